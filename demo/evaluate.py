"""Measures a demo checkpoint on held-out questions, with DoLa off and on, where companions keep company and do not.

    python -m demo.evaluate                        # the tables of the model card, in Markdown
    python -m demo.evaluate --write-card           # and into the model card
    python -m demo.evaluate --no-dola --questions 50

The validation set chooses a bucket and a strength; the test set reports on them. Every difference is paired, question
by question, and comes with its bootstrap 95 % interval.
"""

from __future__ import annotations

import argparse
import platform
import random
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL.Image import Image

from demo.scenes import COLOURS, KINDS, PLACES, SHAPES, Example, Scene, Split, Thing, companion, examples, fogged
from demo.train import Lessons, answer_logits, conversation
from janus.models import VLChatProcessor
from janus_dola import DoLaConfig, DoLaJanusWrapper
from janus_dola.programs.checkpoint import load
from janus_dola.programs.engine import Answer, Task, answer_many
from janus_dola.programs.measures import RESAMPLES, interval, yes_or_no
from janus_dola.programs.options import ModelConfig
from janus_dola.programs.prompts import Prompt

OFF = "off"
DOLA = {
    f"DoLa, bucket {bucket}, α {alpha}": DoLaConfig(bucket_id=bucket, alpha=alpha)
    for bucket in (0, 1, 2)
    for alpha in (0.1, 0.3, 0.5)
}
CONFIGS = {OFF: DoLaConfig(use_dola_lm=False)} | DOLA
ROWS = 96  # of a batch
SEED = 77
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def answers(
    wrapper: DoLaJanusWrapper,
    processor: VLChatProcessor,
    asked: Sequence[tuple[Image, str]],
    configs: Sequence[DoLaConfig],
    lengths: Sequence[int] | None = None,
    repetition_penalty: float = 1.0,
) -> list[list[Answer]]:
    """Greedy answers to questions, each about an image of its own.

    Args:
        wrapper: The model.
        processor: The checkpoint's.
        asked: Image and question.
        configs: The configurations to answer each under.
        lengths: How long the answers should be, so that rows of a batch end at about the same step.
        repetition_penalty: As `generate` has it.

    Returns:
        For each question the answers, one per configuration.

    Raises:
        RuntimeError: A question was not answered, as where memory does not suffice for it alone.
    """
    generation = {"max_new_tokens": 64, "do_sample": False, "repetition_penalty": repetition_penalty}
    batch_size = max(1, ROWS // len(configs))
    prompts = [
        Prompt(i, conversation(question, [image]), configs[0], 0 if lengths is None else lengths[i])
        for i, (image, question) in enumerate(asked)
    ]
    found: dict[str | int, list[Answer]] = {}
    for prompt, outcome in answer_many(wrapper, processor, prompts, Task(configs), generation, batch_size):
        if outcome.error is not None:
            raise RuntimeError(f"question {prompt.id} was not answered: {outcome.error}")
        found[prompt.id] = outcome.answers
    return [found[i] for i in range(len(asked))]


@dataclass
class Answers:
    """What was answered to questions about scenes of a set, of some kinds.

    Attributes:
        pairs: The n scenes and questions.
        answers: Name of a configuration -> n answers.
    """

    pairs: list[Example]
    answers: dict[str, list[Answer]]

    @classmethod
    def ask(
        cls,
        model: DoLaJanusWrapper,
        processor: VLChatProcessor,
        split: Split,
        questions: int,
        configs: Mapping[str, DoLaConfig],
        kinds: Sequence[str] = KINDS,
        habit: bool = False,
        repetition_penalty: float = 1.0,
    ) -> Self:
        """Asks `questions` questions of each kind under each configuration."""
        asked = numbered(split, questions, kinds, habit)
        pairs = [pair for _, pair in asked]
        pictures = [(drawn(scene, i), question.text) for i, (scene, question) in asked]
        lengths = [len(question.answer.split()) for _, question in pairs]
        rows = answers(model, processor, pictures, list(configs.values()), lengths, repetition_penalty)
        return cls(pairs, {name: [row[i] for row in rows] for i, name in enumerate(configs)})

    def of(self, kind: str) -> list[int]:
        """Places of the questions of a kind, "all", or a sort of presence question."""
        kinds = [question.kind for _, question in self.pairs]
        return [i for i, own in enumerate(kinds) if kind in ("all", own, own.split("/")[0])]

    def said(self, name: str, kind: str = "all") -> list[Answer]:
        return [self.answers[name][i] for i in self.of(kind)]

    def exact(self, name: str, kind: str = "all") -> np.ndarray:
        """1 where the answer is exactly right."""
        return np.array(
            [self.answers[name][i].text == self.pairs[i].question.answer for i in self.of(kind)], dtype=float
        )

    def presence(self, name: str, absent: str) -> tuple[np.ndarray, np.ndarray]:
        """Whether yes was said, and was right, about things present and a sort of absent ones: bool [m] each.

        Args:
            absent: "random" or "co-occurring".
        """
        places = self.of("presence/present") + self.of(f"presence/{absent}-absent")
        said = [yes_or_no(self.answers[name][i].text) for i in places]
        return np.array(said) == "yes", np.array([self.pairs[i].question.answer.startswith("Yes") for i in places])

    def described(self, name: str) -> dict[str, np.ndarray]:
        """For each description: how many things it says, how many are right, and how many hallucinated.

        A thing is right if it is in the place where it is said to be, and hallucinated if it is nowhere in the
        picture; "companions" counts the hallucinated that are the companion of something there, "habit" those that
        are the companion of the thing said before.
        """
        counts = []
        for i in self.of("describe"):
            scene = self.pairs[i].scene
            there = {item.place: item.thing for item in scene.items}
            company = [companion(thing) for thing in there.values()]
            said = [(place, Thing(*name.split())) for place, name in SAID.findall(self.answers[name][i].text)]
            before = [None, *(companion(thing) for _, thing in said)]
            made_up = [k for k, (_, thing) in enumerate(said) if thing not in there.values()]
            counts.append(
                {
                    "things": len(there),
                    "said": len(said),
                    "right": sum(there.get(place) == thing for place, thing in said),
                    "hallucinated": len(made_up),
                    "companions": sum(said[k][1] in company for k in made_up),
                    "habit": sum(said[k][1] == before[k] for k in made_up),
                }
            )
        return {key: np.array([count[key] for count in counts], dtype=float) for key in counts[0]}


SAID = re.compile(rf"In the ({'|'.join(PLACES)}) is an? ((?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}))\.")


def numbered(split: Split, questions: int, kinds: Sequence[str], habit: bool = False) -> list[tuple[int, Example]]:
    """`questions` examples of each of some kinds, with their numbers among those of all kinds, which `drawn` takes."""
    asked = enumerate(examples(split, SEED, questions * len(KINDS), habit))
    return [(i, pair) for i, pair in asked if pair.question.kind.split("/")[0] in kinds]


def drawn(scene: Scene, index: int) -> Image:
    return fogged(scene, 192, random.Random(f"fog/{index}"))


@torch.no_grad()
def layers_say(model: Any, processor: VLChatProcessor, count: int) -> list[tuple[float, float]]:
    """For each layer the mean probability of the absent companion's color, and of the color that is there.

    It is taken in the right description of test scenes, at the color of each thing that is not the companion of the
    thing before, and not of its companion's color.
    """
    lessons = Lessons(processor)
    words = processor.tokenizer
    asked = numbered("test", count, ["describe"])
    N = len(model.language_model.model.layers)
    rows = []
    for start in range(0, len(asked), 50):
        part = [pair for _, pair in asked[start : start + 50]]
        pictures = [drawn(scene, i) for i, (scene, _) in asked[start : start + 50]]
        batch = lessons.batch([(scene, [question]) for scene, question in part], pictures)
        q = answer_logits(model, batch, exits=range(1, N)).softmax(-1).roll(-1, 0)  # [N, A, V], the last layer last
        labels = batch.labels[batch.labels != -100].tolist()
        colours = iter([k for k, label in enumerate(labels) if words.decode([label]).strip() in COLOURS])
        for scene, _ in part:
            things = [item.thing for item in scene.items]
            for before, thing in zip([None, *things], things, strict=False):
                k = next(colours)
                if before is not None and (expected := companion(before)).colour != thing.colour:
                    wrong, right = (
                        words.encode(f" {t.colour}", add_special_tokens=False)[0] for t in (expected, thing)
                    )
                    rows.append(q[:, k, [wrong, right]])  # [N, 2]
    return [(float(a), float(b)) for a, b in torch.stack(rows).mean(0)]


def percent(values: np.ndarray) -> str:
    return f"{100 * values.mean():.1f}"


def points(values: np.ndarray) -> str:
    """Mean of paired differences and its interval, in percentage points."""
    return signed(100 * values, 1)


def signed(values: np.ndarray, digits: int = 3) -> str:
    low, high = interval(values)
    return f"{values.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def f1(yes: np.ndarray, true: np.ndarray) -> np.ndarray:
    """F1 of yes in percent, over the last axis: bool [..., m] each."""
    return 200 * (yes & true).sum(-1) / np.maximum(yes.sum(-1) + true.sum(-1), 1)


def f1_difference(yes: np.ndarray, off: np.ndarray, true: np.ndarray) -> str:
    """The same questions are drawn for both: bool [m] each."""
    draws = np.random.default_rng(0).integers(0, len(true), (RESAMPLES, len(true)))
    low, high = np.quantile(f1(yes[draws], true[draws]) - f1(off[draws], true[draws]), [0.025, 0.975])
    return f"{f1(yes, true) - f1(off, true):+.1f} [{low:+.1f}, {high:+.1f}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] + ["--:"] * (len(head) - 1), *rows)), ""]


COUNTED = ("right", "hallucinated", "companions", "habit")


def descriptions(found: Answers, names: Sequence[str], best: Sequence[str] = ()) -> list[str]:
    """A table of descriptions, DoLa off first: means over them, and paired differences."""
    off = found.described(OFF)
    share = 100 * off["hallucinated"].sum() / off["said"].sum()
    rows = [[OFF, percent(found.exact(OFF, "describe")), *(f"{off[key].mean():.3f}" for key in COUNTED)]]
    rows[0][3] += f" ({share:.1f} %)"
    for name in names:
        counts = found.described(name)
        cells = [points(found.exact(name, "describe") - found.exact(OFF, "describe"))]
        cells += [signed(counts[key] - off[key]) for key in COUNTED]
        rows += [[f"**{name}**" if name in best else name, *cells]]
    return table(["", "exact, %", "right", "hallucinated", "companion", "by habit"], rows)


def tables(model_path: str, questions: int, validation_questions: int, dola: bool) -> str:
    """The tables of the model card."""
    wrapper, processor = load(ModelConfig(model_path=model_path, device="cpu", dtype="float32"))
    asked = partial(Answers.ask, wrapper, processor)
    configs = CONFIGS if dola else {OFF: CONFIGS[OFF]}
    others, best = [name for name in configs if name != OFF], []
    lines = [
        "Of descriptions there are means, and differences from DoLa off. Right: things that are in the place where\n"
        "they are said to be. Hallucinated: things that are nowhere in the picture (in percent of those said);\n"
        "companion: of those, what keeps company with something there; by habit: what keeps company with the thing\n"
        "said before.\n"
    ]
    if dola:
        validation = asked("validation", validation_questions, configs, ["describe"])
        best = [max(others, key=lambda name: validation.described(name)["right"].mean())]
        lines += [
            f"**{validation_questions} descriptions of the validation set**; in bold what has most things right.",
            *descriptions(validation, others, best),
        ]
    long = asked("test", questions, configs, ["describe", "presence"])
    lines += [f"**{questions} descriptions of the test set**:", *descriptions(long, others, best)]

    lines += [
        f"**{questions} questions of presence of the test set**: a third about something there, a third about\n"
        "something absent at random, a third about an absent companion; POPE's measures in percent, over the first\n"
        "third and one of the others. Yes: how often it is said."
    ]
    rows = []
    for name in (OFF, *others):
        row = [f"**{name}**" if name in best else name]
        for absent in ("random", "co-occurring"):
            (yes, true), (off, _) = long.presence(name, absent), long.presence(OFF, absent)
            if name == OFF:
                row += [percent(yes == true), f"{f1(yes, true):.1f}", percent(yes)]
            else:
                row += [
                    points((yes == true) * 1.0 - (off == true)),
                    f1_difference(yes, off, true),
                    points(yes * 1.0 - off),
                ]
        rows += [row]
    lines += table(
        ["", *(f"{name}, {absent}" for absent in ("random", "companions") for name in ("accuracy", "F1", "yes"))], rows
    )

    chosen = {name: configs[name] for name in (OFF, *best)}
    short = asked("test", questions, chosen, [kind for kind in KINDS if kind not in ("describe", "presence")])
    habit = asked("test", questions, {OFF: CONFIGS[OFF]}, habit=True)
    lines += [
        f"**Exact answers** in percent, {questions} questions of a kind, in the world with the habit and in that of\n"
        "the test set:"
    ]
    rows = []
    for kind in (*sorted(KINDS), "presence/present", "presence/random-absent", "presence/co-occurring-absent"):
        found = short if short.of(kind) else long
        cells = [points(found.exact(name, kind) - found.exact(OFF, kind)) for name in best]
        rows += [[kind, percent(habit.exact(OFF, kind)), percent(found.exact(OFF, kind)), *cells]]
    rows += [["all", percent(habit.exact(OFF)), percent(np.concatenate([short.exact(OFF), long.exact(OFF)]))]]
    rows[-1] += [
        points(np.concatenate([found.exact(name) - found.exact(OFF) for found in (short, long)])) for name in best
    ]
    lines += table(["", "off, with the habit", "off", *best], rows)

    penalised = asked("test", questions, chosen, ["describe"], repetition_penalty=1.2)
    penalised.answers = {f"{name}, penalty": answers for name, answers in penalised.answers.items()} | {
        OFF: long.said(OFF, "describe")
    }
    lines += [
        f"**With a repetition penalty of 1.2**, the same {questions} descriptions against those of DoLa off without it:"
    ]
    lines += descriptions(penalised, [name for name in penalised.answers if name != OFF])

    said = layers_say(wrapper.model, processor, questions)
    lines += [
        "**What each layer says** at the colour of a thing that is not the companion of the thing before it, in the\n"
        "right descriptions of the test set: mean probability of the companion's colour, and of the right one."
    ]
    rows = [[str(layer), f"{wrong:.2f}", f"{right:.2f}"] for layer, (wrong, right) in enumerate(said, 1)]
    lines += table(["layer", "companion", "what is there"], rows)
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, float32"
    lines += [f"Measured with `python -m demo.evaluate` on {date.today()} ({machine})."]
    return "\n".join(lines)


def write_card(card: Path, text: str) -> None:
    """Puts the tables where the model card has the marks.

    Raises:
        ValueError: The card lacks the marks.
    """
    before, begin, rest = card.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{card} must hold the lines {BEGIN} and {END}")
    card.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description="Measures a demo checkpoint.")
    here = Path(__file__).parent
    parser.add_argument("--model", default=str(here / "checkpoint"), help="checkpoint folder (%(default)s)")
    parser.add_argument("--questions", type=int, default=1500, help="test questions of each kind (%(default)s)")
    parser.add_argument("--validation", type=int, default=300, help="validation questions of each kind (%(default)s)")
    parser.add_argument("--no-dola", action="store_true", help="measure with DoLa off alone")
    parser.add_argument("--write-card", action="store_true", help="put the tables into the folder's README.md")
    options = parser.parse_args(None if arguments is None else list(arguments))
    for name in ("questions", "validation"):
        if (value := getattr(options, name)) < 3:
            parser.error(f"argument --{name}: must be at least 3, so that each sort is asked, got {value}")
    if not (Path(options.model) / "config.json").is_file():
        parser.error(
            f"argument --model: {options.model} is not a checkpoint folder; make one with python -m demo.train"
        )
    text = tables(options.model, options.questions, options.validation, not options.no_dola)
    print(text)
    if options.write_card:
        try:
            write_card(Path(options.model) / "README.md", text)
        except (OSError, ValueError) as error:
            parser.error(f"argument --write-card: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
