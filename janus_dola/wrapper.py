"""`DoLaJanusWrapper`: Janus with DoLa in its text decoding, and nothing else changed."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessor

from janus_dola.call import Call
from janus_dola.config import DoLaConfig, by_row
from janus_dola.exits import ExitView, generating_model, shallow_copy
from janus_dola.processor import DoLaLogitsProcessor, GraphedFormulas, NaNWatch
from janus_dola.score import score_continuations
from janus_dola.trace import DoLaTrace, Recorder


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
        self._graphs: dict[Any, list[GraphedFormulas]] = model._graphs if isinstance(model, DoLaJanusWrapper) else {}

    def __getstate__(self) -> dict[str, Any]:  # compiled views and graphs are not copied
        return vars(self) | {"_compiled": {}, "_graphs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:  # `__getattr__` needs `model`, which is not set yet
        vars(self).update(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def score(self, *args: Any, **kwargs: Any) -> Tensor:
        """Log-probabilities of given continuations: `score.score_continuations`, which see, with `config`.

        Args:
            args, kwargs: Its prompt (`inputs_embeds` or `input_ids`, `attention_mask`), `continuation_ids`,
                `continuation_mask`, and `configs`.

        Returns:
            float32 [rows, T]; [configs, rows, T] if `configs` is given.
        """
        return score_continuations(generating_model(self.model), self.config, *args, **kwargs)

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
        return self._run(Call(generating_model(self.model), args, kwargs))

    def generate_with_dola(
        self, *args: Any, trace: DoLaTrace | None = None, configs: Sequence[DoLaConfig] | None = None, **kwargs: Any
    ) -> Any:
        """The language model's `generate` with DoLa, whatever `config.use_dola_lm` says.

        Greedy search, sampling, beam search and beam sampling, from `inputs_embeds` or `input_ids`, compiled or not.
        The scores it returns on request are log p̂ after the warpers. In beam sampling tokens outside V_head score -1e9
        in place of −∞, as dead beams do: when all beams of a row have ended, transformers 4 would be left with nothing
        but −∞ to sample from.

        Where V_head leaves fewer answers than `num_return_sequences` asks of the beams, transformers fills them up with
        repeats and fragments. Their `sequences_scores` are −∞, and a warning says how many they are.

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
            return self._run(call)
        num_beams = call.get("num_beams") or 1
        outside = -1e9 if num_beams > 1 and call.get("do_sample") else -math.inf
        eos = call.get("eos_token_id")
        recorder = None if trace is None else Recorder(trace, N, rows, num_beams, eos)
        rows = rows if trace is None else rows.traced(trace.traces_all)
        whole = bool(call.get("output_hidden_states") or call.get("output_attentions"))
        several = num_beams > 1 and (call.get("num_return_sequences") or 1) > 1
        bare = several and not call.get("return_dict_in_generate")
        if several:  # their scores alone tell which of them are answers
            call.set("return_dict_in_generate", True)
            call.set("output_scores", True)
        with self._view(model, rows.layers, whole) as view:
            view.read_only(rows.read)
            record = None if recorder is None else recorder.record
            processor = DoLaLogitsProcessor(view.take, rows, outside, record, num_beams > 1, view.backend, self._graphs)
            try:
                output = self._run(call, [processor], recorder, view.model)
            finally:
                processor.give_back()
        if recorder is not None:
            recorder.finish(getattr(output, "sequences", output), call.get("pad_token_id"))
        return output.sequences if bare else output

    @staticmethod
    def _run(call: Call, processors: Sequence[LogitsProcessor] = (), *more: Any) -> Any:
        """What `call.run` returns; warns of NaN and dead beams, unless the caller watches with a `NaNWatch`."""
        watch = NaNWatch()
        watched = any(isinstance(processor, NaNWatch) for processor in call.get("logits_processor") or ())
        output = call.run([*processors] if watched else [watch, *processors], *more)
        if rows := watch.rows():
            warnings.warn(f"logits are NaN in rows {rows}; float16? try bfloat16", RuntimeWarning, stacklevel=3)
        if processors and (dead := mark_dead(output, call.get("length_penalty"))) and not watched:
            warnings.warn(
                f"{dead} of the {len(output.sequences)} returned sequences are no answers, and score -inf: V_head left "
                "fewer than num_return_sequences",
                RuntimeWarning,
                stacklevel=3,
            )
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


def mark_dead(output: Any, length_penalty: float | None) -> int:
    """Sets the scores of returned beams that never were alive to −∞; how many they are.

    transformers starts all beams but the first at −1e9, and fills up with those, and with what it put aside at −1e9,
    where a step leaves fewer tokens than there are beams. The length penalty divides some of these scores.
    """
    scores = getattr(output, "sequences_scores", None)
    if scores is None:
        return 0
    lengths = (output.beam_indices >= 0).sum(-1).clamp(min=1)  # [S]
    total = scores * lengths ** (1.0 if length_penalty is None else length_penalty)
    dead = torch.minimum(scores, total) < -5e8
    output.sequences_scores = scores.masked_fill(dead, -math.inf)
    return int(dead.sum())
