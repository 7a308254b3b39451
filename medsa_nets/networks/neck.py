"""The neck of SAM's image encoders: token width to the width of the image embedding."""

from __future__ import annotations

from torch import nn

from medsa_nets.layers import LayerNorm2d


def make_neck(features: int, out_channels: int) -> nn.Sequential:
    """Two convolutions, each with a layer norm: (B, features, h, w) to (B, out_channels, h, w).

    Source: arXiv 2304.02643 (SAM); MobileSAM's TinyViT has the same one (arXiv 2306.14289).
    """
    return nn.Sequential(
        nn.Conv2d(features, out_channels, kernel_size=1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )
