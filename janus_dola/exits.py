"""Early exits of a language model, read from a view of it: shallow copies with taps, the model itself untouched.

A shallow copy of a module is another module of the same class over the same parameters. A view has such copies of the
modules that lead from the generating model to its decoder layers and its head; all others are the model's own. So a
call's taps are the call's alone, whatever other threads or nested calls do, and a compiled forward pass sees them.
"""

import functools
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# What a call leaves on a model for the next one: compiled functions and caches, bound to that model.
PER_CALL_STATE = ("_compiled_call", "_last_compile_config", "_cache", "_previous_max_cache_length")

NORMED = 0  # in place of a layer's number: the exits, normed


def generating_model(model: Any) -> Any:
    """The part of a model that generates text: itself, or what a Janus, a compiled or an adapted model holds.

    Raises:
        ValueError: There is none, or not one whose layers can be tapped.
    """
    modules: Any = model.modules() if isinstance(model, nn.Module) else ()
    found = next((m for m in modules if isinstance(m, PreTrainedModel) and m.can_generate()), None)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"model must take its prompt as it is, got {type(model).__name__} with a learned one before it"
        )
    if found is None:
        raise ValueError(f"model must be or hold a transformers model that generates, got {type(model).__name__}")
    decoder = found.get_decoder() if hasattr(found, "get_decoder") else None
    parts = getattr(decoder, "layers", None), getattr(decoder, "norm", None), found.get_output_embeddings()
    if found.config.is_encoder_decoder or not all(isinstance(part, nn.Module) for part in parts):
        raise ValueError(
            "model must be a decoder alone, no encoder, whose get_decoder() has .layers and .norm, and have a head; "
            f"got {type(found).__name__}"
        )
    return found


def pack(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The exits that rows want, together in as few columns as hold them: a row of the head's is a row of arithmetic.

    Args:
        wanted: Which exits each row reads, bool [rows, J].

    Returns:
        Which of all exits, counted row by row, each column of a row holds, int64 [rows, K], K = ⌈wanted / rows⌉; and
        row and column of each exit, int64 [2, rows, J]: one that is not wanted is where the one before it is.
    """
    rows, n = len(wanted), int(wanted.sum())
    K = -(-n // rows)
    index = torch.zeros(rows * K, dtype=torch.long)
    index[:n] = wanted.flatten().nonzero().flatten()
    place = (wanted.flatten().cumsum(0) - 1).clamp(min=0).view_as(wanted)
    return index.view(rows, K), torch.stack([place // max(1, K), place % max(1, K)])


def shallow_copy(module: nn.Module) -> Any:
    """A module of the same class with the same parameters and attributes, whose children and hooks are its own."""
    copy = type(module).__new__(type(module))
    for name, value in vars(module).items():
        if name not in PER_CALL_STATE:
            own = isinstance(value, dict) and (name == "_modules" or "_hooks" in name)
            copy.__dict__[name] = value.copy() if own else _rebound(value, module, copy)
    return copy


def _rebound(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """`value`, or if it is a function bound to `old`, the same bound to `new`; not compiled, for that binds, too.

    accelerate and `model.forward = torch.compile(model.forward)` leave such functions on a model.
    """
    value = getattr(value, "_torchdynamo_orig_callable", value)
    if isinstance(value, functools.partial) and value.args[:1] == (old,):
        return functools.partial(value.func, new, *value.args[1:], **value.keywords)
    return MethodType(value.__func__, new) if getattr(value, "__self__", None) is old else value


def path_to(target: nn.Module, root: nn.Module) -> list[str]:
    """The names that lead from root to target, the shortest way."""
    level: list[tuple[list[str], nn.Module]] = [([], root)]
    while level and all(module is not target for _, module in level):
        level = [([*names, name], child) for names, module in level for name, child in module.named_children()]
    return next(names for names, module in level if module is target)


class ExitView:
    """A view whose forward pass also gives the logits of early exits, or keeps their hidden states.

    A decode step is bound by reading weights, and the head is one of the largest. So the exits h_j go through the final
    norm beside the hidden states that are there, and ahead of them into the head: one call, one reading, and what the
    model does to its logits after the head is done to the exits as well. Between the two the exits stand aside, since a
    model may cut positions off there. `generate` reads the last position of the logits, and finds there what it always
    does.

    Args:
        model: As `generating_model` gives it.
        layers: The J tapped layers j < N, counted from 1, lowest first.
        keep: What to keep of a tapped layer's output, [rows, T, d]; by default the last position, for `take`. With
            something else nothing goes into the head: call the decoder alone, and read `hidden`.
        whole: Whether to copy all modules: for calls in which transformers puts hooks of its own on any of them.

    Attributes:
        model: The copy of the model, to be called or generated with.
        hidden: Layer -> what was kept of its output.
        made_of: The model's `state` at the time.

    Raises:
        ValueError: A module on the way to a tapped one has a `forward` of its own that cannot be bound to its copy.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[int] = (),
        keep: Callable[[Tensor], Tensor] | None = None,
        whole: bool = False,
    ) -> None:
        self.model = shallow_copy(model)
        self.hidden: dict[int, Tensor] = {}
        self._wanted: Tensor | None = None  # as `read_only` takes it
        self._index: Tensor | None = None  # as `pack` gives it
        self._read = len(layers)  # exits ahead of each row's hidden states
        self._copies: dict[nn.Module, Any] = {model: self.model}
        self._layers = layers
        self._logits: Any = None
        for name, _ in model.named_modules() if whole else ():
            self.own(name.split(".") if name else [])
        path = path_to(model.get_decoder().layers, model)
        for j in layers:
            self.own([*path, str(j - 1)]).register_forward_hook(self._tap(j, keep or _last_position))
        if keep is None:
            # generate hands each step's outputs to this method before it reads the logits.
            self._update = self.model._update_model_kwargs_for_generation
            self.model._update_model_kwargs_for_generation = self._keep_exits
        if layers and keep is None:
            norm = self.own(path_to(model.get_decoder().norm, model))
            norm.register_forward_pre_hook(self.join_exits)
            norm.register_forward_hook(self._part_exits)
            head = self.own(path_to(model.get_output_embeddings(), model))
            if _is_plain(head):
                head.__class__ = TransposedLinear
            head.register_forward_pre_hook(self.prepend_exits)
        self.made_of = self.state()

    def own(self, path: Sequence[str]) -> Any:
        """The view's copy of the module at `path`, names from the model on."""
        module, copy = next(iter(self._copies.items()))
        for name in path:
            if "forward" in vars(module) and copy.forward is module.forward:
                raise ValueError(f"model must run by its class's forward, got {type(module).__name__} with another")
            module = module._modules[name]  # type: ignore[assignment]
            if module not in self._copies:
                self._copies[module] = shallow_copy(module)
            if name == "_orig_mod":  # of torch.compile(module): run the copy of what it was made of
                copy.__dict__["forward"] = self._copies[module].__call__
            child = self._copies[module]
            copy._modules[name] = child
            copy = child
        return copy

    def read_only(self, wanted: Tensor) -> None:
        """Which exits the next call reads of each prompt's rows, bool [prompts, J]; no others, if `pack` saves any."""
        saves = pack(wanted)[0].shape[1] < len(self._layers)
        self._wanted, self._index = wanted if saves else None, None

    def take(self) -> tuple[Tensor, Tensor]:
        """The last forward pass' logits, given once.

        Returns:
            Of the exits, [rows, J, V], or where not all were read, [rows, K, V] as `pack` has them; of the final layer,
            [rows, V].
        """
        logits, self._logits = self._logits, None
        return logits[:, : self._read], logits[:, -1]

    def backend(self) -> str | Callable[..., Any] | None:
        """The compiler by which `generate` has compiled the view's forward pass; None if it has not."""
        return self.model._last_compile_config.backend if "_compiled_call" in vars(self.model) else None

    def state(self) -> set[tuple[Any, ...]]:
        """What the copied modules consist of: where it is not `made_of`, a hook, child or attribute has changed."""
        return {
            (module, name, key, id(item))
            for module in self._copies
            for name, value in vars(module).items()
            if name not in PER_CALL_STATE
            and not isinstance(value, Tensor)  # which calls keep, too: Qwen2-VL its rope_deltas
            for key, item in (value.items() if isinstance(value, dict) else [(None, value)])
        }

    def _tap(self, j: int, keep: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        def tap(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.hidden[j] = keep(output[0] if isinstance(output, tuple) else output)  # transformers 4 returns tuples

        return tap

    def join_exits(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The final norm's forward pre-hook: the exits ahead of its input, [rows, J + T, d]."""
        hidden, *rest = args
        exits = [self.hidden.pop(j).to(hidden) for j in self._layers]
        self._read = len(exits)
        if not torch.compiler.is_compiling() and self._wanted is not None:  # compiled, each K would be another program
            if self._index is None:
                wanted = self._wanted.repeat_interleave(len(hidden) // len(self._wanted), 0)
                self._index = pack(wanted)[0].to(hidden.device)
            exits = [torch.cat(exits, dim=1).flatten(0, 1)[self._index]]  # [rows, K, d]
            self._read = self._index.shape[1]
        return (torch.cat([*exits, hidden], dim=1), *rest)

    def _part_exits(self, module: nn.Module, args: tuple[Any, ...], normed: Tensor) -> Tensor:
        self.hidden[NORMED] = normed[:, : self._read]
        return normed[:, self._read :]

    def prepend_exits(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The head's forward pre-hook: the exits ahead of its input, [rows, J + T, d]."""
        hidden, *rest = args
        return (torch.cat([self.hidden.pop(NORMED).to(hidden), hidden], dim=1), *rest)

    def _keep_exits(self, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._logits = outputs.logits
        return self._update(outputs, *args, **kwargs)


def _last_position(hidden: Tensor) -> Tensor:
    last = hidden[:, -1:]  # [rows, 1, d]
    return last.clone() if hidden.shape[1] > 1 else last  # a slice would keep the whole prompt's in memory


class TransposedLinear(nn.Linear):
    """(W Xᵀ)ᵀ in place of X Wᵀ: half the time for a few rows of float32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:  # [rows, T, d] -> [rows, T, V]
        logits = (self.weight @ x.flatten(0, -2).T).T.contiguous().unflatten(0, x.shape[:-1])
        return logits if self.bias is None else logits + self.bias


def _is_plain(head: nn.Module) -> bool:
    """Exactly an `nn.Linear` in float32 on the CPU: not quantized, adapted, offloaded, nor hooked by others."""
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter or "forward" in vars(head):
        return False
    where = head.weight.device.type, head.weight.dtype
    return where == ("cpu", torch.float32) and not head._forward_pre_hooks and not head._forward_hooks
