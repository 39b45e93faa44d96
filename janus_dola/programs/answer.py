"""Asks a Janus model about images, with DoLa on or off: janus-dola [config=FILE] key=value ...

One question:    janus-dola config=configs/janus_pro_7b.yaml image=cat.png question="What is on the sofa?"
Off against on:  janus-dola image=cat.png question="What is on the sofa?" compare=true trace=outputs
Many questions:  janus-dola prompts=FILE.jsonl output=ANSWERS.jsonl compare=true report=REPORT.html
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, TextStreamer

from janus.utils.io import load_pil_images
from janus_dola.call import UNSUPPORTED
from janus_dola.config import DoLaConfig
from janus_dola.exits import generating_model
from janus_dola.programs import checkpoint
from janus_dola.programs.differences import differences
from janus_dola.programs.options import CONFIGS, ModelConfig, as_list, check_generation, first_line, read_config
from janus_dola.programs.prompts import (
    DOLA_KEYS,
    IMAGE_TAG,
    Prompt,
    build_conversation,
    encode_continuations,
    fingerprint,
    read_prompts,
)
from janus_dola.programs.results import Results
from janus_dola.trace import DoLaTrace, answer_lengths
from janus_dola.wrapper import DoLaJanusWrapper

DEMO_IMAGE, DEMO_QUESTION = CONFIGS.parent / "demo" / "images" / "scene.png", "Describe the image."
# Arguments of `generate`, the values that leave them off, and why they cannot be in a batch run.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = UNSUPPORTED | {
    "num_return_sequences": ((None, 1), "each prompt has one answer"),
    "return_dict_in_generate": ((None, False), "an answer is its text"),
    "max_length": ((None,), "it counts the padding, max_new_tokens does not"),
    "min_length": ((None, 0), "it counts the padding, min_new_tokens does not"),
    "exponential_decay_length_penalty": ((None,), "it counts the padding"),
    "max_time": ((None,), "it ends all answers of a batch at once"),
}


@dataclass
class AnswerConfig(ModelConfig):
    """The keys of configs/default.yaml, which says what each is for. image=PATH stands for a single one of images."""

    images: Any = field(default_factory=list)
    image: str | None = None
    question: str | None = None
    conversation: Any = None
    compare: bool = False
    stream: bool = False
    trace: str | None = None
    prompts: str | None = None
    output: str | None = None
    report: str | None = None
    image_root: str = "."
    batch_size: int = 8
    workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        images = self.images if self.image is None else self.image
        self.images = [] if images is None else as_list(images)
        if not all(isinstance(image, str) for image in self.images):
            raise ValueError(f"images must be paths or data URLs, got {images!r}")
        if (self.prompts is None) != (self.output is None):
            raise ValueError(f"prompts and output must be given together, got {self.prompts!r} and {self.output!r}")
        check_report(self.report)
        if self.report is not None and self.prompts is None:
            raise ValueError(f"report must come with prompts and output, got {self.report!r} alone")
        for key in ("question", "images", "conversation", "stream", "trace"):
            if self.prompts is not None and (value := getattr(self, key)):
                raise ValueError(f"prompts and {key} must not both be given, got {self.prompts!r} and {value!r}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        if self.workers and not (find_spec("ray") and find_spec("pyarrow")):
            raise ValueError("workers needs ray: pip install 'janus-dola[ray]'")


def check_report(path: str | None) -> None:
    """Refuses what is not the name of a page, such as the file of prompts, before it is overwritten."""
    if path is not None and not path.endswith(".html"):
        raise ValueError(f"report must end in .html, got {path!r}")


def run(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    config = read_config(AnswerConfig, argv)
    if config.prompts is not None and config.output is not None:
        return answer_file(config, config.prompts, config.output)
    check_generation(config.generation)
    answer_one(config)
    return 0


# The engine.


class NaNWatch(LogitsProcessor):
    """Changes nothing: notes which rows' logits were NaN, as in float16 that overflowed, without waiting for them."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.isnan().any(-1))  # [rows]
        return scores

    def errors(self, prompts: int) -> list[str | None]:
        """For each prompt what went wrong, in its first such step."""
        steps = torch.stack(self.steps).unflatten(1, (prompts, -1)).any(-1).cpu()  # [T, prompts]
        return [
            f"logits are NaN at token {int(column.int().argmax()) + 1}; float16? try bfloat16" if column.any() else None
            for column in steps.T
        ]


@dataclass
class Outcome:
    """What became of a prompt.

    Attributes:
        error: Why there is no answer, or None.
        answers: For each of the prompt's configurations {"text", "tokens", "layers"}: the answer, how many tokens it
            took up to and with the end of sequence, and the layer M of each, None without DoLa.
        logprobs: Mean log-probabilities of the tokens of each choice, or of the right answer, [configs, choices].
    """

    error: str | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)


def answer_many(
    model: DoLaJanusWrapper,
    processor: Any,
    prompts: Sequence[Prompt],
    configs: Callable[[Prompt], Sequence[DoLaConfig]],
    generation: Mapping[str, Any],
    *,
    batch_size: int = 8,
    seed: int = 0,
    done: Collection[str | int] = (),
    scored: bool = False,
) -> Iterator[tuple[Prompt, Outcome]]:
    """Answers prompts x configurations in batches, with a progress bar.

    The prompts of a batch are of like lengths, the longest first: where memory does not suffice, it shows at once. Rows
    have configurations of their own; an image is encoded once, whatever the number of configurations.

    Args:
        model: The wrapped model, left as it is: each row brings its configuration.
        processor: The checkpoint's.
        prompts: As `read_prompts` gives them.
        configs: The configurations to answer a prompt under.
        generation: Arguments of `generate`. With `do_sample` each row is a batch of its own with a seed of its prompt's
            own, so that its answer does not depend on the others.
        batch_size: Prompts at a time. When memory runs out it is halved, for the rest of the run.
        seed: Of sampling.
        done: Ids of prompts that need no answer. They keep their places: so an answer's neighbours, and its rounding,
            are the same in a run that was killed.
        scored: Whether to score choices, in place of an answer, and right answers, beside it.

    Raises:
        ValueError: `generate` refuses its arguments.
    """
    rest = sorted(prompts, key=lambda prompt: -prompt.length)
    size = 1 if is_sampling(model, generation) else batch_size
    ways = (configs, generation, seed, scored)
    with tqdm(total=len(rest), desc="prompts", unit="prompt", disable=None) as progress:
        while rest:
            batch = rest[:size]
            if any(prompt.id not in done for prompt in batch):
                outcomes = _attempt(model, processor, batch, *ways)
                if isinstance(outcomes, str) and len(batch) > 1:
                    size = len(batch) // 2
                    tqdm.write(f"{outcomes}: batch_size {len(batch)} is too much, going on with {size}", sys.stderr)
                    continue
                yield from zip(batch, [Outcome(outcomes)] if isinstance(outcomes, str) else outcomes, strict=True)
            progress.update(len(batch))
            rest = rest[len(batch) :]


def _attempt(model: DoLaJanusWrapper, processor: Any, batch: list[Prompt], *ways: Any) -> list[Outcome] | str:
    """What became of a batch, or that memory ran out: after returning, nothing holds the memory that it took."""
    try:
        return _answer(model, processor, batch, *ways)
    except (RuntimeError, MemoryError) as error:
        # On the CPU, PyTorch raises a plain RuntimeError.
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            return f"out of memory ({first_line(error)})"
        raise


@torch.inference_mode()
def _answer(
    model: DoLaJanusWrapper,
    processor: Any,
    batch: list[Prompt],
    configs: Callable[[Prompt], Sequence[DoLaConfig]],
    generation: Mapping[str, Any],
    seed: int,
    scored: bool,
) -> list[Outcome]:
    outcomes, good, prepared = [Outcome() for _ in batch], [], []
    for i, prompt in enumerate(batch):
        try:
            images = load_pil_images(prompt.turns)
            prepared.append(processor.process_one(conversations=prompt.turns, images=images))
            good.append(i)
        except ValueError as error:
            outcomes[i].error = str(error)
    if not good:
        return outcomes
    inputs = processor.batchify(prepared).to(model.device, model.dtype)
    embeds, mask = model.prepare_inputs_embeds(**inputs), inputs.attention_mask  # [prompts, T, d], [prompts, T]
    rows = [  # a prompt's place among the good ones, and a configuration
        (place, config)
        for place, i in enumerate(good)
        for config in (() if scored and batch[i].form == "choices" else configs(batch[i]))
    ]
    # What fills up the rows that end first is no EOS here: a stop string ends a row without one.
    arguments = generate_arguments(processor.tokenizer, {"pad_token_id": processor.pad_id, **generation})
    for part in [[row] for row in rows] if is_sampling(model, generation) else [rows] if rows else []:
        places, own = [place for place, _ in part], [config for _, config in part]
        digest = hashlib.sha256(json.dumps([seed, batch[good[places[0]]].id]).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))  # for sampling, which is one row at a time
        answers = _generate(model, processor.tokenizer, embeds[places], mask[places], own, arguments)
        for place, answer in zip(places, answers, strict=True):
            outcomes[good[place]].error = answer.pop("error", None) or outcomes[good[place]].error
            outcomes[good[place]].answers.append(answer)
    for place, i in enumerate(good):
        if scored and (texts := batch[i].choices or ([batch[i].answer] if batch[i].form == "answer" else [])):
            row = slice(place, place + 1)
            outcomes[i].logprobs = _score(model, processor.tokenizer, embeds[row], mask[row], texts, configs(batch[i]))
    return outcomes


def _generate(
    model: DoLaJanusWrapper,
    tokenizer: Any,
    embeds: Tensor,
    mask: Tensor,
    configs: list[DoLaConfig],
    arguments: dict[str, Any],
) -> list[dict[str, Any]]:
    """The answers to prompts [rows, T, d], each under its configuration; one whose logits were NaN has an "error"."""
    watch, trace = NaNWatch(), DoLaTrace() if any(config.use_dola_lm for config in configs) else None
    ids = model.generate_with_dola(
        **arguments, inputs_embeds=embeds, attention_mask=mask, configs=configs, logits_processor=[watch], trace=trace
    ).cpu()  # [rows, T]
    eos = arguments["eos_token_id"]
    eos = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    answers = []
    lengths = answer_lengths(ids, eos, arguments["pad_token_id"]).tolist()
    for row, (length, config, error) in enumerate(zip(lengths, configs, watch.errors(len(configs)), strict=True)):
        layers = trace.layers[row, :length].tolist() if trace is not None and config.use_dola_lm else None
        text = tokenizer.decode(ids[row, :length], skip_special_tokens=True).strip()
        answers.append({"text": text, "tokens": length, "layers": layers} | ({"error": error} if error else {}))
    return answers


def _score(
    model: DoLaJanusWrapper,
    tokenizer: Any,
    embeds: Tensor,
    mask: Tensor,
    texts: Sequence[str],
    configs: Sequence[DoLaConfig],
) -> list[list[float]]:
    """Mean log-probability of each text's tokens after the prompt [1, T, d], under each configuration."""
    ids, known = encode_continuations(tokenizer, texts)
    scores = model.score(embeds, attention_mask=mask, continuation_ids=ids, continuation_mask=known, configs=configs)
    return (scores.sum(-1).cpu() / known.sum(-1)).tolist()


def is_sampling(model: DoLaJanusWrapper, generation: Mapping[str, Any]) -> bool:
    return bool(generation.get("do_sample", generating_model(model.model).generation_config.do_sample))


def generate_arguments(tokenizer: Any, generation: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `generate`, but for the prompt; those in `generation` win."""
    eos = tokenizer.eos_token_id
    ids = {"pad_token_id": eos, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}
    return {**ids, "tokenizer": tokenizer, **generation}


# A file of prompts.


def check_batch(generation: Mapping[str, Any], batch_size: int) -> None:
    """Refuses what cannot be in a batch run; nothing needs to be loaded for it.

    Raises:
        ValueError: `batch_size` or an argument of `generate` is out of its range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for name, (off, reason) in REFUSED.items():
        if (value := generation.get(name)) not in off:
            raise ValueError(f"generation.{name} must be left off in a batch run, got {value!r}: {reason}")


def answer_file(config: AnswerConfig, path: str, output: str) -> int:
    """Answers a file of prompts; 1 if there was one that could not be answered.

    A line of the output is {"id", "text", "tokens", "layers"}, see `Outcome`, or {"id", "error"}; "text_baseline" with
    `compare` is the answer without DoLa. Where the prompt has an answer, "correct" says whether the text gives it.
    `report` is a page of them all.
    """
    check_batch(config.generation, config.batch_size)
    check_generation(config.generation)
    processor = checkpoint.load_processor(config)
    model_config = checkpoint.load_config(config.model_path)
    _, dtype = checkpoint.pick_device(config.device, config.dtype, model_config.dtype)
    keys = ("model_path", "roles", *DOLA_KEYS, "generation", "seed", "compare")
    settings = {key: getattr(config, key) for key in keys} | {"dtype": str(dtype), "prompts": fingerprint(path)}
    prompts, errors = read_prompts(
        path,
        processor,
        model_config.get_text_config(),
        config.dola(),
        config.roles,
        config.generation.get("max_new_tokens") or 1,
        config.image_root,
    )
    with Results(output, settings) as results:
        results.write(errors)
        if any(prompt.id not in results.lines for prompt in prompts):
            done = results.lines.keys()
            if config.workers:
                from janus_dola.programs.ray_workers import answer_with_workers

                lines = answer_with_workers(config, dtype, prompts, done)
            else:
                model = DoLaJanusWrapper(checkpoint.load_model(config))
                how: Any = {"batch_size": config.batch_size, "seed": config.seed, "compare": config.compare}
                lines = answer_lines(model, processor, prompts, config.generation, **how, done=done)
            with closing(lines):
                for line in lines:
                    results.write([line])
        if config.report is not None:
            from janus_dola.programs.report import write_report  # which imports calibrate, which imports this

            write_report(config.report, output, prompts)
        failed = sum("error" in line for line in results.lines.values())
        if failed:
            print(f"{failed} of {len(prompts) + len(errors)} prompts are errors in {output}", file=sys.stderr)
        return 1 if failed else 0


def answer_lines(
    model: DoLaJanusWrapper,
    processor: Any,
    prompts: Sequence[Prompt],
    generation: Mapping[str, Any],
    *,
    batch_size: int = 8,
    seed: int = 0,
    compare: bool = False,
    done: Collection[str | int] = (),
) -> Generator[dict[str, Any], None, None]:
    """The lines of the prompts that have none yet, as they come; see `answer_file` and `answer_many`."""

    def configs(prompt: Prompt) -> list[DoLaConfig]:
        off = replace(prompt.dola, use_dola_lm=False)
        return [prompt.dola, off] if compare and prompt.dola.use_dola_lm else [prompt.dola]

    how: Any = {"batch_size": batch_size, "seed": seed, "done": done}
    for prompt, outcome in answer_many(model, processor, prompts, configs, generation, **how):
        yield as_line(prompt, outcome, compare)


def as_line(prompt: Prompt, outcome: Outcome, compare: bool) -> dict[str, Any]:
    if outcome.error is not None:
        return {"id": prompt.id, "error": outcome.error}
    line = {"id": prompt.id} | outcome.answers[0]
    if compare:
        line["text_baseline"] = outcome.answers[-1]["text"]
    if prompt.form is not None:
        line["correct"] = prompt.is_right(line["text"])
    return line


# One prompt.


def answer_one(config: AnswerConfig) -> None:
    if config.question is None and not config.conversation and not config.images and DEMO_IMAGE.is_file():
        config.images, config.question = [os.path.relpath(DEMO_IMAGE)], DEMO_QUESTION
    # All that can be wrong without the weights is found before they are loaded.
    turns = build_conversation(config.roles, config.question, config.images, config.conversation)
    pil_images = load_pil_images(turns)
    if config.trace:
        Path(config.trace).mkdir(parents=True, exist_ok=True)
    checkpoint.pick_device(config.device, config.dtype)
    model, processor = checkpoint.load(config)
    tokenizer = processor.tokenizer
    inputs = processor(conversations=turns, images=pil_images).to(model.device, model.dtype)
    with torch.inference_mode():
        embeds = model.prepare_inputs_embeds(**inputs)  # [1, T, d]
    prompt = {"inputs_embeds": embeds, "attention_mask": inputs.attention_mask}
    arguments = generate_arguments(tokenizer, config.generation) | prompt

    compared: list[tuple[str, list[str], int, float]] = []  # what print_comparison takes
    if config.compare:
        model.generate_with_dola(**(arguments | {"max_new_tokens": 2}))  # so that the first answer timed is not colder
        for image in (image for turn in turns for image in turn["images"]):
            print(f"image     {image[:80]}")
        print(f"question  {turns[-2]['content'].replace(IMAGE_TAG, '').strip()}")
    for use_dola_lm in (False, True) if config.compare else (config.use_dola_lm,):
        model.config.use_dola_lm = use_dola_lm
        trace = DoLaTrace() if use_dola_lm and (config.compare or config.trace) else None
        streamer = TextStreamer(tokenizer, skip_special_tokens=True) if config.stream else None
        watch = NaNWatch()
        torch.manual_seed(config.seed)
        start = time.perf_counter()
        sequences = model.generate(**arguments, trace=trace, streamer=streamer, logits_processor=[watch])
        seconds = time.perf_counter() - start
        if error := watch.errors(1)[0]:
            raise ValueError(error)
        answers = [text.strip() for text in tokenizer.batch_decode(sequences, skip_special_tokens=True)]
        if config.compare:
            tokens = int((sequences[0] != tokenizer.eos_token_id).sum()) + 1
            compared.append((f"DoLa {'on' if use_dola_lm else 'off'}", answers, tokens, seconds))
        elif not config.stream:
            print(*answers, sep="\n")
    if config.compare:
        print_comparison(compared)
    if trace is not None:
        report(trace, tokenizer, config)


def print_comparison(compared: list[tuple[str, list[str], int, float]]) -> None:
    """Prints the label, answers, tokens and seconds of both runs; on a terminal the words that differ have a colour."""
    (_, off, *_), (_, on, *_) = compared
    shown = [off, on]
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        pairs = zip(*map(differences, off, on), strict=True)  # off's answers and on's, in parts
        red, green = "\033[4;31m{}\033[0m", "\033[4;32m{}\033[0m"  # both underlined
        shown = [
            ["".join(colour.format(text) if differs else text for text, differs in parts) for parts in side]
            for colour, side in zip((red, green), pairs, strict=True)
        ]
    for (label, _, tokens, seconds), answers in zip(compared, shown, strict=True):
        print(*(f"{label:<10}{answer}" for answer in answers), sep="\n")
        print(f"{'':<10}({tokens} tokens, {seconds / tokens:.4f} seconds per token)")


def report(trace: DoLaTrace, tokenizer: Any, config: AnswerConfig) -> None:
    """Prints the layers chosen, with `compare`, and writes the trace, with `trace`."""
    if config.compare:
        print(f"{'layers':<10}{' '.join(str(layer) for layer in trace.layers[0][: trace.lengths[0]].tolist())}")
    if config.trace:
        folder = Path(config.trace)
        trace.save(folder / "trace.jsonl")
        trace.heatmap(folder / "trace.png", tokenizer)
        print(f"{'JSD':<10}{folder / 'trace.png'} (and trace.jsonl)")
