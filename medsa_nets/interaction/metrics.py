"""Metrics of sessions: quality after each click, clicks to a goal, area under the curve, harmful and obeyed clicks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from monai.metrics import compute_dice, compute_surface_dice
from scipy.integrate import trapezoid

STEPS = (0, 1, 2, 3, 5, 10)
GOALS = (0.80, 0.85, 0.90)
HARM = 0.005  # Dice by which a click must lower a mask to count as harmful
AUC_CLICKS = 5
AUC_DICE = 0.2  # Dice up to which the challenge counts the surface Dice as 0


@dataclass
class SessionCurve:
    """Masks of one session against the truth: entry 0 is before the first click.

    Attributes:
        dice: Dice after 0, 1, 2… clicks.
        nsd: normalised surface Dice after 0, 1, 2… clicks.
        obeyed: for each answer, share of the voxels marked so far that carried their label.
    """

    dice: list[float] = field(default_factory=list)
    nsd: list[float] = field(default_factory=list)
    obeyed: list[float] = field(default_factory=list)

    def add(self, mask: np.ndarray, target: np.ndarray, spacing: Sequence[float], tolerance: float) -> None:
        """Measure a mask.

        Args:
            mask: boolean (spatial…).
            target: boolean (spatial…).
            spacing: size of a voxel along each axis, in mm (pixels of images: 1).
            tolerance: of the surface Dice, in the unit of ``spacing``.
        """
        dice, nsd = measure(mask, target, spacing, tolerance)
        self.dice.append(dice)
        self.nsd.append(nsd)

    def after(self, clicks: int, of: str = "dice") -> float:
        """Dice (or ``nsd``) after so many clicks; a user who found nothing wrong any more clicked no further."""
        values: list[float] = getattr(self, of)
        return values[min(clicks, len(values) - 1)]

    def clicks_to(self, goal: float) -> int | None:
        """Fewest clicks after which Dice is at least ``goal``; none where it never is."""
        return next((clicks for clicks, dice in enumerate(self.dice) if dice >= goal), None)

    def area(self, of: str = "dice") -> float:
        """Area under the curve of the first five clicks (trapezoids, at most 4).

        Source: DSC_AUC and NSD_AUC of the CVPR 2025 challenge on interactive segmentation of volumes
        (github.com/JunMa11/CVPR-MedSegFMCompetition, ``CVPR25_iter_eval.py``): the mask before the first click does not
        count, and the surface Dice is 0 where Dice is 0.2 or less.
        """
        values = [self.after(clicks, of) for clicks in range(1, AUC_CLICKS + 1)]
        if of == "nsd":
            values = [v if self.after(c) > AUC_DICE else 0.0 for c, v in enumerate(values, start=1)]
        return float(trapezoid(values))

    def harmful(self) -> list[bool]:
        """For each click, whether it lowered Dice by more than 0.005."""
        return [after < before - HARM for before, after in zip(self.dice, self.dice[1:])]


def measure(mask: np.ndarray, target: np.ndarray, spacing: Sequence[float], tolerance: float) -> tuple[float, float]:
    """Dice and normalised surface Dice of a mask, both 1 where mask and target are empty.

    Args:
        mask: boolean (spatial…).
        target: boolean (spatial…).
        spacing: size of a voxel along each axis, in mm.
        tolerance: of the surface Dice, in mm.
    """
    if not mask.any() or not target.any():
        same = float(mask.any() == target.any())
        return same, same
    # Surfaces need a margin and no more of the volume than that.
    both = np.argwhere(mask | target)
    low, high = np.maximum(both.min(0) - 1, 0), both.max(0) + 2
    place = tuple(slice(a, b) for a, b in zip(low, high))
    a, b = (torch.from_numpy(np.pad(m[place], 1))[None, None].float() for m in (mask, target))
    dice = float(compute_dice(a, b))
    nsd = compute_surface_dice(a, b, [tolerance], include_background=True, spacing=[float(s) for s in spacing])
    return dice, float(nsd)


def summarise(curves: Sequence[SessionCurve]) -> dict[str, float]:
    """Means over sessions: one row of a table.

    Returns:
        ``dice_after_N`` and ``nsd_after_N`` for N of :data:`STEPS`; ``clicks_to_G`` (mean over the sessions that get
        there, 1 session counts as its clicks) and ``never_to_G`` (share that does not) for G of :data:`GOALS` in
        hundredths; ``dsc_auc``, ``nsd_auc``; ``harmful_clicks`` and ``obeyed`` (shares). NaN where there is none to
        count.
    """
    out: dict[str, float] = {}
    for clicks in STEPS:
        out[f"dice_after_{clicks}"] = _mean([curve.after(clicks) for curve in curves])
        out[f"nsd_after_{clicks}"] = _mean([curve.after(clicks, "nsd") for curve in curves])
    for goal in GOALS:
        needed = [curve.clicks_to(goal) for curve in curves]
        out[f"clicks_to_{goal * 100:.0f}"] = _mean([n for n in needed if n is not None])
        out[f"never_to_{goal * 100:.0f}"] = _mean([float(n is None) for n in needed])
    out["dsc_auc"] = _mean([curve.area() for curve in curves])
    out["nsd_auc"] = _mean([curve.area("nsd") for curve in curves])
    out["harmful_clicks"] = _mean([float(h) for curve in curves for h in curve.harmful()])
    out["obeyed"] = _mean([share for curve in curves for share in curve.obeyed])
    return out


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
