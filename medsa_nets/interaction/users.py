"""A simulated user: where somebody who sees what is wrong with a mask clicks next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import ConvexHull
from torch import Tensor

PLACES = ("centre", "uniform", "border")


class SimulatedUser:
    """Clicks on the largest connected error of a mask (8 or 26 neighbours), or draws on it.

    At the centre, it is the user of the CVPR 2025 challenge on interactive segmentation of volumes
    (github.com/JunMa11/CVPR-MedSegFMCompetition, ``CVPR25_iter_eval.py``): a random voxel among the maxima of the
    distance map of the largest component of all errors, missing and surplus together.

    Args:
        centre: share of clicks at the error's centre, the voxel farthest from its border.
        uniform: share of clicks at a uniformly drawn voxel of it.
        border: share of clicks at its border.
        jitter: largest move of a click along each axis, in voxels; a click stays within the error's kind.
        apart: whether missing and surplus voxels that touch each other are two errors; in the challenge they are one.

    Raises:
        ValueError: when a place is unknown or the shares are negative or all zero.
    """

    def __init__(
        self, centre: float = 1.0, uniform: float = 0.0, border: float = 0.0, jitter: int = 0, apart: bool = False
    ) -> None:
        shares = np.array([centre, uniform, border], dtype=np.float64)
        if (shares < 0).any() or shares.sum() <= 0:
            raise ValueError(f"centre, uniform and border must be 0 or more and not all 0, got {shares.tolist()}.")
        self.shares = shares / shares.sum()
        self.jitter = jitter
        self.apart = apart

    def click(self, mask: np.ndarray, target: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, int] | None:
        """The next click.

        Args:
            mask: boolean (spatial…), what the user sees.
            target: boolean (spatial…), what the user wants.
            random: source of randomness.

        Returns:
            Voxel index (dims,) and label (1 foreground, 0 background), or none where nothing is wrong.
        """
        found = largest_error(mask, target, self.apart)
        if found is None:
            return None
        part, corner = found
        place = PLACES[int(random.choice(3, p=self.shares))]
        voxel = _pick(part, place, random) + corner
        label = int(target[tuple(voxel)])
        if self.jitter:
            moved = voxel + random.integers(-self.jitter, self.jitter + 1, mask.ndim)
            moved = np.clip(moved, 0, np.array(mask.shape) - 1)
            if target[tuple(moved)] == bool(label):
                voxel = moved
        return voxel, label

    def scribble(
        self, mask: np.ndarray, target: np.ndarray, random: np.random.Generator, length: int = 15
    ) -> tuple[np.ndarray, int] | None:
        """A short curve in one slice of the largest error, as far as it is missing, or surplus.

        It runs from one place of the error (see ``centre``, ``uniform``, ``border``) to others of it, through voxels
        of the same error.

        Args:
            mask: see :meth:`click`.
            target: see :meth:`click`.
            random: source of randomness.
            length: most voxels of the curve.

        Returns:
            Voxel indices (N, dims) and label, or none where nothing is wrong.
        """
        found = self._slice_of_error(mask, target, random)
        if found is None:
            return None
        plane, voxel, label, place = found
        curve = [voxel]
        step = random.normal(size=2)
        for _ in range(length - 1):
            step += 0.6 * random.normal(size=2)  # curves, seldom turns back
            move = np.rint(step / max(1e-9, float(np.abs(step).max()))).astype(int)
            there = curve[-1] + move
            if not ((there >= 0) & (there < plane.shape)).all() or not plane[tuple(there)]:
                step = random.normal(size=2)
                continue
            curve.append(there)
        return place(np.unique(np.array(curve), axis=0)), label

    def lasso(self, mask: np.ndarray, target: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, int] | None:
        """A closed line in one slice around what is wanted there; around what is surplus, where nothing is wanted.

        It is the convex hull, up to 1 + ``jitter`` voxels wider.

        Args:
            mask: see :meth:`click`.
            target: see :meth:`click`.
            random: source of randomness.

        Returns:
            Corners (N, dims) and label (1 around what is wanted, 0 around what is not), or none where nothing is
            wrong.
        """
        found = self._slice_of_error(mask, target, random)
        if found is None:
            return None
        _, _, _, place = found
        wanted = place.of(target)
        label = int(wanted.any())
        shape = wanted if label else place.of(mask)
        wide = ndimage.binary_dilation(shape, np.ones((3, 3)), iterations=1 + int(random.integers(self.jitter + 1)))
        pixels = np.argwhere(wide)
        line = pixels if min(np.ptp(pixels, axis=0)) == 0 else pixels[ConvexHull(pixels).vertices]
        return place(line), label

    def _slice_of_error(
        self, mask: np.ndarray, target: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, int, _Slice] | None:
        """A slice through the largest error: its pixels of one kind, one of them, their label, and where it lies."""
        found = largest_error(mask, target, self.apart)
        if found is None:
            return None
        part, corner = found
        voxel = _pick(part, PLACES[int(random.choice(3, p=self.shares))], random) + corner
        label = int(target[tuple(voxel)])
        axis = None if mask.ndim == 2 else int(random.integers(3))
        place = _Slice(axis, 0 if axis is None else int(voxel[axis]))
        wrong = place.of((mask != target) & (target == bool(label)))
        own = voxel if axis is None else np.delete(voxel, axis)
        parts, _ = ndimage.label(wrong, np.ones((3, 3)))
        return parts == parts[tuple(own)], own, label, place

    def clicks(self, masks: Tensor, targets: Tensor, places: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """The next click on each of K masks of B images.

        Args:
            masks: boolean (B, K, spatial…).
            targets: boolean (B, K, spatial…).
            places: a source of randomness for each image.

        Returns:
            Voxel indices (B, K, dims), and labels (B, K), -1 where nothing is wrong.
        """
        coords = torch.zeros(*masks.shape[:2], masks.dim() - 2)
        labels = -torch.ones(*masks.shape[:2])
        for image, source in enumerate(places):
            for k in range(masks.shape[1]):
                random = np.random.default_rng(int(torch.randint(2**31, (1,), generator=source)))
                found = self.click(masks[image, k].cpu().numpy(), targets[image, k].cpu().numpy(), random)
                if found is not None:
                    coords[image, k], labels[image, k] = torch.from_numpy(found[0]).float(), float(found[1])
        return coords.to(masks.device), labels.to(masks.device)


class _Slice:
    """A slice of a volume, or an image as it is."""

    def __init__(self, axis: int | None, index: int) -> None:
        self.axis = axis
        self.index = index

    def of(self, array: np.ndarray) -> np.ndarray:
        """The slice of an array."""
        return array if self.axis is None else array.take(self.index, self.axis)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Positions (N, 2) of the slice as those of the volume."""
        return positions if self.axis is None else np.insert(positions, self.axis, self.index, axis=1)


def largest_error(mask: np.ndarray, target: np.ndarray, apart: bool = False) -> tuple[np.ndarray, np.ndarray] | None:
    """The largest connected error: boolean on its bounding box, and the box's corner.

    Args:
        mask: boolean (spatial…).
        target: boolean (spatial…).
        apart: whether missing and surplus voxels that touch each other are two errors.

    Returns:
        None where nothing is wrong.
    """
    if apart:
        found = [largest_error(error, np.zeros_like(error)) for error in (target & ~mask, mask & ~target)]
        return max((one for one in found if one is not None), key=lambda one: one[0].sum(), default=None)
    parts, count = ndimage.label(mask != target, np.ones((3,) * mask.ndim))
    if not count:
        return None
    largest = int(np.bincount(parts.ravel())[1:].argmax()) + 1
    box = ndimage.find_objects(parts)[largest - 1]
    return parts[box] == largest, np.array([axis.start for axis in box])


def _pick(part: np.ndarray, place: str, random: np.random.Generator) -> np.ndarray:
    """A voxel of an error (boolean), at one of :data:`PLACES`."""
    if place == "uniform":
        voxels = np.argwhere(part)
    else:
        depth = ndimage.distance_transform_edt(np.pad(part, 1))[(slice(1, -1),) * part.ndim]
        voxels = np.argwhere(depth == depth.max() if place == "centre" else part & (depth <= 1.0))
    return voxels[random.integers(len(voxels))]
