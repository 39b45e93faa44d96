"""The step from logits to log p̂ in vLLM's two model runners, request by request."""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as OlderLogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from janus_dola.config import Rows
from janus_dola.processor import by_method, formulas
from janus_dola.vllm.exits import EXITS
from janus_dola.vllm.server import Server, StartUp


class DoLaLogitsProcessor(LogitsProcessor, OlderLogitsProcessor):
    """The entry point `vllm.logits_processors`, of both model runners, which look for different classes under it.

    V2 names a request by its slot, and each step's rows, several for a request with drafts, by their slots; the older
    runner tells who came, went or moved, and a request is its row. Requests that DoLa does not change are not kept, and
    their logits not touched.
    """

    def __init__(self, vllm_config: Any, *of_runner: Any) -> None:
        self.server = Server.of(vllm_config)
        self.requests: dict[int, Rows] = {}  # by slot, or by row
        EXITS.row_by_row = vllm_config.lora_config is not None

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        if StartUp.server is not None:
            StartUp.server.rows(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.requests, batch_update, lambda params, *_: self._rows(params))
        if self.server is not None:
            EXITS.wanted = bool(self.requests)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self.requests.pop(req_idx, None)
        if (rows := self._rows(sampling_params)) is not None:
            self.requests[req_idx] = rows
            EXITS.wanted = True
        return rows is not None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Logits [rows, V] in float32 to log p̂, in place, of the rows that want it."""
        slots, first = range(len(logits)), 0
        if ctx is not None:
            drafts = len(logits) != len(ctx.idx_mapping_np)
            slots = (ctx.expanded_idx_mapping if drafts else ctx.idx_mapping_np).tolist()
            first = ctx.pos.storage_offset()  # drafts of over 1 GB come in parts: views of what all rows have
        methods = [(row, self.requests[slot].methods[0]) for row, slot in enumerate(slots) if slot in self.requests]
        if not methods:
            return logits
        if ctx is not None:  # V2 does not tell who went: whoever decoded now probably goes on
            EXITS.wanted = True
        exits = EXITS.take()[first : first + len(logits)]  # [rows, J, V]
        for method, members in by_method(methods, exits):
            read, own = slice(*method.exits), [self.requests[slots[row]] for row in members]
            candidates = torch.cat([rows.candidates[:, read] for rows in own]).to(logits.device)
            strength = torch.cat([rows.strength for rows in own]).to(logits)
            index = torch.tensor(members, device=logits.device)
            logits[index] = formulas(logits[index], exits[index, read], candidates, strength, method)[1]
        return logits

    def _rows(self, params: Any) -> Rows | None:
        rows = None if self.server is None else self.server.rows(params)
        return None if rows is None or rows.changes_nothing else rows
