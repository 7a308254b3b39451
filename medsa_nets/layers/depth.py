"""Layers that extend a frozen 2D network to volumes: attention along depth, and prompts of other slices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from medsa_nets.layers.adapters import Adaptation, Bottlenecks, zero_linear
from medsa_nets.layers.attention import attend


class DepthBranch(nn.Module):
    """Depth branch of a space-depth block (SD-Trans): the slices' tokens at one position attend to each other.

    It uses the queries, keys and values of the frozen spatial attention. What it owns is a bias for each distance in
    depth, zero at the start, and an adapter without skip path, zero at the start too: a fresh branch adds nothing.

    Args:
        features: token width.
        num_heads: heads of the spatial attention.
        adaptation: makes the adapter.
        max_distance: distances in slices beyond this share the bias of the farthest one.

    Source: arXiv 2304.12620, section "SD-Trans".
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        adaptation: Adaptation = Bottlenecks(),  # noqa: B008 - it is frozen
        max_distance: int = 32,
    ) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.idle = False  # an idle branch adds nothing and is not computed: what trains on single slices
        self.bias = nn.Parameter(torch.zeros(num_heads, 2 * max_distance + 1))
        self.adapter: Any = adaptation.depth_adapter(features)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, depth: int) -> Tensor:
        """Attend along depth, before the attention's output projection.

        Args:
            q: queries of whole slices (B * depth, H, W, heads, c), the slices of a volume one after the other.
            k: keys, likewise.
            v: values, likewise.
            depth: slices of a volume.

        Returns:
            (B * depth, H, W, heads * c).
        """
        slices, height, width, heads, channels = q.shape
        steps = torch.arange(depth, device=q.device)
        distance = (steps.unsqueeze(1) - steps.unsqueeze(0)).clamp(-self.max_distance, self.max_distance)
        bias = self.bias[:, distance + self.max_distance].unsqueeze(0).to(q.dtype)
        out = attend(self._columns(q, depth), self._columns(k, depth), self._columns(v, depth), bias)
        out = out.reshape(slices // depth, height * width, heads, depth, channels).permute(0, 3, 1, 2, 4)
        return out.reshape(slices, height, width, heads * channels)

    def _columns(self, x: Tensor, depth: int) -> Tensor:
        """Tokens of each position, along depth: (B * H * W, heads, depth, c)."""
        slices, height, width, heads, channels = x.shape
        x = x.reshape(slices // depth, depth, height * width, heads, channels)
        return x.permute(0, 2, 3, 1, 4).reshape(-1, heads, depth, channels)

    def forward(self, attended: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Project and adapt what :meth:`attend` gave.

        Args:
            attended: (..., features).
            weight: of the attention's output projection (features, features).
            bias: of it (features,).

        Returns:
            (..., features), zero from a fresh branch.
        """
        adapted: Tensor = self.adapter.follow(attended, weight, bias)
        return adapted


class LinearDepthBranch(DepthBranch):
    """Depth branch of a block whose attention has no softmax: weights are products of rectified queries and keys.

    The exponential of the bias for a distance is a factor of the weights. Arguments as of :class:`DepthBranch`.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, depth: int) -> Tensor:
        """Attend along depth, in single precision; arguments and result as of :meth:`DepthBranch.attend`."""
        slices, height, width, heads, channels = q.shape
        steps = torch.arange(depth, device=q.device)
        distance = (steps.unsqueeze(1) - steps.unsqueeze(0)).clamp(-self.max_distance, self.max_distance)
        factor = torch.exp(self.bias[:, distance + self.max_distance]).unsqueeze(0)
        weights = torch.relu(self._columns(q, depth)) @ torch.relu(self._columns(k, depth)).transpose(2, 3)
        weights = weights.float() * factor
        weights = weights / (weights.sum(dim=3, keepdim=True) + 1e-15)
        out = weights.to(v.dtype) @ self._columns(v, depth)
        out = out.reshape(slices // depth, height * width, heads, depth, channels).permute(0, 3, 1, 2, 4)
        return out.reshape(slices, height, width, heads * channels)


class DistantPrompt(nn.Module):
    """Embeds prompts of other slices for a slice: added to the tokens of prompts that lie elsewhere.

    SAM has a token for "no point here"; a slice gets it in place of each prompt of another slice. This adapter adds
    what the prompt says and how far away it lies. It gives zero at the start.

    Args:
        features: width of a prompt token.
        hidden: bottleneck width.
        frequencies: number of sine and cosine pairs that describe the distance.
    """

    __jit_unused_properties__ = ("trained",)

    def __init__(self, features: int, *, hidden: int = 64, frequencies: int = 8) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.down = nn.Linear(features + 2 * frequencies, hidden)
        self.activation = nn.ReLU()
        self.up = zero_linear(hidden, features)

    @property
    def trained(self) -> bool:
        """Whether it says anything."""
        return bool(self.up.weight.any()) or bool(self.up.bias.any())

    def forward(self, tokens: Tensor, distance: Tensor) -> Tensor:
        """Describe distant prompts.

        Args:
            tokens: embeddings that the prompts would have on their own slice (N, T, features).
            distance: of each prompt's slice from this one, in slices, signed (N, T).

        Returns:
            (N, T, features), zero where the distance is zero.
        """
        scale = torch.arange(self.frequencies, device=distance.device, dtype=torch.float32)
        # wavelengths from 4 slices to 512
        angles = distance.float().unsqueeze(-1) * (0.5 * math.pi * torch.exp2(-scale))
        described = torch.cat([tokens, torch.sin(angles).to(tokens.dtype), torch.cos(angles).to(tokens.dtype)], dim=-1)
        added = self.up(self.activation(self.down(described)))
        return torch.where(distance.unsqueeze(-1) == 0, torch.zeros_like(added), added)
