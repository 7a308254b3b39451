"""EfficientSAM's prompt encoder and mask decoder: what differs from SAM's in them."""

from __future__ import annotations

from functools import partial
from typing import Optional

import torch
from torch import Tensor, nn

from medsa_nets.layers import Adaptation, Bottlenecks
from medsa_nets.networks.mask_decoder import MaskDecoder
from medsa_nets.networks.prompt_encoder import PromptEncoder
from medsa_nets.networks.transformer import TwoWayTransformer


class EfficientSAMPromptEncoder(PromptEncoder):
    """Prompts to the embeddings that EfficientSAM's mask decoder reads. Frozen; parameter names are its own.

    Prompt sets have six tokens at least: it was trained with six places, of which those without a prompt hold a token
    of their own. It has no embedding for background clicks, which are their position alone, and none for earlier masks:
    these are left out (``click_feedback`` lets them reach the decoder).

    Source: arXiv 2312.00863 and its published code.
    """

    def make_embeddings(self, mask_in_chans: int) -> None:
        """Make the parameters beside the positional encoding."""
        self.places = 6
        self.nowhere = -0.5 / 1024  # x and y of a place without prompt: half a pixel outside of an image of 1024
        self.enlarged = 1.0  # what coordinates of points are multiplied by (medsa_nets.adaptations.install_prompts)
        self.invalid_points = nn.Embedding(1, self.embed_dim)
        self.point_embeddings = nn.Embedding(1, self.embed_dim)  # type: ignore[assignment]
        self.bbox_top_left_embeddings = nn.Embedding(1, self.embed_dim)
        self.bbox_bottom_right_embeddings = nn.Embedding(1, self.embed_dim)

    def nothing(self) -> Tensor:
        """Token of a prompt that is none: (1, embed_dim)."""
        weight = self.invalid_points.weight
        return weight + self.pe_layer(torch.full([1, 2], self.nowhere, device=weight.device)).to(weight.dtype)

    def corner_kinds(self) -> Tensor:
        """What tells the first corner of a box from the opposite one: (2, embed_dim)."""
        return torch.cat([self.bbox_top_left_embeddings.weight, self.bbox_bottom_right_embeddings.weight], dim=0)

    def no_mask(self) -> Tensor:
        """Dense embedding of the absence of an earlier mask, zero: (embed_dim,)."""
        return torch.zeros_like(self.invalid_points.weight[0])

    def embed_points(self, coords: Tensor, labels: Tensor, height: int, width: int) -> Tensor:
        """Embed points (N, P, 2) in (x, y) pixels with labels (N, P) in {1, 0, -1}: (N, P, embed_dim)."""
        size = torch.tensor([float(width), float(height)], device=coords.device)
        embedding = self.pe_layer((self.enlarged * coords.float() + 0.5) / size)
        kind = labels.unsqueeze(-1)
        embedding = embedding + (kind == 1) * self.point_embeddings.weight  # type: ignore[operator]
        return torch.where(kind == -1, self.nothing(), embedding)

    def embed_masks(self, masks: Optional[Tensor], count: int, embedding_size: tuple[int, int]) -> Tensor:
        """Zeros (N, embed_dim, h, w): earlier masks are left out; arguments as of the parent's."""
        return self.no_mask().reshape(1, -1, 1, 1).expand(count, -1, embedding_size[0], embedding_size[1])

    def join(self, points: Optional[Tensor], boxes: Optional[Tensor], count: int) -> Tensor:
        """Sparse embeddings of N prompt sets (N, tokens, embed_dim): points, boxes, places without a prompt.

        Args:
            points: (N, P, embed_dim), or none.
            boxes: (N, 2, embed_dim), or none.
            count: N.
        """
        nothing = self.nothing()
        sparse = torch.zeros(count, 0, self.embed_dim, device=nothing.device)
        if points is not None:
            sparse = torch.cat([sparse, points], dim=1)
        if boxes is not None:
            sparse = torch.cat([sparse, boxes], dim=1)
        if sparse.shape[1] < self.places:
            padding = nothing.unsqueeze(0).expand(count, self.places - sparse.shape[1], -1)
            sparse = torch.cat([sparse, padding], dim=1)
        return sparse


def efficient_sam_decoder(adaptation: Adaptation = Bottlenecks()) -> MaskDecoder:  # noqa: B008 - it is frozen
    """EfficientSAM's mask decoder: GELU, a norm over the whole map, prompt embeddings in the self-attention's values.

    Args:
        adaptation: makes the adapters.

    Source: arXiv 2312.00863 and its published code; parameter names equal segment-anything's.
    """
    transformer = TwoWayTransformer(adaptation=adaptation, activation=nn.GELU, embed_values=True)
    return MaskDecoder(transformer=transformer, activation=nn.GELU, norm=partial(nn.GroupNorm, 1))
