"""The exits on their way through vLLM: from a decoder's layers to the head, and from there to the processor.

vLLM's decoders collect the outputs of chosen layers for EAGLE-3. Here they go on behind the final layer's,
[T, (1 + J) d]: vLLM picks the positions to sample and never looks at the width. `compute_logits` splits them.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.sequence import IntermediateTensors

from janus_dola.vllm.server import Server


class Exits:
    """What a model's `compute_logits` and the processor tell each other. They run one after the other in each step.

    Attributes:
        wanted: Whether the next `compute_logits` reads the exits as well.
        row_by_row: Whether the head takes the batch's rows as they are: LoRA's has an adapter for each.
        take: Gives the exits' logits of the last `compute_logits`, [rows, J, V]: those that it read, or, if it did not,
            those of a second call of the head, made once.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.row_by_row = False
        self.take: Callable[[], Any] = lambda: torch.empty(0)


EXITS = Exits()


def append_exits(output: Any) -> Any:
    """The output of a decoder that collects layers, with those behind the hidden states: [T, (1 + J) d].

    A pipeline stage that is not the last hands the exits on by itself, and a decoder without chosen layers has none.
    """
    if isinstance(output, (Tensor, IntermediateTensors)):
        return output
    hidden, exits = output
    return torch.cat([hidden, *exits], -1)


def read_head(
    hidden: Tensor, d: int, norm: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor | None]
) -> Tensor | None:
    """The final layer's logits, and, if wanted, the exits' by the same call of the head.

    Args:
        hidden: What `append_exits` made, at the sampled positions, [rows, (1 + J) d].
        d: The width of the decoder.
        norm: LN_out.
        head: φ, with what the model does to its logits, [n, d] -> [n, V]; None on a rank that does not sample.

    Returns:
        [rows, V]; the exits are for `EXITS.take`.
    """
    layers = hidden.view(len(hidden), -1, d)  # [rows, 1 + J, d]; the final layer's are normed

    def read() -> Tensor | None:  # [rows, 1 + J, V]
        n = layers.shape[1]
        normed = norm(layers[:, 1:].flatten(0, 1)) if n > 1 else layers[:, 1:]
        every = torch.cat([layers[:, :1], normed.view(len(hidden), n - 1, d)], 1)
        if EXITS.row_by_row:
            logits = [head(every[:, k].contiguous()) for k in range(n)]
            return None if logits[0] is None else torch.stack(logits, 1)  # type: ignore[arg-type]
        together = head(every.flatten(0, 1))
        return None if together is None else together.view(len(hidden), n, -1)

    wanted, EXITS.wanted = EXITS.wanted, False
    if wanted:
        logits = read()
        if logits is None:
            return None
        EXITS.take = lambda: logits[:, 1:]
        return logits[:, 0].contiguous()
    EXITS.take = cache(lambda: read()[:, 1:])  # type: ignore[index]
    return head(layers[:, 0].contiguous())


class WithExits:
    """Before a class of vLLM's for a causal language model whose decoder collects layers: the same with exits."""

    config: Any
    model: Any
    set_aux_hidden_state_layers: Callable[[tuple[int, ...]], None]

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        server = Server.of(vllm_config)
        if server is None:
            raise ValueError(f"architectures must name {type(self).__name__} itself, got {self.config.architectures}")
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if stages > 1 and not getattr(self.model, "supports_aux_hidden_states_over_pp", False):
            raise ValueError(f"pipeline_parallel_size must be 1 for {type(self).__name__}, got {stages}")
        self.set_aux_hidden_state_layers(server.layers)  # counted from 1, not normed, with the residual

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return append_exits(super().forward(*args, **kwargs))  # type: ignore[misc]

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        head = super().compute_logits  # type: ignore[misc]
        return read_head(hidden_states, self.config.hidden_size, self.model.norm, head)

    @property
    def compute_logits_local(self) -> Any:
        """Absent: batch-sharded sampling asks for it, and would leave the exits unread."""
        raise AttributeError("compute_logits_local")
