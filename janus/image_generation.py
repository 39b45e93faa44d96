"""Text to image: the loop of the published `generation_inference.py`, once."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from janus.models import VLChatProcessor


def build_prompt(processor: VLChatProcessor, text: str) -> str:
    """The prompt that asks for an image of `text`, in the checkpoint's conversation format."""
    user, assistant = processor.new_chat_template().roles
    turns = [{"role": user, "content": text}, {"role": assistant, "content": ""}]
    prompt = processor.apply_sft_template_for_multi_turn_prompts(turns, sft_format=processor.sft_format)
    return prompt + processor.image_start_tag


@torch.no_grad()
def generate_images(
    model: Any,
    processor: VLChatProcessor,
    prompt: str,
    temperature: float = 1.0,
    parallel_size: int = 16,
    cfg_weight: float = 5.0,
    image_token_num_per_image: int = 576,
    img_size: int = 384,
    patch_size: int = 16,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, np.ndarray]:
    """Draws images with classifier-free guidance.

    Args:
        model: `MultiModalityCausalLM`, or a wrapper with its attributes.
        processor: The checkpoint's processor.
        prompt: As `build_prompt` makes it.
        temperature: Of the sampling; 0 takes the most likely token.
        parallel_size: Number of images, P.
        cfg_weight: Weight of the conditional logits over the unconditional ones.
        image_token_num_per_image: Tokens of an image, `(img_size / patch_size) ** 2`.
        img_size: Side of an image in pixels.
        patch_size: Side in pixels of the square that a token stands for.
        generator: Source of randomness, on the model's device.

    Returns:
        The tokens, int64 [P, image_token_num_per_image], and the images, uint8 [P, img_size, img_size, 3].

    Raises:
        ValueError: `temperature` is negative, or the sizes do not fit each other.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if parallel_size < 1:
        raise ValueError(f"parallel_size must be at least 1, got {parallel_size}")
    if patch_size != (pixels := 2 ** (len(model.gen_vision_model.decoder.conv_blocks) - 1)):
        raise ValueError(f"patch_size must be {pixels}, the pixels of a token in this model, got {patch_size}")
    if img_size < patch_size or img_size % patch_size:
        raise ValueError(f"img_size must be a positive multiple of patch_size {patch_size}, got {img_size}")
    side = img_size // patch_size
    if side**2 != image_token_num_per_image:
        raise ValueError(
            f"image_token_num_per_image must be (img_size // patch_size) ** 2 = {side**2}, "
            f"got {image_token_num_per_image}"
        )
    embed = model.language_model.get_input_embeddings()
    input_ids = torch.tensor(processor.tokenizer.encode(prompt), device=embed.weight.device)
    rows = input_ids.repeat(2 * parallel_size, 1)  # [2P, T], conditional and unconditional in turn
    rows[1::2, 1:-1] = processor.pad_id
    inputs_embeds, cache = embed(rows), None

    tokens = torch.zeros(parallel_size, image_token_num_per_image, dtype=torch.long, device=rows.device)
    for i in tqdm(range(image_token_num_per_image), desc="image tokens", disable=None, leave=False):
        outputs = model.language_model.model(inputs_embeds=inputs_embeds, use_cache=True, past_key_values=cache)
        cache = outputs.past_key_values
        logits = model.gen_head(outputs.last_hidden_state[:, -1])  # [2P, V]
        conditional, unconditional = logits[0::2], logits[1::2]
        logits = unconditional + cfg_weight * (conditional - unconditional)  # [P, V]
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            probs = torch.softmax(logits / temperature, dim=-1)
            token = torch.multinomial(probs, num_samples=1, generator=generator)[:, 0]
        tokens[:, i] = token
        inputs_embeds = model.prepare_gen_img_embeds(token.repeat_interleave(2)).unsqueeze(1)  # [2P, 1, D]

    channels = model.gen_vision_model.quantize.embedding.embedding_dim
    decoded = model.gen_vision_model.decode_code(tokens, shape=[parallel_size, channels, side, side])
    images = ((decoded.float() + 1) / 2 * 255).clamp(0, 255).permute(0, 2, 3, 1)  # [P, H, W, 3]
    return tokens, images.to(torch.uint8).cpu().numpy()
