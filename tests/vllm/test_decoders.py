"""A decoder in vLLM's batches says what `DoLaJanusWrapper` says, whoever else is in the batch."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from engines import LAYERS, SERVER, VOCAB, architecture, llama, new_folder, run, serve
from llama_requests import KEYS, check, config, params, prompts, wanted
from scipy.stats import chisquare
from transformers import AutoConfig, GenerationConfig
from vllm.exceptions import VLLMValidationError

from janus_dola import DoLaConfig
from janus_dola.vllm import exits as exits_module

STOP = [7, 77]


@pytest.fixture(scope="module")
def llm() -> Any:
    """Prompts in chunks of 64 tokens, and a cache of 24 blocks of 32 for eight requests of up to 6."""
    return serve(
        llama()[0],
        SERVER,
        max_num_batched_tokens=64,
        block_size=32,
        num_gpu_blocks_override=24,
        disable_log_stats=False,
        **architecture("DoLaLlamaForCausalLM"),
    )


def test_200_requests_come_and_go(llm: Any) -> None:
    """All configurations in one batch; some answers end early, prompts share beginnings, some requests are preempted.

    Every token is equal, but for ties within float32's rounding: with other prompts one falls otherwise now and then.
    """
    asked = prompts(200)
    keys = [KEYS[(i + i // 11) % len(KEYS)] for i in range(200)]
    lengths = [4 + 5 * i % 29 for i in range(200)]
    requests = [
        ({"prompt_token_ids": prompt}, params(own, max_tokens=n, stop_token_ids=STOP))
        for prompt, own, n in zip(asked, keys, lengths, strict=True)
    ]
    outputs = run(llm, requests, arrivals=[3 * (i // 2) for i in range(200)])
    for output, prompt, own, n in zip(outputs, asked, keys, lengths, strict=True):
        check(output, wanted(llama()[1], prompt, own, max_new_tokens=n, eos_token_id=STOP))
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > 150
    assert any(output.outputs[0].finish_reason == "stop" for output in outputs)
    assert any(output.num_cached_tokens >= 64 for output in outputs)
    assert sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions") > 0


@pytest.mark.parametrize("keys", [KEYS[1], KEYS[3], KEYS[6], KEYS[9], {}])
def test_every_step_is_the_oracles(llm: Any, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "N", LAYERS)
    asked = prompts(4)
    outputs = run(llm, [({"prompt_token_ids": prompt}, params(keys, logprobs=-1, max_tokens=6)) for prompt in asked])
    model = SimpleNamespace(language_model=llama()[1])
    for prompt, output in zip(asked, outputs, strict=True):
        (completion,) = output.outputs
        for t, step in enumerate(completion.logprobs):
            got = torch.tensor([[step[x].logprob for x in range(VOCAB)]])
            embeds = llama()[1].get_input_embeddings()(torch.tensor([prompt]))
            tokens = torch.tensor([completion.token_ids[:t]], dtype=torch.long)
            logits = oracle.all_logits(model, embeds, torch.ones(1, len(prompt), dtype=torch.long), tokens)
            oracle.assert_scores(got, oracle.oracle_step(logits, logits[:, -1], config(keys)))


def test_a_seed_draws_the_same_tokens_twice(llm: Any) -> None:
    """Alone and in a batch, with temperature and top-p after DoLa."""
    (prompt,) = prompts(1)
    drawn = params(KEYS[1], temperature=0.9, top_p=0.95, seed=5)
    (alone,) = run(llm, [({"prompt_token_ids": prompt}, drawn)])
    others = [({"prompt_token_ids": each}, params(own)) for each, own in zip(prompts(6), KEYS, strict=False)]
    *_, again = run(llm, [*others, ({"prompt_token_ids": prompt}, drawn)])
    assert again.outputs[0].token_ids == alone.outputs[0].token_ids


def test_2000_draws_are_distributed_as_p_hat(llm: Any) -> None:
    (prompt,) = prompts(1)
    drawn = params({"bucket_id": 1, "alpha": 0.1}, temperature=1, seed=1, n=2000, max_tokens=1, logprobs=-1)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], [drawn], use_tqdm=False)
    step = output.outputs[0].logprobs[0]
    p = np.exp([step[x].logprob for x in range(VOCAB)])
    counts = np.bincount([completion.token_ids[0] for completion in output.outputs], minlength=VOCAB)
    assert len(output.outputs) == 2000 and (p > 0).sum() > 3
    assert counts[p == 0].sum() == 0
    assert chisquare(counts[p > 0], p[p > 0] / p.sum() * 2000).pvalue > 1e-3


def test_exits_are_read_for_batches_that_want_them(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, read_head = [], exits_module.read_head

    def spy(*args: Any) -> Any:
        seen.append(exits_module.EXITS.wanted)
        return read_head(*args)

    monkeypatch.setattr(exits_module, "read_head", spy)
    (prompt,) = prompts(1)
    off = ({"prompt_token_ids": prompt}, params({"use_dola_lm": False}, max_tokens=6))
    nothing = ({"prompt_token_ids": prompt}, params({"candidate_layers": [], "alpha": 0.0}, max_tokens=6))
    run(llm, [off, nothing])
    assert seen == [False] * 6
    seen.clear()
    run(llm, [off, ({"prompt_token_ids": prompt}, params({}, max_tokens=3))])
    assert seen == [True] * 3 + [False] * 3


BAD = {
    "alhpa": ({"alhpa": 0.2}, r"unknown key 'alhpa', did you mean 'alpha'\?"),
    "alpha": ({"alpha": 7}, r"alpha must be in \[0, 1\], got 7"),
    "type": ({"alpha": "0.2"}, r"alpha must be in \[0, 1\], got '0.2'"),
    "bucket": ({"bucket_id": 3}, "bucket_id must be 0, 1 or 2, got 3"),
    "method": ({"method": "decco"}, "method must be dola, deco, sled or confident, got 'decco', did you mean 'deco'"),
    "of another method": ({"sled_rate": 3.0}, "sled_rate is of method sled"),
    "switch": ({"use_dola_lm": "off"}, "use_dola_lm must be true or false, got 'off'"),
    "layer": ({"candidate_layers": [40]}, "candidate_layers must be in 1...12, the model's layers, got 40"),
    "layers": ({"candidate_layers": "all"}, "candidate_layers must be integers"),
}


@pytest.mark.parametrize("keys, error", BAD.values(), ids=BAD)
def test_bad_requests_are_refused_and_the_next_is_right(llm: Any, keys: dict[str, Any], error: str) -> None:
    (prompt,) = prompts(1)
    with pytest.raises(VLLMValidationError, match=error):
        llm.llm_engine.add_request("bad", {"prompt_token_ids": prompt}, params(keys))
    (output,) = run(llm, [({"prompt_token_ids": prompt}, params(KEYS[2]))])
    check(output, wanted(llama()[1], prompt, KEYS[2]))


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.2}, {"presence_penalty": 1}, {"frequency_penalty": 1}])
def test_penalties_are_refused_where_they_would_come_after_dola(llm: Any, penalty: dict[str, float]) -> None:
    (prompt,) = prompts(1)
    with pytest.raises(VLLMValidationError, match=f"{next(iter(penalty))} must be .* with DoLa"):
        llm.llm_engine.add_request("bad", {"prompt_token_ids": prompt}, params({}, **penalty))
    (output,) = run(llm, [({"prompt_token_ids": prompt}, params({"use_dola_lm": False}, **penalty))])
    assert len(output.outputs[0].token_ids) == 24


def test_the_folder_configures_the_server() -> None:
    """Without keys of its own a request gets generation_config.json's; a layer that is not read is refused."""
    folder, model = llama()
    keys = asdict(DoLaConfig(bucket_id=1, alpha=0.3))
    GenerationConfig(**keys).save_pretrained(folder)
    (prompt,) = prompts(1)
    try:
        llm = serve(folder, **architecture("DoLaLlamaForCausalLM"))
    finally:
        model.generation_config.save_pretrained(folder)
    (output,) = run(llm, [({"prompt_token_ids": prompt}, params({}))])
    check(output, wanted(model, prompt, keys))
    with pytest.raises(VLLMValidationError, match=r"among \[5, 6, 7, 8\], which this server reads, got \[9, 10, 11\]"):
        llm.llm_engine.add_request("bad", {"prompt_token_ids": prompt}, params({"bucket_id": 2}))


START = {
    "key": ({"dola": {"alpah": 0.1}}, {}, "unknown key 'alpah', did you mean 'alpha'"),
    "layer": ({"dola": {"candidate_layers": [13]}}, {}, "candidate_layers must be in 1...12"),
    "list": ({"dola": [1]}, {}, "dola must be a mapping"),
    "n-gram on the older runner": (
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        "speculative_config must be None, or n-gram on vLLM's model runner V2, with DoLa, got ngram",
    ),
    "batch-sharded": (
        {},
        {"enable_batch_sharded_sampling": True},
        "enable_batch_sharded_sampling must be off with DoLa",
    ),
}


@pytest.mark.parametrize("additional, arguments, error", START.values(), ids=START)
def test_a_server_that_cannot_be_right_does_not_start(
    additional: dict[str, Any], arguments: dict[str, Any], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        serve(llama()[0], additional_config=additional, **arguments, **architecture("DoLaLlamaForCausalLM"))


def test_eagle_3_is_refused() -> None:
    """Its drafter's configuration is all that is looked at before."""
    config = AutoConfig.from_pretrained(llama()[0])
    config.architectures, config.num_hidden_layers, config.draft_vocab_size = ["LlamaForCausalLMEagle3"], 1, VOCAB
    config.save_pretrained(folder := new_folder())
    drafter = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="n-gram on vLLM's model runner V2, with DoLa, got eagle3"):
        serve(llama()[0], speculative_config=drafter, **architecture("DoLaLlamaForCausalLM"))
