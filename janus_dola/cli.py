"""What the command lines share: `key=value` configuration, one-line errors, loading, and building a conversation."""

import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from janus_dola.config import DoLaConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
IMAGE_TAG = "<image_placeholder>"
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Arguments of `generate` that are words, by number.
WORDS = ("eos_token_id", "pad_token_id", "bos_token_id", "forced_eos_token_id", "forced_bos_token_id")


@dataclass
class ModelConfig(DoLaConfig):
    """Which model to run, where, and how: the keys that all command lines have.

    Attributes:
        model_path: A folder, or a name on the hub, in the published layout or that of transformers' own Janus.
        roles: The names of user and assistant in the prompt.
        device: `auto`, or a PyTorch device.
        dtype: One of `DTYPES`; auto is what `pick_dtype` says.
        seed: Of all sampling.
        generation: Arguments of transformers' `generate`.
    """

    model_path: str = ""
    roles: list[str] = field(default_factory=lambda: ["<|User|>", "<|Assistant|>"])
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if len(self.roles) != 2:
            raise ValueError(f"roles must be two names, user and assistant, got {self.roles}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be a whole number of 64 bits, got {self.seed}")

    def dola(self) -> DoLaConfig:
        return DoLaConfig(**{key.name: getattr(self, key.name) for key in fields(DoLaConfig)})


def read_config(schema: type[T], argv: Sequence[str], default: Path | None) -> T:
    """`key=value` arguments over the file that `config=FILE` names over the default file, checked against `schema`.

    Args:
        schema: A dataclass; keys and types must be its own.
        argv: The arguments. A key whose type is `str` takes its value as it stands, others are YAML.
        default: The file with the defaults, if there is one.

    Raises:
        ValueError: A file is missing or broken, a key is unknown, or a value is wrong.
    """
    # Text is kept away from OmegaConf: "Is it red: yes?" is YAML for a dict, and "${x}" an interpolation.
    text_keys = {key.name for key in fields(schema) if key.type in (str, str | None)}
    texts: dict[str, str] = {}
    overrides: list[str] = []
    files = [] if default is None else [default]
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise ValueError(f"arguments must be written key=value, got {argument!r}")
        if key == "config":
            files.append(Path(value))
        elif key in text_keys:
            texts[key] = value
        else:
            overrides.append(argument)
    try:
        config = OmegaConf.merge(
            OmegaConf.structured(schema), *map(read_yaml, files), OmegaConf.from_dotlist(overrides)
        )
        values = OmegaConf.to_container(config, resolve=False, structured_config_mode=None)  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise ValueError(explain(error, schema)) from error
    except TypeError as error:  # a list for a mapping, or a mapping for a list, of which OmegaConf does not say where
        raise ValueError(f"config: a list and a mapping stand for the same key: {first_line(error)}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"arguments {overrides} are not YAML: {first_line(error)}") from error
    merged: dict[str, Any] = {str(key): value for key, value in dict(values).items()}  # type: ignore[arg-type]
    refuse_interpolations(merged)
    return schema(**(merged | texts))


def read_yaml(path: Path) -> Any:
    try:
        loaded = OmegaConf.create(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except OSError as error:
        raise ValueError(f"config must name a file that can be read, got {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"config {str(path)!r} is not a YAML mapping: {first_line(error)}") from error
    if not OmegaConf.is_dict(loaded):
        raise ValueError(f"config {str(path)!r} must be a YAML mapping, got a list")
    return loaded


def refuse_interpolations(value: Any, key: str = "") -> None:
    """A configuration is data: `${oc.env:SECRET}` must not read the environment."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            refuse_interpolations(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            refuse_interpolations(item, key)
    elif isinstance(value, str) and "${" in value:
        raise ValueError(f"{key} must not use an interpolation, got {value!r}")


def explain(error: OmegaConfBaseException, schema: type) -> str:
    """OmegaConf's error in one line, with the near miss of an unknown key."""
    key = str(error.full_key or error.key or "")
    names = [item.name for item in fields(schema)]
    if key and re.split(r"[.\[]", key)[0] not in names:
        return unknown_key(key, names)
    return f"{key or 'config'}: {first_line(error)}"


def unknown_key(key: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1)
    return f"unknown key {key!r}, " + (f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(names)}")


def check_settings(path: Path, holds: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """For a file that a run goes on with: what it `holds` must have been made with the same settings.

    Raises:
        ValueError: They differ; the message names in what.
    """
    if differs := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in differs)
        raise ValueError(f"output: {str(path)!r} holds {holds} of other settings ({changes}); give another output")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def main(run: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command line: an error of the user's is one line on stderr and exit code 2."""
    try:
        sys.exit(run(sys.argv[1:]) or 0)
    except (ValueError, OSError, ImportError) as error:  # a file that cannot be written, an extra not installed
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_generation(generation: Mapping[str, Any]) -> None:
    """Refuses what `generate` does not take.

    Raises:
        ValueError: A key is unknown, or its value is of another type or out of range.
    """
    from transformers import GenerationConfig

    names = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for key in generation:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = (
                f", did you mean {'generation.' + near[0]!r}?" if near else ", transformers' generate does not take it"
            )
            raise ValueError(f"unknown key {'generation.' + key!r}{hint}")
    if generation.get("return_dict_in_generate"):
        raise ValueError("generation.return_dict_in_generate must be left off: the answers alone are printed")
    # transformers checks some of these too late, or divides by them.
    for key in ("max_new_tokens", "num_beams", "num_return_sequences"):
        value = generation.get(key, 1)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"generation.{key} must be a whole number of at least 1, got {value!r}")
    for key in WORDS:
        for token in as_list(value := generation.get(key)):
            if token is not None and (not isinstance(token, int) or token < 0):
                raise ValueError(f"generation.{key} must be the number of a word, or some, got {value!r}")
    try:
        GenerationConfig(**generation)
    except TypeError as error:
        raise ValueError(f"generation: {first_line(error)}, got {dict(generation)}") from error


def pick_device(device: str, dtype: str, stored: torch.dtype | None = None) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that the config's words stand for; `stored` is the checkpoint's dtype.

    Raises:
        ValueError: The device is unknown, or not on this machine.
    """
    from janus.utils.io import default_device

    if device == "auto":
        device = default_device().type
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # meta has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device must be auto, cpu, cuda or mps, and be there, got {device!r}: {first_line(error)}"
        ) from error
    return chosen, pick_dtype(chosen, stored) if dtype == "auto" else getattr(torch, dtype)


def pick_dtype(device: torch.device, stored: torch.dtype | None) -> torch.dtype:
    """bfloat16 on cuda, and where a checkpoint of bfloat16 meets a device that multiplies it natively; else float32.

    Args:
        device: The device.
        stored: What the checkpoint's config.json calls its dtype.
    """
    native = device.type in ("cuda", "mps")
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # not before PyTorch 2.10
        native = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if device.type == "cuda" or (native and stored == torch.bfloat16) else torch.float32


class NativeJanus(nn.Module):
    """transformers' `JanusForConditionalGeneration`, with the parts of the published model that the command lines use.

    Args:
        model: The model; it is the language model as well, for it generates text from embeddings.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.language_model = model
        self.device, self.dtype = model.device, model.dtype

    def prepare_inputs_embeds(
        self, input_ids: Tensor, pixel_values: Tensor, images_seq_mask: Tensor, images_emb_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """As `MultiModalityCausalLM.prepare_inputs_embeds`, [B, T, D]; see there for the arguments."""
        images = self.language_model.model.get_image_features(pixel_values.flatten(0, 1)).pooler_output
        inputs_embeds = self.language_model.get_input_embeddings()(input_ids)  # [B, T, D]
        return inputs_embeds.masked_scatter(images_seq_mask[..., None], images[images_emb_mask.flatten(0, 1)])


def load_config(path: str) -> Any:
    """A checkpoint's `MultiModalityConfig`, of the published layout, or `JanusConfig`, of transformers' own.

    Raises:
        ValueError: It is no Janus checkpoint, or has no text decoder (LLaMA's default has 7 billion weights).
    """
    from transformers import AutoConfig

    from janus.models import MultiModalityConfig

    given, _ = MultiModalityConfig.get_config_dict(path)
    if not isinstance(given, dict) or given.get("model_type") not in ("multi_modality", "janus"):
        raise ValueError(
            f"model_path {path!r} is no Janus checkpoint: its config.json has no model_type multi_modality or janus"
        )
    if given["model_type"] == "janus" and not isinstance(given.get("text_config"), dict):  # as MultiModalityConfig does
        raise ValueError(f"config.json: text_config must be a mapping, got {given.get('text_config')!r}")
    return AutoConfig.from_pretrained(path)


def load_processor(config: ModelConfig) -> Any:
    """The checkpoint's processor, after checking all that can be known without its weights.

    Raises:
        ValueError: There is no Janus checkpoint, or it lacks a layer of the DoLa keys or a word of `generation`.
    """
    # Only the command lines know janus: the library wraps the published package, too.
    from janus.models import VLChatProcessor, VLMImageProcessor
    from janus.models.processing_vlm import load_tokenizer

    path = config.model_path
    folder = Path(path)
    if not path:
        raise ValueError("model_path must be a folder or a name on the hub, got ''")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model_path {path!r} is no checkpoint: it has no config.json")
    if not folder.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(
            f"model_path must be a folder or a name on the hub such as deepseek-ai/Janus-Pro-1B, got {path!r}"
        )
    with loading(path):
        model_config = load_config(path)
        language_config = model_config.get_text_config()
        config.resolve_layers(language_config.num_hidden_layers)
        words = language_config.vocab_size
        for key in WORDS:  # transformers would find out in the last step, or when the first row ends
            for token in as_list(config.generation.get(key)):
                if token is not None and token >= words:
                    raise ValueError(f"generation.{key} must be below {words}, the model's words, got {token}")
        if model_config.model_type == "multi_modality":
            return VLChatProcessor.from_pretrained(path)
        # Not transformers' JanusProcessor: it rounds the sizes of images differently, and may leave out the BOS.
        vision = model_config.vision_config
        settings, _ = VLMImageProcessor.get_image_processor_dict(path)
        image_processor = VLMImageProcessor.from_dict(settings | {"image_size": vision.image_size})
        num_image_tokens = (vision.image_size // vision.patch_size) ** 2
        return VLChatProcessor(image_processor, load_tokenizer(path), num_image_tokens=num_image_tokens)


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Errors of reading a checkpoint, as a ValueError that names it: a broken file may raise anything in its parser."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            raise
        raise ValueError(
            f"model_path {path!r} cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error


def load_model(config: ModelConfig) -> Any:
    """The checkpoint's model on its device, in eval mode.

    Raises:
        ValueError: A weight is missing, has another shape, or cannot be read.
    """
    from transformers.utils import logging

    from janus.models import MultiModalityCausalLM

    device, dtype = pick_device(config.device, config.dtype, load_config(config.model_path).dtype)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a table of all weights would come before the one line that names the wrong one
    try:
        with loading(config.model_path):
            if load_config(config.model_path).model_type == "janus":
                return NativeJanus(load_native(config.model_path, dtype).to(device).eval())
            return MultiModalityCausalLM.from_pretrained(config.model_path, dtype=dtype).to(device).eval()
    finally:
        logging.set_verbosity(verbosity)


def load_native(path: str, dtype: torch.dtype) -> Any:
    """transformers' own Janus, except that a missing weight is an error, not a random tensor.

    Raises:
        ValueError: A weight is missing or has another shape.
    """
    from transformers import JanusForConditionalGeneration

    loaded: Any = JanusForConditionalGeneration.from_pretrained(
        path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, info = loaded
    if wrong := sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"model_path {path!r} lacks the weights {', '.join(wrong[:3])}{more}, or has them in another shape than "
            "its config.json describes"
        )
    return model


def build_conversation(
    roles: Sequence[str],
    question: str | None,
    images: Sequence[str] = (),
    conversation: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """The turns to ask the model, the last one empty for its answer.

    Args:
        roles: The names of user and assistant.
        question: One question; image tags are put in front of it unless it has some.
        images: Paths or data URLs, for `question`.
        conversation: Instead of `question`: turns with `content`, the user's first, and optional `role` and `images`.

    Raises:
        ValueError: Both or none of `question` and `conversation`, an empty turn, or images not as many as image tags.
    """
    if (question is None) == (not conversation):
        raise ValueError(
            f"exactly one of question and conversation must be given, got {question!r} and {conversation!r}"
        )
    if conversation:
        if not isinstance(conversation, Sequence) or isinstance(conversation, str):
            raise ValueError(f"conversation must be a list of turns, got {conversation!r}")
        turns = [check_turn(i, turn, roles) for i, turn in enumerate(conversation)]
        if images:
            raise ValueError(f"images go into the turns of a conversation, got {list(images)} beside it")
    else:
        if not (question or "").strip():
            raise ValueError(f"question must not be empty, got {question!r}")
        text = question if IMAGE_TAG in question else f"{IMAGE_TAG}\n" * len(images) + question  # type: ignore[operator]
        turns = [{"role": roles[0], "content": text, "images": list(images)}]
    tags = sum(turn["content"].count(IMAGE_TAG) for turn in turns)
    given = sum(len(turn["images"]) for turn in turns)
    if tags != given:
        raise ValueError(f"images must be as many as the {IMAGE_TAG} in the text, got {given} for {tags}")
    if turns[-1]["role"] == roles[0]:
        turns.append({"role": roles[1], "content": "", "images": []})
    return turns


def check_turn(index: int, turn: Any, roles: Sequence[str]) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
        raise ValueError(f"conversation: turn {index + 1} must have content, a text, got {turn!r}")
    if unknown := sorted(map(str, turn.keys() - {"role", "content", "images"})):
        raise ValueError(
            f"conversation: turn {index + 1} has unknown keys {unknown}, allowed are role, content, images"
        )
    role, images = turn.get("role", roles[index % 2]), turn.get("images") or []
    if role not in roles:
        raise ValueError(f"conversation: role of turn {index + 1} must be one of {list(roles)}, got {role!r}")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(
            f"conversation: images of turn {index + 1} must be a list of paths or data URLs, got {images!r}"
        )
    if not turn["content"].strip() and role == roles[0]:
        raise ValueError(f"conversation: turn {index + 1} must not be empty, got {turn['content']!r}")
    return {"role": role, "content": turn["content"], "images": images}
