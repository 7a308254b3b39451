"""Medical SAM Adapter for volumes: slices through the frozen network, joined along depth by what trains."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medsa_nets.layers import DistantPrompt
from medsa_nets.networks.medsa import MedSA


class VolumeMedSA(MedSA):
    """Frozen SAM with adapters and a depth branch; one network for automatic and prompted segmentation of volumes.

    A volume is a stack of slices along its last axis. The encoder's space-depth blocks let slices see each other; in
    the decoder, slices that hold no click learn of those on other slices (:class:`~medsa_nets.layers.DistantPrompt`).
    Fresh, it gives what :class:`MedSA` gives for each slice by itself.

    Args:
        class_chunk: prompt sets (or classes) that the decoder answers at a time; 0 answers all at once. Fewer need
            less memory.
        checkpointing: whether training recomputes the decoder in the backward pass, for less memory and more time.
        settings: see :class:`MedSA`; the encoder is one with ``spatial_dims=3``.

    Source: arXiv 2304.12620, section "SD-Trans".
    """

    def __init__(
        self, *, class_chunk: int = 0, checkpointing: bool = False, train_norms: bool = False, **settings: Any
    ) -> None:
        super().__init__(train_norms=train_norms, **settings)
        if class_chunk < 0:
            raise ValueError(f"class_chunk must be 0 (all at once) or more, got {class_chunk}.")
        self.class_chunk = class_chunk
        self.near_clicks = 3  # of other slices that a slice sees
        self.checkpointing = checkpointing
        self.distant_prompt = DistantPrompt(self.prompt_encoder.embed_dim)
        self.freeze(train_norms)

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode volumes, or slabs of them, for any number of :meth:`decode` calls.

        Args:
            image: (B, C, H, W, D) with intensities in [0, 1], C of 1 (CT, MRI) or 3. H and W are multiples of the
                encoder's ``stride`` (and, for a ViT base, those that it was built for); D is any.

        Returns:
            Image embedding (B, 256, H / stride, W / stride, D).

        Raises:
            ValueError: when the shape is another.
        """
        if image.dim() != 5 or (image.shape[1] != 1 and image.shape[1] != 3):
            raise ValueError(f"image must have shape (B, 1 or 3, H, W, D), got {image.shape}.")
        if image.shape[2] % self.stride != 0 or image.shape[3] % self.stride != 0:
            raise ValueError(f"image height and width must be multiples of {self.stride}, got {image.shape}.")
        batch, depth = image.shape[0], image.shape[4]
        slices = image.permute(0, 4, 1, 2, 3).flatten(0, 1)
        normalised = (slices - self.pixel_mean) / self.pixel_std  # one channel becomes three
        embedding = self.image_encoder(normalised.contiguous(memory_format=torch.channels_last), depth)
        embedding = embedding.reshape(batch, depth, embedding.shape[1], embedding.shape[2], embedding.shape[3])
        return embedding.permute(0, 2, 3, 4, 1)

    def decode(
        self,
        image_embedding: Tensor,
        point_coords: Optional[Tensor] = None,
        point_labels: Optional[Tensor] = None,
        boxes: Optional[Tensor] = None,
        masks: Optional[Tensor] = None,
        classes: Optional[Tensor] = None,
    ) -> Tensor:
        """Segment by K prompt sets, or automatically (every class) where no prompt is given.

        Coordinates are voxel indices of the image tensor, in the order of its axes (H, W, D). They may lie outside a
        slab's depth: the slab then learns that, and how far away, something was clicked.

        Args:
            image_embedding: (B, 256, h, w, D) from :meth:`encode_image`.
            point_coords: (B, K, P, 3).
            point_labels: (B, K, P): 1 foreground, 0 background, -1 padding.
            boxes: (B, K, 6): first corner, opposite corner.
            masks: (B, K, 4 h, 4 w, D) logits of an earlier mask; with ``click_feedback``, all zero where there is none.
            classes: (K,) class ids whose embeddings are added; alone they give automatic segmentation of these classes.

        Returns:
            Mask logits (B, K, h * stride, w * stride, D), at the image's size.

        Raises:
            ValueError: when points come without labels, or shapes disagree.
        """
        sets = -1
        if point_coords is not None:
            if point_labels is None:
                raise ValueError("point_coords came without point_labels (1 foreground, 0 background, -1 padding).")
            if point_coords.dim() != 4 or point_coords.shape[3] != 3 or point_coords.shape[:3] != point_labels.shape:
                raise ValueError(
                    f"point_coords must be (B, K, P, 3) and point_labels (B, K, P), "
                    f"got {point_coords.shape} and {point_labels.shape}."
                )
            sets = point_coords.shape[1]
        if boxes is not None:
            if boxes.dim() != 3 or boxes.shape[2] != 6:
                raise ValueError(f"boxes must be (B, K, 6), got {boxes.shape}.")
            sets = boxes.shape[1]
        if masks is not None:
            if masks.dim() != 5:
                raise ValueError(f"masks must be (B, K, 4 h, 4 w, D), got {masks.shape}.")
            sets = masks.shape[1]
        if sets < 0 and self.classes_per_pass > 1:
            if torch.jit.is_scripting():
                return self.decode_volume_classes(image_embedding, classes)
            elif self.checkpointing and self.training and torch.is_grad_enabled():
                return checkpoint(self.decode_volume_classes, image_embedding, classes, use_reentrant=False)
            return self.decode_volume_classes(image_embedding, classes)
        if sets < 0 and classes is None:
            classes = torch.arange(self.num_classes, device=image_embedding.device)
        if classes is not None:
            if sets >= 0 and classes.shape[0] != sets:
                raise ValueError(f"classes must name one class for each of {sets} prompt sets, got {classes.shape}.")
            sets = classes.shape[0]
        chunk = sets if self.class_chunk == 0 else self.class_chunk
        answers: list[Tensor] = []
        for start in range(0, sets, chunk):
            stop = min(start + chunk, sets)
            coords = point_coords[:, start:stop] if point_coords is not None else None
            labels = point_labels[:, start:stop] if point_coords is not None and point_labels is not None else None
            corners = boxes[:, start:stop] if boxes is not None else None
            earlier = masks[:, start:stop] if masks is not None else None
            ids = classes[start:stop] if classes is not None else None
            if torch.jit.is_scripting():
                answers.append(self.decode_sets(image_embedding, coords, labels, corners, earlier, ids, stop - start))
            else:
                arguments = (image_embedding, coords, labels, corners, earlier, ids, stop - start)
                if self.checkpointing and self.training and torch.is_grad_enabled():
                    answers.append(checkpoint(self.decode_sets, *arguments, use_reentrant=False))
                else:
                    answers.append(self.decode_sets(*arguments))
        return torch.cat(answers, dim=1)

    def decode_sets(
        self,
        image_embedding: Tensor,
        point_coords: Optional[Tensor],
        point_labels: Optional[Tensor],
        boxes: Optional[Tensor],
        masks: Optional[Tensor],
        classes: Optional[Tensor],
        sets: int,
    ) -> Tensor:
        """Answer ``sets`` prompt sets at once; arguments and result as in :meth:`decode`, which checks them."""
        batch, features, height, width, depth = image_embedding.shape
        slices = image_embedding.permute(0, 4, 1, 2, 3).flatten(0, 1)
        size = (height * self.stride, width * self.stride)
        sparse = torch.zeros(batch * depth * sets, 0, features, device=slices.device)
        if point_coords is not None:
            assert point_labels is not None
            sparse = torch.cat([sparse, self.embed_points(point_coords, point_labels, size, depth)], dim=1)
            if boxes is None:
                # Points alone are followed by one padding point, as in segment-anything.
                padding = self.prompt_encoder.not_a_point_embed.weight.unsqueeze(0).expand(sparse.shape[0], -1, -1)
                sparse = torch.cat([sparse, padding], dim=1)
        if boxes is not None:
            sparse = torch.cat([sparse, self.embed_boxes(boxes, size, depth)], dim=1)
        earlier: Optional[Tensor] = None
        if masks is not None:
            earlier = masks.permute(0, 4, 1, 2, 3).flatten(0, 2).unsqueeze(1)
        _, dense = self.prompt_encoder(None, None, None, earlier, sparse.shape[0], size, (height, width))
        class_embedding: Optional[Tensor] = None
        if classes is not None:
            class_embedding = self.class_embeddings[classes].repeat(batch * depth, 1).unsqueeze(1)
        pe = self.prompt_encoder.dense_pe(height, width)
        if self.click_feedback is not None and (point_coords is not None or masks is not None):
            coords = point_coords.flatten(0, 1) if point_coords is not None else None
            labels = point_labels.flatten(0, 1) if point_coords is not None and point_labels is not None else None
            before = masks.flatten(0, 1) if masks is not None else None
            maps = self.click_feedback.maps(
                coords, labels, before, batch * sets, [4 * height, 4 * width, depth], [size[0], size[1], depth]
            )
            dense = self.with_feedback(dense, earlier, self.to_slices(maps, sets))
            logits, _, upscaled = self.mask_decoder.mark(slices, pe, sparse, dense, class_embedding)
            more = self.click_feedback.refine(
                maps, self.to_volumes(upscaled, sets, depth), self.to_volumes(logits, sets, depth)
            )
            logits = logits + self.to_slices(more, sets)
        else:
            logits, _ = self.mask_decoder(slices, pe, sparse, dense, class_embedding)
        if logits.shape[2] != size[0] or logits.shape[3] != size[1]:
            logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        return logits.reshape(batch, depth, sets, size[0], size[1]).permute(0, 2, 3, 4, 1)

    def to_slices(self, maps: Tensor, sets: int) -> Tensor:
        """(B * K, C, H, W, D) to the decoder's order of slices, (B * D * K, C, H, W)."""
        channels, height, width, depth = maps.shape[1], maps.shape[2], maps.shape[3], maps.shape[4]
        maps = maps.reshape(-1, sets, channels, height, width, depth).permute(0, 5, 1, 2, 3, 4)
        return maps.reshape(-1, channels, height, width)

    def to_volumes(self, slices: Tensor, sets: int, depth: int) -> Tensor:
        """The inverse of :meth:`to_slices`."""
        channels, height, width = slices.shape[1], slices.shape[2], slices.shape[3]
        slices = slices.reshape(-1, depth, sets, channels, height, width).permute(0, 2, 3, 4, 5, 1)
        return slices.reshape(-1, channels, height, width, depth)

    def decode_volume_classes(self, image_embedding: Tensor, classes: Optional[Tensor]) -> Tensor:
        """:meth:`~medsa_nets.networks.MedSA.decode_classes` for volumes: (B, 256, h, w, D) to (B, K, H, W, D)."""
        batch, depth = image_embedding.shape[0], image_embedding.shape[4]
        logits = self.decode_classes(image_embedding.permute(0, 4, 1, 2, 3).flatten(0, 1), classes)
        return logits.reshape(batch, depth, -1, logits.shape[2], logits.shape[3]).permute(0, 2, 3, 4, 1)

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
        nothing = self.prompt_encoder.not_a_point_embed.weight.unsqueeze(0)
        tokens = torch.where(distance.unsqueeze(-1) == 0, corners, nothing)
        return tokens + self.distant_prompt(corners, distance.expand(-1, 2))
