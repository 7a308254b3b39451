"""Medical SAM Adapter: a frozen Segment Anything model and its adapters, joined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsa_nets.layers import ClickFeedback
from medsa_nets.networks.identity import Adapted
from medsa_nets.networks.mask_decoder import MaskDecoder
from medsa_nets.networks.prompt_encoder import PromptEncoder


class MedSA(Adapted):
    """Frozen SAM with adapters; one network for automatic and prompted segmentation of images.

    What its files hold, and which it takes, is said by :class:`~medsa_nets.networks.identity.Adapted`.

    Args:
        image_encoder: adapted encoder with attributes ``stride`` and ``out_channels``.
        prompt_encoder: SAM's prompt encoder.
        mask_decoder: adapted mask decoder.
        num_classes: number of classes of the automatic mode; each has a learned embedding, zero at the start.
        classes_per_pass: classes whose automatic masks one pass of the decoder gives, each by a token of its own. The
            tokens see each other, so that what a class gets depends on which ones share its pass: always those with
            neighbouring ids, whether all are asked for or one. With 1, a fresh network equals the frozen base.
        click_feedback: draws clicks and the mask before them for the decoder; none leaves them to SAM's tokens.
        pixel_mean: the base's pixel mean, for intensities in [0, 1].
        pixel_std: the base's pixel standard deviation, for intensities in [0, 1].
        train_norms: whether the layer norms of the adapted blocks train too.

    Source: arXiv 2304.12620, figure 2.
    """

    if TYPE_CHECKING:  # TorchScript cannot read a class's postponed annotations
        pixel_mean: Tensor
        pixel_std: Tensor

    def __init__(
        self,
        *,
        image_encoder: nn.Module,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        num_classes: int = 1,
        classes_per_pass: int = 1,
        click_feedback: ClickFeedback | None = None,
        pixel_mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0),
        train_norms: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, got {num_classes}.")
        if classes_per_pass < 1:
            raise ValueError(f"classes_per_pass must be 1 or more, got {classes_per_pass}.")
        self.num_classes = num_classes
        self.classes_per_pass = classes_per_pass
        self.stride: int = image_encoder.stride  # type: ignore[assignment]
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.click_feedback = click_feedback
        self.class_embeddings = nn.Parameter(torch.zeros(num_classes, prompt_encoder.embed_dim))
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).reshape(1, 3, 1, 1), persistent=False)
        self.freeze(train_norms)

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode images for any number of :meth:`decode` calls.

        Args:
            image: (B, 3, H, W) with intensities in [0, 1]; the base's own normalisation is applied here. H and W are
                multiples of the encoder's ``stride`` (and, for a ViT base, those that it was built for).

        Returns:
            Image embedding (B, 256, H / stride, W / stride).

        Raises:
            ValueError: when the shape is another.
        """
        if image.dim() != 4 or image.shape[1] != 3:
            raise ValueError(f"image must have shape (B, 3, H, W), got {image.shape}.")
        if image.shape[2] % self.stride != 0 or image.shape[3] % self.stride != 0:
            raise ValueError(f"image height and width must be multiples of {self.stride}, got {image.shape}.")
        normalised = (image - self.pixel_mean) / self.pixel_std
        return self.image_encoder(normalised.contiguous(memory_format=torch.channels_last))

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

        Coordinates are voxel indices of the image tensor: (0, 0) is the centre of its first pixel, the first
        coordinate runs along H, the second along W.

        Args:
            image_embedding: (B, 256, h, w) from :meth:`encode_image`.
            point_coords: (B, K, P, 2).
            point_labels: (B, K, P): 1 foreground, 0 background, -1 padding.
            boxes: (B, K, 4): first corner, opposite corner.
            masks: (B, K, 4 h, 4 w) logits of an earlier mask; with ``click_feedback``, all zero where there is none.
            classes: (K,) class ids whose embeddings are added; alone they give automatic segmentation of these classes.

        Returns:
            Mask logits (B, K, h * stride, w * stride), at the image's size.

        Raises:
            ValueError: when points come without labels, or shapes disagree.
        """
        batch, height, width = image_embedding.shape[0], image_embedding.shape[2], image_embedding.shape[3]
        sets = -1
        coords, labels, corners, earlier = point_coords, point_labels, boxes, masks
        if coords is not None:
            if labels is None:
                raise ValueError("point_coords came without point_labels (1 foreground, 0 background, -1 padding).")
            if coords.dim() != 4 or coords.shape[3] != 2 or coords.shape[:3] != labels.shape:
                raise ValueError(
                    f"point_coords must be (B, K, P, 2) and point_labels (B, K, P), "
                    f"got {coords.shape} and {labels.shape}."
                )
            sets = coords.shape[1]
            # SAM reads (x, y); indices are (row, column).
            coords, labels = coords.flatten(0, 1).flip(-1), labels.flatten(0, 1)
        if corners is not None:
            if corners.dim() != 3 or corners.shape[2] != 4:
                raise ValueError(f"boxes must be (B, K, 4), got {corners.shape}.")
            sets = corners.shape[1]
            corners = corners.reshape(-1, 2, 2).flip(-1).reshape(-1, 4)
        if earlier is not None:
            if earlier.dim() != 4:
                raise ValueError(f"masks must be (B, K, {4 * height}, {4 * width}), got {earlier.shape}.")
            sets = earlier.shape[1]
            earlier = earlier.flatten(0, 1).unsqueeze(1)
        if sets < 0 and self.classes_per_pass > 1:
            return self.decode_classes(image_embedding, classes)
        if sets < 0 and classes is None:
            classes = torch.arange(self.num_classes, device=image_embedding.device)
        class_embedding: Optional[Tensor] = None
        if classes is not None:
            if sets >= 0 and classes.shape[0] != sets:
                raise ValueError(f"classes must name one class for each of {sets} prompt sets, got {classes.shape}.")
            sets = classes.shape[0]
            class_embedding = self.class_embeddings[classes].repeat(batch, 1).unsqueeze(1)
        size = (height * self.stride, width * self.stride)
        sparse, dense = self.prompt_encoder(coords, labels, corners, earlier, batch * sets, size, (height, width))
        pe = self.prompt_encoder.dense_pe(height, width)
        if self.click_feedback is not None and (coords is not None or earlier is not None):
            places = coords.flip(-1) if coords is not None else None
            before = earlier[:, 0] if earlier is not None else None
            maps = self.click_feedback.maps(
                places, labels, before, batch * sets, [4 * height, 4 * width], [size[0], size[1]]
            )
            dense = self.with_feedback(dense, earlier, maps)
            logits, _, upscaled = self.mask_decoder.mark(image_embedding, pe, sparse, dense, class_embedding)
            logits = logits + self.click_feedback.refine(maps, upscaled, logits)
        else:
            logits, _ = self.mask_decoder(image_embedding, pe, sparse, dense, class_embedding)
        if logits.shape[2] != size[0] or logits.shape[3] != size[1]:
            logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        return logits.reshape(batch, sets, size[0], size[1])

    def with_feedback(self, dense: Tensor, earlier: Optional[Tensor], maps: Tensor) -> Tensor:
        """Dense prompt embeddings (N, 256, h, w) with what ``click_feedback`` adds, of slices.

        Args:
            dense: SAM's own.
            earlier: logits of an earlier mask (N, 1, 4 h, 4 w), all zero where a set has none; or none.
            maps: (N, channels, 4 h, 4 w).
        """
        assert self.click_feedback is not None
        if earlier is not None:
            known = (earlier.flatten(1) != 0).any(1).reshape(-1, 1, 1, 1)
            dense = torch.where(known, dense, self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1))
        return dense + self.click_feedback.embed(maps)

    def decode_classes(self, image_embedding: Tensor, classes: Optional[Tensor] = None) -> Tensor:
        """Segment slices automatically, ``classes_per_pass`` classes in each pass of the decoder.

        Args:
            image_embedding: (B, 256, h, w).
            classes: (K,) class ids; none takes all.

        Returns:
            Mask logits (B, K, h * stride, w * stride).
        """
        batch, height, width = image_embedding.shape[0], image_embedding.shape[2], image_embedding.shape[3]
        size = (height * self.stride, width * self.stride)
        sparse, dense = self.prompt_encoder(None, None, None, None, batch, size, (height, width))
        pe = self.prompt_encoder.dense_pe(height, width)
        answers: list[Tensor] = []
        places: list[Tensor] = []  # of each answer among the classes that are asked for
        for first in range(0, self.num_classes, self.classes_per_pass):
            last = min(first + self.classes_per_pass, self.num_classes)
            if classes is not None:
                asked = torch.nonzero((classes >= first) & (classes < last))[:, 0]
                if asked.shape[0] == 0:
                    continue
                places.append(asked)
            class_embedding = self.class_embeddings[first:last].unsqueeze(0).expand(batch, -1, -1)
            logits, _ = self.mask_decoder(image_embedding, pe, sparse, dense, class_embedding)
            if classes is not None:
                logits = logits[:, classes[places[-1]] - first]
            answers.append(logits)
        logits = torch.cat(answers, dim=1)
        if classes is not None:
            logits = logits[:, torch.argsort(torch.cat(places))]
        if logits.shape[2] != size[0] or logits.shape[3] != size[1]:
            logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        return logits

    def forward(
        self,
        image: Tensor,
        point_coords: Optional[Tensor] = None,
        point_labels: Optional[Tensor] = None,
        boxes: Optional[Tensor] = None,
        masks: Optional[Tensor] = None,
        classes: Optional[Tensor] = None,
    ) -> Tensor:
        """Encode ``image`` (B, 3, H, W) and :meth:`decode` it: mask logits (B, K, H, W)."""
        return self.decode(self.encode_image(image), point_coords, point_labels, boxes, masks, classes)
