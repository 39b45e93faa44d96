"""Prompts x configurations, answered in batches. It knows no file and no command line: a `Task` in, `Outcome`s out."""

import hashlib
import json
import sys
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from janus_dola.config import DoLaConfig
from janus_dola.exits import generating_model
from janus_dola.processor import NaNWatch
from janus_dola.programs.errors import first_line
from janus_dola.programs.measures import is_right
from janus_dola.programs.prompts import Prompt, encode_continuations, open_images
from janus_dola.trace import DoLaTrace, answer_lengths
from janus_dola.wrapper import DoLaJanusWrapper


class Answer(NamedTuple):
    """An answer under one configuration.

    Attributes:
        text: What it says.
        tokens: How many tokens it took, up to and with the end of sequence.
        layers: The layer M of each of them, None without DoLa.
        error: Why it is worth nothing, or None.
        jsd: JSD(q_N ‖ q_M) at each of them, 0 where M is N; None without DoLa.
        changed: Which of them are not what q_N alone would have chosen; None without DoLa.
    """

    text: str
    tokens: int
    layers: list[int] | None
    error: str | None = None
    jsd: list[float] | None = None
    changed: list[int] | None = None


@dataclass
class Outcome:
    """What became of a prompt.

    Attributes:
        error: Why there is no answer, or None.
        answers: One for each of the prompt's configurations.
        logprobs: Mean log-probabilities of the tokens of each choice, or of the right answer, [configs, choices].
    """

    error: str | None = None
    answers: list[Answer] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)


class Task:
    """What to ask of each prompt, and what a file of results keeps of it. Workers get it pickled.

    Args:
        compared: The configurations to answer each prompt under; without them it is the prompt's own.

    Attributes:
        scored: Whether each prompt must have a right answer, which is scored; choices are scored in place of an answer.
    """

    scored = False

    def __init__(self, compared: Iterable[DoLaConfig] = ()) -> None:
        self.compared = list(compared)

    def configs(self, prompt: Prompt) -> list[DoLaConfig]:
        """The configurations to answer a prompt under."""
        return self.compared or [prompt.dola]

    def line(self, prompt: Prompt, outcome: Outcome) -> dict[str, Any]:
        """What is kept of an answered prompt beside its id: the first answer, and whether it is right."""
        text, tokens, layers, *_ = outcome.answers[0]
        correct = {} if prompt.form is None else {"correct": is_right(prompt, text)}
        return {"text": text, "tokens": tokens, "layers": layers} | correct


def answer_many(
    model: DoLaJanusWrapper,
    processor: Any,
    prompts: Sequence[Prompt],
    task: Task,
    generation: Mapping[str, Any],
    batch_size: int,
    seed: int = 0,
    done: Container[str | int] = (),
) -> Generator[tuple[Prompt, Outcome], None, None]:
    """Answers prompts x configurations in batches, with a progress bar.

    The prompts of a batch are of like lengths, the longest first: where memory does not suffice, it shows at once. Rows
    have configurations of their own; an image is encoded once, whatever the number of configurations.

    Args:
        model: The wrapped model, left as it is: each row brings its configuration.
        processor: The checkpoint's.
        prompts: As `read_prompts` gives them.
        task: What to ask of each.
        generation: Arguments of `generate`. With `do_sample` each row is a batch of its own with a seed of its
            prompt's own, so that its answer does not depend on the others.
        batch_size: Prompts answered together. When memory runs out it is halved, for the rest of the run.
        seed: Seed for sampling.
        done: Ids of prompts that need no answer. They keep their places: so an answer's neighbors, and its rounding,
            are the same in a run that was killed.

    Yields:
        Each prompt, and what became of it.

    Raises:
        ValueError: `generate` refuses its arguments.
    """
    rest = sorted(prompts, key=lambda prompt: -prompt.length)
    size = 1 if is_sampling(model, generation) else batch_size
    with tqdm(total=len(rest), desc="prompts", unit="prompt", disable=None) as progress:
        while rest:
            batch = rest[:size]
            if any(prompt.id not in done for prompt in batch):
                try:
                    outcomes = _answer(model, processor, batch, task, generation, seed)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    outcomes = [Outcome(f"out of memory ({first_line(error)})")]
                if len(outcomes) < len(batch):  # past the handler, so that nothing holds the memory that it took
                    size = len(batch) // 2
                    problem = f"{outcomes[0].error}: batch_size {len(batch)} is too much, going on with {size}"
                    tqdm.write(problem, sys.stderr)
                    continue
                yield from zip(batch, outcomes, strict=True)
            progress.update(len(batch))
            rest = rest[len(batch) :]


def is_out_of_memory(error: BaseException) -> bool:
    # On the CPU, PyTorch raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@torch.inference_mode()
def _answer(
    model: DoLaJanusWrapper, processor: Any, batch: list[Prompt], task: Task, generation: Mapping[str, Any], seed: int
) -> list[Outcome]:
    tokenizer, outcomes, good, prepared = processor.tokenizer, [Outcome() for _ in batch], [], []
    for prompt, outcome in zip(batch, outcomes, strict=True):
        try:
            images = open_images(prompt.turns, processor)
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
        if not task.scored or prompt.form != "choices"
        for dola in task.configs(prompt)
    ]
    # What fills up the rows that end first is no EOS here: a stop string ends a row without one.
    arguments = generate_arguments(tokenizer, {"pad_token_id": processor.pad_id, **generation})
    parts = [[row] for row in rows] if is_sampling(model, generation) else [rows]
    for part in filter(None, parts):  # there are no rows where all prompts are choices to score
        places, configs = [place for place, _ in part], [dola for _, dola in part]
        torch.manual_seed(seed_of(seed, good[places[0]][0]))  # for sampling, which is one row at a time
        given = arguments | {"inputs_embeds": embeds[places], "attention_mask": mask[places], "configs": configs}
        trace = DoLaTrace() if any(dola.use_dola_lm for dola in configs) else None
        answers = generate_answers(model.generate_with_dola, given, configs, trace)
        for place, answer in zip(places, answers, strict=True):
            outcome = good[place][1]
            outcome.error = answer.error or outcome.error
            outcome.answers.append(answer)
    for place, (prompt, outcome) in enumerate(good if task.scored else ()):
        if texts := prompt.choices or ([prompt.answer] if prompt.form == "answer" else []):
            ids, text_mask = encode_continuations(tokenizer, texts)
            given = {"continuation_ids": ids, "continuation_mask": text_mask, "attention_mask": mask[place : place + 1]}
            scores = model.score(embeds[place : place + 1], **given, configs=task.configs(prompt))
            outcome.logprobs = (scores.sum(-1).cpu() / text_mask.sum(-1)).tolist()
    return outcomes


def generate_answers(
    generate: Callable[..., Any], arguments: dict[str, Any], configs: Sequence[DoLaConfig], trace: DoLaTrace | None
) -> list[Answer]:
    """The answers to prompts [rows, T, d], each under its configuration; one whose logits were NaN has an error.

    Of several beams, those that are alive.
    """
    watch, tokenizer, eos = NaNWatch(), arguments["tokenizer"], arguments["eos_token_id"]
    output = generate(**arguments, return_dict_in_generate=True, logits_processor=[watch], trace=trace)
    ids, scores = output.sequences.cpu(), getattr(output, "sequences_scores", None)  # [rows x returned sequences, T]
    dead = [False] * len(ids) if scores is None else scores.isneginf().tolist()
    eos = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    lengths, errors = answer_lengths(ids, eos, arguments["pad_token_id"]).tolist(), watch.errors(len(configs))
    if trace is not None:
        chosen_jsd, differs = trace.chosen_jsd, trace.tokens != trace.mature_tokens
    answers = []
    for row, length in enumerate(lengths):
        if dead[row]:
            continue
        prompt = row * len(configs) // len(ids)
        answer = Answer(
            tokenizer.decode(ids[row, :length], skip_special_tokens=True).strip(), length, None, errors[prompt]
        )
        if trace is not None and configs[prompt].use_dola_lm:
            layers, jsd, changed = (values[row, :length] for values in (trace.layers, chosen_jsd, differs))
            answer = answer._replace(
                layers=layers.tolist(), jsd=jsd.tolist(), changed=changed.nonzero().flatten().tolist()
            )
        answers.append(answer)
    return answers


def seed_of(seed: int, prompt: Prompt) -> int:
    """A prompt's own seed, so that what is sampled for it does not depend on the others."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, prompt.id]).encode()).digest()[:7], "big")


def is_sampling(model: DoLaJanusWrapper, generation: Mapping[str, Any]) -> bool:
    return bool(generation.get("do_sample", generating_model(model.model).generation_config.do_sample))


def generate_arguments(tokenizer: Any, generation: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `generate`, but for the prompt; those in `generation` win."""
    eos = tokenizer.eos_token_id
    ids = {"pad_token_id": eos, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}
    return {**ids, "tokenizer": tokenizer, **generation}
