"""Decoders of other families, asked for by `--hf-overrides`."""

from typing import Any

import pytest
import torch
import transformers
from engines import LAYERS, SERVER, VOCAB, architecture, new_folder, run, serve
from llama_requests import KEYS, check, params, prompts, wanted

# Gemma's own: softcapping small enough to be felt, and sliding windows that end within the prompts.
OWN: dict[str, dict[str, Any]] = {
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 24,
        "sliding_window": 32,
    },
    "Gemma3": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 24, "sliding_window": 32},
}


@pytest.mark.parametrize("family", OWN)
def test_a_family_answers_as_the_wrapper(family: str) -> None:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": LAYERS}
    none = {"bos_token_id": None, "eos_token_id": None}
    kind = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, kind)(**sizes, **heads, **none, **OWN[family], initializer_range=0.15)
    config._attn_implementation = "eager"  # has softcapping
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.save_pretrained(folder := new_folder())
    asked = [({"prompt_token_ids": prompt}, params(own)) for prompt, own in zip(prompts(11), KEYS, strict=True)]
    # First, since vLLM's backend for transformers' classes decorates these.
    want = [wanted(model, prompt["prompt_token_ids"], own) for (prompt, _), own in zip(asked, KEYS, strict=True)]
    llm = serve(folder, SERVER, **architecture(f"DoLa{family}ForCausalLM"))
    for output, each in zip(run(llm, asked), want, strict=True):
        check(output, each)
