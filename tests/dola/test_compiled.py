"""A compiled forward pass with a static cache: one graph, compiled once, and the answers of the eager one."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from janus_dola import DoLaConfig, DoLaJanusWrapper, DoLaTrace

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 does not compile on a CPU"
)
ON, OFF = DoLaConfig(candidate_layers=[1, 2, 3]), DoLaConfig(use_dola_lm=False)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling, two of each": {"do_sample": True, "temperature": 1.3, "top_k": 20, "num_return_sequences": 2},
}


@pytest.fixture
def model() -> Iterator[Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        initializer_range=0.3,
    )  # fmt: skip
    yield LlamaForCausalLM(config).eval()
    torch._dynamo.reset()


def ask(wrapper: DoLaJanusWrapper, backend: str | None = None, fullgraph: bool = True, **more: Any) -> Any:
    """A left-padded batch of 2, eager or compiled."""
    if backend is not None:
        config = CompileConfig(backend=backend, mode="default", fullgraph=fullgraph)
        config._compile_all_devices = True  # which is for tests
        more |= {"cache_implementation": "static", "compile_config": config}
    torch.manual_seed(1)
    return wrapper.generate(
        torch.tensor([[5, 6, 7, 8], [0, 0, 22, 23]]),
        attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
        **({"do_sample": False} | more),
        max_new_tokens=7,
        eos_token_id=96,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )


def assert_same(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.scores, want.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)  # −∞ in the same places


def graphs() -> tuple[int, int, int]:
    return counters["stats"]["unique_graphs"], counters["stats"]["calls_captured"], counters["frames"]["total"]


@pytest.mark.parametrize("config", [ON, OFF], ids=["on", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_compiled_once(model: Any, config: DoLaConfig, kind: str) -> None:
    wrapper = DoLaJanusWrapper(model, config)
    want = ask(wrapper, **KINDS[kind])
    counters.clear()
    assert_same(ask(wrapper, "eager", **KINDS[kind]), want)
    compiled = graphs()
    # of the forward pass, and of the formulas
    assert compiled[0] == 1 + config.use_dola_lm and not counters["graph_break"]
    for _ in range(2):
        assert_same(ask(wrapper, "eager", **KINDS[kind]), want)
    assert graphs() == compiled


def test_inductor(model: Any) -> None:
    """The compiler that users have, with a trace, which reads what the graph returned."""
    wrapper = DoLaJanusWrapper(model, ON)
    want_trace, trace = DoLaTrace(), DoLaTrace()
    want = ask(wrapper, trace=want_trace)
    assert_same(ask(wrapper, "inductor", trace=trace), want)
    assert torch.equal(trace.layers, want_trace.layers)
    torch.testing.assert_close(trace.jsd, want_trace.jsd, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["deco", "sled", "confident"])
def test_the_formulas_of_other_methods(model: Any, method: str) -> None:
    """Beside rows of DoLa, each method a graph of its own."""
    wrapper = DoLaJanusWrapper(model, ON)
    configs = [ON, DoLaConfig(method=method, candidate_layers=[1, 2])]
    want = ask(wrapper, configs=configs)
    counters.clear()
    assert_same(ask(wrapper, "eager", configs=configs), want)
    assert graphs()[0] == 3 and not counters["graph_break"]


@torch._dynamo.config.patch(recompile_limit=1)
def test_more_formulas_than_pytorch_compiles(model: Any) -> None:
    """The limit of compilations a function, which is 8, makes a call slower and no error."""
    wrapper = DoLaJanusWrapper(model)
    for method, layers in (("dola", [1, 2]), ("deco", [1, 2]), ("dola", [1])):
        wrapper.config = DoLaConfig(method=method, candidate_layers=layers)
        assert_same(ask(wrapper, "eager", fullgraph=False), ask(wrapper))


def test_the_model_is_not_compiled_for_others(model: Any) -> None:
    """The graph is the view's: the model's own calls, DoLa off and other candidates neither see nor disturb it."""
    wrapper = DoLaJanusWrapper(model, ON)
    attributes = sorted(vars(model))
    want = ask(wrapper)
    ask(wrapper, "eager")
    assert sorted(vars(model)) == attributes
    wrapper.config = DoLaConfig(candidate_layers=[1, 3])
    other = ask(wrapper)
    assert_same(ask(wrapper, "eager"), other)
    wrapper.config = OFF
    assert_same(ask(wrapper, "eager"), ask(wrapper))
    wrapper.config = ON
    counters.clear()
    assert_same(ask(wrapper, "eager"), want)
    assert graphs() == (0, 0, 0)


def test_a_model_that_has_changed_is_compiled_again(model: Any) -> None:
    """A hook that the kept view does not have must act all the same."""
    wrapper = DoLaJanusWrapper(model, ON)
    want = ask(wrapper, "eager")

    def suppress(module: Any, args: Any, output: Tensor) -> Tensor:
        return output - 50 * torch.nn.functional.one_hot(want.sequences[0, 4], 97)

    handle = model.lm_head.register_forward_hook(suppress)
    suppressed = ask(wrapper)
    assert suppressed.sequences[0, 4] != want.sequences[0, 4]
    assert_same(ask(wrapper, "eager"), suppressed)
    handle.remove()
    assert_same(ask(wrapper, "eager"), want)


def test_a_view_is_lent_to_one_call_at_a_time(model: Any) -> None:
    wrapper = DoLaJanusWrapper(model, ON)
    want = ask(wrapper, "eager")
    start = Barrier(2)

    def work(turns: int) -> list[Any]:
        start.wait()
        return [ask(wrapper, "eager") for _ in range(turns)]

    with ThreadPoolExecutor(2) as pool:
        results = [result for each in pool.map(work, (3, 3)) for result in each]
    for result in results:
        assert_same(result, want)
