"""Questions of Janus in vLLM, and what the published processor and the wrapper say of them."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from engines import janus
from PIL import Image

from janus.models import MultiModalityCausalLM, VLChatProcessor
from janus_dola import DoLaConfig, DoLaJanusWrapper

# vLLM itself puts a transparent picture on white, where the published processor drops the transparency: not "rgba".
IMAGES = [Image.open(path) for path in sorted((Path(__file__).parents[1] / "golden/expected/images").glob("*.png"))]
QUESTIONS = [
    ("What is it?", IMAGES[:1]),
    ("Which is larger?", IMAGES[2:4]),
    ("它是什么？", []),
    ("And?", IMAGES[4:5]),
]


def prepare(question: str, images: list[Image.Image]) -> Any:
    """The published processor's inputs of a question."""
    turns = [
        {"role": "<|User|>", "content": "<image_placeholder>\n" * len(images) + question, "images": images},
        {"role": "<|Assistant|>", "content": ""},
    ]
    return VLChatProcessor.from_pretrained(janus()[0])(conversations=turns, images=images)


@cache
def published() -> Any:
    return MultiModalityCausalLM.from_pretrained(janus()[0], dtype=torch.float32).eval()


def wanted(question: str, images: list[Image.Image], config: DoLaConfig, model: Any = None) -> Any:
    """The published processor's inputs, and what the wrapper generates from them."""
    inputs = prepare(question, images)
    wrapper = DoLaJanusWrapper(model or published(), config)
    return inputs, wrapper.generate(
        inputs_embeds=wrapper.prepare_inputs_embeds(**inputs),
        attention_mask=inputs.attention_mask,
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
