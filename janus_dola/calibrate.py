"""Chooses bucket and alpha on a validation set: python -m janus_dola.calibrate [config=FILE] data=FILE [output=FILE].

Every question is answered with DoLa off and with each bucket and alpha; the best is written as a config, unless it is
not distinguishable from DoLa off, which is then the winner.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from janus_dola.cli import (
    ModelConfig,
    build_conversation,
    check_generation,
    check_settings,
    load_model,
    load_processor,
    main,
    read_config,
)
from janus_dola.config import DoLaConfig
from janus_dola.wrapper import DoLaJanusWrapper

BASELINE = "off"
OUTPUT = "outputs/calibrated.yaml"
RESAMPLES = 2000
# `images` of the POPE form are named by file; the other forms name whole paths.
FORMS = {"choices": {"question", "choices", "answer"}, "pope": {"text", "label"}, "answer": {"question", "answer"}}


@dataclass
class CalibrateConfig(ModelConfig):
    """The keys of configs/default.yaml that name a model, and these:

    Attributes:
        data: JSON lines in any of three forms: {"images", "question", "answer"}; {"images", "question", "choices",
            "answer": i}; POPE's {"question_id", "image", "text", "label"}. Without images, a question is text alone.
        image_root: Folder of POPE's images.
        output: The winner's config goes there, the table as JSON and the answers as they come beside it; null is
            `OUTPUT`.
        alphas: Values of alpha to try.
        strict: Whether a bad line stops the run.
        two_fold: Whether to choose on one half and report on the other as well, both ways, as the paper does.
    """

    data: str = ""
    image_root: str = "."
    output: str | None = None
    alphas: list[float] = field(default_factory=lambda: [0.1])
    strict: bool = False
    two_fold: bool = False
    # keys of configs/default.yaml that mean nothing here, so that the file can be read
    images: Any = None
    question: Any = None
    conversation: Any = None
    compare: Any = None
    stream: Any = None
    trace: Any = None
    prompts: Any = None
    batch_size: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("data must name a file of JSON lines, got ''")
        if not self.alphas:
            raise ValueError("alphas must hold at least one value, got []")
        self.configurations()  # checks the values
        if self.output is not None and not self.output.endswith((".yaml", ".yml")):
            raise ValueError(f"output must end in .yaml, got {self.output!r}")

    def configurations(self) -> dict[str, DoLaConfig]:
        """What is compared, by name; the baseline first."""
        named = {BASELINE: DoLaConfig(use_dola_lm=False)}
        for bucket_id in (0, 1, 2):
            for alpha in self.alphas:
                named[f"bucket {bucket_id}, alpha {alpha:g}"] = DoLaConfig(alpha=alpha, bucket_id=bucket_id)
        return named


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces, as SQuAD compares answers."""
    text = re.sub(r"[^\w\s]", " ", text.lower())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def yes_or_no(text: str) -> str:
    """What an answer to a POPE question says, as the benchmark reads it: "no" if it says no or not, else "yes"."""
    words = re.sub(r"[.,]", " ", text.lower()).split()
    return "no" if {"no", "not"} & set(words) else "yes"


def parse_line(line: str, image_root: str) -> dict[str, Any]:
    """A line of the data as {"form", "question", "images", "answer", "choices"}.

    Raises:
        ValueError: It is none of the three forms.
    """
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    form = next((form for form, keys in FORMS.items() if isinstance(given, dict) and keys <= given.keys()), None)
    if form is None:
        raise ValueError(f"none of the forms {[sorted(keys) for keys in FORMS.values()]}, got {line.strip()[:80]!r}")
    if form == "pope":
        if str(given["label"]).lower() not in ("yes", "no"):
            raise ValueError(f"label must be yes or no, got {given['label']!r}")
        images = [os.path.join(image_root, given["image"])] if given.get("image") else []
        return {"form": form, "question": given["text"], "images": images, "answer": str(given["label"]).lower()}
    question = {name: given.get(name) for name in ("question", "answer")} | {"images": given.get("images") or []}
    if form == "choices":
        choices, answer = given["choices"], given["answer"]
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise ValueError(f"choices must be a list of at least two texts, got {choices!r}")
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(f"answer must be the number of a choice, 0 to {len(choices) - 1}, got {answer!r}")
        return question | {"form": form, "choices": choices}
    if not isinstance(given["answer"], str) or not given["answer"].strip():
        raise ValueError(f"answer must be a text, got {given['answer']!r}")
    return question | {"form": form}


class Judge:
    """Asks one model one question under all configurations."""

    def __init__(self, model: DoLaJanusWrapper, processor: Any, config: CalibrateConfig) -> None:
        self.model, self.processor, self.config = model, processor, config

    @torch.inference_mode()
    def __call__(
        self, question: dict[str, Any], turns: list[dict[str, Any]], images: list[Any]
    ) -> dict[str, dict[str, Any]]:
        """Name of the configuration -> "correct", and "text", "said" or "logprob" where the form has them."""
        inputs = self.processor(conversations=turns, images=images).to(self.model.device, self.model.dtype)
        embeds, mask = self.model.prepare_inputs_embeds(**inputs), inputs.attention_mask
        named = self.config.configurations()
        results: dict[str, dict[str, Any]] = {name: {} for name in named}
        if question["form"] == "choices":
            scores = self._score(embeds, mask, question["choices"], list(named.values()))  # [configs, choices]
            for name, row in zip(named, scores, strict=True):
                results[name] = {"correct": int(row.argmax()) == question["answer"], "scores": row.tolist()}
            return results
        for name, dola in named.items():
            self.model.config = dola
            torch.manual_seed(self.config.seed)
            tokenizer = self.processor.tokenizer
            eos = tokenizer.eos_token_id
            ids = self.model.generate(
                **({"inputs_embeds": embeds, "attention_mask": mask, "pad_token_id": eos, "eos_token_id": eos}
                   | self.config.generation)
            )  # fmt: skip
            text = tokenizer.decode(ids[0], skip_special_tokens=True).strip()
            if question["form"] == "pope":
                results[name] = {
                    "said": yes_or_no(text),
                    "correct": yes_or_no(text) == question["answer"],
                    "text": text,
                }
            else:
                results[name] = {"correct": normalise(text) == normalise(question["answer"]), "text": text}
        if question["form"] == "answer":
            means = self._score(embeds, mask, [question["answer"]], list(named.values()))[:, 0]
            for name, mean in zip(named, means.tolist(), strict=True):
                results[name]["logprob"] = mean
        return results

    def _score(self, embeds: torch.Tensor, mask: torch.Tensor, texts: list[str], configs: list[DoLaConfig]) -> Any:
        """Mean log-probability of each text's tokens after the prompt, [configs, texts]."""
        encoded = [self.processor.tokenizer.encode(" " + text, add_special_tokens=False) for text in texts]
        T = max(map(len, encoded))
        ids = torch.tensor([row + [0] * (T - len(row)) for row in encoded], device=embeds.device)
        known = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in encoded], device=embeds.device)
        scores = self.model.score(
            inputs_embeds=embeds,
            attention_mask=mask,
            continuation_ids=ids,
            continuation_mask=known,
            configs=configs,
        )
        return (scores.sum(-1) / known.sum(-1)).cpu()


def interval(values: np.ndarray) -> list[float]:
    """Bootstrap 95 % interval of the mean of `values` [n]."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return [float(x) for x in np.quantile(values[draws].mean(1), [0.025, 0.975])]


def pope_measures(said: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and the share of "yes", as POPE reports them (arXiv 2305.10355)."""
    pairs = list(zip(said, truth, strict=True))
    hits = sum(pair == ("yes", "yes") for pair in pairs)
    yes, true = sum(s == "yes" for s in said), sum(t == "yes" for t in truth)
    precision, recall = hits / yes if yes else 0.0, hits / true if true else 0.0
    return {
        "accuracy": sum(s == t for s, t in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": yes / len(pairs),
    }


def summarise(questions: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The table: for each configuration its accuracy, the difference from the baseline, and what changed.

    Args:
        questions: As `parse_line` gives them.
        results: As `Judge` gives them, one for each question.
    """
    baseline = np.array([result[BASELINE]["correct"] for result in results], dtype=float)
    pope = [i for i, question in enumerate(questions) if question["form"] == "pope"]
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
            said, truth = [results[i][name]["said"] for i in pope], [questions[i]["answer"] for i in pope]
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


def two_fold(questions: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Chooses on one half (even or odd lines), reports on the other, both ways."""
    folds, correct = [], 0
    for chosen_on, reported_on in ((0, 1), (1, 0)):
        winner, _ = choose(summarise(questions[chosen_on::2], results[chosen_on::2]))
        held_out = [bool(result[winner]["correct"]) for result in results[reported_on::2]]
        correct += sum(held_out)
        folds.append({"winner": winner, "accuracy": sum(held_out) / len(held_out)})
    return {"folds": folds, "accuracy": correct / len(results)}


def render(table: dict[str, dict[str, Any]]) -> str:
    """The table as text."""
    has_pope = any("pope" in row for row in table.values())
    head = ["configuration", "accuracy", "95 %", "vs off", "95 %", "gained", "lost", "log-prob"]
    lines = [head + (["precision", "recall", "F1", "yes"] if has_pope else [])]
    for name, row in table.items():
        (low, high), (down, up) = row["interval"], row["difference_interval"]
        line = [name, f"{row['accuracy']:.3f}", f"[{low:.3f}, {high:.3f}]", f"{row['difference']:+.3f}"]
        line += [f"[{down:+.3f}, {up:+.3f}]", str(row["gained"]), str(row["lost"])]
        line.append("" if row["logprob"] is None else f"{row['logprob']:.3f}")
        if has_pope:
            line += [f"{row['pope'][key]:.3f}" for key in ("precision", "recall", "f1", "yes_ratio")]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def read_results(path: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What an earlier run saved, by line number; an unfinished last line is cut off.

    Raises:
        ValueError: It ran with other settings.
    """
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    lines = [json.loads(line) for line in whole.splitlines()]
    if not lines:
        return {}
    check_settings(path, "results", lines[0]["settings"], settings)
    return {line["line"]: line["results"] for line in lines[1:]}


def run(argv: Sequence[str]) -> None:
    from janus.utils.io import load_pil_images

    default = Path("configs/default.yaml")
    config = read_config(CalibrateConfig, argv, default if default.exists() else None)
    check_generation(config.generation)
    try:
        text = Path(config.data).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data must name a file of JSON lines that can be read, got {config.data!r}: {error}"
        ) from error

    keep = ("model_path", "roles", "dtype", "seed", "generation", "data", "image_root", "alphas")
    settings = {name: value for name, value in asdict(config).items() if name in keep}
    settings["data's sha256"] = hashlib.sha256(text.encode()).hexdigest()  # results are kept by line number
    output = Path(config.output or OUTPUT)
    output.parent.mkdir(parents=True, exist_ok=True)
    saved = output.with_suffix(".results.jsonl")
    done = read_results(saved, settings)

    judge: Judge | None = None
    questions, results, bad = [], [], []
    with saved.open("a", encoding="utf-8") as file:
        if not done and saved.stat().st_size == 0:
            file.write(json.dumps({"settings": settings}) + "\n")
        for number, line in enumerate(tqdm(text.splitlines(), desc="questions", disable=None), 1):
            if not line.strip():
                continue
            try:
                question = parse_line(line, config.image_root)
                if number not in done:
                    turns = build_conversation(config.roles, question["question"], question["images"])
                    images = load_pil_images(turns)
                    if judge is None:
                        processor = load_processor(config)
                        judge = Judge(DoLaJanusWrapper(load_model(config), config.dola()), processor, config)
                    done[number] = judge(question, turns, images)
                    file.write(json.dumps({"line": number, "results": done[number]}) + "\n")
                    file.flush()
            except ValueError as error:
                if config.strict or "model_path" in str(error):
                    raise ValueError(f"data, line {number}: {error}") from error
                bad.append(f"line {number}: {error}")
                continue
            questions.append(question)
            results.append(done[number])
    for message in bad:
        print(message, file=sys.stderr)
    if not results:
        raise ValueError(f"data must hold at least one good line, got {len(bad)} bad ones in {config.data!r}")

    table = summarise(questions, results)
    winner, reason = choose(table)
    report: dict[str, Any] = {"table": table, "winner": winner, "reason": reason, "bad_lines": bad}
    print(render(table))
    print(f"\n{reason}")
    if config.two_fold:
        if len(results) < 2:
            raise ValueError(f"two_fold must have at least two questions, got {len(results)}")
        report["two_fold"] = two_fold(questions, results)
        chosen = " and ".join(fold["winner"] for fold in report["two_fold"]["folds"])
        print(
            f"two-fold: {report['two_fold']['accuracy']:.3f} with the configuration chosen on the other half ({chosen})"
        )
    output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    dola = config.configurations()[winner]
    mine = {"model_path": config.model_path, "roles": config.roles} | asdict(dola)
    output.write_text(
        f"# Chosen by janus_dola.calibrate on {config.data}: {reason}\n" + OmegaConf.to_yaml(mine), encoding="utf-8"
    )
    print(f"winner: {winner}, written to {output}")


if __name__ == "__main__":
    main(run)
