"""Medical SAM Adapter: a frozen Segment Anything model and its adapters, joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medsa_nets.layers import ChannelProjection, ClickFeedback
from medsa_nets.networks.identity import Adapted
from medsa_nets.networks.mask_decoder import MaskDecoder
from medsa_nets.networks.prompt_encoder import PromptEncoder, count_prompt_sets


def _some(prompts: Optional[Tensor], start: int, stop: int) -> Optional[Tensor]:
    """Some of the K sets of a kind of prompt (B, K, …)."""
    return prompts[:, start:stop] if prompts is not None else None


def _enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (N, K, 4 h, 4 w) at the image's size."""
    if logits.shape[2] == size[0] and logits.shape[3] == size[1]:
        return logits
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


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
        in_channels: channels of an image. None takes what the base takes as it is: 3, of volumes also 1, which becomes
            three; so do these numbers. Any other one has a :class:`~medsa_nets.layers.ChannelProjection` before the
            base, which trains with the adapter.
        pixel_mean: the base's pixel mean, for intensities in [0, 1].
        pixel_std: the base's pixel standard deviation, for intensities in [0, 1].
        train_norms: whether the layer norms of the adapted blocks train too.
        class_chunk: prompt sets (or classes) that the decoder answers at a time; 0 answers all at once. Fewer need
            less memory.
        checkpointing: whether training recomputes the decoder in the backward pass, for less memory and more time.

    Raises:
        ValueError: when ``num_classes``, ``classes_per_pass`` or ``class_chunk`` is out of range.

    Source: arXiv 2304.12620, figure 2.
    """

    __jit_unused_properties__: tuple[str, ...] = (*Adapted.__jit_unused_properties__, "base_channels")
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
        in_channels: int | None = None,
        pixel_mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0),
        train_norms: bool = False,
        class_chunk: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, got {num_classes}.")
        if classes_per_pass < 1:
            raise ValueError(f"classes_per_pass must be 1 or more, got {classes_per_pass}.")
        if class_chunk < 0:
            raise ValueError(f"class_chunk must be 0 (all at once) or more, got {class_chunk}.")
        self.spatial_dims = 2
        self.class_chunk = class_chunk
        self.checkpointing = checkpointing
        self.num_classes = num_classes
        self.classes_per_pass = classes_per_pass
        self.stride: int = image_encoder.stride  # type: ignore[assignment]
        self.embedding_channels: int = image_encoder.out_channels  # type: ignore[assignment]
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.click_feedback = click_feedback
        self.in_channels = in_channels or 0  # 0: what the base takes as it is
        own = in_channels is None or in_channels in self.base_channels
        self.channel_projection = None if own or in_channels is None else ChannelProjection(in_channels)
        self.class_embeddings = nn.Parameter(torch.zeros(num_classes, prompt_encoder.embed_dim))
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).reshape(1, 3, 1, 1), persistent=False)
        # what computes the image encoder in its place, as it is called (medsa_nets.backends); none: it does itself
        self.encoder_backend: Callable[[Tensor, int], Tensor] | None = None
        # what gives the embeddings that it has kept, and lets compute_embedding compute others (medsa_nets.embeddings)
        self.kept_embeddings: Callable[[Tensor], Tensor] | None = None
        self.freeze(train_norms)

    @property
    def base_channels(self) -> tuple[int, ...]:
        """Numbers of channels that an image may have without a projection."""
        return (3,)

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode images, or volumes or slabs of them, for any number of :meth:`decode` calls.

        Args:
            image: intensities in [0, 1]; the base's own normalisation is applied here. Images (B, 3, H, W), volumes
                (B, C, H, W, D) with C of 1 (CT, MRI) or 3; with ``in_channels``, of as many. H and W are multiples of
                the encoder's ``stride`` (and, for a ViT base, those that it was built for); D is any.

        Returns:
            Image embedding (B, C, H / stride, W / stride), of volumes with D behind. C is 256, with SAM 2's bases 1024
            (:mod:`~medsa_nets.networks.skips`).

        Raises:
            ValueError: when the shape is another.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript leaves out what this alone holds)
            if self.kept_embeddings is not None:
                return self.kept_embeddings(image)
        return self.compute_embedding(image)

    def compute_embedding(self, image: Tensor) -> Tensor:
        """:meth:`encode_image`, computed whether or not it was kept."""
        if self.channel_projection is not None:
            if image.dim() != self.spatial_dims + 2 or image.shape[1] != self.in_channels:
                axes = "H, W, D" if self.spatial_dims == 3 else "H, W"
                raise ValueError(f"image must have shape (B, {self.in_channels}, {axes}), got {image.shape}.")
        elif self.spatial_dims == 3:
            if image.dim() != 5 or (image.shape[1] != 1 and image.shape[1] != 3):
                raise ValueError(f"image must have shape (B, 1 or 3, H, W, D), got {image.shape}.")
        elif image.dim() != 4 or image.shape[1] != 3:
            raise ValueError(f"image must have shape (B, 3, H, W), got {image.shape}.")
        if image.shape[2] % self.stride != 0 or image.shape[3] % self.stride != 0:
            raise ValueError(f"image height and width must be multiples of {self.stride}, got {image.shape}.")
        slices = self.to_slices(image)
        depth = slices.shape[0] // image.shape[0]
        if self.channel_projection is not None:
            slices = self.channel_projection(slices)
        normalised = (slices - self.pixel_mean) / self.pixel_std  # one channel becomes three
        embedding = self.run_encoder(normalised.contiguous(memory_format=torch.channels_last), depth)
        return self.to_images(embedding, depth)

    def run_encoder(self, slices: Tensor, depth: int) -> Tensor:
        """Encode normalised slices (B * depth, 3, H, W), by the back end where there is one."""
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.encoder_backend is not None:
                return self.encoder_backend(slices, depth)
        return self.image_encoder(slices, depth)

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

        Coordinates are voxel indices of the image tensor, in the order of its axes: (0, 0) is the centre of its first
        pixel, the first coordinate runs along H, the second along W, and, in volumes, the third along D.

        Args:
            image_embedding: (B, C, h, w) from :meth:`encode_image`; of volumes (B, C, h, w, D).
            point_coords: (B, K, P, 2); of volumes (B, K, P, 3).
            point_labels: (B, K, P): 1 foreground, 0 background, -1 padding.
            boxes: first corner, opposite corner: (B, K, 4); of volumes (B, K, 6).
            masks: logits of an earlier mask (B, K, 4 h, 4 w), of volumes (B, K, 4 h, 4 w, D); with ``click_feedback``,
                all zero where there is none.
            classes: (K,) class ids whose embeddings are added; alone they give automatic segmentation of these classes.

        Returns:
            Mask logits (B, K, h * stride, w * stride), of volumes with D behind, at the image's size.

        Raises:
            ValueError: when points come without labels, or shapes disagree.
        """
        sets = count_prompt_sets(image_embedding, point_coords, point_labels, boxes, masks)
        if sets < 0 and self.classes_per_pass > 1:
            if torch.jit.is_scripting():
                return self.decode_classes(image_embedding, classes)
            else:  # TorchScript compiles what follows a return
                return self._compute(self.decode_classes, image_embedding, classes)
        if sets < 0 and classes is None:
            classes = torch.arange(self.num_classes, device=image_embedding.device)
        if classes is not None:
            if sets >= 0 and classes.shape[0] != sets:
                raise ValueError(f"classes must name one class for each of {sets} prompt sets, got {classes.shape}.")
            sets = classes.shape[0]
        chunk = max(1, sets) if self.class_chunk == 0 else self.class_chunk
        answers: list[Tensor] = []
        for start in range(0, max(1, sets), chunk):
            stop = min(start + chunk, sets)
            coords, labels = _some(point_coords, start, stop), _some(point_labels, start, stop)
            corners, earlier = _some(boxes, start, stop), _some(masks, start, stop)
            ids = classes[start:stop] if classes is not None else None
            if torch.jit.is_scripting():
                answers.append(self.decode_sets(image_embedding, coords, labels, corners, earlier, ids, stop - start))
            else:
                arguments = (image_embedding, coords, labels, corners, earlier, ids, stop - start)
                answers.append(self._compute(self.decode_sets, *arguments))
        return torch.cat(answers, dim=1)

    @torch.jit.unused
    def _compute(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Call a function; in training with checkpointing, keep its arguments only and compute it twice."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            answer: Tensor = checkpoint(function, *arguments, use_reentrant=False)
            return answer
        return function(*arguments)

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
        height, width = image_embedding.shape[2], image_embedding.shape[3]
        size = (height * self.stride, width * self.stride)
        slices = self.to_slices(image_embedding)
        depth, count = slices.shape[0] // image_embedding.shape[0], slices.shape[0] * sets
        sparse = self.embed_prompts(point_coords, point_labels, boxes, count, size, depth)
        earlier = self.to_slices(masks.flatten(0, 1).unsqueeze(1), sets) if masks is not None else None
        dense = self.prompt_encoder.embed_masks(earlier, count, (height, width))
        pe = self.prompt_encoder.dense_pe(height, width)
        class_embedding: Optional[Tensor] = None
        if classes is not None:
            class_embedding = self.class_embeddings[classes].repeat(slices.shape[0], 1).unsqueeze(1)
        if self.click_feedback is not None and (point_coords is not None or masks is not None):
            maps = self.draw_feedback(image_embedding, point_coords, point_labels, masks, sets)
            dense = self.with_feedback(dense, earlier, self.to_slices(maps, sets))
            logits, _, upscaled = self.mask_decoder.mark(slices, pe, sparse, dense, class_embedding)
            more = self.click_feedback.refine(
                maps, self.to_images(upscaled, depth, sets), self.to_images(logits, depth, sets)
            )
            logits = logits + self.to_slices(more, sets)
        else:
            logits, _ = self.mask_decoder(slices, pe, sparse, dense, class_embedding)
        return self.to_images(_enlarge(logits, size).reshape(-1, sets, size[0], size[1]), depth)

    def decode_classes(self, image_embedding: Tensor, classes: Optional[Tensor] = None) -> Tensor:
        """Segment automatically, ``classes_per_pass`` classes in each pass of the decoder.

        Arguments and result as in :meth:`decode`.
        """
        height, width = image_embedding.shape[2], image_embedding.shape[3]
        slices = self.to_slices(image_embedding)
        sparse = self.prompt_encoder.join(None, None, slices.shape[0])
        dense = self.prompt_encoder.embed_masks(None, slices.shape[0], (height, width))
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
            class_embedding = self.class_embeddings[first:last].unsqueeze(0).expand(slices.shape[0], -1, -1)
            logits, _ = self.mask_decoder(slices, pe, sparse, dense, class_embedding)
            if classes is not None:
                logits = logits[:, classes[places[-1]] - first]
            answers.append(logits)
        logits = torch.cat(answers, dim=1)
        if classes is not None:
            logits = logits[:, torch.argsort(torch.cat(places))]
        logits = _enlarge(logits, (height * self.stride, width * self.stride))
        return self.to_images(logits, slices.shape[0] // image_embedding.shape[0])

    def embed_prompts(
        self,
        point_coords: Optional[Tensor],
        point_labels: Optional[Tensor],
        boxes: Optional[Tensor],
        count: int,
        size: tuple[int, int],
        depth: int,
    ) -> Tensor:
        """Tokens of prompts on each slice: where another kind of prompt becomes tokens too.

        Args:
            point_coords: as of :meth:`decode`.
            point_labels: likewise.
            boxes: likewise.
            count: number of slices and sets, B * D * K.
            size: height and width of the image in pixels.
            depth: D, slices of an image.

        Returns:
            Sparse embeddings (B * D * K, tokens, features); no token where there is no prompt.
        """
        points: Optional[Tensor] = None
        if point_coords is not None:
            assert point_labels is not None
            points = self.embed_points(point_coords, point_labels, size, depth)
        corners = self.embed_boxes(boxes, size, depth) if boxes is not None else None
        return self.prompt_encoder.join(points, corners, count)

    def embed_points(self, coords: Tensor, labels: Tensor, size: tuple[int, int], depth: int) -> Tensor:
        """Tokens of clicks: (B, K, P, 2) and (B, K, P) to (B * K, P, features)."""
        # SAM reads (x, y); indices are (row, column).
        return self.prompt_encoder.embed_points(coords.flatten(0, 1).flip(-1), labels.flatten(0, 1), size[0], size[1])

    def embed_boxes(self, boxes: Tensor, size: tuple[int, int], depth: int) -> Tensor:
        """Tokens of boxes: (B, K, 4) to (B * K, 2, features)."""
        corners = boxes.reshape(-1, 2, 2).flip(-1).reshape(-1, 4)
        return self.prompt_encoder.embed_boxes(corners, size[0], size[1])

    def draw_feedback(
        self,
        image_embedding: Tensor,
        point_coords: Optional[Tensor],
        point_labels: Optional[Tensor],
        masks: Optional[Tensor],
        sets: int,
    ) -> Tensor:
        """Clicks and earlier masks as maps (B * K, channels, 4 h, 4 w), of volumes with D behind."""
        assert self.click_feedback is not None
        height, width, depth = image_embedding.shape[2], image_embedding.shape[3], list(image_embedding.shape[4:])
        return self.click_feedback.maps(
            point_coords.flatten(0, 1) if point_coords is not None else None,
            point_labels.flatten(0, 1) if point_labels is not None else None,
            masks.flatten(0, 1) if masks is not None else None,
            image_embedding.shape[0] * sets,
            [4 * height, 4 * width] + depth,  # noqa: RUF005 (TorchScript)
            [height * self.stride, width * self.stride] + depth,  # noqa: RUF005
        )

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
            dense = torch.where(known, dense, self.prompt_encoder.no_mask().reshape(1, -1, 1, 1))
        return dense + self.click_feedback.embed(maps)

    def to_slices(self, images: Tensor, sets: int = 1) -> Tensor:
        """Images (B * K, C, H, W), K for each of B, in the decoder's order of slices: as they are."""
        return images

    def to_images(self, slices: Tensor, depth: int, sets: int = 1) -> Tensor:
        """The inverse of :meth:`to_slices`; ``depth`` is 1."""
        return slices

    def forward(
        self,
        image: Tensor,
        point_coords: Optional[Tensor] = None,
        point_labels: Optional[Tensor] = None,
        boxes: Optional[Tensor] = None,
        masks: Optional[Tensor] = None,
        classes: Optional[Tensor] = None,
    ) -> Tensor:
        """:meth:`encode_image`, then :meth:`decode`: mask logits (B, K, H, W), of volumes with D behind."""
        return self.decode(self.encode_image(image), point_coords, point_labels, boxes, masks, classes)
