"""The logits processors of a call: DoLa's, which puts log p̂ in place of the scores, and a watch for NaN."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from janus_dola.config import Method, Rows
from janus_dola.dola_runtime import read
from janus_dola.exits import pack
from janus_dola.methods import choose

# Elements of [rows, J, V] at a time on the CPU: memory that was just used costs half as much as fresh memory.
# Elsewhere all rows at once: what costs is starting kernels.
CPU_CHUNK = 2**20


def formulas(
    logits: Tensor, exits: Tensor, candidates: Tensor, strength: Tensor, method: Method
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`read`, then `choose`: log q_N, log p̂, M and the JSD of some rows of one method."""
    reading = read(logits, exits, method.dynamic)
    return reading.log_qN, *choose(reading, candidates, strength, method.name, method.top_k), reading.jsd


@functools.cache
def compiled_formulas(backend: str | Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """`formulas`, for calls whose forward pass is compiled: on a GPU 19 kernels in place of 40.

    Never with CUDA graphs, whatever the mode of the forward pass: scores may be kept from step to step. Nor with
    fullgraph, which makes an error of PyTorch's limit of compilations a function; else the next one runs as it is.
    """
    return torch.compile(formulas, backend=backend)


class GraphedFormulas:
    """`formulas` as a CUDA graph, for eager calls, in which a GPU waits for the CPU: one start in place of 40.

    Args:
        logits, exits, candidates, strength: As `formulas` takes them; those of later calls are of these shapes.
        method: That of all its calls.
    """

    def __init__(self, logits: Tensor, exits: Tensor, candidates: Tensor, strength: Tensor, method: Method) -> None:
        self.inputs = logits.clone(), exits.clone(), candidates.clone(), strength.clone()
        formulas(*self.inputs, method)  # loads the kernels, which a capture must not
        stream, current = torch.cuda.Stream(logits.device), torch.cuda.current_stream(logits.device)
        stream.wait_stream(current)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self.graph.capture_begin(capture_error_mode="thread_local")  # other threads go on
            try:
                self.outputs = formulas(*self.inputs, method)
            finally:
                self.graph.capture_end()
        current.wait_stream(stream)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `formulas` makes of the first tensors, the others as they were; log p̂ alone outlives the next call."""
        for own, given in zip(self.inputs, tensors, strict=False):
            own.copy_(given)
        self.graph.replay()
        log_qN, log_p, M_index, jsd = self.outputs
        return log_qN, log_p.clone(), M_index, jsd


def by_method(methods: Iterable[tuple[int, Method]], exits: Tensor) -> Iterator[tuple[Method, list[int]]]:
    """Rows (number, method) of the same method together, on the CPU some at a time; the exits are [rows, J, V]."""
    together: dict[Method, list[int]] = {}
    for row, method in methods:
        together.setdefault(method, []).append(row)
    for method, rows in together.items():
        elements = (method.exits[1] - method.exits[0]) * exits.shape[-1]  # of a row
        n = max(1, CPU_CHUNK // max(1, elements)) if exits.device.type == "cpu" else len(rows)
        yield from ((method, rows[start : start + n]) for start in range(0, len(rows), n))


def expand(rows: Rows, each: int, like: Tensor) -> Rows:
    """The rows of `each` beams, or returned sequences, of each prompt, on the device and in the dtype of `like`."""
    candidates, read, strength = rows.candidates.to(like.device), rows.read.to(like.device), rows.strength.to(like)
    if each > 1:
        candidates, read, strength = (tensor.repeat_interleave(each, 0) for tensor in (candidates, read, strength))
    methods = [method for method in rows.methods for _ in range(each)]
    return Rows(rows.layers, candidates, read, strength, methods)


class DoLaLogitsProcessor(LogitsProcessor):
    """Replaces the final layer's scores by log p̂. It serves one call of `generate`: make a new one for the next.

    transformers runs the caller's processors after its own penalties and before temperature, top-k and top-p, which is
    where DoLa belongs; so one processor serves greedy search, sampling and beams.

    Args:
        logits: Gives those of the step: of the exits [rows, J, V], J may be 0, or [rows, K, V], K < J, as `exits.pack`
            has them; and of the final layer [rows, V].
        rows: What `config.by_row` makes of the configurations, one per prompt; one prompt stands for all.
        outside: The score outside V_head.
        record: Is told what happened at each step, as `trace.Recorder.record` is.
        beams: Whether the scores are log-probabilities, as in beam search, and not logits.
        backend: Tells by which compiler the forward pass was compiled; the formulas then are, too. None: it was not.
        graphs: Those that no call is using. They are kept: a new one costs 1 ms, and memory that no other can use.
    """

    def __init__(
        self,
        logits: Callable[[], tuple[Tensor, Tensor]],
        rows: Rows,
        outside: float,
        record: Callable[..., None] | None = None,
        beams: bool = False,
        backend: Callable[[], str | Callable[..., Any] | None] = lambda: None,
        graphs: dict[Any, list[GraphedFormulas]] | None = None,
    ) -> None:
        self.logits, self.outside, self.record, self.beams, self.backend = logits, outside, record, beams, backend
        self.leaves_some = bool(rows.unchanged.any())
        self.rows = rows
        self.parts: list[tuple[Method, slice | Tensor]] = []  # the rows that are read together
        self.order: Tensor | None = None  # each row's place in their sequence, if it is another
        self.places: Tensor | None = None  # where packed exits are, [2, rows, J]
        self.graphs = graphs if record is None else None  # a record keeps more than log p̂
        self.lent: dict[int, tuple[Any, GraphedFormulas]] = {}  # key and graph, by the part that it is for

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Tokens so far [rows, T] and scores [rows, V], penalties applied, to log p̂ [rows, V]."""
        self.rows = expand(self.rows, len(scores) // len(self.rows.methods), scores)  # the first step tells how many
        exits, final = (logits.to(scores.device) for logits in self.logits())  # [rows, J or K, V], [rows, V]
        if not self.parts:
            self._part(exits)
        parts = [self._step(i, scores, exits, final) for i in range(len(self.parts))]
        if self.record is None:
            log_p = self._together([part[1] for part in parts])
        else:
            parts = [self._among_all(i, *part) for i, part in enumerate(parts)]
            log_qN, log_p, M_index, jsd = map(self._together, zip(*parts, strict=True))
            self.record(input_ids, log_qN, log_p, M_index, jsd)
        if self.outside != -math.inf:
            log_p = log_p.clamp(min=self.outside)
        # Not log q_N: the scores of beams do not add up to 1 after a penalty, and are compared as they are.
        return torch.where(self.rows.unchanged.unsqueeze(1), scores, log_p) if self.leaves_some else log_p

    def _part(self, exits: Tensor) -> None:
        """Puts the rows of a method together; each then reads its own exits alone."""
        sequence = []
        for method, own in by_method(enumerate(self.rows.methods), exits):
            consecutive = own[-1] - own[0] == len(own) - 1
            part = slice(own[0], own[-1] + 1) if consecutive else torch.tensor(own, device=exits.device)
            self.parts.append((method, part))
            sequence += own
        if sequence != sorted(sequence):
            self.order = torch.tensor(sequence).argsort().to(exits.device)

    def _together(self, parts: Sequence[Tensor]) -> Tensor:
        """What was made of the parts, row by row."""
        together = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return together if self.order is None else together[self.order]

    def _among_all(self, i: int, log_qN: Tensor, log_p: Tensor, M_index: Tensor, jsd: Tensor) -> tuple[Tensor, ...]:
        """What a part's step gave, with M and the JSD [n, J] among all exits: NaN where a row does not read one."""
        (method, rows), J = self.parts[i], len(self.rows.layers)
        first, past = method.exits
        every = jsd.new_full((len(jsd), J), math.nan)
        every[:, first:past] = jsd
        M_index = torch.where(M_index == past - first, J, M_index + first)
        return log_qN, log_p, M_index, every.masked_fill(~self.rows.read[rows], math.nan)

    def _exits_of(self, rows: slice | Tensor, own: slice, exits: Tensor) -> Tensor:
        """Some exits of some rows, packed or not: a compiled pass, which reads all, may follow one that does not."""
        if exits.shape[1] == len(self.rows.layers):
            return exits[:, own][rows]
        if self.places is None:  # where nothing is packed, no call waits for the device
            self.places = pack(self.rows.read.cpu())[1].to(exits.device)
        return exits[tuple(self.places[:, rows, own])]

    def _step(self, i: int, scores: Tensor, exits: Tensor, final: Tensor) -> tuple[Tensor, ...]:
        (method, rows), backend = self.parts[i], self.backend()
        logits, own = scores[rows], slice(*method.exits)
        if self.beams and method.name == "sled":  # it compares logits of layers: a constant matters to it alone
            logits = logits + final[rows].to(logits).logsumexp(-1, keepdim=True)
        own_exits = self._exits_of(rows, own, exits)
        arguments = logits, own_exits, self.rows.candidates[:, own][rows], self.rows.strength[rows], method
        if backend is not None:
            return compiled_formulas(backend)(*arguments)
        if scores.device.type != "cuda" or self.graphs is None:
            return formulas(*arguments)
        if i in self.lent:
            return self.lent[i][1](*arguments[:2])
        key = (scores.device, *((tensor.shape, tensor.dtype) for tensor in arguments[:3]), method)
        try:
            graph = self.graphs.setdefault(key, []).pop()
        except IndexError:
            graph = GraphedFormulas(*arguments)
        self.lent[i] = key, graph
        return graph(*arguments[:4])

    def give_back(self) -> None:
        """Ends the call: its graphs are there for later ones."""
        for key, graph in self.lent.values():
            self.graphs[key].append(graph)  # type: ignore[index]
        self.lent.clear()


class NaNWatch(LogitsProcessor):
    """Changes nothing: notes which rows' logits are NaN, as in float16 that overflowed, without waiting for the device.

    One that a caller of `DoLaJanusWrapper` passes as its own processor takes the place of the wrapper's warning.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.amax(-1).isnan())  # [rows]; NaN is the maximum of what holds one
        return scores

    def rows(self) -> list[int]:
        """The rows whose logits were NaN in any step."""
        return torch.stack(self.steps).any(0).nonzero().flatten().tolist() if self.steps else []

    def errors(self, prompts: int) -> list[str | None]:
        """For each prompt what went wrong, in its first such step, or None."""
        if not self.steps:
            return [None] * prompts
        steps = torch.stack(self.steps).unflatten(1, (prompts, -1)).any(-1).cpu()  # [T, prompts]
        return [nan_error(int(column.int().argmax())) if column.any() else None for column in steps.T]


def nan_error(step: int) -> str:
    """What to say of an answer whose logits are NaN at a step, from 0."""
    return f"logits are NaN at token {step + 1}; float16? try bfloat16"
