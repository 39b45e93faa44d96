"""Prompts: a conversation from arguments, or many from a file of JSON lines, with their answers if there are some."""

import codecs
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from types import NoneType
from typing import Any

import torch
from PIL.Image import Image
from torch.nn.utils.rnn import pad_sequence

from janus.utils.io import load_image
from janus_dola.call import check_length
from janus_dola.config import DoLaConfig
from janus_dola.programs.errors import first_line, read_bytes, unknown_key
from janus_dola.programs.options import ModelConfig, merge

IMAGE_TAG = "<image_placeholder>"
USUAL_ROLES = ("user", "assistant")  # what people's files call a model's `roles`
DOLA_KEYS = tuple(key.name for key in fields(DoLaConfig))
# What a line with an answer has beside the keys of any line, by form. POPE's images are named by file.
FORMS = {"choices": {"question", "choices", "answer"}, "pope": {"text", "label"}, "answer": {"question", "answer"}}
KEYS = ("id", "images", "image", "question", "conversation", *DOLA_KEYS, "answer", "choices")
POPE_KEYS = ("id", "question_id", "image", "text", "label", "category", *DOLA_KEYS)


@dataclass
class Prompt:
    """A good line.

    Attributes:
        id: Its own, or "line N".
        turns: The conversation, as `build_conversation` gives it.
        dola: The run's configuration, with the line's own keys over it.
        length: Tokens of the prompt, with those of its images.
        form: One of `FORMS`, or None where the line has no answer.
        answer: The right answer: a string; of "pope" yes or no; of "choices" the index of one.
        choices: The answers to choose from.
        category: POPE's split, such as random, popular or adversarial, where the line names it.
    """

    id: str | int
    turns: list[dict[str, Any]]
    dola: DoLaConfig
    length: int
    form: str | None = None
    answer: Any = None
    choices: tuple[str, ...] = ()
    category: str | None = None

    @property
    def fingerprint(self) -> str:
        """What stands for all that its answer depends on beside the run's settings."""
        asked = [self.turns, asdict(self.dola), self.form, self.answer, self.choices]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def read_prompts(
    config: ModelConfig,
    path: str | PathLike[str],
    processor: Any,
    model_config: Any,
    key: str = "prompts",
    image_root: str = ".",
    judged: bool = False,
) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """The lines of a file of prompts. No image is opened yet.

    Args:
        config: The run's. A line's own DoLa keys win over it.
        path: JSON lines, each with `question` and, if it has some, `images` or one `image`, or with `conversation`; or
            POPE's `text` and `image`. Optionally with `id`, with keys of `DoLaConfig`, and with `answer`, with
            `choices` and one's index as `answer`, or with POPE's `label`. Empty lines do not count.
        processor: The checkpoint's.
        model_config: The checkpoint's; it limits layers and positions.
        key: What errors call the file.
        image_root: Folder of the images of lines in POPE's form.
        judged: Whether each line must have an answer.

    Returns:
        The good lines, and {"id", "error"} for each bad one.

    Raises:
        ValueError: The file cannot be read.
    """
    data = read_bytes(path, key)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:2]:
        raise ValueError(f"{key} must be UTF-8, got UTF-16 in {str(path)!r}")
    text_config = model_config.get_text_config()
    positions = text_config.max_position_embeddings
    lines = {number: _parse(line) for number, line in enumerate(data.splitlines(), 1) if line.strip()}
    first: dict[str | int, int] = {}  # id -> the line that has it
    for number, given in lines.items():
        if isinstance(given, dict) and is_id(given.get("id")):
            first.setdefault(given["id"], number)
    prompts: list[Prompt] = []
    errors: list[dict[str, Any]] = []
    for number, given in lines.items():
        name: str | int = f"line {number}"
        while name in first:  # the id of another line
            name = f"{name}'"
        try:
            if isinstance(given, ValueError):
                raise given
            own = given.get("id", name)
            if not is_id(own):
                raise ValueError(f"id must be a string or an integer, got {own!r}")
            if "id" in given and first[own] != number:
                raise ValueError(f"id must be of one line alone, got {own!r} on line {number} and on line {first[own]}")
            name = own
            form, *answer = _expected(given, image_root)
            if form is None and judged:
                raise ValueError("the line must have an answer, or a label")
            turns = build_conversation(
                config.roles, given.get("question"), given.get("images") or [], given.get("conversation")
            )
            dola = DoLaConfig(**merge(config.dola(), [{key: given[key] for key in DOLA_KEYS if key in given}]))
            dola.resolve_layers(text_config.num_hidden_layers)
            length = check_prompt(turns, processor, model_config, config.generation)
            if judged and (texts := answer[1] or ([answer[0]] if form == "answer" else [])):
                scored = encode_continuations(processor.tokenizer, texts)[0].shape[1]
                check_length(length, scored, positions, "of the longest answer")
            prompts.append(Prompt(name, turns, dola, length, form, *answer))
        except ValueError as error:
            errors.append({"id": name, "error": str(error)})
    return prompts, errors


def is_id(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def check_prompt(turns: list[dict[str, Any]], processor: Any, model_config: Any, generation: Mapping[str, Any]) -> int:
    """The prompt's length in tokens, after checking that it and its answer fit the model.

    Raises:
        ValueError: They do not.
    """
    positions = model_config.get_text_config().max_position_embeddings
    try:
        size = sum(len(turn["content"].encode()) for turn in turns)
    except UnicodeEncodeError as error:  # half a surrogate pair
        raise ValueError(f"prompt must be text that UTF-8 can encode, got {error.object!r}") from error
    if size > positions * longest_token(processor.tokenizer):  # the tokenizer would take minutes to find out
        raise ValueError(f"too long: {size} bytes of text are more than the model's {positions} positions hold")
    length = prompt_length(turns, processor)
    check_length(length, generation.get("max_new_tokens") or 1, positions)
    return length


@functools.lru_cache(maxsize=1)
def longest_token(tokenizer: Any) -> int:
    """The bytes of the longest token."""
    return max(map(len, tokenizer.get_vocab()))


def _parse(line: bytes) -> dict[str, Any] | ValueError:
    """The object on a line, or what is wrong with it."""
    try:
        given = json.loads(line)
        json.dumps(given, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text to tokenize
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {first_line(error)}")
    return given if isinstance(given, dict) else ValueError(f"a line must be a JSON object, got {str(given)[:80]!r}")


def _expected(given: dict[str, Any], image_root: str) -> tuple[str | None, Any, tuple[str, ...], str | None]:
    """Form, answer, choices, category. `images` stands for `image` afterwards, and for POPE's `text` `question`."""
    form = next((form for form, keys in FORMS.items() if keys <= given.keys()), None)
    for key in given:
        if key not in (allowed := POPE_KEYS if form == "pope" else KEYS):
            raise ValueError(unknown_key(key, allowed))
    if form is None and {"answer", "choices"} & given.keys():
        raise ValueError("answer must come with a question, and choices with an answer")
    answer, choices = given.get("answer"), given.get("choices")
    if form == "pope":
        answer = str(given["label"]).lower()
        if answer not in ("yes", "no"):
            raise ValueError(f"label must be yes or no, got {given['label']!r}")
        if not isinstance(given.get("image") or "", str):
            raise ValueError(f"image must be a path, got {given['image']!r}")
        if not isinstance(given.get("category"), (str, NoneType)):
            raise ValueError(f"category must be a string, such as random, got {given['category']!r}")
        given["question"] = given["text"]
        given["images"] = [os.path.join(image_root, given["image"])] if given.get("image") else []
    elif form == "choices":
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise ValueError(f"choices must be a list of at least two strings, got {choices!r}")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise ValueError(f"answer must be the index of a choice, 0 to {len(choices) - 1}, got {answer!r}")
    elif form == "answer":
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = str(answer)
        if not (isinstance(answer, str) and answer.strip()):
            raise ValueError(f"answer must be a string or a number, got {answer!r}")
    if form != "pope" and given.get("image") is not None:
        if given.get("images"):
            raise ValueError(f"image and images must not both be given, got {given['image']!r} and {given['images']!r}")
        given["images"] = [given["image"]]
    return form, answer, tuple(choices or ()), given.get("category")


def encode_prompt(turns: list[dict[str, Any]], processor: Any) -> list[int]:
    """The tokens of the prompt that `process_one` will make, with one for each image."""
    text = processor.apply_sft_template_for_multi_turn_prompts(
        turns, sft_format=processor.sft_format, system_prompt=processor.system_prompt
    )
    return processor.tokenizer.encode(text)


def prompt_length(turns: list[dict[str, Any]], processor: Any) -> int:
    """How many tokens that prompt has, without opening the images."""
    ids = torch.tensor(encode_prompt(turns, processor))  # [T without images]
    return len(processor.add_image_token((ids == processor.image_id).nonzero(), ids)[0])


def encode_continuations(tokenizer: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `DoLaJanusWrapper.score` takes of texts that continue a prompt: ids and mask, int64 [texts, T].

    A space comes before each, as after "Assistant:" in training.
    """
    rows = [torch.tensor(tokenizer.encode(" " + text, add_special_tokens=False)) for text in texts]
    ids, mask = (pad_sequence(part, batch_first=True) for part in (rows, [torch.ones_like(row) for row in rows]))
    return ids, mask


def open_images(turns: Sequence[Mapping[str, Any]], processor: Any) -> list[Image]:
    """The images of a conversation, each brought to the model's size before the next one is opened.

    Raises:
        ValueError: An image is missing or broken.
    """
    return [processor.image_processor.fit(load_image(image)) for turn in turns for image in turn.get("images", ())]


def build_conversation(
    roles: Sequence[str],
    question: str | None,
    images: Sequence[str | Image] = (),
    conversation: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """The turns to ask the model, the last one empty for its answer.

    Args:
        roles: The names of user and assistant.
        question: One question; image tags are put in front of it unless it has some.
        images: Paths, data URLs or PIL images, for `question`.
        conversation: Instead of `question`: turns with `content`, the user's first, and optional `role` and `images`.
            A role is one of `roles`, or user or assistant, which stand for them.

    Raises:
        ValueError: Both or none of `question` and `conversation`, an empty turn, or images not as many as image tags.
    """
    if not isinstance(question, (str, NoneType)):
        raise ValueError(f"question must be a string, got {question!r}")
    if not isinstance(conversation, (list, tuple, NoneType)):
        raise ValueError(f"conversation must be a list of turns, got {conversation!r}")
    if (question is None) == (not conversation):
        raise ValueError(
            f"exactly one of question and conversation must be given, got {question!r} and {conversation!r}"
        )
    images = check_images("images", images)
    if conversation:
        if images:
            raise ValueError(f"images go into the turns of a conversation, got {images} beside it")
        turns = [check_turn(i, turn, roles) for i, turn in enumerate(conversation)]
    else:
        if not (question or "").strip():
            raise ValueError(f"question must not be empty, got {question!r}")
        text = question if IMAGE_TAG in question else f"{IMAGE_TAG}\n" * len(images) + question  # type: ignore[operator]
        turns = [{"role": roles[0], "content": text, "images": images}]
    tags = sum(turn["content"].count(IMAGE_TAG) for turn in turns)
    given = sum(len(turn["images"]) for turn in turns)
    if tags != given:
        raise ValueError(f"images must be as many as the {IMAGE_TAG} in the text, got {given} for {tags}")
    if turns[-1]["role"] == roles[0]:
        turns.append({"role": roles[1], "content": "", "images": []})
    return turns


def check_images(name: str, images: Any) -> list[str | Image]:
    """The list of them, of which a single path may stand for one."""
    found = [images] if isinstance(images, str) else images
    if not isinstance(found, (list, tuple)) or not all(isinstance(image, (str, Image)) for image in found):
        raise ValueError(f"{name} must be a list of paths or data URLs, got {images!r}")
    return list(found)


def check_turn(index: int, turn: Any, roles: Sequence[str]) -> dict[str, Any]:
    where = f"turn {index + 1}"
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
        raise ValueError(f"conversation: {where} must have content, a string, got {turn!r}")
    if unknown := sorted(map(str, turn.keys() - {"role", "content", "images"})):
        raise ValueError(f"conversation: {where} has unknown keys {unknown}, allowed are role, content, images")
    role, images = turn.get("role", roles[index % 2]), turn.get("images") or []
    if role not in roles and role in USUAL_ROLES:
        role = roles[USUAL_ROLES.index(role)]
    if role not in roles:
        allowed = " and ".join(USUAL_ROLES)
        raise ValueError(f"conversation: role of {where} must be one of {list(roles)}, or {allowed}, got {role!r}")
    images = check_images(f"conversation: images of {where}", images)
    if not turn["content"].strip() and role == roles[0]:
        raise ValueError(f"conversation: {where} must not be empty, got {turn['content']!r}")
    return {"role": role, "content": turn["content"], "images": images}
