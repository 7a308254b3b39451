"""TinyViT image encoder of MobileSAM and LiteMedSAM, with adapters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsa_nets.layers import (
    Adaptation,
    Bottlenecks,
    ConvBN,
    DepthBranch,
    Linear,
    attend,
    cut_windows,
    fast,
    join_windows,
    split_windows,
)
from medsa_nets.networks.checkpointing import run_block
from medsa_nets.networks.neck import make_neck


class PatchEmbed(nn.Module):
    """Two convolutions in front of the first stage."""

    def __init__(self, features: int, *, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            ConvBN(3, features // 2, kernel_size=kernel_size, stride=stride),
            nn.GELU(),
            ConvBN(features // 2, features, kernel_size=kernel_size, stride=stride),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, features, H / stride ** 2, W / stride ** 2)."""
        return self.seq(x)


class MBConv(nn.Module):
    """Inverted-bottleneck convolution block of TinyViT's first stage: (B, C, H, W) to the same shape."""

    def __init__(self, features: int, *, expand_ratio: int = 4) -> None:
        super().__init__()
        hidden = features * expand_ratio
        self.conv1 = ConvBN(features, hidden)
        self.conv2 = ConvBN(hidden, hidden, kernel_size=3, groups=hidden)
        self.conv3 = ConvBN(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` (B, C, H, W)."""
        y = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(y))


class PatchMerging(nn.Module):
    """Change of width, and of resolution by ``stride``, between two stages."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(in_channels, out_channels)
        self.conv2 = ConvBN(out_channels, out_channels, kernel_size=3, stride=stride, groups=out_channels)
        self.conv3 = ConvBN(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class ConvStage(nn.Module):
    """TinyViT's first stage. It holds no adapter: nothing in it is attention."""

    def __init__(self, features: int, *, depth: int, downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MBConv(features) for _ in range(depth)])
        self.downsample = downsample

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        """Transform ``x`` (B * depth, C, H, W)."""
        if torch.jit.is_scripting():
            return self.transform(x)
        else:  # TorchScript compiles what follows a return
            return fast.in_groups(self.transform, x)

    def transform(self, x: Tensor) -> Tensor:
        """:meth:`forward` for all images at once."""
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class TinyViTAttention(nn.Module):
    """Multi-head attention within a window, with a learned bias for each distance of two tokens."""

    qkv_by_head = True  # each head's queries, keys and values stand together

    if TYPE_CHECKING:  # TorchScript cannot read a class's postponed annotations
        bias_index: Tensor

    def __init__(self, features: int, *, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.norm = nn.LayerNorm(features)
        self.qkv = Linear(features, 3 * features)
        self.proj = Linear(features, features)
        positions = list(itertools.product(range(window_size), repeat=2))
        offsets: dict[tuple[int, int], int] = {}
        indices = [
            offsets.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(offsets)) for a in positions for b in positions
        ]
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, len(offsets)))
        self.register_buffer(
            "bias_index", torch.tensor(indices).reshape(len(positions), len(positions)), persistent=False
        )

    def split(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values by head: (..., 3 C) to (..., heads, 3, C / heads)."""
        return qkv.unflatten(-1, [self.num_heads, 3, -1])

    def forward(self, qkv: Tensor) -> Tensor:
        """Attend within each window, before the output projection.

        What a window lacks in rows and columns is padded with zeros where the base was trained. A padded token asks
        nothing here; as a key it takes part: one key, with the sum of the padded ones' biases, stands for all of them.

        Args:
            qkv: queries, keys and values (B, h, w, 3 C), h and w the window's size or less.

        Returns:
            (B, h, w, C).
        """
        batch, height, width = qkv.shape[:3]
        features = qkv.shape[3] // 3
        q, k, v = self.split(qkv.flatten(1, 2)).permute(3, 0, 2, 1, 4).unbind(0)
        bias = self.biases(height, width).to(q.dtype)
        if bias.shape[2] > bias.shape[1]:
            nothing = self.qkv(self.norm.bias.unsqueeze(0)).to(q.dtype)  # of a token of zeros
            _, key, value = self.split(nothing).permute(2, 0, 1, 3).unsqueeze(3).unbind(0)
            k = torch.cat([k, key.expand(batch, -1, -1, -1)], dim=2)
            v = torch.cat([v, value.expand(batch, -1, -1, -1)], dim=2)
        x = attend(q, k, v, bias.unsqueeze(0))
        return x.transpose(1, 2).reshape(batch, height, width, features)

    def biases(self, height: int, width: int) -> Tensor:
        """Bias of each pair of tokens, and of each token and all padded ones: (heads, h * w, h * w or one more)."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript leaves out what this alone holds)
            if fast.is_on():
                compute = partial(self.gather, height, width)
                return fast.remember(self, f"bias {height} {width}", (self.attention_biases,), compute)
        return self.gather(height, width)

    def gather(self, height: int, width: int) -> Tensor:
        """Compute :meth:`biases`."""
        size = self.window_size
        bias = self.attention_biases[:, self.bias_index]
        if height == size and width == size:
            return bias
        tokens = height * width
        bias = bias.reshape(-1, size, size, size, size)[:, :height, :width].reshape(-1, tokens, size, size)
        below, beside = bias[:, :, height:].flatten(2), bias[:, :, :height, width:].flatten(2)
        padded = torch.logsumexp(torch.cat([below, beside], dim=2), dim=2, keepdim=True)
        return torch.cat([bias[:, :, :height, :width].flatten(2), padded], dim=2)


class TinyViTMLP(nn.Module):
    """Feed-forward part of a block; its layer norm is applied by the block, which shares it with the adapter."""

    def __init__(self, features: int, *, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.fc1 = Linear(features, hidden)
        self.fc2 = Linear(hidden, features)

    def forward(self, normed: Tensor) -> Tensor:
        """Map normalised tokens (..., C) to (..., C)."""
        if torch.jit.is_scripting():
            return self.transform(normed)
        else:  # TorchScript compiles what follows a return
            return fast.in_groups(self.transform, normed)

    def transform(self, normed: Tensor) -> Tensor:
        """:meth:`forward` for all tokens at once."""
        return self.fc2(F.gelu(self.fc1(normed)))


class TinyViTBlock(nn.Module):
    """Window attention, depthwise convolution and MLP, with the two adapters of an encoder block.

    The first adapter follows the attention, before the residual; the second stands beside the MLP, scaled.

    Attributes:
        norm_mlp_adapter: whether the second adapter sees tokens after the MLP's norm, as the MLP does.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        window_size: int,
        adaptation: Adaptation,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm_mlp_adapter = True
        self.scale = adaptation.scale
        self.attn = TinyViTAttention(features, num_heads=num_heads, window_size=window_size)
        self.local_conv = ConvBN(features, features, kernel_size=3, groups=features)
        self.mlp = TinyViTMLP(features, hidden=4 * features)
        self.attn_adapter = adaptation.adapter(features, skip=True)
        self.mlp_adapter = adaptation.adapter(features)
        self.depth: DepthBranch | None = None
        if spatial_dims == 3:
            self.depth = DepthBranch(features, num_heads=num_heads, adaptation=adaptation)

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        """Transform ``x`` (B * depth, C, H, W)."""
        tokens = x.permute(0, 2, 3, 1)
        qkv = self.attn.qkv(self.attn.norm(tokens))
        parts = split_windows(tokens.shape[1], tokens.shape[2], self.window_size)
        windows = [self.attn(cut_windows(qkv, part, self.window_size)) for part in parts]
        attended = self.attn_adapter(self.attn.proj(join_windows(windows, parts, tokens.shape[0])))
        if self.depth is not None:  # noqa: SIM102 - the same queries, keys and values
            if not self.depth.idle:  # TorchScript reads no attribute of what may be absent
                q, k, v = self.attn.split(qkv).unbind(4)
                attended = attended + self.depth(
                    self.depth.attend(q, k, v, depth), self.attn.proj.weight, self.attn.proj.bias
                )
        tokens = tokens + attended
        tokens = self.local_conv(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        normed = self.mlp.norm(tokens)
        seen = normed if self.norm_mlp_adapter else tokens
        tokens = tokens + self.mlp(normed) + self.scale * self.mlp_adapter(seen)
        return tokens.permute(0, 3, 1, 2)


class TinyViTStage(nn.Module):
    """A stage of attention blocks, with the change of width behind it where there is one."""

    def __init__(
        self, blocks: Sequence[TinyViTBlock], *, downsample: nn.Module | None, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample if downsample is not None else nn.Identity()

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        """Transform ``x`` (B * depth, C, H, W)."""
        for block in self.blocks:
            x = block(x, depth) if torch.jit.is_scripting() else run_block(block, x, depth, self.checkpointing)
        return self.downsample(x)


class TinyViTEncoder(nn.Module):
    """Image encoder of MobileSAM (``patch_stride=4``) and LiteMedSAM (``patch_stride=1``).

    Args:
        patch_stride: 4: two 3 x 3 convolutions of stride 2 (MobileSAM, made for 1024 x 1024); 1: two 1 x 1
            convolutions (LiteMedSAM, made for 256 x 256).
        adaptation: makes the adapters.
        spatial_dims: 2, or 3 for space-depth blocks (SD-Trans).
        checkpointing: whether training recomputes each block in the backward pass, for less memory and more time.

    Source: TinyViT, arXiv 2207.10666 (5M variant, the last stage kept at the third one's resolution as MobileSAM
    does, arXiv 2306.14289); adapters: arXiv 2304.12620.
    """

    out_channels = 256

    def __init__(
        self,
        *,
        patch_stride: int = 1,
        adaptation: Adaptation = Bottlenecks(),  # noqa: B008 - it is frozen
        spatial_dims: int = 2,
        checkpointing: bool = False,
        features: Sequence[int] = (64, 128, 160, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (2, 4, 5, 10),
        window_sizes: Sequence[int] = (7, 7, 14, 7),
    ) -> None:
        super().__init__()
        if patch_stride not in (1, 4):
            raise ValueError(f"patch_stride must be 1 (LiteMedSAM) or 4 (MobileSAM), got {patch_stride}.")
        self.stride = 4 * patch_stride
        kernel, stride = (1, 1) if patch_stride == 1 else (3, 2)
        self.patch_embed = PatchEmbed(features[0], kernel_size=kernel, stride=stride)
        merge_strides = (2, 2, 1)
        self.layers = nn.ModuleList()
        for i, width in enumerate(features):
            downsample = PatchMerging(width, features[i + 1], stride=merge_strides[i]) if i < 3 else None
            if i == 0:
                assert downsample is not None
                self.layers.append(ConvStage(width, depth=depths[0], downsample=downsample))
                continue
            blocks = [
                TinyViTBlock(
                    width,
                    num_heads=num_heads[i],
                    window_size=window_sizes[i],
                    adaptation=adaptation,
                    spatial_dims=spatial_dims,
                )
                for _ in range(depths[i])
            ]
            self.layers.append(TinyViTStage(blocks, downsample=downsample, checkpointing=checkpointing))
        self.neck = make_neck(features[-1], self.out_channels)

    def forward(self, image: Tensor, depth: int = 1) -> Tensor:
        """Encode normalised slices (B * depth, 3, H, W) to (B * depth, 256, H / stride, W / stride)."""
        x = self.patch_embed(image)
        for layer in self.layers:
            x = layer(x, depth)
        return self.neck(x)
