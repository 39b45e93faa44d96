"""The configuration of DoLa: a structured config for OmegaConf, and its checks."""

import copy
import difflib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

from janus_dola.buckets import buckets, candidates_in_bucket

if TYPE_CHECKING:
    from torch import Tensor

# The keys of `DoLaConfig` that belong to each method, its strength first; Confident has none.
METHODS: dict[str, tuple[str, ...]] = {
    "dola": ("alpha",),
    "deco": ("deco_alpha",),
    "sled": ("sled_rate", "sled_top_k"),
    "confident": (),
}
CONFIDENT_LAYERS = 10  # the last ones, N among them, as its authors run it

# Arguments of `generate` that cannot work with DoLa, the values that leave them off, and why they cannot.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_model": ((None,), "assisted decoding checks several tokens per forward pass"),
    "prompt_lookup_num_tokens": ((None,), "prompt lookup decoding checks several tokens per forward pass"),
    "assistant_early_exit": ((None,), "assisted decoding checks several tokens per forward pass"),
    "use_mtp": ((None, False), "multi-token prediction checks several tokens per forward pass"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search re-ranks tokens by hidden states of its own"),
    "num_beam_groups": ((None, 1), "group beam search scores a part of the rows at a time"),
    "guidance_scale": ((None, 1, 1.0), "classifier-free guidance runs the model a second time in every step"),
    "dola_layers": ((None,), "it is another DoLa, that of transformers"),
    "custom_generate": ((None,), "a custom decoding loop need not apply logits processors"),
}


def option(default: Any, about: str) -> Any:
    """A key of a configuration: its default, or what makes it, and the sentence that --help says of it."""
    kind = "default"
    if callable(default) or isinstance(default, (list, dict)):
        kind, default = "default_factory", default if callable(default) else functools.partial(copy.copy, default)
    return field(**{kind: default}, metadata={"help": about})


@dataclass
class DoLaConfig:
    """What to contrast with, and how much to trust the final layer; each key's `metadata["help"]` says what it is for.

    `alpha` is the threshold of V_head (eq. 4 of the paper), in [0, 1]. One candidate layer is static DoLa; none, or the
    last layer alone, leaves nothing to subtract. DeCo and SLED take all layers of a bucket; DeCo's upper one is what
    its paper uses, layers 20 to 28 of 32. Confident takes the last 10 layers, whatever the bucket. The strengths of
    DeCo and SLED are at least 0.

    Raises:
        ValueError: A value is out of its range, or of another method.
    """

    use_dola_lm: bool = option(True, "false: the model as it was published, token for token")
    alpha: float = option(0.1, "tokens less likely than alpha x the most likely one are out; 0 keeps all")
    candidate_layers: list[int] | None = option(
        None,
        "layers (from 1) to contrast with, such as [22, 26]; wins over bucket_id",
    )
    bucket_id: int = option(2, "0, 1, 2: candidates from the lower, middle, upper third of the layers")
    method: str = option("dola", "or deco, sled, confident: other methods on the same exits")
    deco_alpha: float = option(0.6, "DeCo: how much of the surest exit's logits is added; its paper's value")
    sled_rate: float = option(2.0, "SLED: how far the logits move towards what the exits foretell; its paper's value")
    sled_top_k: int = option(10, "SLED: how many tokens remain; its paper has 10 for generation, 75 for TruthfulQA")

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            near = difflib.get_close_matches(str(self.method), METHODS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"method must be dola, deco, sled or confident, got {self.method!r}{hint}")
        if not isinstance(self.alpha, Real) or not 0 <= self.alpha <= 1:  # also refuses NaN
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha!r}")
        if not isinstance(self.bucket_id, Integral) or self.bucket_id not in (0, 1, 2):
            raise ValueError(f"bucket_id must be 0, 1 or 2, got {self.bucket_id!r}")
        layers = () if self.candidate_layers is None else self.candidate_layers
        if not isinstance(layers, Sequence) or any(not isinstance(layer, int) or layer < 1 for layer in layers):
            raise ValueError(f"candidate_layers must be integers from 1 to the number of layers, got {layers!r}")
        for key in ("deco_alpha", "sled_rate"):
            value = getattr(self, key)
            if not isinstance(value, Real) or not 0 <= value < math.inf:
                raise ValueError(f"{key} must be a number of at least 0, got {value!r}")
        if not isinstance(self.sled_top_k, Integral) or self.sled_top_k < 1:
            raise ValueError(f"sled_top_k must be an integer of at least 1, got {self.sled_top_k!r}")
        defaults = {key.name: key.default for key in fields(DoLaConfig)}
        for method, keys in METHODS.items():
            for key in keys:
                if method != self.method and (value := getattr(self, key)) != defaults[key]:
                    raise ValueError(f"{key} is of method {method}, got {key}={value!r} with method {self.method!r}")

    def resolve_layers(self, num_layers: int) -> tuple[int, ...]:
        """The candidate layers for a model of `num_layers` decoder layers, lowest first, each once.

        Raises:
            ValueError: A candidate is not one of the model's layers, or the model is too small for buckets.
        """
        if self.candidate_layers is None and self.method == "dola":
            return candidates_in_bucket(num_layers, self.bucket_id)
        if self.candidate_layers is None and self.method == "confident":
            return tuple(range(max(1, num_layers - CONFIDENT_LAYERS + 1), num_layers))
        if self.candidate_layers is None:
            first, last = buckets(num_layers)[self.bucket_id]
            if self.method == "deco" and self.bucket_id == 2:
                first, last = 5 * num_layers // 8, 7 * num_layers // 8
            return tuple(range(first, last + 1))
        layers = tuple(sorted(set(self.candidate_layers)))
        if layers and layers[-1] > num_layers:
            raise ValueError(f"candidate_layers must be in 1...{num_layers}, the model's layers, got {layers[-1]}")
        return layers


class Method(NamedTuple):
    """How a row's exits are read.

    Attributes:
        name: A key of `METHODS`.
        top_k: SLED's k.
        dynamic: Whether M is selected by the JSD.
        exits: The places of its first candidate and past its last among the exits: it reads no others.
    """

    name: str
    top_k: int
    dynamic: bool
    exits: tuple[int, int]


class Rows(NamedTuple):
    """Configurations, one per row, as `methods.choose` needs them.

    Attributes:
        layers: The J exits j < N to be read, lowest first.
        candidates: Which of them each row may choose from, bool [rows, J].
        read: Which of them are read of each row, bool [rows, J]: those, or in a trace of all layers every one.
        strength: The first of each row's `METHODS` keys, float64 [rows]; 0 where the method has none.
        methods: Each row's.
    """

    layers: tuple[int, ...]
    candidates: "Tensor"
    read: "Tensor"
    strength: "Tensor"
    methods: list[Method]

    @property
    def unchanged(self) -> "Tensor":
        """Rows with nothing to subtract and every token kept, whose p̂ is q_N: the baseline bit for bit; bool [rows]."""
        return ~self.candidates.any(1) & (self.strength == 0)

    @property
    def changes_nothing(self) -> bool:
        """Whether that is all of them."""
        return bool(self.unchanged.all())

    def traced(self, every: bool) -> "Rows":
        """The same for a trace, which shows the JSD of all exits that are read; `every` reads all of every row."""
        methods = [method._replace(dynamic=True) for method in self.methods]
        if not every:
            return self._replace(methods=methods)
        methods = [method._replace(exits=(0, len(self.layers))) for method in methods]
        return self._replace(read=self.read.new_ones(self.read.shape), methods=methods)


def by_row(configs: Sequence[DoLaConfig], num_layers: int, layers: Sequence[int] | None = None) -> Rows:
    """Configurations as tensors. A row with DoLa off subtracts nothing from q_N.

    Args:
        configs: Their values are checked again: they may have been changed since they were made.
        num_layers: N.
        layers: The exits to read; by default all that are some row's candidates.

    Raises:
        ValueError: There is none, one is something else, or does not fit the model.
    """
    import torch  # not at the top: --help shows the keys of this module, and torch takes seconds

    if not configs or not all(isinstance(config, DoLaConfig) for config in configs):
        raise ValueError(f"configs must be a list of at least one DoLaConfig, got {configs!r}")
    off = DoLaConfig(alpha=0.0, candidate_layers=[])
    on = [replace(config) if config.use_dola_lm else off for config in configs]
    own = [{j for j in config.resolve_layers(num_layers) if j < num_layers} for config in on]
    # Without an exit the others have nothing to read; DoLa still limits q_N to V_head.
    on = [config if each or config.method == "dola" else off for config, each in zip(on, own, strict=True)]
    exits = tuple(sorted(set().union(*own)) if layers is None else layers)
    candidates = torch.tensor([[j in each for j in exits] for each in own], dtype=torch.bool)
    strength = [getattr(config, METHODS[config.method][0]) if METHODS[config.method] else 0.0 for config in on]
    places = [row.nonzero().flatten().tolist() or [0, -1] for row in candidates]
    several = (candidates.sum(-1) > 1).tolist()
    methods = [
        Method(config.method, config.sled_top_k, config.method == "dola" and more, (place[0], place[-1] + 1))
        for config, more, place in zip(on, several, places, strict=True)
    ]
    return Rows(exits, candidates, candidates, torch.tensor(strength, dtype=torch.float64), methods)
