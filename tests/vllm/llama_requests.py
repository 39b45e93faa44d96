"""Requests of a decoder in vLLM, and what the wrapper says of them."""

from typing import Any

import torch
from engines import SERVER, VOCAB
from vllm import SamplingParams

from janus_dola import DoLaConfig, DoLaJanusWrapper

KEYS: list[dict[str, Any]] = [
    {"use_dola_lm": False},
    {"bucket_id": 0, "alpha": 0.0},
    {"bucket_id": 1},
    {"bucket_id": 2, "alpha": 0.3},
    {"candidate_layers": [5]},
    {"candidate_layers": [], "alpha": 0.5},
    {"method": "confident"},
    {"method": "deco", "deco_alpha": 1.5, "bucket_id": 0},
    {"method": "sled", "bucket_id": 2},
    {"method": "sled", "bucket_id": 1, "sled_rate": 5.0, "sled_top_k": 5},
    {},
]


def config(keys: dict[str, Any]) -> DoLaConfig:
    return DoLaConfig(**(SERVER | ({"candidate_layers": None} if "bucket_id" in keys else {}) | keys))


def params(keys: dict[str, Any], **arguments: Any) -> SamplingParams:
    defaults = {"temperature": 0, "max_tokens": 24, "detokenize": False, "logprobs": 0, "extra_args": keys or None}
    return SamplingParams(**(defaults | arguments))


def prompts(n: int, longest: int = 100) -> list[list[int]]:
    """Token ids of n prompts; every third begins as another does, for the prefix cache."""
    generator = torch.Generator().manual_seed(n + 1)
    made = [torch.randint(1, VOCAB, (3 + 17 * i % (longest - 2),), generator=generator).tolist() for i in range(n)]
    return [made[i - 4][:64] + prompt if i % 3 == 2 and i > 3 else prompt for i, prompt in enumerate(made)]


def wanted(model: Any, prompt: list[int], keys: dict[str, Any], **arguments: Any) -> tuple[list[int], torch.Tensor]:
    """The wrapper's tokens, and their log-probabilities."""
    output = DoLaJanusWrapper(model, config(keys)).generate(
        torch.tensor([prompt]),
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **({"max_new_tokens": 24} | arguments),
    )
    tokens = output.sequences[0, len(prompt) :].tolist()
    log_p = [torch.log_softmax(scores[0], -1)[x] for scores, x in zip(output.scores, tokens, strict=True)]
    return tokens, torch.stack(log_p)


def check(output: Any, want: tuple[list[int], torch.Tensor]) -> None:
    (completion,) = output.outputs
    assert list(completion.token_ids) == want[0]
    got = [each[x].logprob for x, each in zip(completion.token_ids, completion.logprobs, strict=True)]
    torch.testing.assert_close(torch.tensor(got), want[1], atol=1e-4, rtol=0)
