"""DoLaTrace against an oracle of uncached full forwards, for every way of decoding."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch import Tensor
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor, StoppingCriteria

from janus_dola import DoLaConfig, DoLaJanusWrapper, DoLaTrace
from janus_dola import processor as processor_module

EOS = 481
ALPHA = 0.5
LAYERS = [22, 24, 26, 28]


@pytest.fixture
def wrapper(model: Any) -> DoLaJanusWrapper:
    return DoLaJanusWrapper(model, DoLaConfig(alpha=ALPHA, candidate_layers=LAYERS))


def oracle(
    wrapper: DoLaJanusWrapper, prompt: dict[str, Any], item: int, tokens: list[int], layers: list[int], alpha: float
) -> dict[str, list[Any]]:
    """What a trace of `tokens` must say, in float64, by a forward pass over prompt and tokens of one item alone."""
    if "inputs_embeds" in prompt:
        real = prompt["attention_mask"][item].bool()
        embeds = prompt["inputs_embeds"][item][real]
    else:
        embeds = wrapper.language_model.get_input_embeddings()(prompt["input_ids"][item])
    new = wrapper.language_model.get_input_embeddings()(torch.tensor(tokens[:-1], dtype=torch.long))
    with torch.no_grad():
        out = wrapper.language_model(inputs_embeds=torch.cat([embeds, new])[None], output_hidden_states=True)
        exits = [wrapper.phi(wrapper.ln_out(out.hidden_states[j]))[0, len(embeds) - 1 :].double() for j in layers]
    log_qN = log_softmax(out.logits[0, len(embeds) - 1 :].double().numpy(), axis=-1)  # [T, V]
    log_qj = {j: log_softmax(x.numpy(), axis=-1) for j, x in zip(layers, exits, strict=True)}
    qN = np.exp(log_qN)
    jsd = []
    for log_q in log_qj.values():
        q, m = np.exp(log_q), (qN + np.exp(log_q)) / 2
        jsd.append((rel_entr(qN, m).sum(-1) + rel_entr(q, m).sum(-1)) / 2)
    candidates = [layers.index(j) for j in LAYERS if j in layers]
    result: dict[str, list[Any]] = {name: [] for name in ("mature_tokens", "layers", "jsd", "head_sizes")}
    result |= {"mature_logprobs": [], "logprobs": []}
    for t, token in enumerate(tokens):
        M = layers[max(candidates, key=lambda i: (jsd[i][t], -i))]
        head = qN[t] >= alpha * qN[t].max()
        F = np.where(head, log_qN[t] - log_qj[M][t], -np.inf)
        result["mature_tokens"].append(int(qN[t].argmax()))
        result["layers"].append(M)
        result["jsd"].append([j[t] for j in jsd])
        result["head_sizes"].append(int(head.sum()))
        result["mature_logprobs"].append(log_qN[t][token])
        result["logprobs"].append(log_softmax(F)[token])
    return result


def check(
    wrapper: DoLaJanusWrapper, prompt: dict[str, Any], trace: DoLaTrace, sequences: Tensor, items: list[int]
) -> None:
    """The trace is that of `sequences`, without the prompt, [S, T], of these items of the batch."""
    assert torch.equal(trace.tokens, sequences)
    for s, item in enumerate(items):
        tokens = trace.tokens[s].tolist()
        length = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
        assert trace.lengths[s] == length
        expected = oracle(wrapper, prompt, item, tokens[:length], list(trace.traced_layers), ALPHA)
        for name, values in expected.items():
            seen = getattr(trace, name)[s]
            np.testing.assert_allclose(seen[:length].numpy(), values, atol=1e-4, err_msg=f"{name} of sequence {s}")
            assert torch.equal(
                seen[length:], trace.tokens[s, length:] if name == "mature_tokens" else 0 * seen[length:]
            )


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "sampling, three of each": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "beams, three of each": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": -2.0},
    "beam sampling": {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
}


@pytest.mark.parametrize(
    ("kind", "layers"),
    [(kind, "candidates") for kind in KINDS] + [(kind, "all") for kind in ("greedy", "beams, three of each")],
)
def test_equals_full_forwards(wrapper: DoLaJanusWrapper, prompt: dict[str, Any], kind: str, layers: Any) -> None:
    arguments = prompt | KINDS[kind] | {"max_new_tokens": 8}
    torch.manual_seed(0)
    plain = wrapper.generate_with_dola(**arguments)
    trace = DoLaTrace(layers)
    torch.manual_seed(0)
    sequences = wrapper.generate_with_dola(**arguments, trace=trace)
    assert torch.equal(sequences, plain)  # tracing changes nothing
    assert trace.traced_layers == (tuple(LAYERS) if layers == "candidates" else tuple(range(1, 30)))
    assert (trace.num_layers, trace.candidate_layers, trace.alpha) == (30, tuple(LAYERS), ALPHA)
    each = arguments.get("num_return_sequences", 1)
    check(wrapper, arguments, trace, sequences, [s // each for s in range(len(sequences))])
    assert trace.mature_tokens.ne(trace.tokens).any()  # or the comparison of both proves little


def test_untraced_words_change_nothing_in_the_scores(wrapper: DoLaJanusWrapper, prompt: dict[str, Any]) -> None:
    arguments = prompt | {"return_dict_in_generate": True, "output_scores": True}
    plain = wrapper.generate_with_dola(**arguments)
    trace = DoLaTrace()
    traced = wrapper.generate(**arguments, trace=trace)
    assert torch.equal(torch.stack(plain.scores), torch.stack(traced.scores))
    own = torch.stack(traced.scores).gather(-1, trace.tokens.T.unsqueeze(-1)).squeeze(-1).T  # log p̂ as returned
    for s, length in enumerate(trace.lengths.tolist()):
        assert torch.equal(trace.logprobs[s, :length], own[s, :length])


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}])
@pytest.mark.parametrize(
    "config",
    [
        DoLaConfig(alpha=ALPHA, candidate_layers=LAYERS),
        DoLaConfig(alpha=ALPHA, candidate_layers=LAYERS[:1]),
        DoLaConfig(alpha=0, candidate_layers=[]),  # traced all the same
    ],
    ids=["dynamic", "static", "nothing to subtract"],
)
def test_a_row_at_a_time_is_all_rows_at_once(
    model: Any,
    prompt: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    config: DoLaConfig,
    arguments: dict[str, Any],
) -> None:
    wrapper = DoLaJanusWrapper(model, config)
    arguments = prompt | arguments | {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 6}
    results = []
    for chunk in (processor_module.CPU_CHUNK, 1):
        monkeypatch.setattr(processor_module, "CPU_CHUNK", chunk)
        trace = DoLaTrace("all")
        results.append((wrapper.generate_with_dola(**arguments, trace=trace), trace))
    (once, trace_once), (parts, trace_parts) = results
    assert torch.equal(once.sequences, parts.sequences)
    torch.testing.assert_close(torch.stack(once.scores), torch.stack(parts.scores), atol=1e-5, rtol=0)
    assert torch.equal(trace_once.layers, trace_parts.layers)
    torch.testing.assert_close(trace_once.jsd, trace_parts.jsd, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_prompts_of_ids(wrapper: DoLaJanusWrapper, num_beams: int) -> None:
    """Returned sequences then begin with the prompt, and the trace does not."""
    prompt = {"input_ids": torch.tensor([[1, 40, 50, 60], [1, 77, 88, 99]])}
    trace = DoLaTrace()
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": EOS, "pad_token_id": EOS}
    sequences = wrapper.generate_with_dola(**prompt, **arguments, num_beams=num_beams, trace=trace)
    assert torch.equal(sequences[:, :4], prompt["input_ids"])
    check(wrapper, prompt, trace, sequences[:, 4:], [0, 1])


class Force(LogitsProcessor):
    """Ends item 1 at its third step, whatever the model says."""

    def __init__(self, rows_per_item: int) -> None:
        self.rows_per_item = rows_per_item

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        if input_ids.shape[1] == 2:
            scores[self.rows_per_item : 2 * self.rows_per_item, EOS] = scores.max() + 20
        return scores


@pytest.mark.parametrize("num_beams", [1, 3])
def test_rows_that_end_early(wrapper: DoLaJanusWrapper, prompt: dict[str, Any], num_beams: int) -> None:
    trace = DoLaTrace()
    arguments = prompt | {"num_beams": num_beams, "pad_token_id": 7}
    sequences = wrapper.generate_with_dola(**arguments, logits_processor=[Force(num_beams)], trace=trace)
    assert trace.lengths.tolist() == [12, 3, 12]
    assert torch.equal(trace.tokens, sequences)
    assert trace.tokens[1, 2:].tolist() == [EOS] + [7] * 9
    assert trace.mature_tokens[1, 2] == EOS
    assert trace.mature_tokens[1, 3:].tolist() == [7] * 9
    assert trace.head_sizes[1].tolist()[2:] == [1] + [0] * 9  # V_head is EOS alone
    assert trace.logprobs[1, 2] == 0
    assert trace.mature_logprobs[1, 2] == pytest.approx(0, abs=1e-4)
    for name in ("layers", "jsd", "logprobs", "mature_logprobs"):
        assert not getattr(trace, name)[1, 3:].any()
        assert getattr(trace, name)[0, 3:].any()


class Stop(StoppingCriteria):
    """Stops item 0 after its second token; no EOS is written."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.arange(len(input_ids)) == 0 if input_ids.shape[1] == 2 else torch.zeros(len(input_ids)).bool()


def test_rows_that_other_criteria_stop(wrapper: DoLaJanusWrapper, prompt: dict[str, Any]) -> None:
    trace = DoLaTrace()
    criteria = [Stop()]
    wrapper.generate_with_dola(**prompt | {"pad_token_id": 7}, stopping_criteria=criteria, trace=trace)
    assert trace.lengths.tolist() == [2, 12, 12]
    assert len(criteria) == 1  # the caller's list is the caller's


def test_penalties_come_first(wrapper: DoLaJanusWrapper, prompt: dict[str, Any]) -> None:
    """mature_tokens is what q_N after the penalties would take."""
    penalty = RepetitionPenaltyLogitsProcessor(5.0)
    trace = DoLaTrace()
    wrapper.generate_with_dola(**prompt, logits_processor=[penalty], trace=trace)
    baseline = DoLaJanusWrapper(wrapper.model, DoLaConfig(use_dola_lm=False))
    for t in range(1, 5):  # the baseline, begun from DoLa's tokens
        new = wrapper.language_model.get_input_embeddings()(trace.tokens[:, :t])
        with torch.no_grad():
            mask = torch.cat([prompt["attention_mask"], torch.ones(3, t, dtype=torch.long)], dim=1)
            position = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = baseline.language_model(
                inputs_embeds=torch.cat([prompt["inputs_embeds"], new], dim=1),
                attention_mask=mask,
                position_ids=position,
            ).logits[:, -1]
        assert torch.equal(penalty(trace.tokens[:, :t], logits).argmax(-1), trace.mature_tokens[:, t])


def test_one_candidate(model: Any, prompt: dict[str, Any]) -> None:
    """Static DoLa selects nothing: JSD is there for the trace alone, and M is the candidate."""
    static = DoLaJanusWrapper(model, DoLaConfig(alpha=ALPHA, candidate_layers=[24]))
    several = DoLaJanusWrapper(model, DoLaConfig(alpha=ALPHA, candidate_layers=LAYERS))
    trace, other, every = DoLaTrace(), DoLaTrace(), DoLaTrace("all")
    tokens = static.generate_with_dola(**prompt, trace=trace)
    assert torch.equal(static.generate_with_dola(**prompt), tokens)
    assert torch.equal(static.generate_with_dola(**prompt, trace=every), tokens)
    several.generate_with_dola(**prompt, trace=other)
    assert trace.jsd.shape == (3, 12, 1)
    assert trace.layers[trace.layers > 0].unique().tolist() == [24]
    torch.testing.assert_close(trace.jsd[:, 0], other.jsd[:, 0, 1:2])  # the first step is the same one
    torch.testing.assert_close(trace.jsd[..., 0], every.jsd[..., 23])


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("layers", ["candidates", "all"])
def test_nothing_to_subtract(model: Any, prompt: dict[str, Any], alpha: float, layers: Any) -> None:
    """M is N; the trace sees it all the same, and with alpha = 0 the baseline's scores are untouched."""
    wrapper = DoLaJanusWrapper(model, DoLaConfig(alpha=alpha, candidate_layers=[30]))
    arguments = prompt | {"return_dict_in_generate": True, "output_scores": True}
    trace = DoLaTrace(layers)
    plain = wrapper.generate_with_dola(**arguments)
    traced = wrapper.generate_with_dola(**arguments, trace=trace)
    if layers == "candidates":
        assert torch.equal(torch.stack(plain.scores), torch.stack(traced.scores))
    torch.testing.assert_close(torch.stack(plain.scores), torch.stack(traced.scores))
    assert torch.equal(trace.tokens, plain.sequences)
    within = torch.arange(12) < trace.lengths.unsqueeze(1)
    assert torch.equal(trace.layers, 30 * within)
    assert torch.equal(trace.mature_tokens, trace.tokens)  # greedy
    assert trace.jsd.shape[2] == len(trace.traced_layers) == (0 if layers == "candidates" else 29)
    if alpha == 0:
        assert torch.equal(trace.head_sizes, 512 * within)
        assert torch.equal(trace.logprobs, trace.mature_logprobs)
    else:
        assert (trace.logprobs >= trace.mature_logprobs).all()
        assert (trace.head_sizes < 512).all()


def test_used_again(wrapper: DoLaJanusWrapper, prompt: dict[str, Any]) -> None:
    trace, fresh = DoLaTrace(), DoLaTrace()
    wrapper.generate_with_dola(**prompt | {"max_new_tokens": 5, "num_beams": 2}, trace=trace)
    wrapper.generate_with_dola(**prompt, trace=trace)
    wrapper.generate_with_dola(**prompt, trace=fresh)
    assert trace == fresh
    with pytest.raises(RuntimeError, match="interrupted"):
        wrapper.generate_with_dola(**prompt, trace=trace, stopping_criteria=[Raise()])
    assert trace.tokens.numel() == 0


class Raise(StoppingCriteria):
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("interrupted")


@pytest.mark.parametrize("layers", ["candidates", "all"])
def test_save_and_load(wrapper: DoLaJanusWrapper, prompt: dict[str, Any], tmp_path: Path, layers: Any) -> None:
    trace = DoLaTrace(layers)
    wrapper.generate_with_dola(**prompt, trace=trace)
    trace.logprobs[0, 0] = -torch.inf  # JSON has none
    trace.save(tmp_path / "x.jsonl")
    header, *rows = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    assert header["traced_layers"] == list(trace.traced_layers)
    assert [row["tokens"] for row in rows] == trace.tokens.tolist()
    assert rows[0]["logprobs"][0] is None
    loaded = DoLaTrace.load(tmp_path / "x.jsonl")
    assert loaded == trace
    for name in ("tokens", "mature_tokens", "layers", "jsd", "head_sizes", "mature_logprobs", "logprobs", "lengths"):
        assert torch.equal(getattr(loaded, name), getattr(trace, name))
        assert getattr(loaded, name).dtype == getattr(trace, name).dtype
    loaded.jsd[1, 2, 3] += 0.01
    assert loaded != trace
    trace.jsd[1, 2, 3] = torch.nan  # an exit that overflowed: what was computed is not lost over it
    trace.save(tmp_path / "x.jsonl")
    loaded = DoLaTrace.load(tmp_path / "x.jsonl")
    assert loaded == trace and loaded.jsd.isnan().nonzero().tolist() == [[1, 2, 3]]


def test_save_and_load_without_layers(model: Any, prompt: dict[str, Any], tmp_path: Path) -> None:
    trace = DoLaTrace()
    DoLaJanusWrapper(model, DoLaConfig(candidate_layers=[])).generate_with_dola(**prompt, trace=trace)
    trace.save(tmp_path / "x.jsonl")
    assert DoLaTrace.load(tmp_path / "x.jsonl") == trace
    assert trace.jsd.shape == (3, 12, 0)


def test_errors(wrapper: DoLaJanusWrapper, prompt: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'layers must be "candidates" or "all", got \'some\''):
        DoLaTrace("some")  # type: ignore[arg-type]
    for text in ("", "nonsense", "[]\n", '{"format": "other"}\n'):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"path must be a file that DoLaTrace.save wrote, got .*bad.jsonl"):
            DoLaTrace.load(tmp_path / "bad.jsonl")
    off = DoLaJanusWrapper(wrapper.model, DoLaConfig(use_dola_lm=False))
    with pytest.raises(ValueError, match="trace must be None without DoLa"):
        off.generate(**prompt, trace=DoLaTrace())
    off.generate(**prompt | {"max_new_tokens": 1}, trace=None)
    with pytest.raises(ValueError, match="sequence must be one of the 0 in the trace, got 0"):
        DoLaTrace().heatmap(tmp_path / "x.png", None)
