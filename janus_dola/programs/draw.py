"""Draws images: janus-dola draw prompt=TEXT output=FOLDER [config=FILE] key=value ...

    janus-dola draw config=configs/janus_pro_7b.yaml prompt="A red apple on a table" output=apples

What `generation_inference.py`, the published script, does, with its defaults; DoLa is for text alone. From Python:
`janus.image_generation`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from janus.image_generation import build_prompt, generate_images
from janus_dola.config import option
from janus_dola.programs import checkpoint
from janus_dola.programs.engine import is_out_of_memory
from janus_dola.programs.options import NO_MODEL, ModelConfig, read_config
from janus_dola.programs.prompts import check_length

PATCH = 16  # pixels of a token's side


@dataclass
class DrawConfig:
    """The keys; there is no default model, since the demo's image part is not trained."""

    prompt: str = option("", "what to draw")
    output: str = option("generated_samples", "a folder for img_0.png, img_1.png, ...; those of that name are replaced")
    model_path: str = option("", "a folder, or a name on the hub, in the published layout")
    parallel_size: int = option(16, "number of images, which are drawn together")
    cfg_weight: float = option(5.0, "weight of the prompt in classifier-free guidance; 1: no guidance")
    temperature: float = option(1.0, "temperature of the sampling; 0: the likeliest token")
    seed: int = option(0, "the same seed draws the same images")
    device: str = option("auto", "auto: cuda, else mps, else cpu; or a PyTorch device, such as cuda:1")
    dtype: str = option("auto", "or float32, bfloat16, float16; auto as for `answer`")

    def __post_init__(self) -> None:
        if not self.model_path:
            raise ValueError(NO_MODEL)
        if not self.prompt.strip():
            raise ValueError(f"prompt must not be empty, got {self.prompt!r}")
        if self.parallel_size < 1:
            raise ValueError(f"parallel_size must be at least 1, got {self.parallel_size}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        self.model()  # checks its own

    def model(self) -> ModelConfig:
        return ModelConfig(model_path=self.model_path, device=self.device, dtype=self.dtype, seed=self.seed)


def run(argv: Sequence[str]) -> None:
    config = read_config(DrawConfig, argv, None)
    model_config = checkpoint.load_config(config.model_path)
    if model_config.model_type != "multi_modality":
        raise ValueError(f"model_path {config.model_path!r} must be in the published layout, got transformers' own")
    processor = checkpoint.load_processor(config.model(), model_config)
    prompt, size = build_prompt(processor, config.prompt), processor.image_processor.image_size
    tokens = (size // PATCH) ** 2
    positions = model_config.get_text_config().max_position_embeddings
    check_length(len(processor.tokenizer.encode(prompt)), tokens, positions, "of an image")
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    model = checkpoint.load_model(config.model(), model_config)
    generator = torch.Generator(model.device).manual_seed(config.seed)
    arguments = (config.temperature, config.parallel_size, config.cfg_weight, tokens, size, PATCH)
    try:
        _, images = generate_images(model, processor, prompt, *arguments, generator=generator)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"out of memory: parallel_size {config.parallel_size} is too much") from error
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"img_{i}.png")
    print(f"{folder}: img_*.png, {len(images)} of {size}x{size} pixels, seed {config.seed}", file=sys.stderr)
