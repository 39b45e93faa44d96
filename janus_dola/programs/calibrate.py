"""The program `calibrate`: every configuration on a validation set. What it does is told by `keys.CalibrateConfig`."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from janus_dola.config import DoLaConfig
from janus_dola.programs.engine import Outcome, Task
from janus_dola.programs.keys import BASELINE, CalibrateConfig
from janus_dola.programs.measures import is_right, summarize, yes_or_no
from janus_dola.programs.options import config_files, read_config
from janus_dola.programs.prompts import Prompt
from janus_dola.programs.results import check_files, result_files
from janus_dola.programs.runs import RUN_KEYS, answer_file

OUTPUT = "outputs/calibrated.yaml"


class Judge(Task):
    """Every configuration answers every question, and scores its choices or its right answer.

    Args:
        named: The configurations, by name.
    """

    scored = True

    def __init__(self, named: Mapping[str, DoLaConfig]) -> None:
        super().__init__(named.values())
        self.names = list(named)

    def line(self, prompt: Prompt, outcome: Outcome) -> dict[str, Any]:
        """Name of the configuration -> "correct", and "text", "said", "scores" or "logprob" where the form has them."""
        results: dict[str, dict[str, Any]] = {}
        for i, name in enumerate(self.names):
            if prompt.form == "choices":
                scores = outcome.logprobs[i]
                results[name] = {"correct": scores.index(max(scores)) == prompt.answer, "scores": scores}
                continue
            text = outcome.answers[i].text
            results[name] = {"correct": is_right(prompt, text), "text": text}
            if prompt.form == "pope":
                results[name]["said"] = yes_or_no(text)
            elif outcome.logprobs:  # not of vLLM
                results[name]["logprob"] = outcome.logprobs[i][0]
        return {"results": results}


def choose_winner(table: dict[str, dict[str, Any]]) -> tuple[str, str, str]:
    """The winner, the best configuration with DoLa on, and why.

    The winner is the most accurate of those whose difference from the baseline is beyond noise, in intervals that hold
    for all configurations at once; else it is the baseline.
    """
    others = [name for name in table if name != BASELINE]
    better = [name for name in others if table[name]["simultaneous_interval"][0] > 0]
    best = max(better or others, key=lambda name: table[name]["accuracy"])
    (low, high), difference = table[best]["simultaneous_interval"], table[best]["difference"]
    found = f"{best} is {difference:+.3f} against off, 95 % interval [{low:+.3f}, {high:+.3f}] for all at once"
    if better:
        return best, best, found
    if difference <= 0:
        return BASELINE, best, "no configuration answers more questions than DoLa off"
    return BASELINE, best, f"{found}: within noise, so DoLa off is the winner"


def two_fold(prompts: Sequence[Prompt], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Chooses on one half (even or odd lines), reports on the other, both ways."""
    folds, correct = [], 0
    for chosen_on, reported_on in ((0, 1), (1, 0)):
        winner, *_ = choose_winner(summarize(prompts[chosen_on::2], results[chosen_on::2]))
        held_out = [bool(result[winner]["correct"]) for result in results[reported_on::2]]
        correct += sum(held_out)
        folds.append({"winner": winner, "accuracy": sum(held_out) / len(held_out)})
    return {"folds": folds, "accuracy": correct / len(results)}


def render(table: dict[str, dict[str, Any]]) -> str:
    """The table as text, and POPE's by split, if its lines name theirs."""
    pope = ("precision", "recall", "f1", "yes_ratio") if "pope" in table[BASELINE] else ()
    lines = [["configuration", "accuracy", "95 %", "vs off", "95 %, all at once", "gained", "lost", "log-prob"]]
    lines[0] += ["precision", "recall", "F1", "yes"][: len(pope)]
    for name, row in table.items():
        (low, high), (down, up) = row["interval"], row["simultaneous_interval"]
        line = [name, f"{row['accuracy']:.3f}", f"[{low:.3f}, {high:.3f}]", f"{row['difference']:+.3f}"]
        line += [f"[{down:+.3f}, {up:+.3f}]", str(row["gained"]), str(row["lost"])]
        line.append("" if row["logprob"] is None else f"{row['logprob']:.3f}")
        lines.append([*line, *(f"{row['pope'][key]:.3f}" for key in pope)])
    splits = table[BASELINE].get("pope_splits", {})
    by_split = [["POPE", *(f"{split}, {measure}" for split in splits for measure in ("accuracy", "F1"))]]
    for name, row in table.items() if splits else ():
        by_split.append(
            [name, *(f"{row['pope_splits'][split][key]:.3f}" for split in splits for key in ("accuracy", "f1"))]
        )
    return aligned(lines) + ("\n\n" + aligned(by_split) if splits else "")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _judged(results: Mapping[str, Any]) -> bool:
    return all(isinstance(result, dict) and isinstance(result.get("correct"), bool) for result in results.values())


def run(argv: Sequence[str]) -> None:
    config = read_config(CalibrateConfig, argv)
    output = Path(config.output or OUTPUT)
    named, saved = config.configurations(), output.with_suffix(".results.jsonl")
    written = [output, output.with_suffix(".json"), *result_files(saved)]
    read = {"data": [config.data], "config": config_files(argv), "model_path": [config.model_path]}
    check_files({"output": written}, read)
    good, lines = answer_file(config, Judge(named), (*RUN_KEYS, "methods", "alphas"), "data", saved, config.strict)
    prompts = [prompt for prompt in good if "results" in lines[prompt.id]]
    found = [lines[prompt.id]["results"] for prompt in prompts]
    bad_lines = [f"{line['id']}: {line['error']}" for line in lines.values() if "error" in line]
    for bad in bad_lines:
        print(bad, file=sys.stderr)
    if broken := [i for i, results in enumerate(found) if list(results) != list(named) or not _judged(results)]:
        name = prompts[broken[0]].id
        raise ValueError(f"output: the line of {name!r} in {str(saved)!r} is not a result of these configurations")
    if not found:
        raise ValueError(f"data must hold at least one good line, got {len(bad_lines)} bad ones in {config.data!r}")

    table = summarize(prompts, found)
    winner, best, reason = choose_winner(table)
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
    # Where off wins the best configuration's keys stand beside it: the next look is at what was measured here.
    keys = replace(named[best], use_dola_lm=winner != BASELINE)
    # A file's model_path that is a folder is relative to the file.
    path = str(Path(config.model_path).resolve()) if Path(config.model_path).is_dir() else config.model_path
    mine = {"model_path": path, "roles": config.roles} | asdict(keys)
    about = f"# Chosen by janus-dola calibrate on {config.data}: {reason}\n"
    output.write_text(about + OmegaConf.to_yaml(mine), encoding="utf-8")
    print(f"winner: {winner}, written to {output}")
    if Path(path).is_dir():  # of a name on the hub the file is not the user's
        print(f"for every program on this checkpoint: {json.dumps(asdict(keys))} in {path}/generation_config.json")
