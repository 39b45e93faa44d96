"""Many prompts to one file of answers, in batches; a run that was killed goes on where it was: `run_batch`."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from janus_dola.call import UNSUPPORTED
from janus_dola.cli import build_conversation, check_settings, explain, first_line, refuse_interpolations, unknown_key
from janus_dola.config import DoLaConfig
from janus_dola.trace import DoLaTrace, answer_lengths
from janus_dola.wrapper import DoLaJanusWrapper

DOLA_KEYS = tuple(key.name for key in fields(DoLaConfig))
KEYS = ("id", "images", "question", "conversation", *DOLA_KEYS)
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
class Prompt:
    """A good line of the prompts.

    Attributes:
        id: Its own, or "line N".
        turns: The conversation, as `build_conversation` gives it.
        dola: The run's configuration, with the line's own keys over it.
        length: Tokens of the prompt, with those of its images.
    """

    id: str | int
    turns: list[dict[str, Any]]
    dola: DoLaConfig
    length: int


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


def read_prompts(
    path: str | PathLike[str],
    processor: Any,
    language_config: Any,
    dola: DoLaConfig,
    roles: Sequence[str],
    max_new_tokens: int = 1,
) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """The lines of a file of prompts. No image is opened yet.

    Args:
        path: JSON lines with `question` and, if it has some, `images`, or with `conversation`; optionally with an `id`
            and with keys of `DoLaConfig`. Empty lines do not count.
        processor: The checkpoint's.
        language_config: The language model's; it limits layers and positions.
        dola: For the keys that a line does not have.
        roles: The names of user and assistant.
        max_new_tokens: Positions to leave for the answer.

    Returns:
        The good lines, and {"id", "error"} for each bad one.

    Raises:
        ValueError: The file cannot be read.
    """
    prompts: list[Prompt] = []
    errors: list[dict[str, Any]] = []
    seen: dict[str | int, int] = {}  # id -> its line
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        name: str | int = f"line {number}"
        try:
            given = _parse(line)
            own = given.get("id", name)
            if not isinstance(own, (str, int)) or isinstance(own, bool):
                raise ValueError(f"id must be a text or a whole number, got {own!r}")
            name = own
            if (first := seen.setdefault(name, number)) != number:
                raise ValueError(f"id must be of one line alone, got {name!r} on line {number} and on line {first}")
            turns = _turns(given, roles)
            own_dola = _dola(given, dola, language_config.num_hidden_layers)
            length = _length(turns, processor)
            if length + max_new_tokens > language_config.max_position_embeddings:
                raise ValueError(
                    f"too long: the prompt's {length} tokens and {max_new_tokens} new ones (max_new_tokens) are more "
                    f"than the model's {language_config.max_position_embeddings} positions"
                )
            prompts.append(Prompt(name, turns, own_dola, length))
        except ValueError as error:
            errors.append({"id": name, "error": str(error)})
    return prompts, errors


def _read(path: str | PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"prompts must name a file that can be read, got {str(path)!r}: {error.strerror}") from error


def fingerprint(path: str | PathLike[str]) -> str:
    """What stands for the contents of a file of prompts in an output's settings."""
    return "sha256 " + hashlib.sha256(_read(path)).hexdigest()[:16]


def _parse(line: bytes) -> dict[str, Any]:
    try:
        given = json.loads(line)
        json.dumps(given, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text to tokenize
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {first_line(error)}") from error
    if not isinstance(given, dict):
        raise ValueError(f"a line must be a JSON object, got {str(given)[:80]!r}")
    return given


def _turns(given: Mapping[str, Any], roles: Sequence[str]) -> list[dict[str, Any]]:
    for key in given:
        if key not in KEYS:
            raise ValueError(unknown_key(key, KEYS))
    question, images, conversation = (given.get(key) for key in ("question", "images", "conversation"))
    if not isinstance(question, (str, type(None))):
        raise ValueError(f"question must be a text, got {question!r}")
    if not isinstance(images or [], list) or not all(isinstance(image, str) for image in images or []):
        raise ValueError(f"images must be a list of paths or data URLs, got {images!r}")
    if not isinstance(conversation, (list, type(None))):
        raise ValueError(f"conversation must be a list of turns, got {conversation!r}")
    return build_conversation(roles, question, images or [], conversation)


def _dola(given: Mapping[str, Any], dola: DoLaConfig, num_layers: int) -> DoLaConfig:
    own = {key: given[key] for key in DOLA_KEYS if key in given}
    refuse_interpolations(own)
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(dola), own))
    except OmegaConfBaseException as error:
        raise ValueError(explain(error, DoLaConfig)) from error
    dola = DoLaConfig(**merged)  # type: ignore[arg-type]
    dola.resolve_layers(num_layers)
    return dola


def _length(turns: list[dict[str, Any]], processor: Any) -> int:
    """Tokens of the prompt that `process_one` will make, without opening the images."""
    text = processor.apply_sft_template_for_multi_turn_prompts(
        turns, sft_format=processor.sft_format, system_prompt=processor.system_prompt
    )
    ids = torch.tensor(processor.tokenizer.encode(text))  # [T without images]
    return len(processor.add_image_token((ids == processor.image_id).nonzero(), ids)[0])


class Output:
    """A file of answers, and beside it, in FILE.settings.json, what they depend on.

    Args:
        path: The file. Its lines are kept; an unfinished last one, of a run that was killed, is cut off.
        settings: All that the answers depend on, as JSON can hold it.
        errors: Lines for the prompts that cannot be asked; they are written unless they are there.

    Attributes:
        done: The ids of the prompts that have a line.
        failed: How many lines are errors.

    Raises:
        ValueError: The file holds answers of other settings, or something else, or cannot be written.
    """

    def __init__(
        self, path: str | PathLike[str], settings: Mapping[str, Any], errors: Iterable[dict[str, Any]] = ()
    ) -> None:
        self.path = Path(path)
        self.done: set[str | int] = set()
        self.failed = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            data = self.path.read_bytes() if self.path.exists() else b""
            self._check_settings(json.loads(json.dumps(settings, default=str)), new=not data)
            whole = data[: data.rfind(b"\n") + 1]
            self._file = self.path.open("ab")
            self._file.truncate(len(whole))
        except OSError as error:
            raise ValueError(f"output must name a file that can be written, got {str(path)!r}: {error}") from error
        # A second line of the same id is an error beside the first one's answer: told apart by the whole line.
        missing = {json.dumps(line): line for line in errors}
        for line in map(json.loads, whole.splitlines()):
            self.failed += "error" in line
            if missing.pop(json.dumps(line), None) is None:
                self.done.add(line["id"])
        self._append(missing.values())

    def _check_settings(self, settings: dict[str, Any], new: bool) -> None:
        beside = self.path.with_name(self.path.name + ".settings.json")
        if new:  # written at once, and before the first line: there is no line without
            draft = beside.with_name(beside.name + ".draft")
            draft.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            draft.replace(beside)
            return
        if not beside.exists():
            raise ValueError(f"output: {str(self.path)!r} is not a batch run's, it has no {beside.name} beside it")
        check_settings(self.path, "answers", json.loads(beside.read_text(encoding="utf-8")), settings)

    def write(self, lines: Iterable[dict[str, Any]]) -> int:
        """Adds the lines of prompts that have none; they are in the file when it returns how many they were."""
        new = [line for line in lines if line["id"] not in self.done]
        self._append(new)
        self.done.update(line["id"] for line in new)
        return len(new)

    def _append(self, lines: Iterable[dict[str, Any]]) -> None:
        lines = list(lines)
        self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self._file.flush()
        self.failed += sum("error" in line for line in lines)

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def run_batch(
    model: DoLaJanusWrapper,
    processor: Any,
    prompts: Sequence[Prompt],
    output: Output,
    generation: Mapping[str, Any],
    *,
    batch_size: int = 8,
    seed: int = 0,
    compare: bool = False,
) -> None:
    """Answers the prompts that have no line in `output`.

    A line is {"id", "text", "tokens", "layers"}: the answer, how many tokens it took up to and with the end of
    sequence, and the layer M of each, null without DoLa; or {"id", "error"}. The prompts of a batch share one DoLa
    configuration, and are of like lengths, the longest first: where memory does not suffice, it shows at once.

    Args:
        model: The wrapped model, left as it is: each prompt brings its configuration.
        processor: The checkpoint's.
        prompts: As `read_prompts` gives them.
        output: Where the lines go.
        generation: Arguments of `generate`. With `do_sample` each prompt is a batch of its own with a seed of its own,
            so that its answer does not depend on the others.
        batch_size: Prompts at a time. When memory runs out it is halved, for the rest of the run.
        seed: Of sampling.
        compare: Lines have "text_baseline" as well, the answer without DoLa.

    Raises:
        ValueError: `batch_size` is out of its range, or `generate` refuses its arguments.
    """
    check_batch(generation, batch_size)
    sampling = generation.get("do_sample", model.language_model.generation_config.do_sample)
    size = 1 if sampling else batch_size
    # Of all prompts, done or not: so an answer's neighbours, and its rounding, are the same in a run that was killed.
    ordered = sorted(prompts, key=lambda prompt: (repr(prompt.dola), -prompt.length))
    done = sum(prompt.id in output.done for prompt in prompts)
    with tqdm(total=len(prompts), initial=done, desc="prompts", unit="prompt", disable=None) as progress:
        for _, group in groupby(ordered, key=lambda prompt: repr(prompt.dola)):
            rest = list(group)
            while rest:
                batch = rest[:size]
                if not all(prompt.id in output.done for prompt in batch):
                    lines = _attempt(model, processor, batch, generation, seed, compare)
                    if isinstance(lines, str) and len(batch) > 1:
                        size = len(batch) // 2
                        tqdm.write(f"{lines}: batch_size {len(batch)} is too much, going on with {size}", sys.stderr)
                        continue
                    if isinstance(lines, str):
                        lines = [{"id": batch[0].id, "error": lines}]
                    progress.update(output.write(lines))
                rest = rest[len(batch) :]


def _attempt(model: DoLaJanusWrapper, processor: Any, batch: list[Prompt], *how: Any) -> list[dict[str, Any]] | str:
    """The lines of a batch, or that memory ran out: after returning, nothing holds the memory that it took."""
    try:
        return list(_answer(model, processor, batch, *how))
    except (RuntimeError, MemoryError) as error:
        # On the CPU, PyTorch raises a plain RuntimeError.
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            return f"out of memory ({first_line(error)})"
        raise


def _answer(
    model: DoLaJanusWrapper,
    processor: Any,
    batch: list[Prompt],
    generation: Mapping[str, Any],
    seed: int,
    compare: bool,
) -> Iterator[dict[str, Any]]:
    # The package that the model is from, ours or the published one.
    from janus.utils.io import load_pil_images

    good, prepared = [], []
    for prompt in batch:
        try:
            images = load_pil_images(prompt.turns)
            prepared.append(processor.process_one(conversations=prompt.turns, images=images))
            good.append(prompt)
        except ValueError as error:
            yield {"id": prompt.id, "error": str(error)}
    if not good:
        return
    inputs = processor.batchify(prepared).to(model.device, model.dtype)
    # What fills up the rows that end first is no EOS here: a stop string ends a row without one.
    arguments = {"pad_token_id": processor.pad_id, **generation}
    arguments = generate_arguments(model, processor.tokenizer, inputs, arguments)
    eos = arguments["eos_token_id"]
    eos = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    dola = good[0].dola
    found: dict[bool, list[dict[str, Any]]] = {}  # by use_dola_lm
    for use_dola_lm in {dola.use_dola_lm, False} if compare else {dola.use_dola_lm}:
        trace = DoLaTrace() if use_dola_lm else None
        digest = hashlib.sha256(json.dumps([seed, good[0].id]).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))  # for sampling, which is one prompt at a time
        wrapper = DoLaJanusWrapper(model.model, replace(dola, use_dola_lm=use_dola_lm))
        ids = wrapper.generate(**arguments, **({"trace": trace} if trace else {})).cpu()  # [B, T]
        lengths = answer_lengths(ids, eos, arguments["pad_token_id"]).tolist()
        found[use_dola_lm] = [
            {
                "text": processor.tokenizer.decode(ids[row, :length], skip_special_tokens=True).strip(),
                "tokens": length,
                "layers": None if trace is None else trace.layers[row, :length].tolist(),
            }
            for row, length in enumerate(lengths)
        ]
    for row, prompt in enumerate(good):
        baseline = {"text_baseline": found[False][row]["text"]} if compare else {}
        yield {"id": prompt.id} | found[dola.use_dola_lm][row] | baseline


def generate_arguments(model: Any, tokenizer: Any, inputs: Any, generation: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` for what the processor prepared; those in `generation` win."""
    with torch.inference_mode():
        inputs_embeds = model.prepare_inputs_embeds(**inputs)  # [B, T, D]
    return {
        "inputs_embeds": inputs_embeds,
        "attention_mask": inputs.attention_mask,
        "pad_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tokenizer": tokenizer,
        **generation,
    }
