"""SAM's ViT image encoder with adapters; parameter names equal segment-anything's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor, nn

from medsa_nets.layers import (
    Adaptation,
    Bottlenecks,
    DepthBranch,
    Linear,
    MLPBlock,
    attend_map,
    cut_windows,
    fast,
    join_windows,
    split_windows,
)
from medsa_nets.networks.checkpointing import run_block
from medsa_nets.networks.neck import make_neck


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, embed_dim: int, *, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, H / patch, W / patch, C)."""
        return self.proj(x).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head attention over a token map, or windows of it, with decomposed relative-position bias.

    Args:
        features: token width.
        num_heads: number of heads.
        input_size: height and width of the token map (or window); the tables have ``2 * size - 1`` rows.

    Attributes:
        relative: whether the base's tables are used; false takes zeros in their place.
    """

    if TYPE_CHECKING:  # TorchScript cannot read a class's postponed annotations
        index_h: Tensor
        index_w: Tensor

    def __init__(self, features: int, *, num_heads: int, input_size: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative = True
        head_dim = features // num_heads
        self.qkv = Linear(features, 3 * features)
        self.proj = Linear(features, features)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * input_size[0] - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * input_size[1] - 1, head_dim))
        for name, size in (("index_h", input_size[0]), ("index_w", input_size[1])):
            steps = torch.arange(size)
            self.register_buffer(name, steps[:, None] - steps[None, :] + size - 1, persistent=False)

    def split(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values by head: (B, H, W, 3 C) to (B, H, W, 3, heads, C / heads)."""
        batch, height, width, features = qkv.shape
        return qkv.reshape(batch, height, width, 3, self.num_heads, features // (3 * self.num_heads))

    def tables(self) -> tuple[Tensor, Tensor]:
        """Relative-position vectors of each pair of rows and each pair of columns: (size, size, C / heads)."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript leaves out what this alone holds)
            if fast.is_on():
                return (
                    fast.remember(self, "rows", (self.rel_pos_h,), self.row_table),
                    fast.remember(self, "columns", (self.rel_pos_w,), self.column_table),
                )
        return self.row_table(), self.column_table()

    def row_table(self) -> Tensor:
        """Vectors of each pair of rows."""
        table = self.rel_pos_h[self.index_h]
        return table if self.relative else torch.zeros_like(table)

    def column_table(self) -> Tensor:
        """Vectors of each pair of columns."""
        table = self.rel_pos_w[self.index_w]
        return table if self.relative else torch.zeros_like(table)

    def forward(self, qkv: Tensor, padding: Optional[Tensor] = None) -> Tensor:
        """Attend within maps or windows, before the output projection.

        Rows and columns that a window lacks are what segment-anything pads with zeros. A padded token asks nothing
        here; as a key it takes part, as it did when the base was trained. All of a window's padded keys have one value,
        and their scores, q . b + row bias + column bias, sum up over rectangles: one key stands for all of them.

        Args:
            qkv: queries, keys and values (B, h, w, 3 C), h and w the size given at construction or less.
            padding: those of a padded token (1, 3 C); none takes a token of zeros.

        Returns:
            (B, h, w, C).
        """
        batch, height, width = qkv.shape[:3]
        features = qkv.shape[3] // 3
        channels = features // self.num_heads
        q, k, v = self.split(qkv).flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
        q_map = q.reshape(batch, self.num_heads, height, width, channels)
        rows, columns = self.tables()
        # bias[query, key] = q . R_h[row distance] + q . R_w[column distance]
        bias_h = torch.einsum("bnhwc,hkc->bnhwk", q_map, rows[:height].to(q.dtype)).flatten(2, 3)
        bias_w = torch.einsum("bnhwc,wkc->bnhwk", q_map, columns[:width].to(q.dtype)).flatten(2, 3)
        padded: torch.Tensor | None = None
        if height < rows.shape[0] or width < columns.shape[0]:
            padded = self.log_sum(bias_h.float(), bias_w.float(), height, width).to(q.dtype)
            nothing = self.qkv.bias if padding is None else padding
            nothing = nothing.to(q.dtype).reshape(3, self.num_heads, 1, channels)
            k = torch.cat([k, nothing[1].expand(batch, -1, -1, -1)], dim=2)
            v = torch.cat([v, nothing[2].expand(batch, -1, -1, -1)], dim=2)
        x = attend_map(q, k, v, bias_h[..., :height], bias_w[..., :width], padded, channels**-0.5)
        return x.transpose(1, 2).reshape(batch, height, width, features)

    def log_sum(self, bias_h: Tensor, bias_w: Tensor, height: int, width: int) -> Tensor:
        """Logarithm of the summed exponentials of the bias over the rows and columns beyond ``height`` and ``width``.

        Args:
            bias_h: (B, heads, N, rows).
            bias_w: (B, heads, N, columns).
            height: rows that a window has.
            width: columns that it has.

        Returns:
            (B, heads, N, 1).
        """
        sums: list[Tensor] = []
        if height < bias_h.shape[3]:
            below = torch.logsumexp(bias_h[..., height:], dim=3, keepdim=True)
            sums.append(below + torch.logsumexp(bias_w, dim=3, keepdim=True))
        if width < bias_w.shape[3]:
            beside = torch.logsumexp(bias_w[..., width:], dim=3, keepdim=True)
            sums.append(torch.logsumexp(bias_h[..., :height], dim=3, keepdim=True) + beside)
        return torch.logaddexp(sums[0], sums[1]) if len(sums) > 1 else sums[0]


class Block(nn.Module):
    """Transformer block with window or global attention and the two adapters of an encoder block.

    The first adapter follows the attention, before the residual and with its own skip path; the second stands
    beside the MLP and is scaled (arXiv 2304.12620, section "SAM Adapter").

    Attributes:
        norm_padding: whether a window is padded before the norm, so that a padded token is the norm's bias.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        window_size: int,
        input_size: tuple[int, int],
        adaptation: Adaptation,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm_padding = False
        self.scale = adaptation.scale
        self.norm1 = nn.LayerNorm(features, eps=1e-6)
        self.attn = Attention(
            features, num_heads=num_heads, input_size=(window_size, window_size) if window_size > 0 else input_size
        )
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
        if self.window_size > 0:
            parts = split_windows(x.shape[1], x.shape[2], self.window_size)
            padding: Optional[Tensor] = None
            if self.norm_padding:
                padding = self.attn.qkv(self.norm1.bias.unsqueeze(0))
            windows = [self.attn(cut_windows(qkv, part, self.window_size), padding) for part in parts]
            attended = join_windows(windows, parts, x.shape[0])
        else:
            attended = self.attn(qkv)
        attended = self.attn_adapter(self.attn.proj(attended))
        if self.depth is not None:  # noqa: SIM102 - the same queries, keys and values
            if not self.depth.idle:  # TorchScript reads no attribute of what may be absent
                q, k, v = self.attn.split(qkv).unbind(3)
                attended = attended + self.depth(
                    self.depth.attend(q, k, v, depth), self.attn.proj.weight, self.attn.proj.bias
                )
        x = x + attended
        normed = self.norm2(x)
        return x + self.mlp(normed) + self.scale * self.mlp_adapter(normed)


class ImageEncoderViT(nn.Module):
    """SAM's ViT encoder (ViTDet) for one input size, with adapters.

    Args:
        img_size: height and width of the input, multiples of 16. Position tables are made for this size;
            :func:`medsa_nets.weights.load_base` interpolates a file's tables to it, once.
        embed_dim: token width (768, 1024, 1280 for ``vit_b``, ``vit_l``, ``vit_h``).
        depth: number of blocks.
        num_heads: heads per block.
        global_attn_indexes: blocks with global attention; the others use windows of 14 x 14 tokens.
        adaptation: makes the adapters.
        spatial_dims: 2, or 3 for space-depth blocks (SD-Trans).
        checkpointing: whether training recomputes each block in the backward pass, for less memory and more time.

    Raises:
        ValueError: when ``img_size`` is no multiple of 16.

    Source: arXiv 2304.02643 (SAM), arXiv 2304.12620 (adapters).
    """

    out_channels = 256
    patch_size = 16
    window_size = 14

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        global_attn_indexes: Sequence[int],
        adaptation: Adaptation = Bottlenecks(),  # noqa: B008 - it is frozen
        spatial_dims: int = 2,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        if img_size[0] % self.patch_size or img_size[1] % self.patch_size:
            raise ValueError(f"img_size must be a multiple of {self.patch_size} on both axes, got {img_size}.")
        self.stride = self.patch_size
        self.img_size = img_size
        grid = (img_size[0] // self.patch_size, img_size[1] // self.patch_size)
        self.patch_embed = PatchEmbed(embed_dim, patch_size=self.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0], grid[1], embed_dim))
        self.blocks = nn.ModuleList(
            [
                Block(
                    embed_dim,
                    num_heads=num_heads,
                    window_size=0 if i in global_attn_indexes else self.window_size,
                    input_size=grid,
                    adaptation=adaptation,
                    spatial_dims=spatial_dims,
                )
                for i in range(depth)
            ]
        )
        self.neck = make_neck(embed_dim, self.out_channels)

    def forward(self, image: Tensor, depth: int = 1) -> Tensor:
        """Encode normalised slices (B * depth, 3, H, W) to (B * depth, 256, H / 16, W / 16)."""
        x = self.patch_embed(image) + self.pos_embed
        for block in self.blocks:
            x = block(x, depth) if torch.jit.is_scripting() else run_block(block, x, depth, self.checkpointing)
        return self.neck(x.permute(0, 3, 1, 2))
