"""The configuration of DoLa: a structured config for OmegaConf, and its checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from janus_dola.dola_runtime import candidates_in_bucket


@dataclass
class DoLaConfig:
    """What to contrast with, and how much to trust the final layer.

    Attributes:
        use_dola_lm: Whether `DoLaJanusWrapper.generate` decodes with DoLa.
        alpha: Threshold of V_head (eq. 4 of the paper), in [0, 1]: words less likely than alpha times the most likely
            one are out. 0 keeps every word.
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
            raise ValueError(f"candidate_layers must be whole numbers from 1 to the number of layers, got {layers!r}")

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
