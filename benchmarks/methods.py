"""All methods on demo checkpoints: python -m benchmarks.methods models=[FOLDER,...] [key=value ...]

DoLa, DeCo, SLED and Confident, each by its defaults and with the bucket that validation questions choose, on
descriptions, on questions of presence and on all kinds of question of the demo's test set. Differences from DoLa off
are paired, question by question, and the second interval holds for all rows of a table at once.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import DEMO, Threads, at_least, describe_machine, machine
from demo.evaluate import OFF, Answers, numbered, percent, points, signed
from demo.evaluate import table as markdown
from demo.scenes import KINDS, Split
from janus_dola import DoLaConfig
from janus_dola.config import METHODS
from janus_dola.programs.checkpoint import load
from janus_dola.programs.engine import Answer
from janus_dola.programs.measures import RESAMPLES, simultaneous_intervals
from janus_dola.programs.options import ModelConfig, read_config, run_program

NUM_LAYERS = 30  # of demo checkpoints
TASKS = {"descriptions": "describe", "presence": "presence", "all kinds": "all"}


@dataclass
class MethodsOptions(Threads):
    """The keys of the command line.

    Attributes:
        models: Folders of demo checkpoints.
        methods: Which methods.
        tasks: Of descriptions, presence and all kinds.
        questions: Test questions of each kind.
        validation: Validation questions of each kind, which choose the bucket.
        out: Writes OUT/MODEL-SPLIT-COUNT.json, which a later run reads in place of asking again, and prints the tables.
        threads: PyTorch threads; 0 leaves PyTorch's own number.
    """

    models: list[str] = field(default_factory=lambda: [str(DEMO)])
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    questions: int = 600
    validation: int = 300
    out: str = "outputs/methods"

    def __post_init__(self) -> None:
        at_least("questions", self.questions, 3)
        at_least("validation", self.validation, 3)
        for key, allowed in (("methods", METHODS), ("tasks", TASKS)):
            if not set(given := getattr(self, key)) <= set(allowed):
                raise ValueError(f"{key} must be some of {', '.join(allowed)}, got {given}")


def configurations(num_layers: int) -> dict[str, dict[str, DoLaConfig]]:
    """Method -> its configurations by name, the default first; SLED's is that of its code, which reads all layers."""
    named = {
        method: {f"{method}, bucket {i}": DoLaConfig(method=method, bucket_id=i) for i in (2, 1, 0)}
        for method in ("dola", "deco", "sled")
    }
    every = DoLaConfig(method="sled", candidate_layers=list(range(1, num_layers)))
    named["sled"] = {"sled, all layers": every} | named["sled"]
    return named | {"confident": {"confident": DoLaConfig(method="confident")}}


def ask(options: MethodsOptions, folder: str) -> dict[Split, Answers]:
    """What a checkpoint answers under each configuration, to the questions of both sets."""
    wrapper, processor = load(ModelConfig(model_path=folder, device="cpu", dtype="float32"))
    named, configs = {OFF: DoLaConfig(use_dola_lm=False)}, configurations(NUM_LAYERS)
    for method in options.methods:
        named |= configs[method]
    kinds = KINDS if "all kinds" in options.tasks else [TASKS[task] for task in options.tasks]
    found: dict[Split, Answers] = {}
    counts: dict[Split, int] = {"validation": options.validation, "test": options.questions}
    for split, count in counts.items():
        file = Path(options.out) / f"{Path(folder).resolve().name}-{split}-{count}.json"
        if not file.exists():
            asked = Answers.ask(wrapper, processor, split, count, named, kinds)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(asked.answers) + "\n", encoding="utf-8")
        kept = json.loads(file.read_text(encoding="utf-8"))
        pairs = [pair for _, pair in numbered(split, count, kinds)]
        found[split] = Answers(pairs, {name: [Answer(*row) for row in rows] for name, rows in kept.items()})
    return found


def shown(validation: Answers, kind: str, methods: dict[str, list[str]]) -> dict[str, str]:
    """The rows of a table, name -> why it is there: each method's default, and what has most right in validation."""
    rows: dict[str, str] = {}
    for names in methods.values():
        best = max(names, key=lambda name: validation.exact(name, kind).mean())
        rows[names[0]] = "default"
        rows[best] = "default, chosen" if best == names[0] else "chosen"
    return rows


def changes(said: Sequence[Answer]) -> tuple[float, float]:
    """The share of tokens that q_N alone would not have chosen, and the median JSD(q_N ‖ q_M) at them."""
    there = [answer.jsd[t] for answer in said if answer.jsd and answer.changed for t in answer.changed]
    return len(there) / sum(answer.tokens for answer in said), float(np.median(there)) if there else math.nan


def table(found: Mapping[Split, Answers], kind: str, methods: dict[str, list[str]]) -> list[str]:
    """A task's table in Markdown: what the test set says of each row of `shown`."""
    rows, test = shown(found["validation"], kind, methods), found["test"]
    off = test.exact(OFF, kind)
    differences = np.stack([test.exact(name, kind) - off for name in rows])
    intervals = [f"[{100 * low:+.1f}, {100 * high:+.1f}]" for low, high in simultaneous_intervals(differences)]
    head = ["", "", "exact, %", "all at once", "changed, %", "JSD there", "tokens"]
    cells = [[OFF, "", percent(off), "", "", "", ""]]
    for (name, why), difference, both in zip(rows.items(), differences, intervals, strict=True):
        share, jsd = changes(test.said(name, kind))
        cells.append([name, why, points(difference), both, f"{100 * share:.1f}", f"{jsd:.3f}", ""])
    for row in cells:
        row[6] = f"{np.mean([answer.tokens for answer in test.said(row[0], kind)]):.1f}"
    if kind == "describe":
        head += ["right", "hallucinated", "right of said, %"]
        base = test.described(OFF)
        for row in cells:
            own = test.described(row[0])
            for key in ("right", "hallucinated"):
                row += [f"{own[key].mean():.3f}" if row[0] == OFF else signed(own[key] - base[key])]
            row += [f"{100 * own['right'].sum() / own['said'].sum():.1f}"]
    return markdown(head, cells)


def foretold(test: Answers, kind: str, names: Sequence[str]) -> tuple[float, list[float]]:
    """Whether the JSD tells a gain from a loss: its AUC, and the bootstrap 95 % interval.

    The AUC is the chance that JSD(q_N ‖ q_M), at the first token that is changed, is greater in an answer that became
    right than in one that became wrong; 0.5 tells nothing.
    """
    off = test.exact(OFF, kind)
    gained: list[float] = []
    lost: list[float] = []
    for name in names:
        for before, after, answer in zip(off, test.exact(name, kind), test.said(name, kind), strict=True):
            if before != after and answer.jsd and answer.changed:
                (gained if after else lost).append(answer.jsd[answer.changed[0]])
    pairs = np.sign(np.subtract.outer(gained, lost)) / 2 + 0.5  # [gained, lost]
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, n, (RESAMPLES, n)) for n in pairs.shape]
    means = [pairs[np.ix_(rows, columns)].mean() for rows, columns in zip(*draws, strict=True)]
    return float(pairs.mean()), np.quantile(means, [0.025, 0.975]).tolist()


def run(argv: Sequence[str]) -> None:
    options = read_config(MethodsOptions, argv, None)
    options.set_threads()
    print(f"`{' '.join(['python -m benchmarks.methods', *argv])}`\n\n{describe_machine(machine(torch.device('cpu')))}")
    for folder in options.models:
        found = ask(options, folder)
        methods = {method: list(configurations(NUM_LAYERS)[method]) for method in options.methods}
        for task in options.tasks:
            print(f"\n**{folder}, {task}**")
            print("\n".join(table(found, TASKS[task], methods)))
            if "dola" in methods:
                auc, (low, high) = foretold(found["test"], TASKS[task], methods["dola"])
                print(f"JSD as a sign of a gain, all buckets of DoLa: AUC {auc:.2f} [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    run_program(run)
