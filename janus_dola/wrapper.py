"""`DoLaJanusWrapper`: Janus with DoLa in its text decoding, and nothing else changed."""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessor

from janus_dola.call import Call
from janus_dola.config import DoLaConfig, Rows, by_row
from janus_dola.dola_runtime import choose, read
from janus_dola.exits import ExitView, generating_model, shallow_copy
from janus_dola.score import score
from janus_dola.trace import DoLaTrace, TraceCriteria

# On the CPU so many numbers of [rows, J, V] at a time: memory that was just used costs half as much as fresh memory.
# Elsewhere all rows at once: what costs is starting kernels.
CPU_CHUNK = 2**20


def formulas(
    logits: Tensor, exits: Tensor, candidates: Tensor, strength: Tensor, kind: tuple[str, int, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`read`, then `choose`: log q_N, log p̂, M and the JSD of some rows of one kind (method, top_k, dynamic)."""
    method, top_k, dynamic = kind
    reading = read(logits, exits, dynamic)
    return reading.log_qN, *choose(reading, candidates, strength, method, top_k), reading.jsd


@functools.cache
def compiled_formulas(backend: str | Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """`formulas`, for calls whose forward pass is compiled: on a GPU 19 kernels in place of 40.

    Never with CUDA graphs, whatever the mode of the forward pass: scores may be kept from step to step. Nor with
    fullgraph, which makes an error of PyTorch's limit of compilations a function; else the next one runs as it is.
    """
    return torch.compile(formulas, backend=backend)


class DoLaLogitsProcessor(LogitsProcessor):
    """Replaces the final layer's scores by log p̂.

    transformers runs the caller's processors after its own penalties and before temperature, top-k and top-p, which is
    where DoLa belongs; so one processor serves greedy search, sampling and beams.

    Args:
        logits: Gives those of the step: of the exits [rows, J, V], J may be 0, and of the final layer [rows, V].
        rows: What `config.by_row` makes of the configurations, one per prompt; one prompt stands for all.
        outside: The score outside V_head.
        trace: A `DoLaTrace`, is told what happened at each step.
        beams: Whether the scores are log-probabilities, as in beam search, and not logits.
        backend: Tells by which compiler the forward pass was compiled; the formulas then are, too. None: it was not.
    """

    def __init__(
        self,
        logits: Callable[[], tuple[Tensor, Tensor]],
        rows: Rows,
        outside: float,
        trace: Any = None,
        beams: bool = False,
        backend: Callable[[], str | Callable[..., Any] | None] = lambda: None,
    ) -> None:
        self.logits, self.outside, self.trace, self.beams, self.backend = logits, outside, trace, beams, backend
        _, self.candidates, self.strength, methods = rows
        # Of each row its method, top_k, and whether its JSD are needed.
        self.kinds = [(*m, trace is not None or dynamic) for m, dynamic in zip(methods, rows.dynamic, strict=True)]
        self.same = rows.changes_nothing  # the baseline bit for bit, traced or not
        self.lost = torch.tensor(False)  # rows whose logits were NaN, [rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Tokens so far [rows, T] and scores [rows, V], penalties applied, to log p̂ [rows, V]."""
        each = len(scores) // len(self.kinds)  # rows of a prompt: beams, or sequences to return; the first step tells
        self.candidates, self.strength = self.candidates.to(scores.device), self.strength.to(scores)
        if each > 1:
            self.candidates = self.candidates.repeat_interleave(each, 0)
            self.strength = self.strength.repeat_interleave(each)
            self.kinds = [kind for kind in self.kinds for _ in range(each)]
        exits, final = (logits.to(scores.device) for logits in self.logits())  # [rows, J, V], [rows, V]
        n = max(1, CPU_CHUNK // max(1, exits[0].numel())) if scores.device.type == "cpu" else len(scores)
        parts = zip(*(self._step(rows, scores, exits, final) for rows in self._chunks(n)), strict=True)
        log_qN, log_p, M_index, jsd = (part[0] if len(part) == 1 else torch.cat(part) for part in parts)
        self.lost = self.lost.to(scores.device) | log_qN[:, 0].isnan()  # one NaN makes NaN of its row
        if self.trace is not None:
            self.trace.record(input_ids, log_qN, log_p, M_index, jsd)
        if self.same:
            return scores
        return log_p if self.outside == -math.inf else log_p.clamp(min=self.outside)

    def _chunks(self, n: int) -> Iterator[slice]:
        """Runs of rows of a kind, at most n long."""
        start = 0
        for _, run in groupby(self.kinds):
            end = start + len(list(run))
            yield from (slice(first, min(first + n, end)) for first in range(start, end, n))
            start = end

    def _step(self, rows: slice, scores: Tensor, exits: Tensor, final: Tensor) -> tuple[Tensor, ...]:
        kind, logits, backend = self.kinds[rows.start], scores[rows], self.backend()
        if self.beams and kind[0] == "sled":  # it compares logits of layers: a constant matters to it alone
            logits = logits + final[rows].to(logits).logsumexp(-1, keepdim=True)
        step = formulas if backend is None else compiled_formulas(backend)
        return step(logits, exits[rows], self.candidates[rows], self.strength[rows], kind)


class DoLaJanusWrapper:
    """Composes a Janus model and decodes its text with DoLa (arXiv 2309.03883, dynamic premature layer selection).

    It owns no parameter or buffer; every attribute that is not below is the model's own, so prompt embedding and image
    generation stay what they are. Wrap a model after `.to(...)` and `.eval()`: those return the model, not the wrapper.

    Args:
        model: `MultiModalityCausalLM`, ours or the published one; transformers' `JanusForConditionalGeneration`; or any
            model of transformers that generates, has no encoder, and whose `get_decoder()` has `.layers` and `.norm`.
            Of a wrapper its model, and what has been compiled for it.
        config: `DoLaConfig()` by default. It may be changed between calls.

    Raises:
        ValueError: The model or the config is something else, or the config does not fit the model.
    """

    def __init__(self, model: Any, config: DoLaConfig | None = None) -> None:
        if config is not None and not isinstance(config, DoLaConfig):
            raise ValueError(f"config must be a DoLaConfig, got {type(config).__name__}")
        self.model: Any = model.model if isinstance(model, DoLaJanusWrapper) else model
        generating = generating_model(self.model)
        if type(generating).generate is not GenerationMixin.generate and generating.config.model_type != "janus":
            raise ValueError(f"model must use GenerationMixin.generate, got {type(generating).__name__} with its own")
        self.config = config or DoLaConfig()
        self.config.resolve_layers(self.num_layers)  # fail here rather than in the first call
        self._compiled: dict[tuple[Any, ...], list[ExitView]] = (
            model._compiled if isinstance(model, DoLaJanusWrapper) else {}
        )

    def __getstate__(self) -> dict[str, Any]:  # a copy compiles views of its own
        return vars(self) | {"_compiled": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:  # or it would be looked for on the model, not there yet
        vars(self).update(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    score = score

    @property
    def language_model(self) -> Any:
        """The model's own, but for `generate`, which is the wrapper's: a shallow copy, made afresh each time.

        So code that calls `vl_gpt.language_model.generate(...)`, as the published scripts do, gets DoLa.
        """
        language_model = shallow_copy(self.model.language_model)
        language_model.generate = self.generate
        return language_model

    @property
    def ln_out(self) -> nn.Module:
        """LN_out, the final norm, shared by all exits."""
        return generating_model(self.model).get_decoder().norm

    @property
    def phi(self) -> nn.Module:
        """φ, the head, shared by all exits."""
        return generating_model(self.model).get_output_embeddings()

    @property
    def num_layers(self) -> int:
        """N, the number of decoder layers."""
        return len(generating_model(self.model).get_decoder().layers)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The language model's `generate`, with DoLa if `config.use_dola_lm`. Takes and returns what that does.

        Without DoLa it differs in one thing: `repetition_penalty` is right for left-padded batches of `inputs_embeds`.
        """
        if kwargs.get("generation_mode") == "image":  # of transformers' Janus
            model = generating_model(self.model)
            return type(model).generate(model, *args, **kwargs)  # its own may be custom_generate's, which calls this
        if self.config.use_dola_lm:
            return self.generate_with_dola(*args, **kwargs)
        for name in ("trace", "configs"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} must be None without DoLa: config.use_dola_lm is False")
        return Call(generating_model(self.model), args, kwargs).run()

    def generate_with_dola(
        self, *args: Any, trace: DoLaTrace | None = None, configs: Sequence[DoLaConfig] | None = None, **kwargs: Any
    ) -> Any:
        """The language model's `generate` with DoLa, whatever `config.use_dola_lm` says.

        Greedy search, sampling, beam search and beam sampling, from `inputs_embeds` or `input_ids`, compiled or not.
        The scores it returns on request are log p̂ after the warpers. In beam sampling tokens outside V_head score -1e9
        in place of −∞, as dead beams do: when all beams of a row have ended, transformers 4 would be left with nothing
        but −∞ to sample from.

        Args:
            args, kwargs: Those of the language model's `generate`.
            trace: Records what happened at each step. It changes nothing: JSD of the candidates is computed anyway, and
                a trace of all layers only looks at the others.
            configs: One for each prompt, in place of `config`; its beams and returned sequences follow it. A prompt
                whose `use_dola_lm` is false is decoded without DoLa.

        Returns:
            What the language model's `generate` returns.

        Raises:
            ValueError: A kind of decoding is asked for that DoLa cannot work with, or an argument is wrong.
        """
        model = generating_model(self.model)
        call = Call(model, args, kwargs)
        call.check_dola()
        if trace is not None and not isinstance(trace, DoLaTrace):
            raise ValueError(f"trace must be a DoLaTrace, got {trace!r}")
        own = [replace(self.config, use_dola_lm=True)] if configs is None else configs
        N = self.num_layers
        rows = by_row(own, N, range(1, N) if trace is not None and trace.traces_all else None)
        if configs is not None and len(configs) != call.rows:
            raise ValueError(f"configs must be one for each of the {call.rows} prompts, got {len(configs)}")
        if trace is None and rows.changes_nothing:
            return call.run()
        num_beams = call.get("num_beams") or 1
        outside = -1e9 if num_beams > 1 and call.get("do_sample") else -math.inf
        criterion = None if trace is None else TraceCriteria(trace)
        if trace is not None:
            trace.start(N, rows, num_beams, call.get("eos_token_id"))
        whole = bool(call.get("output_hidden_states") or call.get("output_attentions"))
        with self._view(model, rows.layers, whole) as view:
            processor = DoLaLogitsProcessor(view.take, rows, outside, trace, num_beams > 1, view.backend)
            output = call.run(processor, criterion, view.model)
        if processor.lost.any():
            lost = processor.lost.nonzero().flatten().tolist()
            warnings.warn(f"logits are NaN in rows {lost}; float16? try bfloat16", RuntimeWarning, stacklevel=2)
        if trace is not None:
            trace.finish(getattr(output, "sequences", output), call.get("pad_token_id"))
        return output

    @contextmanager
    def _view(self, model: Any, layers: tuple[int, ...], whole: bool) -> Iterator[ExitView]:
        """A view of the model as it is now: a call's own, but kept for later ones once `generate` has compiled it."""
        kept = self._compiled.setdefault((model, layers, whole), [])
        try:
            view: ExitView | None = kept.pop()
        except IndexError:  # asking first would leave another thread time to take it
            view = None
        if view is None or view.state() != view.made_of:
            view = ExitView(model, layers, whole=whole)
        try:
            yield view
        finally:
            view.hidden.clear()
            if view.backend() is not None:
                kept.append(view)
