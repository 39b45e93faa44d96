"""Checkpoints: the one place that loads a model and its processor."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, JanusConfig, JanusForConditionalGeneration
from transformers.utils import logging

from janus.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor, VLMImageProcessor
from janus.models.processing_vlm import load_tokenizer
from janus.models.siglip_vit import tower_sizes
from janus.models.stored_sizes import check_depths, check_shapes, refuse, refuse_pointer, stored_shapes
from janus.utils.io import default_device
from janus_dola.programs.errors import first_line
from janus_dola.programs.generation import check_token_ids
from janus_dola.programs.options import ModelConfig
from janus_dola.wrapper import DoLaJanusWrapper

SMALL = 20_000_000  # weights


def pick_device(device: str, dtype: str, stored: torch.dtype | None = None) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that the config names; `stored` is the checkpoint's dtype.

    Raises:
        ValueError: The device is unknown, or not on this machine.
    """
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
        ValueError: It is not a Janus checkpoint, or has no text decoder (LLaMA's default has 7 billion weights).
    """
    if not path:
        raise ValueError("model_path must be a folder or a name on the hub, got ''")
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise ValueError(f"model_path {path!r} is not a checkpoint: it has no config.json")
    if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(
            f"model_path must be a folder or a name on the hub such as deepseek-ai/Janus-Pro-1B, got {path!r}"
        )
    with loading(path):
        for file in sorted(Path(path).glob("*.json")):  # of the hub's files none is a pointer
            refuse_pointer(path, file)
        given, _ = MultiModalityConfig.get_config_dict(path)
        if not isinstance(given, dict) or given.get("model_type") not in ("multi_modality", "janus"):
            wanted = "model_type multi_modality or janus"
            raise ValueError(f"model_path {path!r} is not a Janus checkpoint: its config.json has no {wanted}")
        if given["model_type"] == "janus" and not isinstance(given.get("text_config"), dict):  # as MultiModalityConfig
            raise ValueError(f"config.json: text_config must be a mapping, got {given.get('text_config')!r}")
        return AutoConfig.from_pretrained(path)


def load_processor(config: ModelConfig, model_config: Any) -> Any:
    """The checkpoint's processor, after checking all that can be known without its weights.

    Args:
        config: The program's.
        model_config: The checkpoint's, from `load_config`.

    Raises:
        ValueError: The checkpoint is broken, or lacks a layer of the DoLa keys or a token of `generation`.
    """
    text, path = model_config.get_text_config(), config.model_path
    config.resolve_layers(text.num_hidden_layers)
    check_token_ids(config.generation, text.vocab_size)
    with loading(path):
        if model_config.model_type == "multi_modality":
            processor = VLChatProcessor.from_pretrained(path)
            check_images(processor, **tower_sizes(**model_config.vision_config.params))
            return processor
        # Not transformers' JanusProcessor: it rounds the sizes of images differently, and may leave out the BOS.
        vision = model_config.vision_config
        settings, _ = VLMImageProcessor.get_image_processor_dict(path)
        image_processor = VLMImageProcessor.from_dict(settings | {"image_size": vision.image_size})
        num_image_tokens = (vision.image_size // vision.patch_size) ** 2
        return VLChatProcessor(image_processor, load_tokenizer(path), num_image_tokens=num_image_tokens)


def check_images(processor: VLChatProcessor, image_size: int, patch_size: int, **sizes: Any) -> None:
    """Refuses a processor that is not of the vision tower's sizes, before it makes anything of its own.

    Raises:
        ValueError: The images, or their tokens, are others than the tower's.
    """
    for file, key, found, wanted in (
        ("preprocessor_config.json", "image_size", processor.image_processor.image_size, image_size),
        ("processor_config.json", "num_image_tokens", processor.num_image_tokens, (image_size // patch_size) ** 2),
    ):
        if found != wanted:
            raise ValueError(f"{file}: {key} must be {wanted}, as the vision_config of config.json has it, got {found}")


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Errors of reading a checkpoint, as a ValueError that names it: a broken file may raise anything in its parser."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ValueError) or isinstance(error, json.JSONDecodeError):
            message = f"model_path {path!r} cannot be loaded: {type(error).__name__}: {first_line(error)}"
        elif path in str(error):
            raise
        else:
            message = f"model_path {path!r}: {error}"
        raise ValueError(message) from error


def load_model(config: ModelConfig, model_config: Any) -> Any:
    """The checkpoint's model on its device, in eval mode; `model_config` is the checkpoint's.

    Raises:
        ValueError: A weight is missing, has another shape, or cannot be read.
    """
    device, dtype = pick_device(config.device, config.dtype, model_config.dtype)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a table of all weights would come before the one line that names the wrong one
    try:
        with loading(config.model_path):
            native = model_config.model_type == "janus"
            load = load_native if native else MultiModalityCausalLM.from_pretrained
            model: Any = load(config.model_path, dtype=dtype)
            check_dtype(model, dtype)
            model = model.to(device).eval()
            return choose_threads(NativeJanus(model) if native else model)
    finally:
        logging.set_verbosity(verbosity)


def choose_threads(model: Any) -> Any:
    """The model, after leaving it one CPU thread if it is too small for more, unless OMP_NUM_THREADS says how many.

    On its matrices threads mostly wait for each other: where other programs run, three times as long as one computes.
    """
    if "OMP_NUM_THREADS" not in os.environ and sum(weight.numel() for weight in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    return model


def check_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Refuses a quantized model that has been unpacked to another dtype, which would stand beside the one asked for.

    Raises:
        ValueError: A weight that is not packed has another dtype.
    """
    found = {weight.dtype for weight in model.parameters() if weight.is_floating_point() and weight.itemsize > 1}
    if other := sorted(str(each).removeprefix("torch.") for each in found - {dtype}):
        raise ValueError(
            f"config.json: quantization_config makes weights of {other[0]} here: give dtype={other[0]}, or take it out"
        )


def load_native(path: str, dtype: torch.dtype) -> Any:
    """transformers' own Janus, except that a missing weight is an error, not a random tensor.

    Raises:
        ValueError: A weight is missing or has another shape.
    """
    config: Any = JanusConfig.from_pretrained(path)
    if (heads := config.vision_config.num_attention_heads) < 1:
        raise ValueError(f"config.json: vision_config.num_attention_heads must be at least 1, got {heads}")
    stored = stored_shapes(path, getattr(config, "quantization_config", None) is not None)
    if stored is not None:
        check_depths(native_depths(config), stored)
        check_shapes(lambda: JanusForConditionalGeneration(config), stored, path, renamed=True)
    loaded: Any = JanusForConditionalGeneration.from_pretrained(
        path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, info = loaded
    refuse(path, info["missing_keys"], info["mismatched_keys"])
    return model


def native_depths(config: Any) -> Iterator[tuple[str, Any, int, str]]:
    """What `check_depths` takes of a `JanusConfig`."""
    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    for key, layers, prefix in (
        ("text_config.num_hidden_layers", text.num_hidden_layers, "language_model.layers"),
        ("vision_config.num_hidden_layers", vision.num_hidden_layers, "vision_model.encoder.layers"),
        ("vq_config.num_res_blocks", vq.num_res_blocks, "vqmodel.encoder.down.0.block"),
    ):
        yield key, layers, layers, f"model.{prefix}"
    for key, depth, part in (
        ("vision_config.depth", vision.depth, "aligner"),
        ("vq_config.num_hidden_layers", vq.num_hidden_layers, "generation_aligner"),
    ):
        yield key, depth, depth - 1, f"model.{part}.hidden_layers"


def load(config: ModelConfig) -> tuple[DoLaJanusWrapper, Any]:
    """The wrapped model and its processor."""
    model_config = load_config(config.model_path)
    processor = load_processor(config, model_config)
    return DoLaJanusWrapper(load_model(config, model_config), config.dola()), processor
