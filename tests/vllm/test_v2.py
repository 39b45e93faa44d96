"""The processor as vLLM's model runner V2 calls it, which needs a GPU to run: slots, and rows in any order."""

from typing import Any

import numpy as np
import pytest
import torch
from engines import LAYERS, VOCAB, architecture, llama
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from janus_dola import DoLaConfig
from janus_dola.config import by_row
from janus_dola.dola_runtime import read
from janus_dola.methods import choose
from janus_dola.vllm.exits import EXITS, append_exits, read_head
from janus_dola.vllm.processor import DoLaLogitsProcessor
from janus_dola.vllm.server import Server

EXIT_LAYERS = tuple(range(1, LAYERS))
D = 64


@pytest.fixture
def processor() -> DoLaLogitsProcessor:
    made = DoLaLogitsProcessor.__new__(DoLaLogitsProcessor)
    EXITS.row_by_row = False  # an engine with LoRA may have been here
    made.server, made.requests = Server(DoLaConfig(), LAYERS, EXIT_LAYERS, penalties_first=True), {}
    return made


class Step:
    """One step of V2's: hidden states of rows, the head, and the processor where the sampler has it."""

    def __init__(self, slots: list[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.slots, self.calls = slots, []
        self.head = torch.randn(D, VOCAB, generator=generator) / 4
        self.hidden = torch.randn(len(slots), (1 + len(EXIT_LAYERS)) * D, generator=generator)

    def compute_logits(self) -> Tensor:
        def head(x: Tensor) -> Tensor:
            self.calls.append(len(x))
            return x @ self.head

        logits = read_head(self.hidden, D, lambda x: x * 2, head)
        assert logits is not None
        return logits

    def apply(self, processor: Any, logits: Tensor, rows: slice = slice(None)) -> Tensor:
        """Of some of the rows: the rejection sampler takes whole requests, as many as make 1 GB of logits."""
        requests = np.array(list(dict.fromkeys(self.slots[rows])), dtype=np.int32)
        rest: Any = dict.fromkeys(("expanded_local_pos", "input_ids", "seq_lens_upper_bound_np"))
        ctx = LogitsContext(
            expanded_idx_mapping=torch.tensor(self.slots)[rows],
            idx_mapping=torch.from_numpy(requests),
            idx_mapping_np=requests,
            pos=torch.arange(len(self.slots))[rows],
            **rest,
        )
        return processor.apply(logits[rows].float().clone(), ctx)

    def want(self, row: int, config: DoLaConfig, logits: Tensor) -> Tensor:
        """Log p̂ of a row by itself."""
        h = self.hidden[row].view(-1, D)
        rows = by_row([config], LAYERS, EXIT_LAYERS)
        method, top_k, *_ = rows.methods[0]
        reading = read(logits[row : row + 1], (2 * h[1:] @ self.head)[None])
        return choose(reading, rows.candidates, rows.strength.float(), method, top_k)[0][0]


def params(**keys: Any) -> SamplingParams:
    return SamplingParams(extra_args=keys or None)


def test_slots_are_recycled_and_rows_reordered(processor: DoLaLogitsProcessor) -> None:
    assert isinstance(processor, LogitsProcessor)
    assert processor.add_request(5, params(alpha=0.3))
    assert not processor.add_request(2, params(use_dola_lm=0))
    assert processor.add_request(7, params(method="sled", bucket_id=1))
    configs = {5: DoLaConfig(alpha=0.3), 7: DoLaConfig(method="sled", bucket_id=1)}
    for seed, slots in enumerate(([5, 2, 7], [7, 5, 2], [2, 7])):
        step = Step(slots, seed)
        logits = step.compute_logits()
        assert step.calls == [len(slots) * (1 + len(EXIT_LAYERS))]
        got = step.apply(processor, logits)
        for row, slot in enumerate(slots):
            want = step.want(row, configs[slot], logits) if slot in configs else logits[row]
            torch.testing.assert_close(got[row], want, atol=1e-4, rtol=1e-4)
    assert not processor.add_request(7, params(use_dola_lm=0))  # the slot of one that has ended
    assert processor.add_request(2, params(method="deco"))
    step = Step([7, 2], 9)
    logits = step.compute_logits()
    got = step.apply(processor, logits)
    assert torch.equal(got[0], logits[0])
    torch.testing.assert_close(got[1], step.want(1, DoLaConfig(method="deco"), logits), atol=1e-4, rtol=1e-4)


def test_exits_are_read_late_rather_than_never(processor: DoLaLogitsProcessor) -> None:
    """V2 does not tell who has ended or waits: a step without DoLa stops the reading, one with it starts it again."""
    processor.add_request(0, params())
    processor.add_request(1, params(use_dola_lm=0))
    first, off, still_off, late, again = (Step(slots) for slots in ([0, 1], [1], [1], [1, 0], [1, 0]))
    steps = (first, off, still_off, late, again)
    for step in steps:
        logits = step.compute_logits()
        got = step.apply(processor, logits)
        for row, slot in enumerate(step.slots):
            want = logits[row] if slot else step.want(row, DoLaConfig(), logits)
            torch.testing.assert_close(got[row], want, atol=1e-4, rtol=1e-4)
    J = len(EXIT_LAYERS)
    assert [step.calls for step in steps] == [
        [2 + 2 * J],
        [1 + J],
        [1],
        [2, 2 + 2 * J],
        [2 + 2 * J],
    ]


@pytest.mark.parametrize("read", ["with the final layer", "late"])
def test_drafts_are_rows_of_their_request_and_come_in_parts(processor: DoLaLogitsProcessor, read: str) -> None:
    """The sampler does not call for a part whose requests all have DoLa off."""
    configs = {5: DoLaConfig(alpha=0.3), 7: DoLaConfig(method="deco", bucket_id=1)}
    processor.add_request(5, params(alpha=0.3))
    processor.add_request(2, params(use_dola_lm=0))
    processor.add_request(7, params(method="deco", bucket_id=1))
    EXITS.wanted = read != "late"
    step = Step([5, 5, 5, 2, 2, 7, 7, 2, 7])
    logits = step.compute_logits()
    for rows in (slice(0, 9), slice(0, 3), slice(5, 8), slice(8, 9)):
        got = step.apply(processor, logits, rows)
        for row, slot in enumerate(step.slots[rows], rows.start):
            want = step.want(row, configs[slot], logits) if slot in configs else logits[row]
            torch.testing.assert_close(got[row - rows.start], want, atol=1e-4, rtol=1e-4)
    J = len(EXIT_LAYERS)
    assert step.calls == ([9 + 9 * J] if read != "late" else [9, 9 + 9 * J])


def test_penalties_come_before_dola_and_are_allowed(processor: DoLaLogitsProcessor) -> None:
    assert processor.add_request(0, SamplingParams(repetition_penalty=1.3))


def test_a_tensor_parallel_rank_without_logits() -> None:
    EXITS.wanted = True
    assert read_head(torch.zeros(2, 3 * D), D, lambda x: x, lambda x: None) is None


def test_the_last_pipeline_stage_appends_the_exits() -> None:
    """Others hand their exits on in vLLM's own `IntermediateTensors`."""
    from vllm.sequence import IntermediateTensors

    tensors = IntermediateTensors({"hidden_states": torch.zeros(2, D)})
    assert append_exits(tensors) is tensors
    hidden, exits = torch.randn(2, D), [torch.randn(2, D), torch.randn(2, D)]
    assert torch.equal(append_exits((hidden, exits)), torch.cat([hidden, *exits], 1))


def test_n_gram_drafts_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a configuration goes, where there is no Triton."""
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    monkeypatch.setattr(VllmConfig, "_validate_v2_model_runner", lambda self: None)
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    arguments = {"max_model_len": 512, "speculative_config": drafts, **architecture("DoLaLlamaForCausalLM")}
    assert EngineArgs(str(llama()[0]), **arguments).create_engine_config().additional_config["dola"]["use_dola_lm"]
