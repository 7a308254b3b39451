"""Surface metrics in millimetres (MONAI's, with the spacing of each volume), and agreement with several raters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.metrics import CumulativeIterationMetric, HausdorffDistanceMetric, SurfaceDiceMetric, compute_dice
from torch import Tensor


def spacings(volumes: Sequence[Tensor] | Tensor) -> list[list[float]]:
    """Voxel spacing of each volume in mm; 1 for a tensor without affine."""
    return [
        [float(s) for s in volume.pixdim] if isinstance(volume, MetaTensor) else [1.0] * (volume.dim() - 1)
        for volume in volumes
    ]


class HausdorffDistanceMM(HausdorffDistanceMetric):
    """``monai.metrics.HausdorffDistanceMetric`` that takes each volume's spacing from its affine: distances in mm."""

    def __call__(self, y_pred: Any, y: Any = None, **kwargs: Any) -> Any:
        """Compare lists of one-hot volumes (classes, X, Y, Z)."""
        return _one_by_one(super().__call__, y_pred, y, **kwargs)


class SurfaceDiceMM(SurfaceDiceMetric):
    """``monai.metrics.SurfaceDiceMetric`` (NSD) with each volume's spacing; thresholds are tolerances in mm.

    A class of which the label holds nothing is undefined (NaN) and counts in no mean, as in ``DiceMetric`` with
    ``ignore_empty``: it may be there and not be annotated.
    """

    def _compute_tensor(self, y_pred: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        result = super()._compute_tensor(y_pred, y, **kwargs)
        reference = y if self.include_background else y[:, 1:]
        empty = reference.flatten(2).amax(-1) == 0
        return torch.where(empty.to(result.device), torch.full_like(result, float("nan")), result)

    def __call__(self, y_pred: Any, y: Any = None, **kwargs: Any) -> Any:
        """Compare lists of one-hot volumes (classes, X, Y, Z)."""
        return _one_by_one(super().__call__, y_pred, y, **kwargs)


class VoxelsElsewhere(CumulativeIterationMetric):
    """Share of a prediction's voxels in slices that do not hold their class at all: organs found where none is.

    Slices lie along the last axis, and the first channel is the background. A class of which a volume's label holds
    nothing does not count there: it may be there and not be annotated. The share is that of the voxels of all classes
    and volumes together; NaN where nothing was predicted.
    """

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Any:
        """Compare one-hot volumes (B, 1 + classes, X, Y, Z): voxels elsewhere, and all, (B, classes) each."""
        assert y is not None
        held = y[:, 1:].flatten(2, 3).amax(2) > 0  # (B, classes, Z)
        found = y_pred[:, 1:].sum((2, 3), dtype=torch.float64) * held.any(-1, keepdim=True)
        return [(found * ~held).sum(-1), found.sum(-1)]

    def aggregate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Share over all volumes so far."""
        elsewhere, found = self.get_buffer()
        return elsewhere.sum() / found.sum()


def _dice(one: Tensor, other: Tensor) -> Tensor:
    """Dice of two masks (spatial…); 1 where both are empty."""
    return compute_dice(one[None, None], other[None, None], ignore_empty=False)[0, 0]


class RaterDice(CumulativeIterationMetric):
    """Mean Dice of a mask with those of several raters; where both are empty, it is 1.

    It is comparable with :class:`RaterAgreement`: a mask that agrees with the raters as they do among each other has
    about that Dice.
    """

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Compare masks (B, 1, spatial…) with those of raters (B, raters, spatial…): (B, 1)."""
        assert y is not None
        return torch.stack([torch.stack([_dice(p[0], rater) for rater in own]).mean() for p, own in zip(y_pred, y)])[
            :, None
        ]

    def aggregate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Mean over all images so far."""
        return torch.as_tensor(self.get_buffer()).mean()


class RaterAgreement(RaterDice):
    """Mean Dice of the raters of an image with each other, over all pairs; where two masks are empty, it is 1."""

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Compare the masks of raters (B, raters, spatial…), two or more, with each other: (B, 1)."""
        pairs = [[_dice(own[i], own[j]) for j in range(len(own)) for i in range(j)] for own in y_pred]
        return torch.stack([torch.stack(own).mean() for own in pairs])[:, None]


def _one_by_one(metric: Any, y_pred: Any, y: Any, **kwargs: Any) -> Tensor:
    results = [
        metric(p.unsqueeze(0), t.unsqueeze(0), spacing=spacing, **kwargs)
        for p, t, spacing in zip(y_pred, y, spacings(y))
    ]
    return torch.cat(results)
