"""Images of any number of channels, before a base that was made for three."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelProjection(nn.Module):
    """A learned 1 x 1 convolution from the channels of an image (MRI sequences, phases) to the three of a base.

    At the start each of the three is the mean of all channels: of one channel, that channel thrice.

    Args:
        in_channels: channels of the image, 1 or more.

    Raises:
        ValueError: when ``in_channels`` is below 1.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"in_channels must be 1 or more, got {in_channels}.")
        self.in_channels = in_channels
        self.weight = nn.Parameter(torch.full((3, in_channels, 1, 1), 1.0 / in_channels))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, 3, H, W), in the precision of ``x`` whatever autocast is on.

        Sums of products are no matrix product to autocast, which would round the intensities.
        """
        return (x.unsqueeze(1) * self.weight.unsqueeze(0)).sum(dim=2) + self.bias.reshape(1, 3, 1, 1)
