"""The Python API: wrong arguments, logits that are not numbers, faults within a call, and threads."""

import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from janus_dola import DoLaConfig, DoLaJanusWrapper, DoLaTrace
from janus_dola.config import METHODS, by_row
from janus_dola.dola_runtime import log_softmax, read
from janus_dola.exits import ExitView, pack
from janus_dola.methods import choose
from janus_dola.processor import DoLaLogitsProcessor
from janus_dola.trace import Recorder

# The Python API.


@pytest.mark.parametrize("use_dola_lm", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda embeds, mask: {"inputs_embeds": embeds[0]}, r"inputs_embeds must be .*\[rows, T, 64\].* \[91, 64\]"),
        (lambda embeds, mask: {"inputs_embeds": embeds[..., :9]}, r"inputs_embeds must be .* got \[3, 91, 9\]"),
        (lambda embeds, mask: {"inputs_embeds": embeds[:0], "attention_mask": mask[:0]}, r"got \[0, 91, 64\]"),
        (lambda embeds, mask: {"inputs_embeds": embeds[:, :0], "attention_mask": mask[:, :0]}, r"got \[3, 0, 64\]"),
        (lambda embeds, mask: {"inputs_embeds": embeds.numpy()}, "inputs_embeds must be a tensor"),
        (lambda embeds, mask: {"attention_mask": mask[:, :3]}, r"attention_mask must be .* \[3, 91\], got \[3, 3\]"),
        (lambda embeds, mask: {"attention_mask": mask[:2]}, r"attention_mask must be .* \[3, 91\], got \[2, 91\]"),
        (lambda embeds, mask: {"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0, but is 0"),
        (lambda embeds, mask: {"alhpa": 1}, "`model_kwargs` are not used by the model: .'alhpa'"),
        (lambda embeds, mask: {"trace": "out"}, "trace must be"),
    ],
)  # fmt: skip
def test_generate_refuses(
    model: Any, prompt: dict[str, Any], use_dola_lm: bool, change: Callable[..., dict[str, Any]], message: str
) -> None:
    wrapper = DoLaJanusWrapper(model, DoLaConfig(use_dola_lm=use_dola_lm))
    bad = change(prompt["inputs_embeds"], prompt["attention_mask"])
    with pytest.raises(ValueError, match=message):
        wrapper.generate(**(prompt | bad))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": (slice(None), slice(None), slice(1))}, r"pixel_values must be .* got \[2, 1, 1, 64, 64\]"),
        ({"pixel_values": (0,)}, r"pixel_values must be of shape .* got \[1, 3, 64, 64\]"),
        ({"pixel_values": (..., slice(32))}, r"pixel_values must be of shape .* got \[2, 1, 3, 64, 32\]"),
        ({"images_emb_mask": (..., slice(5))}, r"images_emb_mask must be of shape \[2, 1, 16\], got \[2, 1, 5\]: does"),
        ({"images_seq_mask": (slice(1),)}, "images_seq_mask must be of input_ids' shape"),
    ],
)  # fmt: skip
def test_prepare_inputs_embeds_refuses(
    model: Any, expected: dict[str, Tensor], change: dict[str, Any], message: str
) -> None:
    names = ("input_ids", "pixel_values", "images_seq_mask", "images_emb_mask")
    inputs = {name: expected[f"batch_mixed/{name}"] for name in names}
    with pytest.raises(ValueError, match=message):
        model.prepare_inputs_embeds(**(inputs | {name: inputs[name][index] for name, index in change.items()}))


def test_a_wrapped_wrapper_obeys_its_own_config(model: Any, prompt: dict[str, Any]) -> None:
    on, off = DoLaConfig(), DoLaConfig(use_dola_lm=False)
    inner = {use: DoLaJanusWrapper(model, config) for use, config in ((True, on), (False, off))}
    want = {use: wrapper.generate(**prompt) for use, wrapper in inner.items()}
    assert not torch.equal(want[True], want[False])
    assert torch.equal(DoLaJanusWrapper(inner[False], on).generate(**prompt), want[True])
    assert torch.equal(DoLaJanusWrapper(inner[True], off).generate(**prompt), want[False])


# Logits that are not numbers.


def step(final: Tensor, exits: Tensor) -> Tensor:
    """log p̂ [rows, V] of the logits of the final layer and of the exits."""
    J = exits.shape[1]
    rows = by_row([DoLaConfig(alpha=0.05, candidate_layers=[*range(1, J + 1)])], J + 1)
    processor = DoLaLogitsProcessor(lambda: (exits, final), rows, -torch.inf)
    return processor(torch.zeros(len(final), 1), final)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 50, generator=generator) * 2, torch.randn(3, 3, 50, generator=generator) * 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_exit_that_overflowed_is_not_chosen(logits: tuple[Tensor, Tensor], bad: float) -> None:
    """float16 overflows; argmax takes NaN for the largest divergence, and made NaN of the row, which is token 0."""
    final, exits = logits
    want = step(final, exits)
    chosen = [next(j for j in range(3) if torch.equal(step(final, exits[:, [j]])[row], want[row])) for row in range(3)]
    broken = exits.clone()
    broken[1, (chosen[1] + 1) % 3, 7] = bad  # one that is not chosen anyway
    torch.testing.assert_close(step(final, broken), want, atol=0, rtol=0)
    broken = exits.clone()
    broken[1, chosen[1], 7] = bad  # the one that would be
    others = [j for j in range(3) if j != chosen[1]]
    torch.testing.assert_close(step(final, broken)[1], step(final, exits[:, others])[1], atol=0, rtol=0)
    torch.testing.assert_close(step(final, broken)[[0, 2]], want[[0, 2]], atol=0, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("J", [1, 3])
def test_without_any_exit_that_is_finite_there_is_nothing_to_subtract(
    logits: tuple[Tensor, Tensor], J: int, bad: float
) -> None:
    final, exits = logits[0], logits[1][:, :J].clone()
    want = step(final, exits)
    exits[1, :, 7] = bad
    got = step(final, exits)
    log_q = log_softmax(final[1:2])
    on_V_head = log_softmax(log_q.masked_fill(log_q < log_q.max() + math.log(0.05), -torch.inf))
    torch.testing.assert_close(got[1:2], on_V_head, atol=1e-6, rtol=0)
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]], atol=0, rtol=0)
    for dynamic in [True, False] if J == 1 else [True]:
        reading = read(final, exits, dynamic)
        log_p, M_index = choose(reading, torch.ones(3, J, dtype=torch.bool), torch.zeros(3))
        assert M_index[1] == J and (M_index[[0, 2]] < J).all()  # J stands for the final layer
        assert torch.equal(log_p[1], reading.log_qN[1]) and not log_p.isnan().any()


def test_rows_are_read_with_those_of_their_method_and_their_exits_alone() -> None:
    """In any order of rows, more than fit a chunk: bit for bit what each gets by itself, whatever other exits hold."""
    configs = [DoLaConfig(method=method, bucket_id=i) for i in (0, 2) for method in METHODS]
    configs = [DoLaConfig(candidate_layers=[]), *configs, *reversed(configs)] * 2
    rows = by_row(configs, 12)
    torch.manual_seed(0)
    exits, final = 3 * torch.randn(len(configs), len(rows.layers), 2**15), 3 * torch.randn(len(configs), 2**15)
    ids = torch.zeros(len(configs), 1, dtype=torch.long)
    got = DoLaLogitsProcessor(lambda: (exits, final), rows, -torch.inf)(ids, final)
    for i, config in enumerate(configs):
        alone = by_row([config], 12)
        own = exits[i : i + 1, [rows.layers.index(layer) for layer in alone.layers]]
        one = DoLaLogitsProcessor(lambda own=own, i=i: (own, final[i : i + 1]), alone, -torch.inf)
        assert torch.equal(got[i : i + 1], one(ids[:1], final[i : i + 1]))
    packed = exits.flatten(0, 1)[pack(rows.read)[0]]
    assert packed.shape[1] < exits.shape[1]
    assert torch.equal(DoLaLogitsProcessor(lambda: (packed, final), rows, -torch.inf)(ids, final), got)


@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=9).filter(lambda x: any(map(any, x)))
)
def test_packed_exits_are_those_that_are_wanted(wanted: list[list[bool]]) -> None:
    index, places = pack(torch.tensor(wanted))
    assert len(index) == len(wanted) and index.numel() - sum(map(sum, wanted)) < len(wanted)
    for row, exits in enumerate(wanted):
        for j in range(5):
            if exits[j]:
                assert index[tuple(places[:, row, j])] == 5 * row + j


def test_a_row_whose_final_logits_are_nan_is_its_own_affair(model: Any, prompt: dict[str, Any]) -> None:
    """As without DoLa: sampling says so, and the other rows are what they were."""

    class Break(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores = scores.clone()
            scores[1] = torch.nan
            return scores

    wrapper = DoLaJanusWrapper(model)
    want = wrapper.generate(**prompt)
    got = wrapper.generate(**prompt, logits_processor=[Break()])
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    for subject in (wrapper, model.language_model):
        with pytest.raises(RuntimeError, match="probability tensor contains either"):
            subject.generate(**(prompt | {"do_sample": True}), logits_processor=[Break()])
    assert torch.equal(wrapper.generate(**prompt), want)


# Faults within a call.


class Fault(Exception):
    pass


def fail() -> None:
    raise Fault


class Watched(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Whichever of the three it is passed as, it calls `then` and changes nothing."""

    def __init__(self, then: Callable[[], Any]) -> None:
        self.then = then

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self.then()
        return scores if isinstance(scores, Tensor) else torch.zeros(len(input_ids), dtype=torch.bool)

    def put(self, value: Tensor) -> None:
        self.then()

    def end(self) -> None:
        pass


def hooks(model: Any) -> dict[str, tuple[list[int], list[int]]]:
    """transformers has hooks of its own once hidden states were asked for, so none is not what to expect."""
    return {
        name: (list(module._forward_hooks), list(module._forward_pre_hooks)) for name, module in model.named_modules()
    }


POINTS = ["layer 22", "layer 24", "layer 26", "layer 28", "layer 30", "norm", "lm_head", "processor", "criteria"]
POINTS += ["streamer", "ExitView.join_exits", "ExitView.prepend_exits", "ExitView.take", "trace", "read", "choose"]


@pytest.fixture(scope="module")
def answer(model: Any, prompt: dict[str, Any]) -> Tensor:
    return DoLaJanusWrapper(model).generate(**(prompt | {"max_new_tokens": 4}))


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("at", [1, 3])
def test_after_a_fault_the_next_call_is_right(
    model: Any, prompt: dict[str, Any], answer: Tensor, monkeypatch: pytest.MonkeyPatch, point: str, at: int
) -> None:
    """At the prompt, and in the third step."""
    decoder, library = model.language_model.model, sys.modules[DoLaLogitsProcessor.__module__]
    wrapper, prompt, before, count = DoLaJanusWrapper(model), prompt | {"max_new_tokens": 4}, hooks(model), 0
    one = {name: prompt[name][:1] for name in ("inputs_embeds", "attention_mask")}

    def fault(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise Fault

    def failing(owner: Any, name: str) -> None:
        function = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: (fault(), function(*args, **kwargs))[1])

    trace, handle = DoLaTrace(), None
    arguments: dict[str, Any] = {
        "processor": {"logits_processor": [Watched(fault)]},
        "criteria": {"stopping_criteria": [Watched(fault)]},
        "streamer": one | {"streamer": Watched(fault)},
        "trace": {"trace": trace},
    }.get(point, {})
    with monkeypatch.context() as patch:
        if point.startswith("layer"):
            handle = decoder.layers[int(point.split()[1]) - 1].register_forward_hook(fault)
        elif point in ("norm", "lm_head"):
            handle = {"norm": decoder.norm, "lm_head": model.language_model.lm_head}[point].register_forward_hook(fault)
        elif point.startswith("ExitView"):
            failing(ExitView, point.split(".")[1])
        elif point in ("read", "choose"):
            failing(library, point)
        elif point == "trace":
            failing(Recorder, "record")
        try:
            with pytest.raises(Fault):
                wrapper.generate(**(prompt | arguments))
        finally:
            if handle is not None:
                handle.remove()
    assert count == at
    assert hooks(model) == before
    assert torch.equal(wrapper.generate(**prompt), answer)
    assert trace.tokens.numel() == 0  # empty, not half a trace


# Threads.


def test_eight_threads_with_streaming_and_faults_among_them(model: Any, prompt: dict[str, Any], processor: Any) -> None:
    """Mixed configurations on one model and on one wrapper; two of the eight fail, and the others do not notice."""
    prompt = prompt | {"max_new_tokens": 6}
    shared = DoLaJanusWrapper(model)  # DoLa through generate_with_dola, off through the model's own
    low = DoLaJanusWrapper(model, DoLaConfig(bucket_id=0, alpha=0.02))
    one = prompt | {name: prompt[name][1:2] for name in ("inputs_embeds", "attention_mask")}

    def stream(wrapper: DoLaJanusWrapper) -> str:
        streamer = TextIteratorStreamer(processor.tokenizer, timeout=60)
        thread = threading.Thread(target=wrapper.generate, kwargs=one | {"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    jobs: list[Callable[[], Any]] = [
        lambda: shared.generate_with_dola(**prompt),
        lambda: model.language_model.generate(**prompt),
        lambda: low.generate(**prompt),
        lambda: shared.generate(**prompt, num_beams=2),
        lambda: stream(shared),
        lambda: stream(low),
        lambda: shared.generate(**prompt, logits_processor=[Watched(fail)]),
        lambda: low.generate(**prompt, stopping_criteria=[Watched(fail)]),
    ]
    before = hooks(model)
    want = [job() for job in jobs[:6]]
    assert not torch.equal(want[0], want[1]) and want[4] != want[5]
    results: list[list[Any]] = [[] for _ in jobs]
    start = threading.Barrier(len(jobs))

    def work(index: int) -> None:
        start.wait()
        for _ in range(2):
            try:
                results[index].append(jobs[index]())
            except Exception as error:
                results[index].append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, got in enumerate(results):
        assert len(got) == 2
        if index >= 6:
            assert [type(error) for error in got] == [Fault] * 2
        else:
            assert all(torch.equal(a, want[index]) if isinstance(a, Tensor) else a == want[index] for a in got), (
                f"job {index}: {got}"
            )
    assert hooks(model) == before
