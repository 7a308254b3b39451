"""Convolutions of the TinyViT and EfficientViT encoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsa_nets.layers import fast


class ConvBN(nn.Module):
    """Bias-free convolution and a frozen batch normalisation.

    The base is frozen, its running statistics too, so batch normalisation is an affine map in training as in
    inference: it can be folded into the convolution's weights, once, and is so in exports.

    Attributes:
        own_statistics: whether the statistics are an adapter's own, and stand in its file.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)
        self.own_statistics = False
        self.stride = stride
        self.padding = kernel_size // 2
        self.groups = groups
        self.pointwise = kernel_size == 1 and stride == 1 and groups == 1

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise ``x`` (B, in_channels, H, W)."""
        if torch.jit.is_scripting():
            return self.convolve(x, self.folded_weight(), self.folded_bias())
        else:  # TorchScript compiles what follows a return
            if fast.is_on():
                return fast.convolve(self, x)
            bn = self.bn
            return F.batch_norm(self.c(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Convolve as the layer does, with another weight and a bias."""
        return F.conv2d(x, weight, bias, stride=self.stride, padding=self.padding, groups=self.groups)

    def folded_weight(self) -> Tensor:
        """The convolution's weight, scaled as batch normalisation scales its output."""
        variance = self.bn.running_var
        assert variance is not None  # BatchNorm2d types its buffers as optional
        return self.c.weight * (self.bn.weight * torch.rsqrt(variance + self.bn.eps)).reshape(-1, 1, 1, 1)

    def folded_bias(self) -> Tensor:
        """What batch normalisation adds."""
        variance, mean = self.bn.running_var, self.bn.running_mean
        assert variance is not None
        assert mean is not None
        return self.bn.bias - mean * self.bn.weight * torch.rsqrt(variance + self.bn.eps)
