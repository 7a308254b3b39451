"""Prompts drawn from masks: clicks, boxes and corrections, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from medsa_nets.prompts.value import Prompts

PROTOCOLS = ("none", "point", "points3", "box50", "box75", "box")
VOLUME_PROTOCOLS = ("none", "point", "point_per_slice", "points3", "box50", "box75", "box")


def random_points(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` voxels of a mask, uniformly and with replacement.

    Args:
        mask: boolean (spatial…), with at least one true voxel.
        count: number of points.
        generator: source of randomness, on the CPU.

    Returns:
        Voxel indices (count, dims), float32.
    """
    voxels = mask.nonzero()
    chosen = torch.randint(len(voxels), (count,), generator=generator)
    return voxels[chosen.to(voxels.device)].float()


def bounding_box(mask: Tensor) -> Tensor | None:
    """Exact box of a boolean mask (spatial…): first and last voxel index on each axis (2 * dims), or none if empty."""
    voxels = mask.nonzero()
    if len(voxels) == 0:
        return None
    return torch.cat([voxels.amin(0), voxels.amax(0)]).float()


def jitter_box(box: Tensor, shape: tuple[int, ...], jitter: float, generator: torch.Generator) -> Tensor:
    """Move each side of a box at random by up to ``jitter`` of the box's extent, within the image.

    Args:
        box: (2 * dims).
        shape: the image's spatial shape.
        jitter: largest move of a side as a share of the box's extent on that axis.
        generator: source of randomness.

    Returns:
        Box (2 * dims), first corner not after the second.
    """
    dims = len(shape)
    extent = (box[dims:] - box[:dims] + 1.0).repeat(2)
    moved = box + (2.0 * torch.rand(2 * dims, generator=generator).to(box.device) - 1.0) * jitter * extent
    return _ordered_inside(moved, shape)


def overlapping_box(box: Tensor, shape: tuple[int, ...], overlap: float, generator: torch.Generator) -> Tensor:
    """A box whose overlap (intersection over union) with ``box`` is ``overlap``.

    The box is shifted in a random direction, by what gives the wanted overlap exactly; where 32 draws all leave the
    image, it is shrunk within the exact box instead. The paper evaluates boxes of 50 % and 75 % overlap
    (arXiv 2304.12620, section "Experiments").

    Args:
        box: exact box (2 * dims), corners inclusive.
        shape: the image's spatial shape.
        overlap: wanted intersection over union, in (0, 1].
        generator: source of randomness.

    Returns:
        Box (2 * dims); corners may lie between voxels.
    """
    dims = len(shape)
    extent = box[dims:] - box[:dims] + 1.0
    # Equal boxes that share a volume share s have IoU s / (2 - s).
    shared = 2.0 * overlap / (1.0 + overlap)
    last = torch.tensor(shape, dtype=torch.float32, device=box.device) - 1.0
    for _ in range(32):
        split = torch.rand(dims, generator=generator) + 1e-3
        kept = shared ** (split / split.sum())  # share of each axis that stays covered
        sign = torch.where(torch.rand(dims, generator=generator) < 0.5, -1.0, 1.0)
        shift = (sign * (1.0 - kept)).to(box.device) * extent
        if bool(((box[:dims] + shift >= 0) & (box[dims:] + shift <= last)).all()):
            return box + shift.repeat(2)
    thick = extent > 1.0  # an axis of one voxel can't be shrunk
    margin = thick * extent * (1.0 - overlap ** (1.0 / max(int(thick.sum()), 1))) / 2.0
    return torch.cat([box[:dims] + margin, box[dims:] - margin])


def _ordered_inside(box: Tensor, shape: tuple[int, ...]) -> Tensor:
    dims = len(shape)
    last = (torch.tensor(shape, dtype=torch.float32, device=box.device) - 1.0).repeat(2)
    box = torch.minimum(box.clamp_min(0.0), last)
    return torch.cat([torch.minimum(box[:dims], box[dims:]), torch.maximum(box[:dims], box[dims:])])


def error_point(prediction: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, int] | None:
    """A click that corrects a mask: a random voxel of the error, and the label that it should have had.

    Args:
        prediction: boolean (spatial…).
        target: boolean (spatial…).
        generator: source of randomness.

    Returns:
        Voxel index (dims) and label (1 missed foreground, 0 false foreground), or none where nothing is wrong.
    """
    wrong = prediction != target
    if not bool(wrong.any()):
        return None
    point = random_points(wrong, 1, generator)[0]
    return point, int(target[tuple(point.long())])


def protocol_prompts(mask: Tensor, protocol: str, generator: torch.Generator) -> Prompts:
    """The prompts of an evaluation protocol for one mask, K = 1.

    ``none``: none. ``point``: 1 random point of the mask. ``points3``: 3 of them. ``box``: the exact box.
    ``box75``, ``box50``: boxes of 75 % and 50 % overlap with it. An empty mask can't be pointed at and gives none.

    Args:
        mask: boolean (spatial…).
        protocol: one of :data:`PROTOCOLS`.
        generator: source of randomness.

    Returns:
        P points or a box, or nothing.

    Raises:
        ValueError: when the protocol is unknown.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"prompt must be one of {', '.join(PROTOCOLS)}; got {protocol!r}.")
    box = None if protocol == "none" else bounding_box(mask)
    if box is None:
        return Prompts()
    if protocol.startswith("point"):
        count = 3 if protocol == "points3" else 1
        return Prompts(points=random_points(mask, count, generator)[None], labels=torch.ones(1, count))
    if protocol != "box":
        box = overlapping_box(box, tuple(mask.shape), int(protocol.removeprefix("box")) / 100.0, generator)
    return Prompts(boxes=box[None])


def class_masks(label: Tensor, classes: Tensor) -> Tensor:
    """Masks (B, K, spatial…) of classes (K,), from a label (B, 1, spatial…) of 0 (background) and 1 + class id."""
    wanted = (classes + 1).reshape(1, -1, *[1] * (label.dim() - 2)).to(label.device)
    return label == wanted


def class_protocol_prompts(label: Tensor, num_classes: int, protocol: str, generator: torch.Generator) -> Prompts:
    """The prompts of an evaluation protocol for every class that a labelled volume holds.

    As :func:`protocol_prompts` for each class. ``point`` is one click per class and *volume*; ``point_per_slice`` is
    one per class and slice along the last axis, as the paper and most publications count (arXiv 2304.12620).

    Args:
        label: (spatial…) of 0 (background) and 1 + class id.
        num_classes: number of classes.
        protocol: one of :data:`VOLUME_PROTOCOLS`.
        generator: source of randomness.

    Returns:
        Points or a box for each of the K classes in the volume. Nothing where there is none of them, or with ``none``.

    Raises:
        ValueError: when the protocol is unknown.
    """
    if protocol not in VOLUME_PROTOCOLS:
        raise ValueError(f"prompt must be one of {', '.join(VOLUME_PROTOCOLS)}; got {protocol!r}.")
    present = [i for i in range(num_classes) if bool((label == i + 1).any())]
    if protocol == "none" or not present:
        return Prompts()
    drawn = []
    for i in present:
        mask = label == i + 1
        if protocol == "point_per_slice":
            points = []
            for z in mask.any(0).any(0).nonzero().flatten().tolist():
                point = random_points(mask[..., z], 1, generator)[0]
                points.append(torch.cat([point, point.new_tensor([float(z)])]))
            drawn.append(Prompts(points=torch.stack(points)[None], labels=torch.ones(1, len(points))))
        else:
            drawn.append(protocol_prompts(mask, protocol, generator))
    return replace(Prompts.join(drawn), classes=torch.tensor(present))


class PromptSampler:
    """Draws the prompts of one training step: none, points or a box, in given proportions.

    Args:
        none: weight of steps without prompt (automatic mode).
        points: weight of steps with points.
        boxes: weight of steps with a jittered box.
        max_points: most points of a draw (1 to this many, the first positive, each other positive or negative).
        box_jitter: largest move of a box's side, as a share of the box's extent.
        correction: share of draws that are followed by clicks on the error of the mask that they gave.
        max_corrections: most of these clicks (1 to this many), each on the error that the ones before it left.

    Raises:
        ValueError: when the weights are negative or all zero, or ``max_points`` or ``max_corrections`` is below 1.
    """

    def __init__(
        self,
        *,
        none: float = 0.3,
        points: float = 0.4,
        boxes: float = 0.3,
        max_points: int = 3,
        box_jitter: float = 0.1,
        correction: float = 0.25,
        max_corrections: int = 1,
    ) -> None:
        weights = torch.tensor([none, points, boxes], dtype=torch.float64)
        if bool((weights < 0).any()) or float(weights.sum()) <= 0:
            raise ValueError(f"none, points and boxes must be 0 or more and not all 0, got {weights.tolist()}.")
        if max_points < 1:
            raise ValueError(f"max_points must be 1 or more, got {max_points}.")
        if max_corrections < 1:
            raise ValueError(f"max_corrections must be 1 or more, got {max_corrections}.")
        self.cumulative = (weights / weights.sum()).cumsum(0)
        self.max_points = max_points
        self.box_jitter = box_jitter
        self.correction = correction
        self.max_corrections = max_corrections

    def modes(self, draws: int, generator: torch.Generator) -> list[str]:
        """Kinds of ``draws`` prompts, evenly spread over the proportions (systematic sampling)."""
        positions = (torch.arange(draws) + torch.rand(1, generator=generator, dtype=torch.float64)) / draws
        chosen = torch.searchsorted(self.cumulative, positions, right=True).clamp_max(2)
        return [("none", "points", "boxes")[int(i)] for i in chosen]

    def corrections(self, generator: torch.Generator) -> int:
        """How many correcting clicks follow this draw."""
        if float(torch.rand(1, generator=generator)) >= self.correction:
            return 0
        return int(torch.randint(1, self.max_corrections + 1, (1,), generator=generator))

    def count(self, generator: torch.Generator) -> int:
        """How many points a draw of points has."""
        return int(torch.randint(1, self.max_points + 1, (1,), generator=generator))

    def draw(
        self, label: Tensor, mode: str, generator: torch.Generator | Sequence[torch.Generator], count: int = 0
    ) -> list[Prompts]:
        """Draw prompts for a batch.

        Args:
            label: (B, K, spatial…), foreground above 0.5: one mask for each prompt set.
            mode: ``none``, ``points`` or ``boxes``.
            generator: source of randomness, on the CPU, or one for each image.
            count: number of points; 0 draws it.

        Returns:
            The prompts of each image, K sets. An empty mask gets background points only, or a box of any place and
            size: the answer to both is an empty mask.
        """
        images, sets = label.shape[:2]
        masks = [mask > 0.5 for mask in label.flatten(0, 1)]
        sources = _for_each_mask(generator, images, sets)
        if mode == "points":
            count = count or self.count(sources[0])
            drawn = [self._points(mask, count, source) for mask, source in zip(masks, sources)]
        elif mode == "boxes":
            drawn = [Prompts(boxes=self._box(mask, source)[None]) for mask, source in zip(masks, sources)]
        else:
            return [Prompts()] * images
        return [Prompts.join(drawn[i * sets : (i + 1) * sets]) for i in range(images)]

    def _points(self, mask: Tensor, count: int, generator: torch.Generator) -> Prompts:
        positive = torch.rand(count, generator=generator) < 0.5
        positive[0] = True
        if not bool(mask.any()):
            positive[:] = False
        if bool(mask.all()):
            positive[:] = True
        inside, outside = int(positive.sum()), int((~positive).sum())
        coords = torch.zeros(count, mask.dim(), device=mask.device)
        if inside:
            coords[positive] = random_points(mask, inside, generator)
        if outside:
            coords[~positive] = random_points(~mask, outside, generator)
        return Prompts(points=coords[None], labels=positive.float().to(mask.device)[None])

    def _box(self, mask: Tensor, generator: torch.Generator) -> Tensor:
        shape = tuple(mask.shape)
        box = bounding_box(mask)
        if box is None:
            last = torch.tensor(shape, dtype=torch.float32) - 1.0
            return _ordered_inside(torch.rand(2 * len(shape), generator=generator) * last.repeat(2), shape).to(
                mask.device
            )
        return jitter_box(box, shape, self.box_jitter, generator)


def _for_each_mask(generator: torch.Generator | Sequence[torch.Generator], images: int, sets: int) -> list:
    """The source of randomness of each of ``images * sets`` masks."""
    own = [generator] * images if isinstance(generator, torch.Generator) else list(generator)
    return [source for source in own for _ in range(sets)]


def add_correction(
    prompts: Sequence[Prompts],
    prediction: Tensor,
    label: Tensor,
    generator: torch.Generator | Sequence[torch.Generator],
) -> list[Prompts]:
    """Add one click on the error of each image's masks to its prompts.

    Args:
        prompts: of each image, as :class:`PromptSampler` draws them.
        prediction: (B, K, spatial…) boolean masks that these prompts gave.
        label: (B, K, spatial…), foreground above 0.5.
        generator: source of randomness, or one for each image.

    Returns:
        Prompts with one point more in each set; a padding point where a mask has no error.
    """
    clicks = []
    sources = _for_each_mask(generator, *label.shape[:2])
    for mask, target, source in zip(prediction.flatten(0, 1), label.flatten(0, 1) > 0.5, sources):
        click = error_point(mask, target, source)
        clicks.append((torch.zeros(target.dim(), device=label.device), -1) if click is None else click)
    shape = (*label.shape[:2], 1)
    points = torch.stack([point for point, _ in clicks]).unflatten(0, shape)
    labels = torch.tensor([float(kind) for _, kind in clicks], device=label.device).unflatten(0, shape)
    return [one.with_points(*click) for one, *click in zip(prompts, points, labels)]
