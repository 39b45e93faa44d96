"""Measures a demo checkpoint on held-out questions: exact greedy answers, by kind of question, with DoLa off and on.

python -m demo.evaluate                        # the tables of the model card, in Markdown
python -m demo.evaluate --write-card           # and into the model card
python -m demo.evaluate --no-dola --questions 200
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from tqdm import tqdm

from demo.scenes import Example, examples
from demo.train import conversation
from janus.models import VLChatProcessor
from janus_dola import DoLaConfig, DoLaJanusWrapper
from janus_dola.programs.checkpoint import load
from janus_dola.programs.options import ModelConfig

ALPHAS = (0.05, 0.1, 0.3)
BUCKETS = (0, 1, 2)
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@torch.no_grad()
def answers(
    wrapper: DoLaJanusWrapper, processor: VLChatProcessor, asked: Sequence[tuple[Image, str]], **arguments: Any
) -> list[str]:
    """Greedy answers to a batch of questions, each about an image of its own.

    Args:
        wrapper: Decodes as its config says.
        processor: The checkpoint's.
        asked: Image and question of each row.
        arguments: More for `generate`.

    Returns:
        The texts, without the space that follows "<|Assistant|>:".
    """
    rows = [processor(conversations=conversation(q), images=[image], force_batchify=False) for image, q in asked]
    batch = processor.batchify(rows)  # type: ignore[arg-type]
    tokens = wrapper.generate(
        inputs_embeds=wrapper.prepare_inputs_embeds(**batch),
        attention_mask=batch.attention_mask,
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        do_sample=False,
        **({"max_new_tokens": 64} | arguments),
    )
    return [text.strip() for text in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def exact(
    wrapper: DoLaJanusWrapper, processor: VLChatProcessor, pairs: Sequence[Example], bar: tqdm | None = None
) -> dict[str, list[bool]]:
    """Whether each answer is exact, by kind of question; a presence question counts under its sort, too."""
    right: dict[str, list[bool]] = defaultdict(list)
    by_length = sorted(pairs, key=lambda pair: len(pair.question.answer))  # rows of a batch end at about the same step
    for start in range(0, len(by_length), 100):
        part = by_length[start : start + 100]
        given = answers(wrapper, processor, [(scene.render(), question.text) for scene, question in part])
        for (_, question), text in zip(part, given, strict=True):
            for kind in {question.kind, question.kind.split("/")[0], "all"}:
                right[kind].append(text == question.answer)
        if bar is not None:
            bar.update(len(part))
    return right


def share(right: Sequence[bool]) -> str:
    return f"{100 * sum(right) / len(right):.1f}"


def tables(model_path: str, questions: int, dola: bool) -> str:
    """The tables of the model card: exact answers with DoLa off, then with each bucket and alpha."""
    loaded, processor = load(ModelConfig(model_path=model_path, device="cpu", dtype="float32"))
    model = loaded.model
    pairs = list(examples("test", 0, questions))
    configurations = list(product(BUCKETS, ALPHAS)) if dola else []
    with tqdm(total=questions * (1 + len(configurations)), unit="question", file=sys.stderr, disable=None) as bar:
        off = exact(DoLaJanusWrapper(model, DoLaConfig(use_dola_lm=False)), processor, pairs, bar)
        measured = {
            (bucket, alpha): exact(
                DoLaJanusWrapper(model, DoLaConfig(alpha=alpha, bucket_id=bucket)), processor, pairs, bar
            )
            for bucket, alpha in configurations
        }
    kinds = sorted(kind for kind in off if "/" not in kind and kind != "all")
    sorts = sorted(kind for kind in off if "/" in kind)
    lines = [f"Exact answers in percent, greedy, {questions} questions about scenes of the test set:", ""]
    lines += ["| kind | questions | exact |", "|---|--:|--:|"]
    lines += [f"| {kind} | {len(off[kind])} | {share(off[kind])} |" for kind in [*kinds, *sorts]]
    lines += [f"| **all** | {questions} | **{share(off['all'])}** |"]
    if measured:
        header = " | ".join(kinds)
        lines += ["", "With DoLa, beside DoLa off:", "", f"| bucket | layers | α | all | {header} |"]
        lines += ["|---|---|--:|--:|" + "--:|" * len(kinds)]
        lines += [f"| off | | | {share(off['all'])} | {' | '.join(share(off[kind]) for kind in kinds)} |"]
        for (bucket, alpha), right in measured.items():
            layers = DoLaConfig(bucket_id=bucket).resolve_layers(len(model.language_model.model.layers))
            cells = " | ".join(share(right[kind]) for kind in kinds)
            lines += [f"| {bucket} | {', '.join(map(str, layers))} | {alpha} | {share(right['all'])} | {cells} |"]
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, float32"
    lines += ["", f"Measured with `python -m demo.evaluate` on {date.today()} ({machine})."]
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
    parser.add_argument("--questions", type=int, default=1000, help="how many test questions (%(default)s)")
    parser.add_argument("--no-dola", action="store_true", help="measure with DoLa off alone")
    parser.add_argument("--write-card", action="store_true", help="put the tables into the folder's README.md")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.questions < 18:
        parser.error(f"argument --questions: must be at least 18, so that each kind is asked, got {options.questions}")
    if not (Path(options.model) / "config.json").is_file():
        parser.error(
            f"argument --model: {options.model} is not a checkpoint folder; make one with python -m demo.train"
        )
    text = tables(options.model, options.questions, not options.no_dola)
    print(text)
    if options.write_card:
        try:
            write_card(Path(options.model) / "README.md", text)
        except (OSError, ValueError) as error:
            parser.error(f"argument --write-card: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
