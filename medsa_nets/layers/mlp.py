"""The feed-forward part of a transformer block; parameter names equal segment-anything's."""

from __future__ import annotations

from torch import Tensor, nn

from medsa_nets.layers.linear import Linear


class MLPBlock(nn.Module):
    """Two linear layers with an activation between them.

    Attributes:
        own_weights: whether the weights are an adapter's own, and stand in its file.
    """

    def __init__(self, *, features: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.lin1 = Linear(features, hidden)
        self.lin2 = Linear(hidden, features)
        self.act = activation
        self.own_weights = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., features) to (..., features)."""
        return self.lin2(self.act(self.lin1(x)))
