"""`DoLaJanusWrapper`: Janus with DoLa in its text decoding, and nothing else changed."""

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from janus_dola.config import DoLaConfig
from janus_dola.dola_runtime import contrast, jsd, premature, softmax
from janus_dola.readout import Readout
from janus_dola.score import score
from janus_dola.trace import DoLaTrace, TraceCriteria

# On the CPU so many numbers of [rows, J, V] at a time: memory that was just used costs half as much as fresh memory.
# Elsewhere all rows at once: what costs is starting kernels.
CPU_CHUNK = 2**20

# Arguments of `generate` that cannot work with DoLa, the values that leave them off, and why they cannot.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_model": ((None,), "assisted decoding checks several words per forward pass"),
    "prompt_lookup_num_tokens": ((None,), "prompt lookup decoding checks several words per forward pass"),
    "assistant_early_exit": ((None,), "assisted decoding checks several words per forward pass"),
    "use_mtp": ((None, False), "multi-token prediction checks several words per forward pass"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search re-ranks words by hidden states of its own"),
    "num_beam_groups": ((None, 1), "group beam search scores a part of the rows at a time"),
    "guidance_scale": ((None, 1, 1.0), "classifier-free guidance runs the model a second time in every step"),
    "dola_layers": ((None,), "it is another DoLa, that of transformers"),
    "custom_generate": ((None,), "a custom decoding loop need not apply logits processors"),
}


class DoLaLogitsProcessor(LogitsProcessor):
    """Replaces the final layer's scores by log p̂.

    transformers runs the caller's processors after its own penalties and before temperature, top-k and top-p, which is
    where DoLa belongs; so one processor serves greedy search, sampling and beams.

    Args:
        num_layers: N.
        layers: The candidate layers j < N, lowest first; with none, there is nothing to subtract.
        alpha: Threshold of V_head.
        readout: Where the exits' logits come from; None where no layer is tapped.
        floor: The score outside V_head.
        trace: Is told what happened at each step. It may tap more layers than the candidates.
    """

    def __init__(
        self,
        num_layers: int,
        layers: tuple[int, ...],
        alpha: float,
        readout: Readout | None,
        floor: float = -math.inf,
        trace: DoLaTrace | None = None,
    ) -> None:
        self.alpha = alpha
        self.readout = readout
        self.floor = floor
        self.trace = trace
        self.tapped = layers if trace is None else trace.traced_layers  # what the readout gives
        self.candidates = [self.tapped.index(layer) for layer in layers]
        self.layers = torch.tensor([*self.tapped, num_layers])
        # With nothing to subtract and every word kept, p̂ is q_N: the baseline bit for bit, traced or not.
        self.same = not layers and alpha == 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Tokens so far [rows, T] and scores [rows, V], penalties applied, to log p̂ [rows, V]."""
        exits = None if self.readout is None else self.readout.take().to(scores.device)  # [rows, J, V]
        n = len(scores)
        if exits is not None and exits.device.type == "cpu":
            n = max(1, CPU_CHUNK // exits[0].numel())
        parts = [
            self._read(scores[i : i + n], None if exits is None else exits[i : i + n]) for i in range(0, len(scores), n)
        ]
        log_qN, log_p, M, divergence = (
            part[0] if len(part) == 1 or part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)
        )
        if self.trace is not None:
            self.layers = self.layers.to(M.device)
            self.trace.record(input_ids, log_qN, log_p, self.layers[M], divergence)
        if self.same:
            return scores
        return log_p if self.floor == -math.inf else log_p.clamp(min=self.floor)

    def _read(self, scores: Tensor, exits: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """log q_N and log p̂ [rows, V], M as an index into `layers` [rows], and JSD(q_N ‖ q_j) [rows, J] if needed."""
        qN, log_qN = softmax(scores)
        log_qM = divergence = None
        M = torch.full((len(scores),), len(self.tapped), device=scores.device)
        if exits is not None:
            qj, log_qj = softmax(exits)  # [rows, J, V]
            if len(self.candidates) > 1 or self.trace is not None:
                divergence = jsd(qN.unsqueeze(1), qj, log_qN.unsqueeze(1), log_qj)
            if self.candidates:
                M, log_qM = premature(log_qj, divergence, self.candidates)
        log_p = log_qN if self.same else contrast(log_qN, log_qM, self.alpha)
        return log_qN, log_p, M, divergence


class DoLaJanusWrapper:
    """Composes a Janus model and decodes its text with DoLa (arXiv 2309.03883, dynamic premature layer selection).

    It owns no parameter or buffer; every attribute that is not below is the model's own, so prompt embedding and image
    generation stay what they are. Wrap a model after `.to(...)` and `.eval()`: those return the model, not the wrapper.

    Args:
        model: `MultiModalityCausalLM`, ours or the published one: anything with `prepare_inputs_embeds` and a
            `language_model` that has `.model.layers`, `.model.norm`, `.lm_head` and `.generate`.
        config: `DoLaConfig()` by default. It may be changed between calls.

    Raises:
        ValueError: The model or the config is something else, or the config does not fit the model.
    """

    def __init__(self, model: Any, config: DoLaConfig | None = None) -> None:
        if config is not None and not isinstance(config, DoLaConfig):
            raise ValueError(f"config must be a DoLaConfig, got {type(config).__name__}")
        for path in ("language_model.model.layers", "language_model.model.norm", "language_model.lm_head"):
            part = model
            for name in path.split("."):
                part = getattr(part, name, None)
            if not isinstance(part, nn.Module):
                raise ValueError(f"model must be a Janus model, with {path}; got {type(model).__name__} without it")
        self.model = model
        self.config = config or DoLaConfig()
        self.config.resolve_layers(self.num_layers)  # fail here rather than in the first call

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not set yet: while unpickling or copying
            raise AttributeError(name)
        return getattr(self.model, name)

    @property
    def language_model(self) -> Any:
        return self.model.language_model

    @property
    def ln_out(self) -> nn.Module:
        """LN_out, the final norm, shared by all exits."""
        return self.language_model.model.norm

    @property
    def phi(self) -> nn.Module:
        """φ, the head, shared by all exits."""
        return self.language_model.lm_head

    @property
    def num_layers(self) -> int:
        """N, the number of decoder layers."""
        return len(self.language_model.model.layers)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`language_model.generate`, with DoLa if `config.use_dola_lm`. Takes its arguments, returns what it returns.

        Without DoLa it differs in one thing: `repetition_penalty` is right for left-padded batches of `inputs_embeds`.
        """
        if self.config.use_dola_lm:
            return self.generate_with_dola(*args, **kwargs)
        if kwargs.pop("trace", None) is not None:
            raise ValueError("trace must be None without DoLa: config.use_dola_lm is False")
        return self._generate([], *args, **kwargs)

    def generate_with_dola(self, *args: Any, trace: DoLaTrace | None = None, **kwargs: Any) -> Any:
        """`language_model.generate` with DoLa, whatever `config.use_dola_lm` says.

        Greedy search, sampling, beam search and beam sampling, from `inputs_embeds` or `input_ids`. The scores it
        returns on request are log p̂ after the warpers. In beam sampling words outside V_head score -1e9, the value
        that transformers gives a dead beam, in place of −∞: when all beams of a row have ended, transformers 4 would be
        left with nothing but −∞ to sample from.

        Args:
            args, kwargs: Those of `language_model.generate`.
            trace: Records what happened at each step. It changes nothing: JSD of the candidates is computed anyway, and
                a trace of all layers only looks at the others.

        Returns:
            What `language_model.generate` returns.

        Raises:
            ValueError: A kind of decoding is asked for that DoLa cannot work with.
        """
        config = replace(self.config)  # checked again, and safe from changes while this call runs
        layers = tuple(j for j in config.resolve_layers(self.num_layers) if j < self.num_layers)
        settings = Settings(self.language_model, args, kwargs)
        if trace is not None and not isinstance(trace, DoLaTrace):
            raise ValueError(f"trace must be a DoLaTrace, got {trace!r}")
        for name, (off, reason) in UNSUPPORTED.items():
            if (value := settings.get(name)) not in off:
                raise ValueError(f"{name} must be left off with DoLa, got {value!r}: {reason}")
        if not layers and config.alpha == 0 and trace is None:  # p̂ is q_N itself: bit for bit the baseline
            return self._generate([], *args, **kwargs)
        num_beams = settings.get("num_beams") or 1
        floor = -1e9 if num_beams > 1 and settings.get("do_sample") else -math.inf
        tapped = layers
        if trace is not None:
            trace.start(self.num_layers, layers, config.alpha, num_beams, settings.get("eos_token_id"))
            tapped = trace.traced_layers
            criteria = settings.kwargs.get("stopping_criteria")
            settings.kwargs["stopping_criteria"] = StoppingCriteriaList([*(criteria or []), TraceCriteria(trace)])
        with Readout(self.language_model, tapped) if tapped else nullcontext() as readout:
            processor = DoLaLogitsProcessor(self.num_layers, layers, config.alpha, readout, floor, trace)
            output = self._generate([processor], **settings.kwargs)
        if trace is not None:
            trace.finish(getattr(output, "sequences", output), settings.get("pad_token_id"))
        return output

    def score(
        self,
        inputs_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        continuation_ids: Tensor,
        continuation_mask: Tensor | None = None,
        configs: Sequence[DoLaConfig] | None = None,
        apc_floor: float = -1000.0,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Log-probabilities of given continuations: log p̂, or log q_N where `use_dola_lm` is false.

        One teacher-forced forward pass serves all configurations. Each position of each row is read as a decode step
        reads it (without penalties), in chunks, so that memory does not grow with the length of the continuations.

        Args:
            inputs_embeds: Prompts, [rows, P, d], padded on the left. Or else `input_ids`, [rows, P]. A single prompt is
                shared by all continuations, and run once.
            attention_mask: 0 on the prompts' padding, [rows, P]; all 1 by default.
            continuation_ids: [rows, T], padded on the right with anything.
            continuation_mask: 0 on the continuations' padding, [rows, T]; all 1 by default.
            configs: Score under each of these in place of `config`.
            apc_floor: The score of a token outside V_head, −1000 as in the paper's multiple-choice protocol.
            chunk_size: Positions read out at a time; by default as many as keep below 300 MB at Janus' vocabulary.

        Returns:
            float32 [rows, T], 0 where the continuation is padding; [configs, rows, T] if `configs` is given.

        Raises:
            ValueError: A shape, a mask, an id or a config does not fit.
        """
        if configs is not None and (not configs or not all(isinstance(config, DoLaConfig) for config in configs)):
            raise ValueError(f"configs must be a list of at least one DoLaConfig, got {configs!r}")
        scores = score(
            self.language_model,
            [replace(config) for config in ([self.config] if configs is None else configs)],  # checked again
            inputs_embeds,
            input_ids,
            attention_mask,
            continuation_ids,
            continuation_mask,
            apc_floor,
            chunk_size,
        )
        return scores[0] if configs is None else scores

    def _generate(self, processors: list[LogitsProcessor], *args: Any, **kwargs: Any) -> Any:
        """`language_model.generate` with `processors` after the caller's own.

        Raises:
            ValueError: `inputs_embeds` or its `attention_mask` has the wrong shape.
        """
        call = Settings(self.language_model, args, kwargs)
        embeds, mask = call.get("inputs_embeds"), call.get("attention_mask")
        if embeds is not None:
            shape, d = list(getattr(embeds, "shape", ())), self.language_model.config.hidden_size
            if not isinstance(embeds, Tensor) or len(shape) != 3 or 0 in shape or shape[2] != d:
                raise ValueError(f"inputs_embeds must be a tensor [rows, T, {d}], rows and T at least 1, got {shape}")
            alone = call.get("inputs") is None and call.get("input_ids") is None  # ids beside it are more to mask
            if alone and mask is not None and mask.ndim == 2 and list(mask.shape) != shape[:2]:
                raise ValueError(f"attention_mask must be of shape {shape[:2]}, got {list(mask.shape)}")
        ours: list[LogitsProcessor] = []
        penalty = call.get("repetition_penalty")
        if penalty not in (None, 1.0) and call.get("inputs_embeds") is not None and call.get("inputs") is None:
            # transformers 5 counts a row's padding off its new tokens and skips the penalty for as many of them.
            call.set("repetition_penalty", 1.0)
            ours.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
        if ours or processors:
            call.set(
                "logits_processor", LogitsProcessorList([*ours, *(call.get("logits_processor") or []), *processors])
            )
        return self.language_model.generate(**call.kwargs)


class Settings:
    """The arguments of one `generate` call, by name, with the defaults of the model's generation config."""

    def __init__(self, language_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # generate's leading positional parameters, the same in transformers 4.48 and 5.
        positional = (
            "inputs",
            "generation_config",
            "logits_processor",
            "stopping_criteria",
            "prefix_allowed_tokens_fn",
        )
        if len(args) > len(positional):
            raise ValueError(f"generate takes at most {len(positional)} positional arguments, got {len(args)}")
        self.kwargs = dict(zip(positional, args, strict=False)) | kwargs
        self._defaults = language_model.generation_config

    def get(self, name: str) -> Any:
        """What `generate` will use: keyword, else the call's generation config, else the model's."""
        if self.kwargs.get(name) is not None:
            return self.kwargs[name]
        given: GenerationConfig | None = self.kwargs.get("generation_config")
        value = getattr(given, name, None)
        return value if value is not None else getattr(self._defaults, name, None)

    def set(self, name: str, value: Any) -> None:
        """Sets an argument without changing what the caller passed in."""
        given = self.kwargs.get("generation_config")
        if given is not None and hasattr(given, name):  # transformers warns when both are given
            self.kwargs["generation_config"] = copy.deepcopy(given)
            setattr(self.kwargs["generation_config"], name, value)
            self.kwargs.pop(name, None)
        else:
            self.kwargs[name] = value
