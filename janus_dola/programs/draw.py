"""The program `draw`, which draws images. What it does is told by `keys.DrawConfig`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from janus.image_generation import build_prompt, generate_images
from janus_dola.programs import checkpoint
from janus_dola.programs.engine import is_out_of_memory
from janus_dola.programs.keys import DrawConfig
from janus_dola.programs.options import read_config
from janus_dola.programs.prompts import check_length

PATCH = 16  # pixels of a token's side


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
