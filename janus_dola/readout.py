"""Taps the candidate layers and reads every early exit in the same `lm_head` call that reads the final layer."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

# The readouts at work in this thread, innermost last. Modules are shared between threads and calls may nest; a hook
# acts only for the readout on top of its own thread's stack.
_local = threading.local()


class Readout:
    """A context in which each forward pass of the language model also leaves the exits' logits here.

    A decode step is bound by reading weights, and `lm_head` is one of the largest. So the exits h_j, normed, are
    appended to the input of `lm_head` along the sequence, and split off its output: one call, one reading.

    The hooks exist within the context only. They keep the last position of each candidate layer until `lm_head` has
    run, never the prompt's.

    Args:
        language_model: With `.model.layers`, `.model.norm` (LN_out) and `.lm_head` (φ).
        layers: Candidate layers j < N, counted from 1, lowest first; at least one.
    """

    def __init__(self, language_model: Any, layers: tuple[int, ...]) -> None:
        self._decoder_layers: list[nn.Module] = [language_model.model.layers[layer - 1] for layer in layers]
        self._ln_out = language_model.model.norm
        self._phi = language_model.lm_head
        self._hidden: dict[int, Tensor] = {}  # index into `layers` -> h_j, [rows, 1, d]
        self._length: int | None = None  # of lm_head's own input, while exits are appended to it
        self._logits: Tensor | None = None

    def __enter__(self) -> "Readout":
        with ExitStack() as handles:
            for index, layer in enumerate(self._decoder_layers):
                handles.callback(layer.register_forward_hook(self._keep(index)).remove)
            # Ours is the innermost pair: hooks that others have put on lm_head see its usual shapes.
            handles.callback(self._phi.register_forward_pre_hook(self._append).remove)
            handles.callback(self._phi.register_forward_hook(self._split, prepend=True).remove)
            stack = _local.__dict__.setdefault("stack", [])
            stack.append(self)
            handles.callback(stack.remove, self)
            self._handles = handles.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handles.close()
        self._hidden.clear()
        self._logits = None

    def take(self) -> Tensor:
        """The exits' logits of the last forward pass, [rows, J, V], in the model's dtype; they are given once.

        Raises:
            RuntimeError: No forward pass went through the hooks since the last call.
        """
        if self._logits is None:
            raise RuntimeError(
                "the language model's forward pass did not reach the hooks on lm_head; a compiled forward does not "
                "see them: pass disable_compile=True"
            )
        logits, self._logits = self._logits, None
        return logits

    def _active(self) -> bool:
        stack = getattr(_local, "stack", None)
        return bool(stack and stack[-1] is self)

    # The hooks take no kwargs on purpose: PyTorch looks up that flag after it has listed the hooks, and another thread
    # may have removed one in between.

    def _keep(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._active():
                hidden = (
                    output[0] if isinstance(output, tuple) else output
                )  # transformers 4 returns tuples; [rows, T, d]
                last = hidden[:, -1:]
                self._hidden[index] = last.clone() if hidden.shape[1] > 1 else last  # a view would keep the prompt's

        return keep

    def _append(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._active():
            return None
        hidden, *rest = args  # [rows, T, d], normed
        exits = torch.cat([self._hidden.pop(i).to(hidden.device) for i in range(len(self._decoder_layers))], dim=1)
        exits = self._ln_out(exits).to(hidden)  # [rows, J, d]
        self._length = hidden.shape[1]
        return (torch.cat([hidden, exits], dim=1), *rest)

    def _split(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self._active() or self._length is None:
            return None
        length, self._length = self._length, None
        self._logits = output[:, length:]  # [rows, J, V]
        return output[:, :length]
