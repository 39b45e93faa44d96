"""`wrapper.score` against step-by-step decoding and against plain forward passes."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from janus_dola import DoLaConfig, DoLaJanusWrapper, DoLaTrace
from janus_dola import wrapper as wrapper_module
from janus_dola.processor import DoLaLogitsProcessor

EOS = 481
CONFIGS = [
    DoLaConfig(use_dola_lm=False),
    DoLaConfig(alpha=0.3, bucket_id=0),
    DoLaConfig(alpha=0.3, bucket_id=2),
    DoLaConfig(alpha=0.0, bucket_id=2),
    DoLaConfig(alpha=0.1, candidate_layers=[15]),
    DoLaConfig(alpha=0.5, candidate_layers=[]),
    DoLaConfig(method="deco"),
    DoLaConfig(method="confident"),
    DoLaConfig(method="sled", sled_top_k=40, bucket_id=1),
]


@pytest.fixture
def wrapper(model: Any) -> DoLaJanusWrapper:
    return DoLaJanusWrapper(model, CONFIGS[2])


@pytest.fixture(scope="module")
def prompts(model: Any, prompt: dict[str, Any]) -> dict[str, Tensor]:
    """A left-padded batch of 3; right-padded continuations of 6, 4 and 1 tokens, most of them the model's own."""
    torch.manual_seed(0)
    ids = model.language_model.generate(**prompt | {"max_new_tokens": 6, "eos_token_id": 511, "do_sample": True})
    ids[1, 2:] = torch.randint(0, 480, (4,))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    return {
        "inputs_embeds": prompt["inputs_embeds"],
        "attention_mask": prompt["attention_mask"],
        "continuation_ids": ids.masked_fill(mask == 0, -100),
        "continuation_mask": mask,
    }


def test_equals_decoding_step_by_step(wrapper: DoLaJanusWrapper, prompt: dict[str, Any]) -> None:
    """Tokens that DoLa itself samples, left-padded batch, each config: log p̂ of the trace."""
    for config in CONFIGS[1:]:
        wrapper.config = config
        trace = DoLaTrace()
        torch.manual_seed(1)
        wrapper.generate_with_dola(**prompt | {"do_sample": True, "temperature": 1.5}, trace=trace)
        mask = torch.arange(trace.tokens.shape[1]) < trace.lengths.unsqueeze(1)
        scores = wrapper.score(
            prompt["inputs_embeds"],
            attention_mask=prompt["attention_mask"],
            continuation_ids=trace.tokens,
            continuation_mask=mask,
        )
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, trace.logprobs, atol=1e-4, rtol=0)


class Teacher(LogitsProcessor):
    """Keeps log p̂ of each given token as it passes, and then makes decoding take that token."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        word = self.ids[:, input_ids.shape[1], None]
        self.seen.append(scores.gather(1, word).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter(1, word, 0.0)


class Taught(DoLaLogitsProcessor):
    """The teacher must come after DoLa, where no caller's processor can be."""

    def __init__(self, teacher: Teacher, *args: Any) -> None:
        super().__init__(*args)
        self.teacher = teacher

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.teacher(input_ids, super().__call__(input_ids, scores))


def test_equals_decoding_of_given_tokens(
    wrapper: DoLaJanusWrapper, prompts: dict[str, Tensor], monkeypatch: Any
) -> None:
    """Tokens that DoLa would not take; those outside V_head score apc_floor."""
    ids, mask = prompts["continuation_ids"].clamp(min=0), prompts["continuation_mask"].bool()
    expected = []
    for config in CONFIGS[1:]:
        teacher = Teacher(ids)
        wrapper.config = config

        with monkeypatch.context() as patch:
            patch.setattr(wrapper_module, "DoLaLogitsProcessor", partial(Taught, teacher))
            wrapper.generate(
                inputs_embeds=prompts["inputs_embeds"],
                attention_mask=prompts["attention_mask"],
                do_sample=False,
                max_new_tokens=6,
                eos_token_id=511,
                pad_token_id=511,
            )
        expected.append(torch.stack(teacher.seen, dim=1))
    by_steps = torch.stack(expected)  # [configs, rows, T]
    by_steps = by_steps.masked_fill(by_steps == -torch.inf, -77.0) * mask
    scores = wrapper.score(**prompts, configs=CONFIGS[1:], apc_floor=-77.0)
    assert scores.shape == (len(CONFIGS) - 1, 3, 6)
    torch.testing.assert_close(scores, by_steps, atol=1e-4, rtol=0)
    outside = (scores == -77).sum((1, 2)).tolist()  # per config
    assert outside[2] == 0  # alpha = 0 keeps every word
    assert all(0 < outside[i] < 11 for i in (0, 1, 3, 4))


def test_off_is_log_softmax_of_the_logits(wrapper: DoLaJanusWrapper, prompts: dict[str, Tensor]) -> None:
    """Each row by itself, without padding, through the model's own forward."""
    wrapper.config = DoLaConfig(use_dola_lm=False)
    scores = wrapper.score(**prompts)
    for row in range(3):
        T = int(prompts["continuation_mask"][row].sum())
        ids = prompts["continuation_ids"][row : row + 1, :T]
        embeds = prompts["inputs_embeds"][row][prompts["attention_mask"][row].bool()][None]
        with torch.no_grad():
            new = wrapper.language_model.get_input_embeddings()(ids)
            logits = wrapper.language_model(inputs_embeds=torch.cat([embeds, new], dim=1)).logits
        log_q = logits.log_softmax(-1)[:, embeds.shape[1] - 1 : -1].gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(scores[row : row + 1, :T], log_q, atol=1e-5, rtol=0)
        assert not scores[row, T:].any()


def test_several_configs_are_each_alone(wrapper: DoLaJanusWrapper, prompts: dict[str, Tensor]) -> None:
    scores = wrapper.score(**prompts, configs=CONFIGS)
    for config, together in zip(CONFIGS, scores, strict=True):
        wrapper.config = config
        torch.testing.assert_close(wrapper.score(**prompts), together, atol=1e-5, rtol=0)
    assert len({tuple(row.flatten().tolist()) for row in scores}) == len(CONFIGS)  # they differ


def test_chunks_and_rows_change_nothing(wrapper: DoLaJanusWrapper, prompts: dict[str, Tensor]) -> None:
    whole = wrapper.score(**prompts, configs=CONFIGS)
    for chunk_size in (1, 4, 11, 1000):
        part = wrapper.score(**prompts, configs=CONFIGS, chunk_size=chunk_size)
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=0)
    for row in range(3):
        alone = wrapper.score(**{name: value[row : row + 1] for name, value in prompts.items()}, configs=CONFIGS)
        torch.testing.assert_close(alone, whole[:, row : row + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("P", [1, 9])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_single_prompt_is_shared_and_run_once(
    wrapper: DoLaJanusWrapper, prompts: dict[str, Tensor], P: int, padding: int
) -> None:
    """Choices of one question, say: the same scores as with the prompt repeated, for the work of one."""
    embeds = prompts["inputs_embeds"][:1, -(P + padding) :]
    mask = (torch.arange(P + padding) >= padding).long().unsqueeze(0)
    continuations = {name: prompts[name] for name in ("continuation_ids", "continuation_mask")}
    configs = [DoLaConfig(use_dola_lm=False), DoLaConfig(alpha=0), DoLaConfig(bucket_id=0)]
    rows = len(continuations["continuation_ids"])
    want = wrapper.score(
        embeds.expand(rows, -1, -1), attention_mask=mask.expand(rows, -1), configs=configs, **continuations
    )
    positions = []
    first = wrapper.language_model.model.layers[0]
    handle = first.register_forward_hook(lambda module, args, output: positions.append(args[0][..., 0].numel()))
    try:
        got = wrapper.score(embeds, attention_mask=mask, configs=configs, **continuations)
    finally:
        handle.remove()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    T = continuations["continuation_ids"].shape[1]
    assert sum(positions) == (P + padding - 1 if P + padding > 1 else 0) + rows * T


def test_prompts_of_ids(wrapper: DoLaJanusWrapper) -> None:
    ids = torch.tensor([[1, 40, 50, 60], [481, 1, 77, 88]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    words = torch.tensor([[5, 6], [7, 8]])
    by_ids = wrapper.score(input_ids=ids, attention_mask=mask, continuation_ids=words)
    embeds = wrapper.language_model.get_input_embeddings()(ids)
    assert torch.equal(by_ids, wrapper.score(embeds, attention_mask=mask, continuation_ids=words))
    assert by_ids.min() < 0
    single = wrapper.score(input_ids=ids[:1, :1], continuation_ids=words[:1, :1])  # the smallest there is
    assert single.shape == (1, 1)


def test_nothing_is_left_behind(wrapper: DoLaJanusWrapper, prompts: dict[str, Tensor], monkeypatch: Any) -> None:
    def hooks() -> list[Any]:  # other tests may have made transformers install some of its own
        return [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in wrapper.language_model.modules()]

    before, installed = {name: value.clone() for name, value in prompts.items()}, hooks()
    wrapper.score(**prompts)
    assert all(torch.equal(before[name], value) for name, value in prompts.items())
    monkeypatch.setattr(wrapper.phi, "forward", lambda hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        wrapper.score(**prompts)
    assert hooks() == installed


def test_the_head_is_not_run_on_the_prompt(wrapper: DoLaJanusWrapper, prompts: dict[str, Tensor]) -> None:
    seen: list[int] = []
    handle = wrapper.phi.register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))
    try:
        wrapper.score(**prompts)
    finally:
        handle.remove()
    assert sum(seen) == 11 * 5  # tokens, times 4 candidates and the last layer


def test_scoring_within_a_generation(
    wrapper: DoLaJanusWrapper, prompt: dict[str, Any], prompts: dict[str, Tensor]
) -> None:
    """A processor that scores does not disturb the generation, nor the generation the scores."""
    tokens, scores = wrapper.generate_with_dola(**prompt), wrapper.score(**prompts)
    seen = []

    class Scorer(LogitsProcessor):
        def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
            seen.append(wrapper.score(**prompts))
            return logits

    assert torch.equal(wrapper.generate_with_dola(**prompt, logits_processor=[Scorer()]), tokens)
    assert all(torch.equal(each, scores) for each in seen)
    assert len(seen) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs_embeds": None}, "inputs_embeds or input_ids must be given, and not both; got neither"),
        ({"input_ids": torch.ones(3, 4).long()}, "inputs_embeds or input_ids must be given, and not both; got both"),
        ({"inputs_embeds": torch.zeros(3, 64)}, r"inputs_embeds must be of shape \[rows, P, d\], got \[3, 64\]"),
        ({"inputs_embeds": torch.zeros(3, 0, 64)}, r"at least one row and position, got shape \[3, 0, 64\]"),
        ({"attention_mask": torch.ones(3, 2)}, r"attention_mask must be of the prompt's shape .* got \[3, 2\]"),
        ({"attention_mask": "right"}, "attention_mask must be 0 on the left .* got otherwise in row 1"),
        ({"continuation_ids": torch.ones(2, 6).long()}, r"continuation_ids must be of shape \[3, T\].* got \[2, 6\]"),
        ({"continuation_ids": torch.ones(3, 0).long()}, r"continuation_ids must be of shape \[3, T\].* got \[3, 0\]"),
        ({"continuation_ids": torch.ones(3, 6)}, "continuation_ids must be integers, got torch.float32"),
        ({"continuation_ids": torch.full((3, 6), 512)}, r"continuation_ids must be in 0\.\.\.511, .* got 512"),
        ({"continuation_mask": torch.ones(3, 5)}, r"continuation_mask must be .* \[3, 6\], got \[3, 5\]"),
        ({"continuation_mask": torch.tensor([[1] * 6, [0, 1] * 3, [0] * 6])}, "continuation_mask must be 1, .* row 1"),
        ({"configs": []}, r"configs must be a list of at least one DoLaConfig, got \[\]"),
        ({"configs": ["off"]}, r"configs must be a list of at least one DoLaConfig, got \['off'\]"),
        ({"configs": [DoLaConfig(candidate_layers=[31])]}, r"candidate_layers must be in 1\.\.\.30.* got 31"),
        ({"apc_floor": 1.0}, "apc_floor must be a log-probability, at most 0, got 1.0"),
        ({"apc_floor": float("nan")}, "apc_floor must be .* got nan"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ],
)
def test_errors(wrapper: DoLaJanusWrapper, prompts: dict[str, Tensor], change: dict[str, Any], message: str) -> None:
    if isinstance(change.get("attention_mask"), str):
        mask = torch.ones_like(prompts["attention_mask"])
        mask[1, -1] = 0
        change = {"attention_mask": mask}
    with pytest.raises(ValueError, match=message):
        wrapper.score(**prompts | change)


MEMORY = """
import resource, torch
from transformers import LlamaConfig, LlamaForCausalLM
from janus_dola import DoLaConfig, DoLaJanusWrapper
torch.manual_seed(0)
config = LlamaConfig(vocab_size=102400, hidden_size=32, intermediate_size=64, num_hidden_layers=8,
                     num_attention_heads=2, tie_word_embeddings=True)
wrapper = DoLaJanusWrapper(LlamaForCausalLM(config).eval(), DoLaConfig(candidate_layers=[2, 3, 4, 5, 6]))
ids = torch.randint(0, 102400, (1, 340))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with torch.no_grad():
    wrapper.get_decoder()(ids, use_cache=False)
before = peak()
wrapper.score(input_ids=ids[:, :300], continuation_ids=ids[:, 300:])
print(peak() - before)
"""


def test_memory_is_bounded() -> None:
    """At V = 102,400 and 5 exits, reading out 40 answer tokens at once would take 400 MB above the forward pass."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 200


def test_another_thread_on_the_same_model(
    wrapper: DoLaJanusWrapper, prompt: dict[str, Any], prompts: dict[str, Tensor]
) -> None:
    """Scores and a generation at once are what each is alone."""
    tokens, scores = wrapper.generate_with_dola(**prompt), wrapper.score(**prompts)
    with ThreadPoolExecutor() as pool:
        generation = pool.submit(wrapper.generate_with_dola, **prompt)
        seen = [wrapper.score(**prompts)]
        while not generation.done():
            seen.append(wrapper.score(**prompts))
    assert torch.equal(generation.result(), tokens)
    assert all(torch.equal(each, scores) for each in seen)
