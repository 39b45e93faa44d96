"""The configuration of DoLa: a structured config for OmegaConf, and its checks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

import torch
from torch import Tensor

from janus_dola.dola_runtime import candidates_in_bucket


@dataclass
class DoLaConfig:
    """What to contrast with, and how much to trust the final layer.

    Attributes:
        use_dola_lm: Whether `DoLaJanusWrapper.generate` decodes with DoLa.
        alpha: Threshold of V_head (eq. 4 of the paper), in [0, 1]: tokens less likely than alpha times the most likely
            one are out. 0 keeps every token.
        candidate_layers: Layers to choose the premature layer from, counted from 1. Wins over `bucket_id`. One layer is
            static DoLa; none, or the last layer alone, leaves nothing to subtract.
        bucket_id: 0, 1 or 2: candidates from the lower, middle or upper third of the layers.

    Raises:
        ValueError: A value is out of its range.
    """

    use_dola_lm: bool = True
    alpha: float = 0.1
    candidate_layers: list[int] | None = None
    bucket_id: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, Real) or not 0 <= self.alpha <= 1:  # also refuses NaN
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha!r}")
        if not isinstance(self.bucket_id, Integral) or self.bucket_id not in (0, 1, 2):
            raise ValueError(f"bucket_id must be 0, 1 or 2, got {self.bucket_id!r}")
        layers = () if self.candidate_layers is None else self.candidate_layers
        if not isinstance(layers, Sequence) or any(not isinstance(layer, int) or layer < 1 for layer in layers):
            raise ValueError(f"candidate_layers must be integers from 1 to the number of layers, got {layers!r}")

    def resolve_layers(self, num_layers: int) -> tuple[int, ...]:
        """The candidate layers for a model of `num_layers` decoder layers, lowest first, each once.

        Raises:
            ValueError: A candidate is not one of the model's layers, or the model is too small for buckets.
        """
        if self.candidate_layers is None:
            return candidates_in_bucket(num_layers, self.bucket_id)
        layers = tuple(sorted(set(self.candidate_layers)))
        if layers and layers[-1] > num_layers:
            raise ValueError(f"candidate_layers must be in 1...{num_layers}, the model's layers, got {layers[-1]}")
        return layers


def by_row(
    configs: Sequence[DoLaConfig], num_layers: int, layers: Sequence[int] | None = None
) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """What `dola_runtime.choose` needs of configurations, one per row. A row with DoLa off subtracts nothing from q_N.

    Args:
        configs: Their values are checked again: they may have been changed since they were made.
        num_layers: N.
        layers: The exits to read; by default all that are some row's candidates.

    Returns:
        The J exits j < N, lowest first; candidates, bool [rows, J]; alpha, float64 [rows].

    Raises:
        ValueError: There is none, one is something else, or does not fit the model.
    """
    if not configs or not all(isinstance(config, DoLaConfig) for config in configs):
        raise ValueError(f"configs must be a list of at least one DoLaConfig, got {configs!r}")
    on = [replace(config) if config.use_dola_lm else DoLaConfig(alpha=0.0, candidate_layers=[]) for config in configs]
    own = [{j for j in config.resolve_layers(num_layers) if j < num_layers} for config in on]
    exits = tuple(sorted(set().union(*own)) if layers is None else layers)
    candidates = torch.tensor([[j in each for j in exits] for each in own], dtype=torch.bool)
    return exits, candidates, torch.tensor([config.alpha for config in on], dtype=torch.float64)
