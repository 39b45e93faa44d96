"""Decoders of other families, asked for by `--hf-overrides`."""

from typing import Any

import pytest
import torch
import transformers
from engines import LAYERS, SERVER, VOCAB, architecture, new_folder, run, serve
from test_decoders import KEYS, check, params, prompts, wanted


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_a_family_answers_as_the_wrapper(family: str) -> None:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": LAYERS}
    none = {"bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **none, initializer_range=0.15)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.save_pretrained(folder := new_folder())
    llm = serve(folder, SERVER, **architecture(f"DoLa{family}ForCausalLM"))
    asked = [({"prompt_token_ids": prompt}, params(own)) for prompt, own in zip(prompts(11), KEYS, strict=True)]
    for output, (prompt, _), own in zip(run(llm, asked), asked, KEYS, strict=True):
        check(output, wanted(model, prompt["prompt_token_ids"], own))
