"""On a GPU, where there is one: the formulas as a CUDA graph."""

from typing import Any

import pytest
import torch

from janus_dola import DoLaConfig, DoLaJanusWrapper
from janus_dola.config import by_row
from janus_dola.processor import GraphedFormulas, formulas

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONFIGS = [DoLaConfig(method=method) for method in ("dola", "deco", "sled", "confident")]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_a_graph_gives_what_the_formulas_give(config: DoLaConfig) -> None:
    rows = by_row([config] * 3, 30)
    fixed = rows.candidates.cuda(), rows.strength.cuda().float()

    def logits() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(3, 500).cuda() * 3, torch.randn(3, len(rows.layers), 500).cuda().bfloat16() * 3

    graph = GraphedFormulas(*logits(), *fixed, rows.methods[0])
    kept = []
    for _ in range(3):
        given = logits()
        want = formulas(*given, *fixed, rows.methods[0])
        assert all(torch.equal(got, of) for got, of in zip(graph(*given), want, strict=True))
        kept.append((graph(*given)[1], want[1]))
    assert all(torch.equal(got, of) for got, of in kept)  # log p̂ is not written over


def test_calls_share_graphs_and_answer_as_without(model: Any, prompt: dict[str, Any]) -> None:
    wrapper = DoLaJanusWrapper(model.cuda())
    try:
        given = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in prompt.items()}
        for configs in ([CONFIGS[0]] * 3, [CONFIGS[1], CONFIGS[0], CONFIGS[1]]):
            tokens = [wrapper.generate_with_dola(**given, configs=configs) for _ in range(2)]
            made = sum(map(len, wrapper._graphs.values()))
            wrapper.generate_with_dola(**given, configs=configs)
            assert sum(map(len, wrapper._graphs.values())) == made > 0
            plain = DoLaJanusWrapper(model)
            plain._graphs = None  # type: ignore[assignment]
            assert all(torch.equal(plain.generate_with_dola(**given, configs=configs), got) for got in tokens)
    finally:
        model.cpu()
