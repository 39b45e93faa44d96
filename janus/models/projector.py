"""Projection of vision features or codebook entries to the language model's width (`janus/models/projector.py`)."""

from torch import Tensor, nn


class MlpProjector(nn.Module):
    """`identity`, `linear`, or `mlp_gelu`: `depth` linear layers with GELU between them.

    Args:
        projector_type: One of the three names above.
        input_dim: Width of the input.
        n_embed: Width of the output.
        depth: Number of linear layers of `mlp_gelu`.

    Raises:
        ValueError: `projector_type` is none of the three.
    """

    def __init__(self, projector_type: str, input_dim: int, n_embed: int, depth: int = 1) -> None:
        super().__init__()
        self.layers: nn.Module
        if projector_type == "identity":
            self.layers = nn.Identity()
        elif projector_type == "linear":
            self.layers = nn.Linear(input_dim, n_embed)
        elif projector_type == "mlp_gelu":
            modules: list[nn.Module] = [nn.Linear(input_dim, n_embed)]
            for _ in range(1, depth):
                modules += [nn.GELU(), nn.Linear(n_embed, n_embed)]
            self.layers = nn.Sequential(*modules)
        else:
            raise ValueError(f"projector_type must be identity, linear or mlp_gelu, got {projector_type!r}")

    def forward(self, x: Tensor) -> Tensor:  # [..., input_dim] -> [..., n_embed]
        return self.layers(x)
