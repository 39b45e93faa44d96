"""Chooses method, bucket and alpha on a validation set: janus-dola calibrate [config=FILE] data=FILE [output=FILE].

Every question is answered with DoLa off and with each method and bucket, DoLa with each alpha; the best is written as a
config, unless it is not distinguishable from DoLa off, which is then the winner.

    janus-dola calibrate config=configs/janus_pro_7b.yaml data=val.jsonl alphas=[0.1,0.3] output=mine.yaml
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from omegaconf import OmegaConf

from janus_dola.config import DoLaConfig
from janus_dola.methods import METHODS
from janus_dola.programs.answer import answer_file
from janus_dola.programs.options import read_config
from janus_dola.programs.prompts import ManyConfig, Outcome, Prompt, yes_or_no

BASELINE = "off"
OUTPUT = "outputs/calibrated.yaml"
RESAMPLES = 2000


@dataclass
class CalibrateConfig(ManyConfig):
    """The keys of configs/default.yaml that name a model, and these:

    Attributes:
        data: JSON lines in any of three forms: {"images", "question", "answer"}; {"images", "question", "choices",
            "answer": i}; POPE's {"question_id", "image", "text", "label"}. Without images, a question is text alone.
        output: The winner's config goes there, the table as JSON and the answers as they come beside it; null is
            outputs/calibrated.yaml.
        methods: Those to try. DeCo and SLED have the strength and the k of their papers.
        alphas: Values of DoLa's alpha to try.
        strict: Whether a bad line stops the run.
        two_fold: Whether to choose on one half and report on the other as well, both ways, as the paper does.
    """

    data: str = ""
    output: str | None = None
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    alphas: list[float] = field(default_factory=lambda: [0.1])
    strict: bool = False
    two_fold: bool = False

    SCORED: ClassVar = True
    SETTINGS: ClassVar = (*ManyConfig.SETTINGS, "methods", "alphas")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("data must name a file of JSON lines, got ''")
        if not self.alphas:
            raise ValueError("alphas must hold at least one value, got []")
        if not self.methods:
            raise ValueError(f"methods must be some of {', '.join(METHODS)}, got []")
        self.configurations()  # checks the values
        if self.output is not None and not self.output.endswith((".yaml", ".yml")):
            raise ValueError(f"output must end in .yaml, got {self.output!r}")

    def configurations(self) -> dict[str, DoLaConfig]:
        """What is compared, by name; the baseline first."""
        named = {BASELINE: DoLaConfig(use_dola_lm=False)}
        for method, bucket_id in product(dict.fromkeys(self.methods), (0, 1, 2)):
            for alpha in self.alphas if method == "dola" else ():
                named[f"bucket {bucket_id}, alpha {alpha:g}"] = DoLaConfig(alpha=alpha, bucket_id=bucket_id)
            if method != "dola":
                named[f"{method}, bucket {bucket_id}"] = DoLaConfig(method=method, bucket_id=bucket_id)
        return named

    def configs(self, prompt: Prompt) -> list[DoLaConfig]:
        return list(self.configurations().values())

    def line(self, prompt: Prompt, outcome: Outcome) -> dict[str, Any]:
        """Name of the configuration -> "correct", and "text", "said", "scores" or "logprob" where the form has them."""
        results: dict[str, dict[str, Any]] = {}
        for i, name in enumerate(self.configurations()):
            if prompt.form == "choices":
                scores = outcome.logprobs[i]
                results[name] = {"correct": scores.index(max(scores)) == prompt.answer, "scores": scores}
                continue
            text = outcome.answers[i]["text"]
            results[name] = {"correct": prompt.is_right(text), "text": text}
            results[name] |= {"said": yes_or_no(text)} if prompt.form == "pope" else {"logprob": outcome.logprobs[i][0]}
        return {"results": results}


def interval(values: np.ndarray) -> list[float]:
    """Bootstrap 95 % interval of the mean of `values` [n]."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return [float(x) for x in np.quantile(values[draws].mean(1), [0.025, 0.975])]


def pope_measures(said: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and the share of "yes", as POPE reports them (arXiv 2305.10355)."""
    yes, true = np.array(said) == "yes", np.array(truth) == "yes"
    hits = (yes & true).sum()
    return {
        "accuracy": float((yes == true).mean()),
        "precision": float(hits / max(yes.sum(), 1)),
        "recall": float(hits / max(true.sum(), 1)),
        "f1": float(2 * hits / max(yes.sum() + true.sum(), 1)),
        "yes_ratio": float(yes.mean()),
    }


def summarise(prompts: Sequence[Prompt], results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The table: for each configuration its accuracy, the difference from the baseline, and what changed.

    Args:
        prompts: The questions.
        results: Of each, name of the configuration -> {"correct"}, and "said" or "logprob" where the form has them.
    """
    baseline = np.array([result[BASELINE]["correct"] for result in results], dtype=float)
    pope = [i for i, prompt in enumerate(prompts) if prompt.form == "pope"]
    table: dict[str, dict[str, Any]] = {}
    for name in results[0]:
        correct = np.array([result[name]["correct"] for result in results], dtype=float)
        logprobs = [result[name]["logprob"] for result in results if "logprob" in result[name]]
        table[name] = {
            "questions": len(correct),
            "accuracy": float(correct.mean()),
            "interval": interval(correct),
            "difference": float((correct - baseline).mean()),
            "difference_interval": interval(correct - baseline),
            "gained": int(((correct == 1) & (baseline == 0)).sum()),
            "lost": int(((correct == 0) & (baseline == 1)).sum()),
            "logprob": float(np.mean(logprobs)) if logprobs else None,
        }
        if pope:
            said, truth = [results[i][name]["said"] for i in pope], [prompts[i].answer for i in pope]
            table[name]["pope"] = pope_measures(said, truth)
    return table


def choose(table: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """The winner, and why: the best, unless its difference from the baseline is within noise."""
    best = max(table, key=lambda name: table[name]["accuracy"])  # the first of equals: the baseline, if it is one
    if best == BASELINE:
        return BASELINE, "no configuration answers more questions than DoLa off"
    low, high = table[best]["difference_interval"]
    found = f"{best} is {table[best]['difference']:+.3f} against off, 95 % interval [{low:+.3f}, {high:+.3f}]"
    if low <= 0:
        return BASELINE, f"{found}: within noise, so DoLa off is the winner"
    return best, found


def two_fold(prompts: Sequence[Prompt], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Chooses on one half (even or odd lines), reports on the other, both ways."""
    folds, correct = [], 0
    for chosen_on, reported_on in ((0, 1), (1, 0)):
        winner, _ = choose(summarise(prompts[chosen_on::2], results[chosen_on::2]))
        held_out = [bool(result[winner]["correct"]) for result in results[reported_on::2]]
        correct += sum(held_out)
        folds.append({"winner": winner, "accuracy": sum(held_out) / len(held_out)})
    return {"folds": folds, "accuracy": correct / len(results)}


def render(table: dict[str, dict[str, Any]]) -> str:
    """The table as text."""
    pope = ("precision", "recall", "f1", "yes_ratio") if "pope" in table[BASELINE] else ()
    lines = [["configuration", "accuracy", "95 %", "vs off", "95 %", "gained", "lost", "log-prob"]]
    lines[0] += ["precision", "recall", "F1", "yes"][: len(pope)]
    for name, row in table.items():
        (low, high), (down, up) = row["interval"], row["difference_interval"]
        line = [name, f"{row['accuracy']:.3f}", f"[{low:.3f}, {high:.3f}]", f"{row['difference']:+.3f}"]
        line += [f"[{down:+.3f}, {up:+.3f}]", str(row["gained"]), str(row["lost"])]
        line.append("" if row["logprob"] is None else f"{row['logprob']:.3f}")
        lines.append([*line, *(f"{row['pope'][key]:.3f}" for key in pope)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)) for line in lines)


def run(argv: Sequence[str]) -> None:
    config = read_config(CalibrateConfig, argv)
    output = Path(config.output or OUTPUT)
    good, lines = answer_file(config, "data", output.with_suffix(".results.jsonl"), config.strict)
    prompts = [prompt for prompt in good if "results" in lines[prompt.id]]
    found = [lines[prompt.id]["results"] for prompt in prompts]
    bad_lines = [f"{line['id']}: {line['error']}" for line in lines.values() if "error" in line]
    for bad in bad_lines:
        print(bad, file=sys.stderr)
    if not found:
        raise ValueError(f"data must hold at least one good line, got {len(bad_lines)} bad ones in {config.data!r}")

    table = summarise(prompts, found)
    winner, reason = choose(table)
    report: dict[str, Any] = {"table": table, "winner": winner, "reason": reason, "bad_lines": bad_lines}
    print(render(table))
    print(f"\n{reason}")
    if config.two_fold:
        if len(found) < 2:
            raise ValueError(f"two_fold must have at least two questions, got {len(found)}")
        report["two_fold"] = folds = two_fold(prompts, found)
        chosen = " and ".join(fold["winner"] for fold in folds["folds"])
        print(f"two-fold: {folds['accuracy']:.3f} with the configuration chosen on the other half ({chosen})")
    output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    mine = {"model_path": config.model_path, "roles": config.roles} | asdict(config.configurations()[winner])
    about = f"# Chosen by janus-dola calibrate on {config.data}: {reason}\n"
    output.write_text(about + OmegaConf.to_yaml(mine), encoding="utf-8")
    print(f"winner: {winner}, written to {output}")
