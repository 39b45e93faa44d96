"""VQ-16, the image tokenizer of Janus: 16x16 pixels to one of `codebook_size` codes (`janus/models/vq_model.py`)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:  # the key exists in the published weights only where the width changes
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # [B, H*W, C]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # padded right and below only, as the weights were trained


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where `attention`, then `resample`."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, attention: bool, resample: nn.Module | None, name: str
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(out_channels if i else in_channels, out_channels) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attention else 0))
        self.resample_name = name
        if resample is not None:
            self.add_module(name, resample)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        resample = getattr(self, self.resample_name, None)
        return x if resample is None else resample(x)


def middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResnetBlock(channels, channels), AttnBlock(channels), ResnetBlock(channels, channels)])


class Encoder(nn.Module):
    def __init__(self, ch: int, ch_mult: Sequence[int], z_channels: int, num_res_blocks: int = 2) -> None:
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, ch, kernel_size=3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[i - 1] if i else ch,
                widths[i],
                num_res_blocks,
                attention=i == last,
                resample=None if i == last else Downsample(widths[i]),
                name="downsample",
            )
            for i in range(len(widths))
        )
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, z_channels, H/16, W/16]
        h = self.conv_in(x)
        for block in [*self.conv_blocks, *self.mid]:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, ch: int, ch_mult: Sequence[int], z_channels: int, num_res_blocks: int = 2) -> None:
        super().__init__()
        widths = [ch * mult for mult in reversed(ch_mult)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[0], kernel_size=3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                widths[i],
                num_res_blocks + 1,
                attention=i == 0,
                resample=None if i == last else Upsample(widths[i]),
                name="upsample",
            )
            for i in range(len(widths))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # [B, z_channels, H/16, W/16] -> [B, 3, H, W]
        h = self.conv_in(z)
        for block in [*self.mid, *self.conv_blocks]:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VectorQuantizer(nn.Module):
    """Nearest codebook entry by cosine similarity: both sides are normalised (`codebook_l2_norm`)."""

    def __init__(self, codebook_size: int, codebook_embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, codebook_embed_dim)

    def codebook(self) -> Tensor:  # [codebook_size, codebook_embed_dim], rows of unit length
        return F.normalize(self.embedding.weight, dim=-1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] -> the quantised [B, C, H, W] and its codes [B*H*W], int64."""
        z = F.normalize(z.permute(0, 2, 3, 1), dim=-1)  # [B, H, W, C]
        codebook = self.codebook()
        indices = (z.flatten(0, 2) @ codebook.T).argmax(-1)  # unit vectors: the nearest has the largest product
        z_q = codebook[indices].view(z.shape)
        z_q = z + (z_q - z).detach()  # straight-through gradient
        return z_q.permute(0, 3, 1, 2), indices


class VQModel(nn.Module):
    """Encoder, quantizer and decoder of VQ-16; the defaults are the published sizes.

    Args:
        codebook_size: Number of codes.
        codebook_embed_dim: Width of a code.
        ch: Width of the first convolution.
        ch_mult: Width of each resolution over `ch`; there are `len(ch_mult) - 1` halvings.
        z_channels: Width between the encoder and the quantizer.
    """

    def __init__(
        self,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        z_channels: int = 256,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(ch, ch_mult, z_channels)
        self.decoder = Decoder(ch, ch_mult, z_channels)
        self.quantize = VectorQuantizer(codebook_size, codebook_embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, codebook_embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(codebook_embed_dim, z_channels, kernel_size=1)

    def encode(self, x: Tensor) -> tuple[Tensor, tuple[None, None, None], tuple[None, None, Tensor]]:
        """Images [B, 3, H, W] in [-1, 1] to the quantised features [B, C, H/16, W/16] and, last, the codes [B*H*W/256].

        The published return value; its losses exist in training only and are None.
        """
        quant, indices = self.quantize(self.quant_conv(self.encoder(x)))
        return quant, (None, None, None), (None, None, indices)

    def decode(self, quant: Tensor) -> Tensor:
        """Quantised features [B, C, H/16, W/16] to images [B, 3, H, W], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code_b: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True) -> Tensor:
        """Codes to images.

        Args:
            code_b: Codes, int, [B, H/16 * W/16] or flat.
            shape: (B, C, H/16, W/16), or (B, H/16, W/16, C) with `channel_first=False`. Without it the codes must
                have the shape [B, H/16, W/16].
            channel_first: How `shape` is written.

        Returns:
            Images [B, 3, H, W], about [-1, 1].
        """
        z = self.quantize.codebook()[code_b]  # [..., C]
        if shape is not None:
            B, H, W, C = (shape[0], shape[2], shape[3], shape[1]) if channel_first else shape
            z = z.reshape(B, H, W, C)
        return self.decode(z.permute(0, 3, 1, 2).contiguous())

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[None, None, None]]:
        quant, loss, _ = self.encode(x)
        return self.decode(quant), loss


def VQ_16(**kwargs: object) -> VQModel:
    return VQModel(**kwargs)  # type: ignore[arg-type]


VQ_models = {"VQ-16": VQ_16}
