"""All methods on demo checkpoints: python -m benchmarks.methods models=[FOLDER,...] [key=value ...]

DoLa, DeCo, SLED and Confident, each with its paper's defaults and with the bucket that validation questions choose, on
descriptions, on questions of presence and on all kinds of question of the demo's test set. Differences from DoLa off are
paired, question by question; their intervals hold for all configurations of a table at once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import DEMO, Threads, at_least, describe_machine, machine
from demo.evaluate import OFF, Answers, numbered, points, signed
from demo.scenes import KINDS, Split
from janus_dola import DoLaConfig
from janus_dola.methods import METHODS
from janus_dola.programs.checkpoint import load
from janus_dola.programs.engine import Answer
from janus_dola.programs.measures import simultaneous_intervals
from janus_dola.programs.options import ModelConfig, read_config, run_program

TASKS = {"descriptions": "describe", "presence": "presence", "all kinds": "all"}


@dataclass
class MethodsOptions(Threads):
    """The keys of the command line.

    Attributes:
        models: Folders of demo checkpoints.
        questions: Test questions of each kind.
        validation: Validation questions of each kind, which choose the bucket.
        out: Writes OUT/MODEL-SPLIT.json, which a later run reads in place of asking again, and prints the tables.
        threads: PyTorch threads; 0 leaves PyTorch's own number.
    """

    models: list[str] = field(default_factory=lambda: [str(DEMO)])
    questions: int = 600
    validation: int = 300
    out: str = "outputs/methods"

    def __post_init__(self) -> None:
        at_least("questions", self.questions, 3)
        at_least("validation", self.validation, 3)


def configurations(num_layers: int) -> dict[str, dict[str, DoLaConfig]]:
    """Method -> its configurations by name, that of its paper first."""
    buckets = {
        method: {f"{method}, bucket {i}": DoLaConfig(method=method, bucket_id=i) for i in (2, 1, 0)}
        for method in METHODS
        if method != "confident"
    }
    every = DoLaConfig(method="sled", candidate_layers=list(range(1, num_layers)))
    buckets["sled"] = {"sled, all layers": every} | buckets["sled"]
    return buckets | {"confident": {"confident": DoLaConfig(method="confident")}}


def ask(options: MethodsOptions, folder: str) -> dict[Split, Answers]:
    """What a checkpoint answers under each configuration, to the questions of both sets."""
    wrapper, processor = load(ModelConfig(model_path=folder, device="cpu", dtype="float32"))
    named = {OFF: DoLaConfig(use_dola_lm=False)}
    for own in configurations(wrapper.num_layers).values():
        named |= own
    found: dict[Split, Answers] = {}
    counts: dict[Split, int] = {"validation": options.validation, "test": options.questions}
    for split, count in counts.items():
        file = Path(options.out) / f"{Path(folder).resolve().name}-{split}.json"
        if not file.exists():
            asked = Answers.ask(wrapper, processor, split, count, named)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(asked.answers) + "\n", encoding="utf-8")
        kept = json.loads(file.read_text(encoding="utf-8"))
        pairs = [pair for _, pair in numbered(split, count, KINDS)]
        found[split] = Answers(pairs, {name: [Answer(*row) for row in rows] for name, rows in kept.items()})
    return found


def table(found: dict[Split, Answers], task: str, methods: dict[str, dict[str, DoLaConfig]]) -> list[str]:
    """The rows of a task: each method's default, and what validation chose."""
    kind, test = TASKS[task], found["test"]
    rows: dict[str, str] = {}
    for method, own in methods.items():
        best = max(own, key=lambda name: found["validation"].exact(name, kind).mean())
        rows[next(iter(own))] = method
        rows[best] = (rows.get(best, "") and f"{method}, also chosen") or f"{method}, chosen"
    off = test.exact(OFF, kind)
    differences = np.stack([test.exact(name, kind) - off for name in rows])
    lines = []
    for (name, label), difference, (low, high) in zip(
        rows.items(), differences, simultaneous_intervals(differences), strict=True
    ):
        cells = [name, label, points(difference), f"[{100 * low:+.1f}, {100 * high:+.1f}]"]
        said = test.said(name, kind)
        tokens, changed = sum(a.tokens for a in said), sum(len(a.changed or ()) for a in said)
        cells += [f"{100 * changed / tokens:.1f}", f"{tokens / len(said):.1f}"]
        if kind == "describe":
            ours, base = test.described(name), test.described(OFF)
            cells += [signed(ours[key] - base[key]) for key in ("right", "hallucinated")]
            cells += [f"{ours['right'].sum() / ours['said'].sum():.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def run(argv: Sequence[str]) -> None:
    options = read_config(MethodsOptions, argv, None)
    options.set_threads()
    for folder in options.models:
        found = ask(options, folder)
        for task in TASKS:
            print(folder, task, f"{100 * found['test'].exact(OFF, TASKS[task]).mean():.1f}")
            print("\n".join(table(found, task, configurations(30))))
    print(describe_machine(machine(torch.device("cpu"))))


if __name__ == "__main__":
    run_program(run)
