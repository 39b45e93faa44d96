"""Images to pixel values: longest side to `image_size`, padded to a square (`janus/models/image_processing_vlm.py`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, PretrainedConfig
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature


class VLMImageProcessorConfig(PretrainedConfig):
    model_type = "deepseek_vlm"


def expand2square(image: Image.Image, background_color: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of its longer side."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background_color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


class VLMImageProcessor(BaseImageProcessor):
    """Resizes, pads, rescales and normalises images.

    Args:
        image_size: Side of the square output in pixels.
        min_size: The shorter side is at least this, in pixels.
        image_mean, image_std: Per channel, of values in [0, 1]. The padding has the colour of `image_mean`.
        rescale_factor: Takes the values from [0, 255] to [0, 1].
        do_normalize: Whether to subtract the mean and divide by the deviation.

    Raises:
        ValueError: The sizes are not 1 <= min_size <= image_size, the mean or deviation is not that of 3 channels, or
            `rescale_factor` is not a number.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int,
        min_size: int = 14,
        image_mean: Sequence[float] | None = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] | None = (0.26862954, 0.26130258, 0.27577711),
        rescale_factor: float = 1.0 / 255.0,
        do_normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        if not (isinstance(image_size, int) and isinstance(min_size, int) and 1 <= min_size <= image_size):
            raise ValueError(f"image_size must be at least min_size, and that 1, got {image_size!r} and {min_size!r}")
        for name, values in (("image_mean", image_mean), ("image_std", image_std)) if do_normalize else ():
            if not isinstance(values, Sequence) or len(values) != 3 or (name == "image_std" and min(values) <= 0):
                raise ValueError(f"{name} must be 3 numbers (above 0 for image_std) to normalise with, got {values!r}")
        if not isinstance(rescale_factor, (int, float)):
            raise ValueError(f"rescale_factor must be a number, got {rescale_factor!r}")
        super().__init__(**kwargs)
        self.image_size = image_size
        self.min_size = min_size
        self.image_mean = image_mean
        self.image_std = image_std
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.background_color = (127, 127, 127) if image_mean is None else tuple(int(x * 255) for x in image_mean)

    @property
    def default_shape(self) -> list[int]:
        return [3, self.image_size, self.image_size]

    def fit(self, image: Image.Image) -> Image.Image:
        """An image of any size and mode to RGB, image_size x image_size. One that has been fitted stays as it is.

        Raises:
            ValueError: It has no pixel.
        """
        width, height = image.size
        if 0 in image.size:
            raise ValueError(f"images must have at least one pixel, got one of {width}x{height}")
        longest = max(width, height)
        new_width, new_height = (max(int(x / longest * self.image_size), self.min_size) for x in (width, height))
        # The published code asks torchvision, which does this to a PIL image; it has no build for every CPU torch.
        image = image.convert("RGB").resize((new_width, new_height), Image.Resampling.BICUBIC)
        return expand2square(image, self.background_color)

    def resize(self, image: Image.Image) -> np.ndarray:
        """An image of any size and mode to uint8 [3, image_size, image_size]."""
        return np.asarray(self.fit(image)).transpose(2, 0, 1)

    def preprocess(self, images: Sequence[Image.Image], return_tensors: str = "pt", **kwargs: Any) -> BatchFeature:
        """PIL images to `pixel_values`, float32 [n_images, 3, image_size, image_size].

        Raises:
            ValueError: `images` is not a list of PIL images with at least one pixel each.
        """
        if not isinstance(images, Sequence) or not all(isinstance(image, Image.Image) for image in images):
            raise ValueError(
                f"images must be a list of PIL images, got {str(images)[:80]}: load_pil_images opens paths"
            )
        pixel_values = np.zeros((len(images), *self.default_shape), dtype=np.float32)
        for i, image in enumerate(images):
            pixels = (self.resize(image).astype(np.float64) * self.rescale_factor).astype(np.float32)
            if self.do_normalize:
                mean, std = (np.asarray(x, dtype=np.float32)[:, None, None] for x in (self.image_mean, self.image_std))
                pixels = (pixels - mean) / std
            pixel_values[i] = pixels
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)


AutoImageProcessor.register(VLMImageProcessorConfig, slow_image_processor_class=VLMImageProcessor, exist_ok=True)
