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
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TextStreamer

from janus.utils.io import load_pil_images
from janus_dola.config import DoLaConfig
from janus_dola.exits import generating_model
from janus_dola.processor import NaNWatch
from janus_dola.programs import checkpoint
from janus_dola.programs.differences import differences
from janus_dola.programs.options import CONFIGS, first_line, read_config
from janus_dola.programs.prompts import (
    DOLA_KEYS,
    IMAGE_TAG,
    ManyConfig,
    Outcome,
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


@dataclass
class AnswerConfig(ManyConfig):
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

    SETTINGS: ClassVar = (*DOLA_KEYS, "compare", *ManyConfig.SETTINGS)

    def __post_init__(self) -> None:
        super().__post_init__()
        images = self.images if self.image is None else self.image
        self.images = [images] if isinstance(images, str) else images or []
        if (self.prompts is None) != (self.output is None):
            raise ValueError(f"prompts and output must be given together, got {self.prompts!r} and {self.output!r}")
        check_report(self.report)
        if self.report is not None and self.prompts is None:
            raise ValueError(f"report must come with prompts and output, got {self.report!r} alone")
        for key in ("question", "images", "conversation", "stream", "trace"):
            if self.prompts is not None and (value := getattr(self, key)):
                raise ValueError(f"prompts and {key} must not both be given, got {self.prompts!r} and {value!r}")

    def configs(self, prompt: Prompt) -> list[DoLaConfig]:
        """With `compare` the baseline, too, last."""
        both = self.compare and prompt.dola.use_dola_lm
        return [prompt.dola, replace(prompt.dola, use_dola_lm=False)] if both else [prompt.dola]

    def line(self, prompt: Prompt, outcome: Outcome) -> dict[str, Any]:
        """With `compare` "text_baseline" is the answer without DoLa."""
        baseline = {"text_baseline": outcome.answers[-1]["text"]} if self.compare else {}
        return super().line(prompt, outcome) | baseline


def check_report(path: str | None) -> None:
    """Refuses what is not the name of a page, such as the file of prompts, before it is overwritten."""
    if path is not None and not path.endswith(".html"):
        raise ValueError(f"report must end in .html, got {path!r}")


def run(argv: Sequence[str]) -> int:
    """Returns the exit code: 1 if there was a prompt of a file that could not be answered."""
    config = read_config(AnswerConfig, argv)
    if config.output is None:
        answer_one(config)
        return 0
    prompts, lines = answer_file(config, "prompts", config.output)
    if config.report is not None:
        from janus_dola.programs.report import write_report  # which imports calibrate, which imports this

        write_report(config.report, config.output, prompts)
    if failed := sum("error" in line for line in lines.values()):
        print(f"{failed} of {len(lines)} prompts are errors in {config.output}", file=sys.stderr)
    return 1 if failed else 0


# The engine.


def answer_many(
    model: DoLaJanusWrapper, processor: Any, prompts: Sequence[Prompt], config: ManyConfig, done: Container[Any] = ()
) -> Generator[dict[str, Any], None, None]:
    """Answers prompts x configurations in batches, with a progress bar.

    The prompts of a batch are of like lengths, the longest first: where memory does not suffice, it shows at once. Rows
    have configurations of their own; an image is encoded once, whatever the number of configurations.

    Args:
        model: The wrapped model, left as it is: each row brings its configuration.
        processor: The checkpoint's.
        prompts: As `read_prompts` gives them.
        config: The run's. With `do_sample` each row is a batch of its own with a seed of its prompt's own, so that its
            answer does not depend on the others. When memory runs out `batch_size` is halved, for the rest of the run.
        done: Ids of prompts that need no answer. They keep their places: so an answer's neighbours, and its rounding,
            are the same in a run that was killed.

    Yields:
        Of each prompt {"id"} and what `config.line` keeps, or {"id", "error"}.

    Raises:
        ValueError: `generate` refuses its arguments.
    """
    rest = sorted(prompts, key=lambda prompt: -prompt.length)
    size = 1 if is_sampling(model, config.generation) else config.batch_size
    with tqdm(total=len(rest), desc="prompts", unit="prompt", disable=None) as progress:
        while rest:
            batch = rest[:size]
            if any(prompt.id not in done for prompt in batch):
                try:
                    outcomes = _answer(model, processor, batch, config)
                except (RuntimeError, MemoryError) as error:
                    # On the CPU, PyTorch raises a plain RuntimeError.
                    out = isinstance(error, (torch.OutOfMemoryError, MemoryError))
                    if not out and "can't allocate memory" not in str(error):
                        raise
                    outcomes = [Outcome(f"out of memory ({first_line(error)})")]
                if len(outcomes) < len(batch):  # past the handler, so that nothing holds the memory that it took
                    size = len(batch) // 2
                    problem = f"{outcomes[0].error}: batch_size {len(batch)} is too much, going on with {size}"
                    tqdm.write(problem, sys.stderr)
                    continue
                for prompt, outcome in zip(batch, outcomes, strict=True):
                    kept = config.line(prompt, outcome) if outcome.error is None else {"error": outcome.error}
                    yield {"id": prompt.id} | kept
            progress.update(len(batch))
            rest = rest[len(batch) :]


@torch.inference_mode()
def _answer(model: DoLaJanusWrapper, processor: Any, batch: list[Prompt], config: ManyConfig) -> list[Outcome]:
    tokenizer, outcomes, good, prepared = processor.tokenizer, [Outcome() for _ in batch], [], []
    for prompt, outcome in zip(batch, outcomes, strict=True):
        try:
            images = load_pil_images(prompt.turns)
            prepared.append(processor.process_one(conversations=prompt.turns, images=images))
            good.append((prompt, outcome))
        except ValueError as error:
            outcome.error = str(error)
    if not good:
        return outcomes
    inputs = processor.batchify(prepared).to(model.device, model.dtype)
    embeds, mask = model.prepare_inputs_embeds(**inputs), inputs.attention_mask  # [prompts, T, d], [prompts, T]
    rows = [  # a prompt's place among the good ones, and a configuration
        (place, dola)
        for place, (prompt, _) in enumerate(good)
        if not config.SCORED or prompt.form != "choices"
        for dola in config.configs(prompt)
    ]
    # What fills up the rows that end first is no EOS here: a stop string ends a row without one.
    arguments = generate_arguments(tokenizer, {"pad_token_id": processor.pad_id, **config.generation})
    for part in [[row] for row in rows] if is_sampling(model, config.generation) else [rows] if rows else []:
        places = [place for place, _ in part]
        digest = hashlib.sha256(json.dumps([config.seed, good[places[0]][0].id]).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))  # for sampling, which is one row at a time
        configs = [dola for _, dola in part]
        given = arguments | {"inputs_embeds": embeds[places], "attention_mask": mask[places], "configs": configs}
        trace = DoLaTrace() if any(dola.use_dola_lm for dola in configs) else None
        for place, answer in zip(places, _generate(model.generate_with_dola, given, configs, trace), strict=True):
            outcome = good[place][1]
            outcome.error = answer.pop("error", outcome.error)
            outcome.answers.append(answer)
    for place, (prompt, outcome) in enumerate(good if config.SCORED else ()):
        if texts := prompt.choices or ([prompt.answer] if prompt.form == "answer" else []):
            ids, text_mask = encode_continuations(tokenizer, texts)
            given = {"continuation_ids": ids, "continuation_mask": text_mask, "attention_mask": mask[place : place + 1]}
            scores = model.score(embeds[place : place + 1], **given, configs=config.configs(prompt))
            outcome.logprobs = (scores.sum(-1).cpu() / text_mask.sum(-1)).tolist()
    return outcomes


def _generate(
    generate: Callable[..., Tensor], arguments: dict[str, Any], configs: Sequence[DoLaConfig], trace: DoLaTrace | None
) -> list[dict[str, Any]]:
    """The answers to prompts [rows, T, d], each under its configuration; one whose logits were NaN has an "error"."""
    watch, tokenizer, eos = NaNWatch(), arguments["tokenizer"], arguments["eos_token_id"]
    ids = generate(**arguments, logits_processor=[watch], trace=trace).cpu()  # [rows x returned sequences, T]
    eos = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    lengths, errors = answer_lengths(ids, eos, arguments["pad_token_id"]).tolist(), watch.errors(len(configs))
    answers = []
    for row, length in enumerate(lengths):
        prompt = row * len(configs) // len(ids)
        layers = trace.layers[row, :length].tolist() if trace is not None and configs[prompt].use_dola_lm else None
        text = tokenizer.decode(ids[row, :length], skip_special_tokens=True).strip()
        error = {} if errors[prompt] is None else {"error": errors[prompt]}
        answers.append({"text": text, "tokens": length, "layers": layers} | error)
    return answers


def is_sampling(model: DoLaJanusWrapper, generation: Mapping[str, Any]) -> bool:
    return bool(generation.get("do_sample", generating_model(model.model).generation_config.do_sample))


def generate_arguments(tokenizer: Any, generation: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `generate`, but for the prompt; those in `generation` win."""
    eos = tokenizer.eos_token_id
    ids = {"pad_token_id": eos, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}
    return {**ids, "tokenizer": tokenizer, **generation}


# A file of prompts.


def answer_file(
    config: ManyConfig, key: str, output: str | os.PathLike[str], strict: bool = False
) -> tuple[list[Prompt], dict[str | int, dict[str, Any]]]:
    """Answers a file of prompts. The lines of the output are those of `answer_many`, and {"id", "error"} of bad ones.

    Args:
        config: The run's.
        key: The one of its keys that names the file.
        output: The file of results; see `Results`.
        strict: Whether the first error stops the run.

    Returns:
        The good prompts, and all lines by id.

    Raises:
        ValueError: Something in the configuration is wrong, or `strict` and there is an error.
    """
    config.check_batch()
    model_config = checkpoint.load_config(config.model_path)
    processor = checkpoint.load_processor(config, model_config)
    _, dtype = checkpoint.pick_device(config.device, config.dtype, model_config.dtype)
    prompts, errors = read_prompts(config, getattr(config, key), processor, model_config, key)
    settings = {name: getattr(config, name) for name in config.SETTINGS}
    settings |= {"dtype": str(dtype), key: fingerprint(getattr(config, key), key)}
    with Results(output, settings) as results:

        def keep(lines: Iterable[dict[str, Any]]) -> None:
            for line in lines:
                results.write([line])
                if strict and "error" in line:
                    raise ValueError(f"{key}, {line['id']}: {line['error']}")

        keep([*errors, *results.lines.values()])
        if any(prompt.id not in results.lines for prompt in prompts):
            done = results.lines.keys()
            if config.workers:
                from janus_dola.programs.ray_workers import answer_with_workers

                lines = answer_with_workers(config, dtype, prompts, done)
            else:
                model = DoLaJanusWrapper(checkpoint.load_model(config, model_config))
                lines = answer_many(model, processor, prompts, config, done)
            with closing(lines):
                keep(lines)
        return prompts, results.lines


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

    compared: list[list[str]] = []  # what print_comparison takes
    speeds: list[str] = []
    if config.compare:
        model.generate_with_dola(**(arguments | {"max_new_tokens": 2}))  # so that the first answer timed is not colder
        for image in (image for turn in turns for image in turn["images"]):
            print(f"image     {image[:80]}")
        print(f"question  {turns[-2]['content'].replace(IMAGE_TAG, '').strip()}")
    for use_dola_lm in (False, True) if config.compare else (config.use_dola_lm,):
        model.config.use_dola_lm = use_dola_lm
        trace = DoLaTrace() if use_dola_lm and (config.compare or config.trace) else None
        streamer = TextStreamer(tokenizer, skip_special_tokens=True) if config.stream else None
        torch.manual_seed(config.seed)
        start = time.perf_counter()
        answers = _generate(model.generate, arguments | {"streamer": streamer}, [model.config], trace)
        seconds = time.perf_counter() - start
        first = answers[0]
        if "error" in first:
            raise ValueError(first["error"])
        if config.compare:
            compared.append([answer["text"] for answer in answers])
            speeds.append(f"({first['tokens']} tokens, {seconds / first['tokens']:.4f} seconds per token)")
        elif not config.stream:
            print(*(answer["text"] for answer in answers), sep="\n")
    if config.compare:
        print_comparison(compared, speeds)
    if trace is not None and config.compare:
        print(f"{'layers':<10}{' '.join(map(str, first['layers']))}")
    if trace is not None and config.trace:
        folder = Path(config.trace)
        trace.save(folder / "trace.jsonl")
        trace.heatmap(folder / "trace.png", tokenizer)
        print(f"{'JSD':<10}{folder / 'trace.png'} (and trace.jsonl)")


def print_comparison(compared: list[list[str]], speeds: list[str]) -> None:
    """Prints the answers with DoLa off and on, and their speeds; on a terminal the words that differ have a colour."""
    shown = compared
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        pairs = zip(*map(differences, *compared), strict=True)  # off's answers and on's, in parts
        red, green = "\033[4;31m{}\033[0m", "\033[4;32m{}\033[0m"  # both underlined
        shown = [
            ["".join(colour.format(text) if differs else text for text, differs in parts) for parts in side]
            for colour, side in zip((red, green), pairs, strict=True)
        ]
    for label, answers, speed in zip(("DoLa off", "DoLa on"), shown, speeds, strict=True):
        print(*(f"{label:<10}{answer}" for answer in answers), sep="\n")
        print(f"{'':<10}{speed}")
