"""Hiera image encoder of SAM 2, with adapters."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsa_nets.layers import (
    Adaptation,
    Bottlenecks,
    DepthBranch,
    Linear,
    MLPBlock,
    attend,
    cut_windows,
    fast,
    join_windows,
    split_windows,
)
from medsa_nets.networks.checkpointing import run_block
from medsa_nets.networks.skips import MIDDLE, WIDE, pack_skips, packed_channels


def halve(x: Tensor) -> Tensor:
    """Largest of each 2 x 2 tokens: (B, H, W, C) to (B, H / 2, W / 2, C)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), kernel_size=2).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Overlapping patches of 7 x 7 pixels, 4 apart, to tokens."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, features, kernel_size=7, stride=4, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, H / 4, W / 4, features)."""
        return self.proj(x).permute(0, 2, 3, 1)


class HieraAttention(nn.Module):
    """Multi-head attention over a token map or a window of it, whose queries may be pooled.

    Args:
        features: token width that comes in.
        out_features: token width that goes out; where it is another one, queries are halved (:func:`halve`).
        num_heads: number of heads.
    """

    def __init__(self, features: int, out_features: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.pool = features != out_features
        self.qkv = Linear(features, 3 * out_features)
        self.proj = Linear(out_features, out_features)

    def split(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values by head: (B, H, W, 3 C) to (B, H, W, 3, heads, C / heads)."""
        return qkv.unflatten(-1, [3, self.num_heads, -1])

    def forward(self, qkv: Tensor, window_size: int) -> Tensor:
        """Attend within maps or windows, before the output projection.

        What a window lacks in rows and columns is padded with zeros where the base was trained. A padded token asks
        nothing here; as a key it takes part: one key, with the logarithm of their number, stands for all of them.

        Args:
            qkv: queries, keys and values (B, h, w, 3 C).
            window_size: of a window, h and w this size or less; 0 for whole maps.

        Returns:
            (B, h, w, C), of halved queries (B, h / 2, w / 2, C).
        """
        batch, height, width = qkv.shape[:3]
        q, k, v = self.split(qkv).unbind(3)
        if self.pool:
            q = halve(q.flatten(3)).unflatten(-1, [self.num_heads, -1])
        rows, columns = q.shape[1], q.shape[2]
        q, k, v = q.flatten(1, 2).transpose(1, 2), k.flatten(1, 2).transpose(1, 2), v.flatten(1, 2).transpose(1, 2)
        missing = window_size * window_size - height * width if window_size > 0 else 0
        bias: Optional[Tensor] = None
        if missing > 0:
            nothing = self.qkv.bias.to(k.dtype).reshape(3, self.num_heads, 1, -1)  # of a token of zeros
            k = torch.cat([k, nothing[1].expand(batch, -1, -1, -1)], dim=2)
            v = torch.cat([v, nothing[2].expand(batch, -1, -1, -1)], dim=2)
            bias = torch.zeros(height * width, dtype=q.dtype, device=q.device)
            bias = F.pad(bias, (0, 1), value=math.log(missing)).expand(1, self.num_heads, rows * columns, -1)
        return attend(q, k, v, bias).transpose(1, 2).reshape(batch, rows, columns, -1)


class HieraBlock(nn.Module):
    """Transformer block with window or global attention and the two adapters of an encoder block.

    The first block of a stage halves the map, and doubles the width, by its queries. It works in the windows of the
    stage before. The first adapter follows the attention, before the residual; the second stands beside the MLP,
    scaled.

    Attributes:
        depth: the depth branch of volumes; none in a block that halves the map, where no query has a key of its own
            position.
    """

    def __init__(
        self,
        features: int,
        out_features: int,
        *,
        num_heads: int,
        window_size: int,
        adaptation: Adaptation,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.scale = adaptation.scale
        self.norm1 = nn.LayerNorm(features, eps=1e-6)
        self.attn = HieraAttention(features, out_features, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(out_features, eps=1e-6)
        self.mlp = MLPBlock(features=out_features, hidden=4 * out_features, activation=nn.GELU())
        self.proj: Linear | None = None
        if self.attn.pool:
            self.proj = Linear(features, out_features)
        self.attn_adapter = adaptation.adapter(out_features, skip=True)
        self.mlp_adapter = adaptation.adapter(out_features)
        self.depth: DepthBranch | None = None
        if spatial_dims == 3 and not self.attn.pool:
            self.depth = DepthBranch(out_features, num_heads=num_heads, adaptation=adaptation)

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        """Transform tokens (B * depth, H, W, C); a block that halves the map gives (B * depth, H / 2, W / 2, 2 C)."""
        normed = self.norm1(x)
        qkv = self.attn.qkv(normed)
        if self.window_size > 0:
            parts = split_windows(x.shape[1], x.shape[2], self.window_size)
            windows = [self.attn(cut_windows(qkv, part, self.window_size), self.window_size) for part in parts]
            if self.attn.pool:
                parts = [(part[0] // 2, part[1] // 2, part[2] // 2, part[3] // 2) for part in parts]
            attended = join_windows(windows, parts, x.shape[0])
        else:
            attended = self.attn(qkv, 0)
        attended = self.attn_adapter(self.attn.proj(attended))
        if self.depth is not None:  # noqa: SIM102 - the same queries, keys and values
            if not self.depth.idle:  # TorchScript reads no attribute of what may be absent
                q, k, v = self.attn.split(qkv).unbind(3)
                attended = attended + self.depth(
                    self.depth.attend(q, k, v, depth), self.attn.proj.weight, self.attn.proj.bias
                )
        if self.proj is not None:
            x = halve(self.proj(normed))
        x = x + attended
        normed = self.norm2(x)
        return x + self.mlp(normed) + self.scale * self.mlp_adapter(normed)


class HieraTrunk(nn.Module):
    """Hiera: four stages of attention blocks, each at half the resolution and twice the width of the one before.

    Positions are embedded by a coarse map, interpolated to the size of the token map, and one window that is repeated
    over it.

    Args:
        features: token width of the first stage.
        num_heads: heads of the first stage; they double with the width.
        stages: number of blocks of each stage.
        global_blocks: blocks with global attention; the others use windows.
        window_sizes: of each stage, in tokens.
        coarse_size: side of the coarse map of positions.
        adaptation: makes the adapters.
        spatial_dims: 2, or 3 for space-depth blocks (SD-Trans).
        checkpointing: whether training recomputes each block in the backward pass.

    Source: arXiv 2306.00989 (Hiera), arXiv 2311.05613 (positions by windows), arXiv 2408.00714 (SAM 2).
    """

    def __init__(
        self,
        *,
        features: int,
        num_heads: int,
        stages: Sequence[int],
        global_blocks: Sequence[int],
        window_sizes: Sequence[int] = (8, 4, 14, 7),
        coarse_size: int = 7,
        adaptation: Adaptation,
        spatial_dims: int = 2,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.patch_embed = PatchEmbed(features)
        self.pos_embed = nn.Parameter(torch.zeros(1, features, coarse_size, coarse_size))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, features, window_sizes[0], window_sizes[0]))
        self.ends = [sum(stages[: i + 1]) - 1 for i in range(len(stages))]
        self.blocks = nn.ModuleList()
        width = features
        for stage, count in enumerate(stages):
            for i in range(count):
                before = stage - 1 if stage > 0 and i == 0 else stage  # a block that halves the map is still there
                self.blocks.append(
                    HieraBlock(
                        width,
                        features * 2**stage,
                        num_heads=num_heads * 2**stage,
                        window_size=0 if len(self.blocks) in global_blocks else window_sizes[before],
                        adaptation=adaptation,
                        spatial_dims=spatial_dims,
                    )
                )
                width = features * 2**stage

    def positions(self, height: int, width: int) -> Tensor:
        """Embedding of each token's position (1, height, width, features), height and width multiples of a window."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript leaves out what this alone holds)
            if fast.is_on():
                sources, compute = (self.pos_embed, self.pos_embed_window), partial(self.lay_positions, height, width)
                return fast.remember(self, f"positions {height} {width}", sources, compute)
        return self.lay_positions(height, width)

    def lay_positions(self, height: int, width: int) -> Tensor:
        """Compute :meth:`positions`."""
        window = self.pos_embed_window
        coarse = F.interpolate(self.pos_embed, size=(height, width), mode="bicubic", align_corners=False)
        return (coarse + window.repeat(1, 1, height // window.shape[2], width // window.shape[3])).permute(0, 2, 3, 1)

    def forward(self, image: Tensor, depth: int = 1) -> list[Tensor]:
        """Tokens of each stage: (B * depth, 3, H, W) to (B * depth, H / 4, W / 4, features), then halves and doubles.

        H and W are multiples of 32.
        """
        x = self.patch_embed(image)
        x = x + self.positions(x.shape[1], x.shape[2])
        maps: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(x, depth) if torch.jit.is_scripting() else run_block(block, x, depth, self.checkpointing)
            if i in self.ends:
                maps.append(x)
        return maps


class HieraNeck(nn.Module):
    """Feature pyramid: each stage's map at one width; the third has what the fourth one says added.

    Args:
        features: token width of the first stage.
        out_channels: width of what comes out.
        stages: number of stages.
    """

    def __init__(self, features: int, out_channels: int, *, stages: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(  # from the coarsest map to the finest
            [
                nn.Sequential(OrderedDict(conv=nn.Conv2d(features * 2**stage, out_channels, kernel_size=1)))
                for stage in reversed(range(stages))
            ]
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Tokens of each stage (B, h, w, C) to maps (B, out_channels, h, w) of the first three, the finest first."""
        out: list[Tensor] = []
        for i, conv in enumerate(self.convs):
            out.append(conv(maps[len(maps) - 1 - i].permute(0, 3, 1, 2)))
        coarsest = F.interpolate(out[0].float(), scale_factor=2.0, mode="nearest")
        return [out[3], out[2], out[1] + coarsest]


class HieraEncoder(nn.Module):
    """Image encoder of SAM 2 as it sees single images, with adapters.

    What it gives holds, beside the image embedding of 256 channels, two finer maps that SAM 2's mask decoder adds as it
    upscales: 64 channels at half the stride and 32 at a quarter, each fine pixel a channel of its own
    (:func:`~medsa_nets.networks.skips.pack_skips`). The convolutions that narrow them belong to the encoder here, so
    that what is kept of an image is small; in SAM 2's files they stand in the mask decoder.

    Sides that are no multiple of 32 are padded with zeros at the end, and the embedding is cut again.

    Args:
        features: token width of the first stage (96 in SAM 2's tiny and small).
        num_heads: heads of the first stage.
        stages: number of blocks of each of the four stages.
        global_blocks: blocks with global attention.
        adaptation: makes the adapters.
        spatial_dims: 2, or 3 for space-depth blocks (SD-Trans).
        checkpointing: whether training recomputes each block in the backward pass, for less memory and more time.

    Attributes:
        no_mem_embed: what SAM 2 adds to the embedding of an image that nothing came before.

    Source: arXiv 2408.00714 (SAM 2); adapters: arXiv 2304.12620.
    """

    embedding_channels = 256
    out_channels = packed_channels(embedding_channels)

    def __init__(
        self,
        *,
        features: int = 96,
        num_heads: int = 1,
        stages: Sequence[int] = (1, 2, 7, 2),
        global_blocks: Sequence[int] = (5, 7, 9),
        adaptation: Adaptation = Bottlenecks(),  # noqa: B008 - it is frozen
        spatial_dims: int = 2,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.stride = 16
        self.multiple = 32  # of a side: the last stage's stride, and a window of the first one's
        self.trunk = HieraTrunk(
            features=features,
            num_heads=num_heads,
            stages=stages,
            global_blocks=global_blocks,
            adaptation=adaptation,
            spatial_dims=spatial_dims,
            checkpointing=checkpointing,
        )
        self.neck = HieraNeck(features, self.embedding_channels, stages=len(stages))
        self.conv_s0 = nn.Conv2d(self.embedding_channels, WIDE, kernel_size=1)
        self.conv_s1 = nn.Conv2d(self.embedding_channels, MIDDLE, kernel_size=1)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, self.embedding_channels))

    def forward(self, image: Tensor, depth: int = 1) -> Tensor:
        """Encode normalised slices (B * depth, 3, H, W) to (B * depth, 1024, H / 16, W / 16)."""
        height, width = image.shape[2], image.shape[3]
        image = F.pad(image, (0, -width % self.multiple, 0, -height % self.multiple))
        finest, finer, embedding = self.neck(self.trunk(image, depth))
        embedding = embedding + self.no_mem_embed.reshape(1, -1, 1, 1)
        packed = pack_skips(embedding, self.conv_s1(finer), self.conv_s0(finest))
        return packed[:, :, : height // self.stride, : width // self.stride]
