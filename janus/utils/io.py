"""Loading of images and of pretrained models (`janus/utils/io.py`)."""

import base64
import io
import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from transformers import PreTrainedTokenizerFast

from janus.models import MultiModalityCausalLM, VLChatProcessor


def default_device() -> torch.device:
    """cuda where there is one, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_pretrained_model(
    model_path: str, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedTokenizerFast, VLChatProcessor, MultiModalityCausalLM]:
    """Loads a checkpoint for inference.

    Args:
        model_path: A folder, or a name on the hub.
        dtype: Of the model; bfloat16 on a GPU and float32 elsewhere by default.
        device: Where to; `default_device()` by default.

    Returns:
        The tokenizer, the processor and the model in eval mode.
    """
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    processor = VLChatProcessor.from_pretrained(model_path)
    model = MultiModalityCausalLM.from_pretrained(model_path, dtype=dtype)
    return processor.tokenizer, processor, model.to(device).eval()


def load_image(source: str | os.PathLike[str] | PIL.Image.Image) -> PIL.Image.Image:
    """Opens an image as RGB.

    Args:
        source: A path, a data URL (`data:image/png;base64,...`), or an image that is open already.

    Raises:
        ValueError: There is no such file, it is not a regular one, not an image that can be read, or it has more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    if isinstance(source, PIL.Image.Image):
        try:
            return source.convert("RGB")  # it may not be decoded yet
        except Exception as error:
            raise ValueError(f"images: cannot read {source!r}: {str(error) or type(error).__name__}") from error
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"images must hold paths or data URLs, got {source!r}")
    name = str(source)
    shown = name if len(name) <= 80 else name[:60] + "..."
    header, _, payload = name.partition(",")
    if name.startswith("data:") and not (header.startswith("data:image") and header.endswith(";base64")):
        raise ValueError(f"images: a data URL must start with data:image/TYPE;base64, got {shown!r}")
    limit = PIL.Image.MAX_IMAGE_PIXELS  # None where the user has switched it off
    if name.startswith("data:") and limit is not None and len(payload) > 4 * limit:  # 3 bytes a pixel, in base64
        raise ValueError(
            f"images: a data URL must have at most {4 * limit} characters, got {len(payload)} in {shown!r}"
        )
    try:
        if not name.startswith("data:") and not stat.S_ISREG(os.stat(source).st_mode):  # a FIFO would be waited for
            raise ValueError("it is not a regular file")
        file: Any = io.BytesIO(base64.b64decode(payload, validate=True)) if name.startswith("data:") else source
        with PIL.Image.open(file) as image:  # reads the header only
            if limit is not None and image.width * image.height > limit:  # where Pillow itself only warns, up to twice
                raise ValueError(f"{image.width}x{image.height} is more than {limit} pixels")
            if image.format == "EPS":
                raise ValueError("EPS is a program, which Ghostscript would run")
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"images: there is no file {shown!r}") from error
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"images: {shown!r} is not an image that Pillow can read") from error
    except Exception as error:  # Pillow's decoders may raise anything, and MemoryError where a file is absurd
        raise ValueError(f"images: cannot read {shown!r}: {str(error) or type(error).__name__}") from error


def load_pil_images(conversations: Sequence[Mapping[str, Any]]) -> list[PIL.Image.Image]:
    """Opens the images of a conversation, in order, as RGB.

    Args:
        conversations: Its turns; a turn may have `images`, a list of what `load_image` takes.

    Raises:
        ValueError: An image is missing or broken, or `images` is not a list, or a turn not a mapping.
    """
    for message in conversations:
        if not isinstance(message, Mapping):
            raise ValueError(
                f"conversations must be a list of turns, got {message!r} in {type(conversations).__name__}"
            )
        images = message.get("images", ())
        if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
            raise ValueError(f"images must be a list of paths or data URLs, got {images!r}")
    return [load_image(source) for message in conversations for source in message.get("images", ())]
