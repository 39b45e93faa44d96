"""SigLIP's vision transformer without its pooling head, which Janus does not use (`janus/models/siglip_vit.py`)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# timm's names and sizes, as in the published `SigLIP_MODEL_CONFIG`.
SIGLIP_SIZES: dict[str, dict[str, float]] = {
    "siglip_large_patch16_384": {"patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4},
    "siglip_so400m_patch14_384": {"patch_size": 14, "width": 1152, "layers": 27, "heads": 16, "mlp_ratio": 3.7362},
    "siglip_so400m_patch14_224": {"patch_size": 14, "width": 1152, "layers": 27, "heads": 16, "mlp_ratio": 3.7362},
}


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, H*W / patch_size**2, width]
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, width]
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # [B, heads, T, d]
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, C))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """SigLIP's encoder: patches, learned positions, pre-norm blocks, final norm.

    Args:
        image_size: Side of the square input in pixels.
        patch_size: Side of a patch in pixels.
        width: Width of the features.
        layers: Number of blocks to run.
        heads: Number of attention heads.
        mlp_ratio: Width of the MLP over `width`.
    """

    def __init__(self, image_size: int, patch_size: int, width: int, layers: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, width))
        self.blocks = nn.Sequential(*[Block(width, heads, mlp_ratio) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, image_size, image_size] -> [B, patches, width]
        return self.norm(self.blocks(self.patch_embed(x) + self.pos_embed))


def tower_sizes(
    model_name: str = "siglip_large_patch16_384",
    image_size: int = 384,
    select_layer: int = -1,
    patch_size: int | None = None,
    width: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    mlp_ratio: float | None = None,
    **kwargs: object,
) -> dict[str, Any]:
    """`VisionTransformer`'s arguments from those of `CLIPVisionTower`.

    Raises:
        ValueError: `model_name` is unknown and a size is missing, a size is not a positive number, or `heads` does not
            divide `width`.
    """
    given = {"patch_size": patch_size, "width": width, "layers": layers, "heads": heads, "mlp_ratio": mlp_ratio}
    sizes = SIGLIP_SIZES.get(model_name, {}) | {name: size for name, size in given.items() if size is not None}
    if missing := given.keys() - sizes.keys():
        raise ValueError(
            f"vision_config.params.model_name must be one of {sorted(SIGLIP_SIZES)}, or come with "
            f"{sorted(missing)}, got {model_name!r}"
        )
    for name, size in (sizes | {"image_size": image_size}).items():
        if not isinstance(size, (int, float)) or not 0 < size < math.inf:
            raise ValueError(f"vision_config.params.{name} must be a positive number, got {size!r}")
    if (heads := int(sizes["heads"])) < 1 or int(sizes["width"]) % heads:
        raise ValueError(f"vision_config.params.heads must divide width, {sizes['width']}, got {sizes['heads']!r}")
    total = int(sizes["layers"])
    depth = min(total, total + select_layer + 1 if select_layer <= 0 else select_layer)
    whole = {name: int(sizes[name]) for name in ("patch_size", "width", "heads")}
    return {"image_size": image_size, "layers": depth, "mlp_ratio": sizes["mlp_ratio"]} | whole


class CLIPVisionTower(nn.Module):
    """The published wrapper around the encoder (`janus/models/clip_encoder.py`), for SigLIP models.

    Args, as `tower_sizes` takes them:
        model_name: A key of `SIGLIP_SIZES`, or any name when all the sizes below are given.
        image_size: Side of the square input in pixels.
        select_layer: Which block's features to return: -1 the last, -2 the one before, or a count from 1.
        patch_size, width, layers, heads, mlp_ratio: Override the sizes that `model_name` stands for.
        kwargs: Other published keys (`select_feature`, `ckpt_path`, ...), which change nothing for SigLIP.

    Raises:
        ValueError: `model_name` is unknown and a size is missing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.vision_tower = VisionTransformer(**tower_sizes(*args, **kwargs))

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, image_size, image_size] -> [B, patches, width]
        return self.vision_tower(images)
