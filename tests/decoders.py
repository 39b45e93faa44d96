"""Decoders with random weights to hold against the oracle, their prompts, and their logits read layer by layer."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

N, V = 8, 96
LAYERS = [2, 4, 5, 7]
ALPHA = 0.1
TEXT: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # so that no row ends
}
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10])
IDS = torch.tensor([[0, 0, 0, 1, 5, 6, 7, 8, 9, 10], [1, 20, 21, 22, 23, 24, 25, 26, 27, 28]])
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads would only wait for each other on matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case(NamedTuple):
    """A model, its prompt, and what it does to the logits that its head gives."""

    model: Any
    prompt: dict[str, Tensor]
    after_head: Callable[[Tensor], Tensor]


def unchanged(logits: Tensor) -> Tensor:
    return logits


@torch.no_grad()
def all_logits(case: Case, tokens: Tensor) -> np.ndarray:
    """Logits of every layer at the last position, [rows, N, V] in float64: no cache, one head call for each layer.

    Args:
        case: Its prompts [prompts, P] are repeated for the beams; tokens start with them.
        tokens: [rows, T].
    """
    model, each = case.model, len(tokens) // len(MASK)
    inputs = {name: value for name, value in case.prompt.items() if name != "input_ids"}
    for name, value in inputs.items():  # of Qwen2-VL's image patches, as many of each prompt
        inputs[name] = value.unflatten(0, (2, -1)).repeat_interleave(each, 0).flatten(0, 1)
    mask = torch.cat([MASK.repeat_interleave(each, 0), torch.ones_like(tokens[:, MASK.shape[1] :])], 1)
    if "mm_token_type_ids" in inputs:  # what is generated is text
        inputs["mm_token_type_ids"] = pad(inputs["mm_token_type_ids"], (0, tokens.shape[1] - MASK.shape[1]))
    if "image_grid_thw" in inputs:  # height and width of the image are in the positions
        where = model if hasattr(model, "get_rope_index") else model.model
        about = {name: value for name, value in inputs.items() if name != "pixel_values"}
        inputs["position_ids"] = where.get_rope_index(tokens, attention_mask=mask, **about)[0]
    else:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    plain = model(input_ids=tokens, attention_mask=mask, **inputs, use_cache=False, output_hidden_states=True)
    norm, head, hidden = model.get_decoder().norm, model.get_output_embeddings(), plain.hidden_states
    assert len(hidden) == N + 1
    # hidden_states[N] is normed
    exits = [head(norm(h[:, -1])) for h in hidden[1:N]] + [head(hidden[N][:, -1])]
    logits = case.after_head(torch.stack(exits, 1))
    torch.testing.assert_close(logits[:, -1], plain.logits[:, -1], atol=1e-5, rtol=1e-5)
    return logits.double().numpy()
