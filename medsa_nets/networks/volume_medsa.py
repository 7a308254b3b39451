"""Medical SAM Adapter for volumes: slices through the frozen network, joined along depth by what trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medsa_nets.layers import DistantPrompt
from medsa_nets.networks.medsa import MedSA


class VolumeMedSA(MedSA):
    """Frozen SAM with adapters and a depth branch; one network for automatic and prompted segmentation of volumes.

    A volume is a stack of slices along its last axis. The encoder's space-depth blocks let slices see each other; in
    the decoder, slices that hold no click learn of those on other slices (:class:`~medsa_nets.layers.DistantPrompt`).
    Fresh, it gives what :class:`MedSA` gives for each slice by itself.

    Args:
        settings: see :class:`MedSA`; the encoder is one with ``spatial_dims=3``. Coordinates may lie outside a slab's
            depth: the slab then learns that, and how far away, something was clicked.

    Source: arXiv 2304.12620, section "SD-Trans".
    """

    def __init__(self, *, train_norms: bool = False, **settings: Any) -> None:
        super().__init__(train_norms=train_norms, **settings)
        self.spatial_dims = 3
        self.near_clicks = 3  # of other slices that a slice sees
        self.distant_prompt = DistantPrompt(self.prompt_encoder.embed_dim)
        self.freeze(train_norms)

    @property
    def base_channels(self) -> tuple[int, ...]:
        """Numbers of channels that a volume may have without a projection: one becomes three."""
        return (1, 3)

    def to_slices(self, images: Tensor, sets: int = 1) -> Tensor:
        """Volumes (B * K, C, H, W, D), K for each of B, in the decoder's order of slices: (B * D * K, C, H, W)."""
        channels, height, width, depth = images.shape[1], images.shape[2], images.shape[3], images.shape[4]
        images = images.reshape(-1, sets, channels, height, width, depth).permute(0, 5, 1, 2, 3, 4)
        return images.reshape(-1, channels, height, width)

    def to_images(self, slices: Tensor, depth: int, sets: int = 1) -> Tensor:
        """The inverse of :meth:`to_slices`."""
        channels, height, width = slices.shape[1], slices.shape[2], slices.shape[3]
        slices = slices.reshape(-1, depth, sets, channels, height, width).permute(0, 2, 3, 4, 5, 1)
        return slices.reshape(-1, channels, height, width, depth)

    def embed_points(self, coords: Tensor, labels: Tensor, size: tuple[int, int], depth: int) -> Tensor:
        """Tokens of clicks on each slice: (B, K, P, 3) and (B, K, P) to (B * depth * K, at most P, features)."""
        steps = torch.arange(depth, device=coords.device).reshape(1, -1, 1, 1)
        distance = torch.where(labels == -1, 0.0, coords[..., 2].float().round()).unsqueeze(1) - steps
        distance = torch.where((labels == -1).unsqueeze(1), torch.zeros_like(distance), distance).flatten(0, 2)
        # SAM reads (x, y); indices are (row, column).
        plane = coords[..., :2].flip(-1).unsqueeze(1).expand(-1, depth, -1, -1, -1).flatten(0, 2)
        labels = labels.unsqueeze(1).expand(-1, depth, -1, -1).flatten(0, 2)
        # A slice sees its own clicks and the nearest of the others: training shows few at once.
        away = torch.where(labels == -1, torch.full_like(distance, float("inf")), distance.abs())
        own = int((away == 0).sum(dim=1).amax()) if away.shape[1] > 0 else 0
        if own + self.near_clicks < away.shape[1]:
            nearest = torch.argsort(away, dim=1, stable=True)[:, : own + self.near_clicks]
            distance, labels, away = distance.gather(1, nearest), labels.gather(1, nearest), away.gather(1, nearest)
            plane = plane.gather(1, nearest.unsqueeze(-1).expand(-1, -1, 2))
            surplus = torch.cumsum((away > 0).to(torch.int64), dim=1) > self.near_clicks
            labels = torch.where(surplus, -torch.ones_like(labels), labels)
            distance = torch.where(surplus, torch.zeros_like(distance), distance)
        here = torch.where(distance == 0, labels, -torch.ones_like(labels))
        tokens = self.prompt_encoder.embed_points(plane, here, size[0], size[1])
        elsewhere = self.prompt_encoder.embed_points(plane, labels, size[0], size[1])
        return tokens + self.distant_prompt(elsewhere, distance)

    def embed_boxes(self, boxes: Tensor, size: tuple[int, int], depth: int) -> Tensor:
        """Tokens of boxes on each slice: (B, K, 6) to (B * depth * K, 2, features)."""
        steps = torch.arange(depth, device=boxes.device).reshape(1, -1, 1)
        first, last = boxes[..., 2].float().round().unsqueeze(1), boxes[..., 5].float().round().unsqueeze(1)
        distance = (first - steps).clamp_min(0.0) + (last - steps).clamp_max(0.0)  # zero within the box
        distance = distance.flatten(0, 2).unsqueeze(1)
        plane = torch.stack([boxes[..., 1], boxes[..., 0], boxes[..., 4], boxes[..., 3]], dim=-1)
        plane = plane.unsqueeze(1).expand(-1, depth, -1, -1).flatten(0, 2)
        corners = self.prompt_encoder.embed_boxes(plane, size[0], size[1])
        nothing = self.prompt_encoder.nothing().unsqueeze(0)
        tokens = torch.where(distance.unsqueeze(-1) == 0, corners, nothing)
        return tokens + self.distant_prompt(corners, distance.expand(-1, 2))
