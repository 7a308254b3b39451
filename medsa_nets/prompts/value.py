"""The prompts of one image as a value: what is asked of the network, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Prompts:
    """The prompts of one image: K prompt sets, which give K masks, or none for automatic segmentation.

    Coordinates are voxel indices of the image's tensor, in the order of its axes; ``dims`` is 2 for images, 3 for
    volumes. A batch of images has a sequence of these; :meth:`batched` turns it into the network's arguments. Each
    method gives a new value and leaves this one as it is. It is false where nothing is asked for.

    Args:
        points: (K, P, dims), the points of each set in the order in which they were given.
        labels: (K, P), of the points: 1 foreground, 0 background, -1 padding, where a set has fewer points than others.
        boxes: (K, 2 * dims): first corner, opposite corner, both inclusive.
        masks: (K, 4 h, 4 w) or (K, 4 h, 4 w, D), logits of an earlier mask on the grid that
            :meth:`~medsa_nets.networks.MedSA.decode` takes them on.
        classes: (K,), the class id of each set; alone they ask for automatic segmentation of these classes.

    Raises:
        ValueError: when a tensor has another shape, points lack labels or labels points, or the tensors disagree about
            K or dims.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None
    classes: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in self._tensors().items():  # what is drawn from a label comes with its metadata
            if type(value) is not Tensor:
                object.__setattr__(self, name, value.as_subclass(Tensor))
        if (self.points is None) != (self.labels is None):
            given, absent = ("labels", "points") if self.points is None else ("points", "labels")
            raise ValueError(f"{given} came without {absent} (labels: 1 foreground, 0 background, -1 padding).")
        dims = {}
        if self.points is not None and self.labels is not None:
            fitting = self.points.dim() == 3 and self.points.shape[:2] == self.labels.shape
            _expect(fitting, "points must be (K, P, dims) and labels (K, P)", self.points, self.labels)
            dims["points"] = self.points.shape[2]
        if self.boxes is not None:
            _expect(self.boxes.dim() == 2 and self.boxes.shape[1] % 2 == 0, "boxes must be (K, 2 * dims)", self.boxes)
            dims["boxes"] = self.boxes.shape[1] // 2
        if self.masks is not None:
            _expect(self.masks.dim() in (3, 4), "masks must be (K, 4 h, 4 w) or (K, 4 h, 4 w, D)", self.masks)
            dims["masks"] = self.masks.dim() - 1
        if self.classes is not None:
            _expect(self.classes.dim() == 1, "classes must be (K,)", self.classes)
        for what, found in (("sets", self._counts()), ("dimensions", dims)):
            if len(set(found.values())) > 1:
                listed = ", ".join(f"{name} {count}" for name, count in found.items())
                raise ValueError(f"the prompts of an image must agree about their number of {what}, got {listed}.")
        if not set(dims.values()) <= {2, 3}:
            raise ValueError(f"prompts must have 2 or 3 dimensions, got {next(iter(dims.values()))}.")

    def _tensors(self) -> dict[str, Tensor]:
        """What is there, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _counts(self) -> dict[str, int]:
        """Number of sets by the name of each tensor; labels go with their points."""
        return {name: len(value) for name, value in self._tensors().items() if name != "labels"}

    def _moved(self, **changes: Tensor | None) -> Prompts:
        """With these tensors in place of those that are there."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    @property
    def kinds(self) -> frozenset[str]:
        """What there is: some of ``points``, ``boxes``, ``masks`` and ``classes``."""
        return frozenset(self._counts())

    @property
    def sets(self) -> int:
        """Number K of prompt sets; 0 where nothing is asked for."""
        return next(iter(self._counts().values()), 0)

    @property
    def automatic(self) -> bool:
        """Whether nothing shows a place, so that classes, all or those that are named, are segmented automatically."""
        return self.kinds <= {"classes"}

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def __eq__(self, other: object) -> bool:
        """Whether shapes and values are the same, on whatever device."""
        if not isinstance(other, Prompts):
            return NotImplemented
        mine, theirs = self._tensors(), other._tensors()
        return mine.keys() == theirs.keys() and all(_same(mine[name], theirs[name]) for name in mine)

    def __repr__(self) -> str:
        listed = []
        for name, value in self._tensors().items():
            listed.append(f"{name}={value.tolist() if value.numel() <= 24 else tuple(value.shape)}")
        return f"Prompts({', '.join(listed)})"

    def select(self, sets: Sequence[int] | None = None, *, classes: Sequence[int] | None = None) -> Prompts:
        """Some of the prompt sets, by their places or by their classes.

        Args:
            sets: places among the K sets.
            classes: class ids, in place of ``sets``; one set for each.

        Raises:
            ValueError: when there is no such set or class, or not exactly one of the two is given.
        """
        if (sets is None) == (classes is None):
            raise ValueError("select takes either sets or classes.")
        if sets is None:
            known = [] if self.classes is None else self.classes.tolist()
            absent = [index for index in classes or () if index not in known]
            if absent:
                raise ValueError(f"there are no prompts for class {absent[0]}; the classes are {known}.")
            sets = [known.index(index) for index in classes or ()]
        wrong = [index for index in sets if not 0 <= index < self.sets]
        if wrong:
            raise ValueError(f"there is no prompt set {wrong[0]}; there are {self.sets}, counted from 0.")
        return Prompts(**{name: value[list(sets)] for name, value in self._tensors().items()})

    @staticmethod
    def join(parts: Sequence[Prompts]) -> Prompts:
        """The prompt sets of several values, one after the other, with padding points where a set has fewer.

        Args:
            parts: of one kind of prompts each, the same for all.

        Raises:
            ValueError: when there are none, or their kinds differ.
        """
        if len({part.kinds for part in parts}) != 1:
            kinds = [" and ".join(sorted(part.kinds)) or "nothing" for part in parts]
            raise ValueError(f"only prompts of the same kinds can be joined, got {', '.join(kinds) or 'nothing'}.")
        tensors = [part._tensors() for part in _equally_long(parts)]
        return Prompts(**{name: torch.cat([part[name] for part in tensors]) for name in tensors[0]})

    def with_points(self, points: Tensor, labels: Tensor) -> Prompts:
        """With more points in each set, after those that are there.

        Args:
            points: (K, N, dims).
            labels: (K, N).

        Raises:
            ValueError: when K or dims are others.
        """
        more = replace(self, points=points, labels=labels)
        if self.points is None or self.labels is None:
            return more
        if points.shape[::2] != self.points.shape[::2]:
            own = tuple(self.points.shape)
            raise ValueError(f"points must be (K, N, dims) with K and dims as in {own}, got {tuple(points.shape)}.")
        return replace(self, points=torch.cat([self.points, points], 1), labels=torch.cat([self.labels, labels], 1))

    def until(self, count: int) -> Prompts:
        """With the first ``count`` points of each set, as it was when they had been given; 0 leaves no points."""
        if self.points is None or self.labels is None or count == 0:
            return replace(self, points=None, labels=None)
        return replace(self, points=self.points[:, :count], labels=self.labels[:, :count])

    def shift(self, first: int, depth: int | None = None) -> Prompts:
        """Prompts of a volume as a slab of it counts its slices.

        Points and boxes may lie outside of the slab.

        Args:
            first: the volume's slice that is the slab's first one.
            depth: slices of the slab; earlier masks are cut to them. None keeps all from ``first`` on.

        Raises:
            ValueError: when these are prompts of an image of 2 dimensions.
        """
        return self._moved(
            points=_shifted(self.points, [2], first),
            boxes=_shifted(self.boxes, [2, 5], first),
            masks=None if self.masks is None else self.masks[..., first : None if depth is None else first + depth],
        )

    def mirror(self, axes: Sequence[int], size: Sequence[int]) -> Prompts:
        """Prompts of an image as its mirror image has them.

        Args:
            axes: spatial axes along which the image is mirrored.
            size: the image's spatial size, dims numbers.
        """
        points, boxes, masks, dims = self.points, self.boxes, self.masks, len(size)
        for axis in axes:
            points, boxes = _mirrored(points, [axis], size[axis]), _mirrored(boxes, [axis, axis + dims], size[axis])
            masks = None if masks is None else masks.flip(1 + axis)
        return self._moved(points=points, boxes=boxes, masks=masks)

    def turn(self, quarters: int, size: Sequence[int]) -> Prompts:
        """Prompts of an image as the turned image has them.

        Args:
            quarters: quarter turns, from the first spatial axis to the second one, as ``torch.rot90`` turns.
            size: the image's spatial size, dims numbers.
        """
        turned, (rows, columns, *depth) = self, size
        for _ in range(quarters % 4):
            turned = turned._transpose().mirror([0], (columns, rows, *depth))
            rows, columns = columns, rows
        return turned

    def _transpose(self) -> Prompts:
        """With the first two spatial axes exchanged."""
        points, boxes, masks = self.points, self.boxes, self.masks
        if points is not None:
            points = points[..., [1, 0, 2][: points.shape[-1]]]
        if boxes is not None:
            boxes = boxes[:, [1, 0, 3, 2] if boxes.shape[1] == 4 else [1, 0, 2, 4, 3, 5]]
        return self._moved(points=points, boxes=boxes, masks=None if masks is None else masks.transpose(1, 2))

    def through(self, affine: Tensor) -> Prompts:
        """Prompts of an image as they lie on another grid.

        Args:
            affine: (n + 1, n + 1) with n of dims or more, from voxel indices of this grid to those of the other one.

        Raises:
            ValueError: when there are earlier masks, which an affine map would have to resample.
        """
        if self.masks is not None:
            raise ValueError("masks lie on the network's grid already; map points and boxes before masks are added.")
        boxes = None
        if self.boxes is not None:
            corners = self.boxes.reshape(len(self.boxes), 2, -1)
            boxes = _sorted_corners(transform_positions(corners, affine).reshape(self.boxes.shape))
        points = None if self.points is None else transform_positions(self.points, affine)
        return self._moved(points=points, boxes=boxes)

    def to(self, *args: Any, **kwargs: Any) -> Prompts:
        """On another device; arguments as of ``torch.Tensor.to``, which here must not change the type."""
        return Prompts(**{name: value.to(*args, **kwargs) for name, value in self._tensors().items()})

    def arguments(self) -> dict[str, Tensor]:
        """Keyword arguments of :meth:`medsa_nets.networks.MedSA.decode` for this image alone, a batch of one."""
        return Prompts.batched([self])

    @staticmethod
    def batched(images: Sequence[Prompts]) -> dict[str, Tensor]:
        """Keyword arguments of :meth:`medsa_nets.networks.MedSA.decode` for a batch of images.

        Args:
            images: the prompts of each image. Where one has fewer points than another, padding points follow.

        Raises:
            ValueError: when images differ in their kinds or numbers of prompts, or in the classes; the network answers
                the same questions for all images of a batch.
        """
        first = images[0]
        if any((one.kinds, one.sets) != (first.kinds, first.sets) for one in images):
            listed = ", ".join(f"{one.sets} of {'+'.join(sorted(one.kinds)) or 'nothing'}" for one in images)
            raise ValueError(
                f"the images of a batch need prompts of the same kinds and number, got {listed}. Take batches of one."
            )
        tensors = [one._tensors() for one in _equally_long(images)]
        out = {
            argument: torch.stack([one[name] for one in tensors])
            for name, argument in _ARGUMENTS.items()
            if name in tensors[0]
        }
        if first.classes is not None:
            if not all(_same(one["classes"], first.classes) for one in tensors):
                listed = ", ".join(str(one["classes"].tolist()) for one in tensors)
                raise ValueError(f"the images of a batch need prompts for the same classes, got {listed}.")
            out["classes"] = first.classes
        return out


_ARGUMENTS = {"points": "point_coords", "labels": "point_labels", "boxes": "boxes", "masks": "masks"}


def transform_positions(positions: Tensor, affine: Tensor) -> Tensor:
    """Positions (…, dims) of one grid as those of another one, in double precision; the result is single.

    Args:
        positions: (…, dims).
        affine: (n + 1, n + 1) with n of dims or more.
    """
    dims = positions.shape[-1]
    affine = affine.to(positions.device, torch.float64)
    flat = positions.reshape(-1, dims).to(torch.float64)
    moved = flat @ affine[:dims, :dims].T + affine[:dims, -1]
    return moved.to(torch.float32).reshape(positions.shape)


def _expect(right: bool, expected: str, *found: Tensor) -> None:
    if not right:
        raise ValueError(f"{expected}, got {' and '.join(str(tuple(tensor.shape)) for tensor in found)}.")


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and bool((one.cpu() == other.cpu()).all()))


def _equally_long(parts: Sequence[Prompts]) -> list[Prompts]:
    """With padding points where a part has fewer than others."""
    most = max(0 if part.labels is None else part.labels.shape[1] for part in parts)
    return [part if part.labels is None else _padded(part, most - part.labels.shape[1]) for part in parts]


def _padded(prompts: Prompts, more: int) -> Prompts:
    assert prompts.points is not None
    assert prompts.labels is not None
    if more == 0:
        return prompts
    points, labels = F.pad(prompts.points, (0, 0, 0, more)), F.pad(prompts.labels, (0, more), value=-1)
    return replace(prompts, points=points, labels=labels)


def _shifted(positions: Tensor | None, places: list[int], first: int) -> Tensor | None:
    if positions is None:
        return None
    if positions.shape[-1] <= places[-1]:
        raise ValueError("only prompts of volumes have slices; these are of an image of 2 dimensions.")
    moved = positions.float().clone()
    moved[..., places] -= first
    return moved


def _mirrored(positions: Tensor | None, places: list[int], size: int) -> Tensor | None:
    if positions is None:
        return None
    moved = positions.float().clone()
    moved[..., places] = (size - 1 - moved[..., places]).flip(-1)  # a box's first corner keeps the lower index
    return moved


def _sorted_corners(boxes: Tensor) -> Tensor:
    """First corner before the opposite one on every axis."""
    first, second = boxes.chunk(2, dim=-1)
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=-1)
