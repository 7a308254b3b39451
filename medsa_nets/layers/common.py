"""Small layers that several parts of the network share; parameter names equal segment-anything's."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of a (B, C, H, W) tensor."""

    def __init__(self, channels: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (B, C, H, W) over C."""
        channels_last = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return channels_last.permute(0, 3, 1, 2)


class MLPBlock(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, *, features: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.lin1 = nn.Linear(features, hidden)
        self.lin2 = nn.Linear(hidden, features)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., features) to (..., features)."""
        return self.lin2(self.act(self.lin1(x)))


class ConvBN(nn.Module):
    """Bias-free convolution and a frozen batch normalisation, computed as one convolution.

    The base is frozen, its running statistics too, so batch normalisation is an affine map in training as in
    inference; it is folded into the convolution's weights on every call (the weights are small).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.padding = kernel_size // 2
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise ``x`` (B, in_channels, H, W)."""
        variance, mean = self.bn.running_var, self.bn.running_mean
        assert variance is not None  # BatchNorm2d types its buffers as optional
        assert mean is not None
        scale = self.bn.weight * torch.rsqrt(variance + self.bn.eps)
        weight = self.c.weight * scale.reshape(-1, 1, 1, 1)
        bias = self.bn.bias - mean * scale
        return F.conv2d(x, weight, bias, stride=self.stride, padding=self.padding, groups=self.groups)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Scaled dot-product attention, by the faster of two equal ways.

    Fused attention's backward pass is slow on a CPU for many small windows (10 times this explicit form's at 7 x 7
    tokens, measured by ``tests/benchmarks/attention.py``), so training on a CPU multiplies and normalises explicitly.

    Args:
        q: queries (B, heads, N, C).
        k: keys (B, heads, M, C).
        v: values (B, heads, M, C).
        bias: added to the scores, broadcast to (B, heads, N, M), or none.

    Returns:
        (B, heads, N, C).
    """
    if q.requires_grad and not q.is_cuda:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        return torch.softmax(scores, dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def partition_windows(x: Tensor, window_size: int) -> Tensor:
    """Cut a token map into square windows, padded with zeros at the bottom and right.

    Args:
        x: tokens (B, H, W, C).
        window_size: side of a window, in tokens.

    Returns:
        Windows (B * nH * nW, window_size, window_size, C).
    """
    batch, height, width, channels = x.shape
    pad_h = (window_size - height % window_size) % window_size
    pad_w = (window_size - width % window_size) % window_size
    if pad_h > 0 or pad_w > 0:
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    rows, columns = (height + pad_h) // window_size, (width + pad_w) // window_size
    x = x.reshape(batch, rows, window_size, columns, window_size, channels)
    return x.transpose(2, 3).reshape(-1, window_size, window_size, channels)


def merge_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """Undo :func:`partition_windows`: windows (B * nH * nW, S, S, C) to tokens (B, height, width, C)."""
    size, channels = windows.shape[1], windows.shape[3]
    rows, columns = (height + size - 1) // size, (width + size - 1) // size
    x = windows.reshape(-1, rows, columns, size, size, channels).transpose(2, 3)
    return x.reshape(-1, rows * size, columns * size, channels)[:, :height, :width]
