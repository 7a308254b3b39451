"""A simulated user: where somebody who sees what is wrong with a mask clicks next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

PLACES = ("centre", "uniform", "border")


class SimulatedUser:
    """Clicks on the largest connected error of a mask.

    Args:
        centre: weight of clicks at the error's centre, the voxel farthest from its border.
        uniform: weight of clicks at a voxel of it that is drawn uniformly.
        border: weight of clicks at its border.
        jitter: largest move of a click along each axis, in voxels, where the label stays true; else it does not move.

    Raises:
        ValueError: when a weight is negative, or all are zero.
    """

    def __init__(self, centre: float = 1.0, uniform: float = 0.0, border: float = 0.0, jitter: int = 0) -> None:
        shares = np.array([centre, uniform, border], dtype=np.float64)
        if (shares < 0).any() or shares.sum() <= 0:
            raise ValueError(f"centre, uniform and border must be 0 or more and not all 0, got {shares.tolist()}.")
        self.shares = shares / shares.sum()
        self.jitter = jitter

    def click(self, mask: np.ndarray, target: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, int] | None:
        """The next click.

        Args:
            mask: boolean (spatial…), what the user sees.
            target: boolean (spatial…), what the user wants.
            random: source of randomness.

        Returns:
            Voxel index (dims,) and label (1 foreground, 0 background), or none where nothing is wrong.
        """
        wrong = mask != target
        if not wrong.any():
            return None
        best: tuple[int, np.ndarray, int] | None = None
        structure = np.ones((3,) * mask.ndim)
        for label, error in ((1, target & ~mask), (0, mask & ~target)):
            parts, count = ndimage.label(error, structure)
            if count:
                sizes = np.bincount(parts.ravel())[1:]
                if best is None or sizes.max() > best[0]:
                    best = (int(sizes.max()), parts == int(sizes.argmax()) + 1, label)
        assert best is not None
        _, part, label = best
        place = PLACES[int(random.choice(3, p=self.shares))]
        corner = [int(axis.min()) for axis in np.nonzero(part)]
        small = part[tuple(slice(int(axis.min()), int(axis.max()) + 1) for axis in np.nonzero(part))]
        if place == "uniform":
            voxels = np.argwhere(small)
        else:
            depth = ndimage.distance_transform_edt(np.pad(small, 1))[(slice(1, -1),) * small.ndim]
            voxels = np.argwhere(depth == depth.max() if place == "centre" else small & (depth <= 1.0))
        voxel = voxels[random.integers(len(voxels))] + corner
        if self.jitter:
            moved = voxel + random.integers(-self.jitter, self.jitter + 1, mask.ndim)
            moved = np.clip(moved, 0, np.array(mask.shape) - 1)
            if target[tuple(moved)] == bool(label):
                voxel = moved
        return voxel, label

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
