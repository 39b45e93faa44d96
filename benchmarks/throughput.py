"""Answers per minute of the programs' engine: python -m benchmarks.throughput [key=value ...], such as shape=1b

Questions about scenes of the demo's test set, in batches, each question under 1, 2 and 8 configurations, as a file of
prompts, `compare` and calibrate ask. The runs interleave with rotating order, as in `benchmarks.latency`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from benchmarks.common import DEMO, SHAPES, Threads, at_least, build, describe_machine, device_of, machine, quartiles
from demo.evaluate import SEED
from demo.scenes import examples
from janus.models.projector import MlpProjector
from janus_dola import DoLaConfig, DoLaJanusWrapper
from janus_dola.programs.checkpoint import load
from janus_dola.programs.engine import Outcome, Task, answer_many
from janus_dola.programs.options import DTYPES, ModelConfig, as_list, read_config, run_program
from janus_dola.programs.prompts import Prompt, build_conversation, prompt_length

ON, OFF = DoLaConfig(), DoLaConfig(use_dola_lm=False)
ASKED = {
    "1, DoLa off": [OFF],
    "1": [ON],
    "2": [ON, OFF],
    "8": [ON, OFF, *(DoLaConfig(alpha=alpha, bucket_id=bucket) for alpha, bucket in product((0.2, 0.3), (0, 1, 2)))],
}


@dataclass
class ThroughputOptions(Threads):
    """The keys of the command line.

    Attributes:
        shape: demo (the demo checkpoint), or 1b, 7b, tiny: its vision tower before that language model of
            `benchmarks.latency`, whose weights are random, so that every answer has all its tokens.
        batch: Questions answered together, a value or a list.
        questions: How many are asked, a multiple of each batch.
        tokens: The most tokens of an answer.
        rounds: Each runs all batches with all numbers of configurations.
        device, dtype, threads: As for `benchmarks.latency`.
    """

    shape: str = "demo"
    batch: Any = field(default_factory=lambda: [1, 8, 32])
    questions: int = 96
    tokens: int = 64
    rounds: int = 3
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.shape not in ("demo", *SHAPES):
            raise ValueError(f"shape must be one of demo, {', '.join(SHAPES)}, got {self.shape!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        self.batch = as_list(self.batch)
        for value in self.batch:
            at_least("batch", value, 1)
        for key, minimum in (("questions", 1), ("tokens", 1), ("rounds", 1)):
            at_least(key, getattr(self, key), minimum)
        if any(self.questions % batch for batch in self.batch):
            raise ValueError(f"questions must be a multiple of each batch, {self.batch}, got {self.questions}")


def load_shape(options: ThroughputOptions) -> tuple[DoLaJanusWrapper, Any]:
    """The wrapped model of a shape, and the demo's processor."""
    device, dtype = device_of(options.shape, options.device, options.dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    wrapper, processor = load(ModelConfig(model_path=str(DEMO), device=str(device), dtype=dtype_name))
    if options.shape != "demo":
        language_model = build(options.shape, device, dtype)
        sizes = wrapper.model.config.aligner_config.params | {"n_embed": language_model.config.hidden_size}
        wrapper.model.language_model, wrapper.model.aligner = language_model, MlpProjector(**sizes).to(device, dtype)
    return wrapper, processor


def questions(processor: Any, count: int) -> list[Prompt]:
    """Prompts of all kinds of question by turns, so that short and long answers are mixed."""
    prompts = []
    for i, (scene, question) in enumerate(examples("test", SEED, count)):
        turns = build_conversation(ModelConfig().roles, question.text, [scene.render()])
        prompts.append(Prompt(i, turns, ON, prompt_length(turns, processor)))
    return prompts


def answer(
    model: DoLaJanusWrapper,
    processor: Any,
    prompts: Sequence[Prompt],
    options: ThroughputOptions,
    batch: int,
    asked: list[DoLaConfig],
) -> tuple[list[tuple[Prompt, Outcome]], float]:
    """What the engine gives for each prompt, the longest first, and answers per minute.

    Raises:
        RuntimeError: A question was not answered.
    """
    generation: dict[str, Any] = {"max_new_tokens": options.tokens, "do_sample": False}
    if options.shape != "demo":
        generation["eos_token_id"] = None
    start = time.perf_counter()
    answered = list(answer_many(model, processor, prompts, Task(asked), generation, batch))
    minutes = (time.perf_counter() - start) / 60
    if problems := [outcome.error for _, outcome in answered if outcome.error is not None]:
        raise RuntimeError(f"batch {batch}, {len(asked)} configurations: {problems[0]}")
    return answered, sum(len(outcome.answers) for _, outcome in answered) / minutes


def run(argv: Sequence[str]) -> None:
    options = read_config(ThroughputOptions, argv, None)
    options.set_threads()
    model, processor = load_shape(options)
    prompts = questions(processor, options.questions)
    cells = list(product(options.batch, ASKED))
    answer(model, processor, prompts[:1], options, 1, ASKED["8"])  # so that the first run is not colder than the others
    found: dict[tuple[int, str], list[float]] = {cell: [] for cell in cells}
    for i in range(options.rounds):
        first = i % len(cells)
        for batch, name in cells[first:] + cells[:first]:
            found[batch, name].append(answer(model, processor, prompts, options, batch, ASKED[name])[1])
    print(f"`{' '.join(['python -m benchmarks.throughput', *argv])}`\n")
    print(f"{describe_machine(machine(model.device))}. Answers a minute by configurations: median (quartiles).\n")
    print(f"| batch | {' | '.join(ASKED)} |\n|--:|{'--:|' * len(ASKED)}")
    for batch in options.batch:
        quarters = (quartiles(found[batch, name]) for name in ASKED)
        print(f"| {batch} | {' | '.join(f'{b:.0f} ({a:.0f} to {c:.0f})' for a, b, c in quarters)} |")


if __name__ == "__main__":
    run_program(run)
