"""A plain ViT as image encoder, EfficientSAM's, with adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medsa_nets.layers import Adaptation, Bottlenecks, DepthBranch, Linear, MLPBlock, attend
from medsa_nets.networks.checkpointing import run_block
from medsa_nets.networks.image_encoder import PatchEmbed
from medsa_nets.networks.neck import make_neck


class Attention(nn.Module):
    """Multi-head attention over a whole token map, without a bias of positions."""

    def __init__(self, features: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(features, 3 * features)
        self.proj = Linear(features, features)

    def split(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values by head: (B, H, W, 3 C) to (B, H, W, 3, heads, C / heads)."""
        return qkv.unflatten(-1, [3, self.num_heads, -1])

    def forward(self, qkv: Tensor) -> Tensor:
        """Attend, before the output projection: queries, keys and values (B, H, W, 3 C) to (B, H, W, C)."""
        q, k, v = self.split(qkv).flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
        return attend(q, k, v).transpose(1, 2).reshape(qkv.shape[0], qkv.shape[1], qkv.shape[2], -1)


class PlainViTBlock(nn.Module):
    """Transformer block with global attention and the two adapters of an encoder block.

    The adapters stand as in SAM's ViT (:class:`~medsa_nets.networks.image_encoder.Block`).
    """

    def __init__(self, features: int, *, num_heads: int, adaptation: Adaptation, spatial_dims: int = 2) -> None:
        super().__init__()
        self.scale = adaptation.scale
        self.norm1 = nn.LayerNorm(features, eps=1e-6)
        self.attn = Attention(features, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(features, eps=1e-6)
        self.mlp = MLPBlock(features=features, hidden=4 * features, activation=nn.GELU())
        self.attn_adapter = adaptation.adapter(features, skip=True)
        self.mlp_adapter = adaptation.adapter(features)
        self.depth: DepthBranch | None = None
        if spatial_dims == 3:
            self.depth = DepthBranch(features, num_heads=num_heads, adaptation=adaptation)

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        """Transform tokens (B * depth, H, W, C)."""
        qkv = self.attn.qkv(self.norm1(x))
        attended = self.attn_adapter(self.attn.proj(self.attn(qkv)))
        if self.depth is not None:  # noqa: SIM102 - the same queries, keys and values
            if not self.depth.idle:  # TorchScript reads no attribute of what may be absent
                q, k, v = self.attn.split(qkv).unbind(3)
                attended = attended + self.depth(
                    self.depth.attend(q, k, v, depth), self.attn.proj.weight, self.attn.proj.bias
                )
        x = x + attended
        normed = self.norm2(x)
        return x + self.mlp(normed) + self.scale * self.mlp_adapter(normed)


class PlainViTEncoder(nn.Module):
    """EfficientSAM's encoder for one input size, with adapters.

    Args:
        img_size: height and width of the input, multiples of 16. The position table is made for this size;
            :func:`medsa_nets.weights.load_base` interpolates a file's table to it, once.
        embed_dim: token width (192, 384 for ``efficient_sam_vitt``, ``efficient_sam_vits``).
        depth: number of blocks.
        num_heads: heads per block.
        adaptation: makes the adapters.
        spatial_dims: 2, or 3 for space-depth blocks (SD-Trans).
        checkpointing: whether training recomputes each block in the backward pass, for less memory and more time.

    Raises:
        ValueError: when ``img_size`` is no multiple of 16.

    Source: arXiv 2312.00863 (EfficientSAM), arXiv 2304.12620 (adapters).
    """

    out_channels = 256
    patch_size = 16

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        embed_dim: int,
        num_heads: int,
        depth: int = 12,
        adaptation: Adaptation = Bottlenecks(),  # noqa: B008 - it is frozen
        spatial_dims: int = 2,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if img_size[0] % self.patch_size or img_size[1] % self.patch_size:
            raise ValueError(f"img_size must be a multiple of {self.patch_size} on both axes, got {img_size}.")
        self.checkpointing = checkpointing
        self.stride = self.patch_size
        self.img_size = img_size
        grid = (img_size[0] // self.patch_size, img_size[1] // self.patch_size)
        self.patch_embed = PatchEmbed(embed_dim, patch_size=self.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0], grid[1], embed_dim))
        self.blocks = nn.ModuleList(
            [
                PlainViTBlock(embed_dim, num_heads=num_heads, adaptation=adaptation, spatial_dims=spatial_dims)
                for _ in range(depth)
            ]
        )
        self.neck = make_neck(embed_dim, self.out_channels)

    def forward(self, image: Tensor, depth: int = 1) -> Tensor:
        """Encode normalised slices (B * depth, 3, H, W) to (B * depth, 256, H / 16, W / 16)."""
        x = self.patch_embed(image) + self.pos_embed
        for block in self.blocks:
            x = block(x, depth) if torch.jit.is_scripting() else run_block(block, x, depth, self.checkpointing)
        return self.neck(x.permute(0, 3, 1, 2))
