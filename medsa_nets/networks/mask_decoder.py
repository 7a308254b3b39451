"""SAM's mask decoder around the adapted two-way transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor, nn

from medsa_nets.layers import LayerNorm2d, Linear
from medsa_nets.networks.skips import unpack_skips
from medsa_nets.networks.transformer import TwoWayTransformer


class MLP(nn.Module):
    """Three-layer perceptron."""

    def __init__(self, features: int, out_features: int, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.activation = activation()
        self.layers = nn.ModuleList(
            [Linear(features, features), Linear(features, features), Linear(features, out_features)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., features) to (..., out_features)."""
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < 2:
                x = self.activation(x)
        return x


class MaskDecoder(nn.Module):
    """Image embedding and prompt embeddings to mask logits and their estimated IoU.

    Args:
        transformer: the adapted two-way transformer.
        features: width of an embedding.
        num_multimask_outputs: masks that SAM offers for an ambiguous prompt, beside the single one. Their tokens take
            part in the transformer; the masks themselves are not computed.
        activation: makes the activation of the perceptrons.
        norm: makes the norm between the two steps of upscaling, from a number of channels.

    Source: arXiv 2304.02643, section "Mask decoder"; parameter names equal segment-anything's.
    """

    def __init__(
        self,
        *,
        transformer: TwoWayTransformer,
        features: int = 256,
        num_multimask_outputs: int = 3,
        activation: Callable[[], nn.Module] = nn.ReLU,
        norm: Callable[[int], nn.Module] = LayerNorm2d,
    ) -> None:
        super().__init__()
        self.features = features
        self.num_mask_tokens = num_multimask_outputs + 1
        self.transformer = transformer
        self.iou_token = nn.Embedding(1, features)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, features)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(features, features // 4, kernel_size=2, stride=2),
            norm(features // 4),
            nn.GELU(),
            nn.ConvTranspose2d(features // 4, features // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            [MLP(features, features // 8, activation) for _ in range(self.num_mask_tokens)]
        )
        self.iou_prediction_head = MLP(features, self.num_mask_tokens, activation)

    def forward(
        self,
        image_embedding: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        class_embedding: Optional[Tensor] = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode N = B * K prompt sets, K for each image: mask logits and their estimated IoU.

        Args:
            image_embedding: (B, C, h, w).
            image_pe: (1, C, h, w).
            sparse: sparse prompt embeddings (N, tokens, C).
            dense: dense prompt embeddings (N, C, h, w).
            class_embedding: (N, G, C) or none.

        Returns:
            Mask logits (N, G (1 without classes), 4 h, 4 w) and the single mask's estimated IoU (N, 1).
        """
        masks, iou, _ = self.mark(image_embedding, image_pe, sparse, dense, class_embedding)
        return masks, iou

    def mark(
        self,
        image_embedding: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        class_embedding: Optional[Tensor] = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode N = B * K prompt sets, K for each image, and say from what their masks were read.

        Args:
            image_embedding: (B, C, h, w), with what :meth:`upscale` needs of the encoder behind, where it does.
            image_pe: (1, C, h, w).
            sparse: sparse prompt embeddings (N, tokens, C).
            dense: dense prompt embeddings (N, C, h, w).
            class_embedding: (N, G, C), added to the token of the single mask, or none. G classes give G such tokens
                and G masks, in one pass of the transformer.

        Returns:
            Mask logits (N, G (1 without classes), 4 h, 4 w), the single mask's estimated IoU (N, 1), and the upscaled
            image embedding (N, C / 8, 4 h, 4 w), whose product with a token's weights is its mask.
        """
        count, classes = sparse.shape[0], 1
        mask_tokens = self.mask_tokens.weight.unsqueeze(0).expand(count, -1, -1)
        if class_embedding is not None:
            classes = class_embedding.shape[1]
            mask_tokens = torch.cat([mask_tokens[:, :1] + class_embedding, mask_tokens[:, 1:]], dim=1)
        iou_token = self.iou_token.weight.unsqueeze(0).expand(count, -1, -1)
        tokens = torch.cat([iou_token, mask_tokens, self.with_own_tokens(sparse)], dim=1)

        height, width = image_embedding.shape[2], image_embedding.shape[3]
        # Tokens last, contiguous: the additions below them are a third of the decoder's time otherwise.
        image_tokens = image_embedding[:, : self.features].flatten(2).transpose(1, 2).contiguous()
        image_tokens = torch.repeat_interleave(image_tokens, count // image_tokens.shape[0], dim=0)
        image_tokens = image_tokens + dense.flatten(2).transpose(1, 2)
        tokens, image_tokens = self.transformer(image_tokens, image_pe.flatten(2).transpose(1, 2).contiguous(), tokens)
        image_map = image_tokens.reshape(count, height, width, -1).permute(0, 3, 1, 2)
        upscaled = self.upscale(image_map, image_embedding)
        iou = self.rate(tokens[:, 0])

        weights = self.output_hypernetworks_mlps[0](tokens[:, 1 : 1 + classes])
        # Channels last, as the convolutions left them: no copy, here or in the backward pass.
        masks = upscaled.permute(0, 2, 3, 1).flatten(1, 2) @ weights.transpose(1, 2)
        masks = masks.transpose(1, 2).reshape(count, -1, upscaled.shape[2], upscaled.shape[3])
        return masks, iou[:, :1], upscaled

    def with_own_tokens(self, sparse: Tensor) -> Tensor:
        """Prompt tokens (N, tokens, C), with those of the decoder that nothing is read from here: none."""
        return sparse

    def upscale(self, image_map: Tensor, image_embedding: Tensor) -> Tensor:
        """What the transformer made of the image (N, C, h, w) at the resolution of masks: (N, C / 8, 4 h, 4 w)."""
        return self.output_upscaling(image_map)

    def rate(self, token: Tensor) -> Tensor:
        """Estimated IoU of each mask (N, masks), from the transformer's token for it (N, C)."""
        return self.iou_prediction_head(token)


class SAM2MaskDecoder(MaskDecoder):
    """SAM 2's mask decoder as it answers on single images.

    It differs from SAM's in three things. Two finer maps of the encoder are added as the image is upscaled; they come
    with the embedding (:mod:`~medsa_nets.networks.skips`). A token of its own says whether the object is in the image:
    it takes part in the transformer, and its score, which SAM 2 reads in videos, is not computed. And the estimated IoU
    is the sigmoid of what the head gives.

    SAM 2's predictor can replace a single mask whose edge is not stable by the best of its three masks for ambiguous
    prompts. This decoder never does: adapters train the single mask's token, and an answer by the others would not know
    of them.

    Source: arXiv 2408.00714, section 4 and appendix; parameter names equal SAM 2's, as :mod:`medsa_nets.weights` reads
    them.
    """

    def __init__(self, *, transformer: TwoWayTransformer, features: int = 256, num_multimask_outputs: int = 3) -> None:
        super().__init__(transformer=transformer, features=features, num_multimask_outputs=num_multimask_outputs)
        self.obj_score_token = nn.Embedding(1, features)
        self.pred_obj_score_head = MLP(features, 1)

    def with_own_tokens(self, sparse: Tensor) -> Tensor:
        """Prompt tokens (N, tokens, C), behind the token of the object's presence."""
        own = self.obj_score_token.weight.unsqueeze(0).expand(sparse.shape[0], -1, -1)
        return torch.cat([own, sparse], dim=1)

    def upscale(self, image_map: Tensor, image_embedding: Tensor) -> Tensor:
        """What the transformer made of the image (N, C, h, w), with finer maps added: (N, C / 8, 4 h, 4 w)."""
        layers = self.output_upscaling
        middle, wide = unpack_skips(image_embedding)
        x = layers[2](layers[1](_add_to_sets(layers[0](image_map), middle)))
        return layers[4](_add_to_sets(layers[3](x), wide))

    def rate(self, token: Tensor) -> Tensor:
        """Estimated IoU of each mask (N, masks), from the transformer's token for it (N, C)."""
        return torch.sigmoid(self.iou_prediction_head(token))


def _add_to_sets(x: Tensor, image: Tensor) -> Tensor:
    """Add a map of each image (B, C, h, w) to those of its K prompt sets (B * K, C, h, w)."""
    return (x.unflatten(0, [image.shape[0], -1]) + image.unsqueeze(1)).flatten(0, 1)
