"""SAM's prompt encoder: points, boxes and masks to sparse and dense embeddings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor, nn

from medsa_nets.layers import LayerNorm2d


def count_prompt_sets(
    image_embedding: Tensor,
    point_coords: Optional[Tensor],
    point_labels: Optional[Tensor],
    boxes: Optional[Tensor],
    masks: Optional[Tensor],
) -> int:
    """Number of prompt sets, -1 where there is no prompt; arguments as of :meth:`~medsa_nets.networks.MedSA.decode`.

    Raises:
        ValueError: when points come without labels, or shapes disagree.
    """
    axes, sets = image_embedding.dim() - 2, -1
    if point_coords is not None:
        if point_labels is None:
            raise ValueError("point_coords came without point_labels (1 foreground, 0 background, -1 padding).")
        shape = point_coords.shape
        if point_coords.dim() != 4 or shape[3] != axes or shape[:3] != point_labels.shape:
            raise ValueError(
                f"point_coords must be (B, K, P, {axes}) and point_labels (B, K, P), "
                f"got {shape} and {point_labels.shape}."
            )
        sets = shape[1]
    if boxes is not None:
        if boxes.dim() != 3 or boxes.shape[2] != 2 * axes:
            raise ValueError(f"boxes must be (B, K, {2 * axes}), got {boxes.shape}.")
        sets = boxes.shape[1]
    if masks is not None:
        if masks.dim() != axes + 2:
            height, width = 4 * image_embedding.shape[2], 4 * image_embedding.shape[3]
            expected = f"{height}, {width}, D" if axes == 3 else f"{height}, {width}"
            raise ValueError(f"masks must be (B, K, {expected}), got {masks.shape}.")
        sets = masks.shape[1]
    return sets


class PositionEmbeddingRandom(nn.Module):
    """Positional encoding by random spatial frequencies (a frozen 2 x ``num_pos_feats`` matrix of the base)."""

    if TYPE_CHECKING:  # TorchScript cannot read a class's postponed annotations
        positional_encoding_gaussian_matrix: Tensor

    def __init__(self, num_pos_feats: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, num_pos_feats))

    def forward(self, coords: Tensor) -> Tensor:
        """Encode (x, y) in [0, 1], shape (..., 2), to (..., 2 * num_pos_feats); always in single precision."""
        # Coordinates lose their last pixels in bfloat16, so autocast has no say here.
        matrix = self.positional_encoding_gaussian_matrix.float()
        x = 2.0 * coords.float() - 1.0
        angles = 2.0 * math.pi * (x[..., 0:1] * matrix[0] + x[..., 1:2] * matrix[1])
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)


class PromptEncoder(nn.Module):
    """Prompts to the embeddings that the mask decoder reads. Frozen; parameter names equal segment-anything's.

    Args:
        embed_dim: width of an embedding.
        mask_in_chans: hidden channels of the mask branch.
        pad_boxes: whether the padding point that follows clicks follows boxes too, as in SAM 2.

    Source: arXiv 2304.02643, section "Prompt encoder".
    """

    def __init__(self, *, embed_dim: int = 256, mask_in_chans: int = 16, pad_boxes: bool = False) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.pad_boxes = pad_boxes
        self.pe_layer = PositionEmbeddingRandom(embed_dim // 2)
        self.make_embeddings(mask_in_chans)

    def make_embeddings(self, mask_in_chans: int) -> None:
        """Make the parameters beside the positional encoding."""
        embed_dim = self.embed_dim
        # background point, foreground point, first box corner, second box corner
        self.point_embeddings = nn.ModuleList([nn.Embedding(1, embed_dim) for _ in range(4)])
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_chans // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans // 4),
            nn.GELU(),
            nn.Conv2d(mask_in_chans // 4, mask_in_chans, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans),
            nn.GELU(),
            nn.Conv2d(mask_in_chans, embed_dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    def nothing(self) -> Tensor:
        """Token of a prompt that is none: (1, embed_dim)."""
        return self.not_a_point_embed.weight

    def corner_kinds(self) -> Tensor:
        """What tells the first corner of a box from the opposite one: (2, embed_dim)."""
        return torch.cat([self.point_embeddings[2].weight, self.point_embeddings[3].weight], dim=0)  # type: ignore[list-item]

    def no_mask(self) -> Tensor:
        """Dense embedding of the absence of an earlier mask: (embed_dim,)."""
        return self.no_mask_embed.weight[0]

    def dense_pe(self, height: int, width: int) -> Tensor:
        """Positional encoding of an embedding grid: (1, embed_dim, height, width)."""
        device = self.pe_layer.positional_encoding_gaussian_matrix.device
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        grid = torch.stack([x.unsqueeze(0).expand(height, width), y.unsqueeze(1).expand(height, width)], dim=-1)
        return self.pe_layer(grid).permute(2, 0, 1).unsqueeze(0)

    def embed_points(self, coords: Tensor, labels: Tensor, height: int, width: int) -> Tensor:
        """Embed points (N, P, 2) in (x, y) pixels with labels (N, P) in {1, 0, -1}: (N, P, embed_dim)."""
        size = torch.tensor([float(width), float(height)], device=coords.device)
        embedding = self.pe_layer((coords.float() + 0.5) / size)
        kind = labels.unsqueeze(-1)
        embedding = torch.where(kind == -1, torch.zeros_like(embedding), embedding)
        embedding = embedding + (kind == -1) * self.not_a_point_embed.weight
        embedding = embedding + (kind == 0) * self.point_embeddings[0].weight  # type: ignore[operator]
        return embedding + (kind == 1) * self.point_embeddings[1].weight  # type: ignore[operator]

    def embed_boxes(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Embed boxes (N, 4) as (x0, y0, x1, y1) pixels: (N, 2, embed_dim)."""
        size = torch.tensor([float(width), float(height)], device=boxes.device)
        corners = self.pe_layer((boxes.float().reshape(-1, 2, 2) + 0.5) / size)
        return corners + self.corner_kinds().unsqueeze(0)

    def embed_masks(self, masks: Optional[Tensor], count: int, embedding_size: tuple[int, int]) -> Tensor:
        """Embed logits of earlier masks (N, 1, 4 h, 4 w), or their absence: (N, embed_dim, h, w).

        Args:
            masks: of N prompt sets, or none.
            count: N.
            embedding_size: height h and width w of the image embedding.
        """
        if masks is not None:
            return self.mask_downscaling(masks)
        return self.no_mask().reshape(1, -1, 1, 1).expand(count, -1, embedding_size[0], embedding_size[1])

    def join(self, points: Optional[Tensor], boxes: Optional[Tensor], count: int) -> Tensor:
        """Sparse embeddings of N prompt sets: tokens of points, then of boxes (N, tokens, embed_dim).

        Args:
            points: (N, P, embed_dim), or none; without boxes, one padding point follows, as in segment-anything (with
                ``pad_boxes``, with boxes too).
            boxes: (N, 2, embed_dim), or none.
            count: N, for the case that there is neither.
        """
        nothing = self.nothing()
        sparse = torch.zeros(count, 0, self.embed_dim, device=nothing.device)
        if points is not None:
            sparse = torch.cat([sparse, points], dim=1)
        if (points is not None and boxes is None) or (boxes is not None and self.pad_boxes):
            sparse = torch.cat([sparse, nothing.unsqueeze(0).expand(count, -1, -1)], dim=1)
        return sparse if boxes is None else torch.cat([sparse, boxes], dim=1)

    def forward(
        self,
        point_coords: Optional[Tensor],
        point_labels: Optional[Tensor],
        boxes: Optional[Tensor],
        masks: Optional[Tensor],
        count: int,
        image_size: tuple[int, int],
        embedding_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Embed N prompt sets.

        Args:
            point_coords: (N, P, 2) in (x, y) pixels of the image, or none.
            point_labels: (N, P): 1 foreground, 0 background, -1 padding.
            boxes: (N, 4) as (x0, y0, x1, y1), or none.
            masks: (N, 1, 4 h, 4 w) logits of an earlier mask, or none.
            count: N, for the case that no prompt is given.
            image_size: height and width of the image in pixels.
            embedding_size: height h and width w of the image embedding.

        Returns:
            Sparse embeddings (N, tokens, embed_dim) and dense embeddings (N, embed_dim, h, w).
        """
        points: Optional[Tensor] = None
        if point_coords is not None:
            assert point_labels is not None
            points = self.embed_points(point_coords, point_labels, image_size[0], image_size[1])
        corners = self.embed_boxes(boxes, image_size[0], image_size[1]) if boxes is not None else None
        return self.join(points, corners, count), self.embed_masks(masks, count, embedding_size)
