"""EfficientViT-SAM's image encoder, with adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsa_nets.layers import (
    Adaptation,
    Bottlenecks,
    ConvBN,
    DepthBranch,
    LayerNorm2d,
    Linear,
    LinearDepthBranch,
    fast,
)
from medsa_nets.networks.checkpointing import run_block

EPS = 1e-6  # of every norm


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class ConvAdapters(nn.Module):
    """The two adapters of a convolution block, placed as in an attention block.

    The first one follows the block's layers, before the residual; the second stands beside them, scaled.
    """

    def __init__(self, features: int, adaptation: Adaptation) -> None:
        super().__init__()
        self.scale = adaptation.scale
        self.conv_adapter = adaptation.adapter(features, skip=True)
        self.mlp_adapter = adaptation.adapter(features)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added to a block's input ``x`` (B, C, H, W), whose layers gave ``y`` (B, C, H, W)."""
        tokens = self.conv_adapter(y.permute(0, 2, 3, 1)) + self.scale * self.mlp_adapter(x.permute(0, 2, 3, 1))
        return tokens.permute(0, 3, 1, 2)


class Stem(nn.Module):
    """First convolution, of stride 2: (B, 3, H, W) to (B, features, H / 2, W / 2)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv = ConvBN(3, features, kernel_size=3, stride=2, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` (B, 3, H, W)."""
        return _gelu(self.conv(x))


class ResBlock(nn.Module):
    """Two convolutions and a skip path: (B, C, H, W) to the same shape."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(features, features, kernel_size=3, eps=EPS)
        self.conv2 = ConvBN(features, features, kernel_size=3, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` (B, C, H, W)."""
        return x + self.conv2(_gelu(self.conv1(x)))


class FusedMBConv(nn.Module):
    """Wide 3 x 3 convolution and a pointwise one; where the shape stays, a skip path, and adapters or none."""

    def __init__(
        self, in_channels: int, out_channels: int, *, expand: int, stride: int = 1, adaptation: Adaptation | None = None
    ) -> None:
        super().__init__()
        self.skip = stride == 1
        self.adapters = None if adaptation is None else ConvAdapters(out_channels, adaptation)
        self.spatial_conv = ConvBN(in_channels, expand * in_channels, kernel_size=3, stride=stride, eps=EPS)
        self.point_conv = ConvBN(expand * in_channels, out_channels, eps=EPS)

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride); ``depth`` changes nothing."""
        y = self.point_conv(_gelu(self.spatial_conv(x)))
        if self.adapters is not None:
            y = self.adapters(x, y)
        return x + y if self.skip else y


class MBConv(nn.Module):
    """Inverted bottleneck whose first convolutions have a bias, no norm.

    Where the shape stays it has a skip path, and adapters or none.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, expand: int, stride: int = 1, adaptation: Adaptation | None = None
    ) -> None:
        super().__init__()
        hidden = expand * in_channels
        self.skip = stride == 1
        self.adapters = None if adaptation is None else ConvAdapters(out_channels, adaptation)
        self.inverted_conv = nn.Conv2d(in_channels, hidden, 1)
        self.depth_conv = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden)
        self.point_conv = ConvBN(hidden, out_channels, eps=EPS)

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride); ``depth`` changes nothing."""
        y = self.point_conv(_gelu(self.depth_conv(_gelu(self.inverted_conv(x)))))
        if self.adapters is not None:
            y = self.adapters(x, y)
        return x + y if self.skip else y


class LinearAttention(nn.Module):
    """Multi-head attention without softmax, of tokens and of 5 x 5 neighbourhoods of them.

    The cost grows with the number of tokens, not with its square.
    """

    qkv_by_head = True  # each head's queries, keys and values stand together

    def __init__(self, features: int, *, head_features: int) -> None:
        super().__init__()
        self.num_heads = features // head_features
        self.head_features = head_features
        self.qkv = Linear(features, 3 * features, bias=False)
        wide = 3 * features
        self.aggreg = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(wide, wide, 5, padding=2, groups=wide, bias=False),
                    nn.Conv2d(wide, wide, 1, groups=3 * self.num_heads, bias=False),
                )
            ]
        )
        self.proj = ConvBN(2 * features, features, eps=EPS)

    def split(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values by head: (B, H, W, 3 C) to (B, H, W, heads, 3, C / heads)."""
        return qkv.unflatten(-1, [self.num_heads, 3, self.head_features])

    def attend(self, qkv: Tensor) -> Tensor:
        """Attend by all heads: (B, heads * 3 * c, H, W) in single precision to (B, heads * c, H, W)."""
        batch, height, width = qkv.shape[0], qkv.shape[2], qkv.shape[3]
        q, k, v = qkv.reshape(batch, -1, 3, self.head_features, height * width).unbind(2)
        q, k = torch.relu(q), torch.relu(k)
        summed = v @ k.transpose(2, 3)
        norm = k.sum(dim=3, keepdim=True).transpose(2, 3) @ q
        return (summed @ q / (norm + 1e-15)).reshape(batch, -1, height, width)

    def forward(self, qkv: Tensor) -> Tensor:
        """Attend, with the output projection: queries, keys and values (B, H, W, 3 C) to (B, H, W, C)."""
        maps = qkv.permute(0, 3, 1, 2)
        for neighbours in self.aggreg:
            maps = torch.cat([maps, neighbours(maps)], dim=1)
        if torch.jit.is_scripting():
            out = self.attend(maps.float())
        else:  # sums over a whole map lose too much in half precision
            with torch.autocast(maps.device.type, enabled=False):
                out = self.attend(maps if maps.dtype == torch.float64 else maps.float())
        return self.proj(out.to(qkv.dtype)).permute(0, 2, 3, 1)

    def token_weight(self) -> Tensor:
        """Weight of the output projection for tokens themselves, without neighbourhoods: (C, C)."""
        return self.proj.folded_weight().flatten(1)[:, : self.num_heads * self.head_features]


class MBConvMLP(nn.Module):
    """Feed-forward part of an attention block: an inverted bottleneck, its first convolution a linear layer."""

    def __init__(self, features: int, *, expand: int) -> None:
        super().__init__()
        hidden = expand * features
        self.lin1 = Linear(features, hidden)
        self.depth_conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.point_conv = ConvBN(hidden, features, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, H, W, C) to (B, H, W, C)."""
        wide = _gelu(self.lin1(x)).permute(0, 3, 1, 2)
        return self.point_conv(_gelu(self.depth_conv(wide))).permute(0, 2, 3, 1)


class EfficientViTBlock(nn.Module):
    """Linear attention and an inverted bottleneck, with the two adapters of an encoder block.

    The first adapter follows the attention, before the residual; the second stands beside the bottleneck, scaled.
    """

    def __init__(
        self, features: int, *, expand: int, head_features: int, adaptation: Adaptation, spatial_dims: int = 2
    ) -> None:
        super().__init__()
        self.scale = adaptation.scale
        self.attn = LinearAttention(features, head_features=head_features)
        self.mlp = MBConvMLP(features, expand=expand)
        self.attn_adapter = adaptation.adapter(features, skip=True)
        self.mlp_adapter = adaptation.adapter(features)
        self.depth: DepthBranch | None = None
        if spatial_dims == 3:
            self.depth = LinearDepthBranch(features, num_heads=self.attn.num_heads, adaptation=adaptation)

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        """Transform ``x`` (B * depth, C, H, W)."""
        tokens = x.permute(0, 2, 3, 1)
        qkv = self.attn.qkv(tokens)
        attended = self.attn_adapter(self.attn(qkv))
        if self.depth is not None:  # noqa: SIM102 - the same queries, keys and values
            if not self.depth.idle:  # TorchScript reads no attribute of what may be absent
                q, k, v = self.attn.split(qkv).unbind(4)
                attended = attended + self.depth(
                    self.depth.attend(q, k, v, depth), self.attn.token_weight(), self.attn.proj.folded_bias()
                )
        tokens = tokens + attended
        tokens = tokens + self.mlp(tokens) + self.scale * self.mlp_adapter(tokens)
        return tokens.permute(0, 3, 1, 2)


class ConvStage(nn.Sequential):
    """A stage of convolution blocks on large maps, without adapters."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` (B * depth, C, H, W)."""
        if torch.jit.is_scripting():
            return self.transform(x)
        else:  # TorchScript compiles what follows a return
            return fast.in_groups(self.transform, x)

    def transform(self, x: Tensor) -> Tensor:
        """:meth:`forward` for all images at once."""
        for block in self:
            x = block(x)
        return x


class EfficientViTEncoder(nn.Module):
    """Image encoder of EfficientViT-SAM (``l0``, ``l1``, ``l2``), made for 512 x 512, with adapters.

    The published code brings the maps of the last three stages to 64 x 64, whatever the image; here they are brought to
    an eighth of the image, which is the same at 512 x 512.

    Args:
        depths: blocks of the stages, beside the one that each begins with.
        neck_depth: blocks after the sum of the last three stages.
        adaptation: makes the adapters: two in each attention block of the last stage, and in each convolution block of
            the stage before it and after the sum.
        spatial_dims: 2, or 3 for space-depth blocks (SD-Trans).
        checkpointing: whether training recomputes each block that has adapters in the backward pass.
        features: widths of the stages.
        head_features: width of a head.
        neck_features: width of the blocks after the sum.

    Source: arXiv 2205.14756 (EfficientViT), arXiv 2402.05008 (EfficientViT-SAM), arXiv 2304.12620 (adapters).
    """

    out_channels = 256

    def __init__(
        self,
        *,
        depths: Sequence[int],
        neck_depth: int,
        adaptation: Adaptation = Bottlenecks(),  # noqa: B008 - it is frozen
        spatial_dims: int = 2,
        checkpointing: bool = False,
        features: Sequence[int] = (32, 64, 128, 256, 512),
        head_features: int = 32,
        neck_features: int = 256,
    ) -> None:
        super().__init__()
        self.stride = 8
        self.checkpointing = checkpointing
        first = [Stem(features[0]), *(ResBlock(features[0]) for _ in range(depths[0]))]
        self.stages = nn.ModuleList([ConvStage(*first)])
        for i in (1, 2):
            blocks = [FusedMBConv(features[i], features[i], expand=4) for _ in range(depths[i])]
            self.stages.append(ConvStage(FusedMBConv(features[i - 1], features[i], expand=16, stride=2), *blocks))
        later = [MBConv(features[3], features[3], expand=4, adaptation=adaptation) for _ in range(depths[3])]
        self.stages.append(nn.ModuleList([MBConv(features[2], features[3], expand=16, stride=2), *later]))
        attention = [
            EfficientViTBlock(
                features[4], expand=6, head_features=head_features, adaptation=adaptation, spatial_dims=spatial_dims
            )
            for _ in range(depths[4])
        ]
        self.stages.append(nn.ModuleList([MBConv(features[3], features[4], expand=24, stride=2), *attention]))
        self.inputs = nn.ModuleList([ConvBN(features[i], neck_features, eps=EPS) for i in (4, 3, 2)])
        self.middle = nn.ModuleList(
            [FusedMBConv(neck_features, neck_features, expand=1, adaptation=adaptation) for _ in range(neck_depth)]
        )
        self.output = nn.Conv2d(neck_features, self.out_channels, 1)
        self.norm = LayerNorm2d(self.out_channels, eps=EPS)

    def forward(self, image: Tensor, depth: int = 1) -> Tensor:
        """Encode normalised slices (B * depth, 3, H, W) to (B * depth, 256, H / 8, W / 8)."""
        eighth = self.stages[2](self.stages[1](self.stages[0](image)))
        x = eighth
        for block in self.stages[3]:  # type: ignore[attr-defined]
            x = block(x, depth) if torch.jit.is_scripting() else run_block(block, x, depth, self.checkpointing)
        sixteenth = x
        for block in self.stages[4]:  # type: ignore[attr-defined]
            x = block(x, depth) if torch.jit.is_scripting() else run_block(block, x, depth, self.checkpointing)
        size = [eighth.shape[2], eighth.shape[3]]
        summed = self.inputs[2](eighth)
        summed = F.interpolate(self.inputs[1](sixteenth), size=size, mode="bicubic", align_corners=False) + summed
        summed = F.interpolate(self.inputs[0](x), size=size, mode="bicubic", align_corners=False) + summed
        for block in self.middle:
            if torch.jit.is_scripting():
                summed = block(summed, depth)
            else:
                summed = run_block(block, summed, depth, self.checkpointing)
        return self.norm(self.output(summed))
