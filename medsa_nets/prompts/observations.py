"""Clicks and scribbles as measurements of a mask's logit: Gaussian-process regression with the network as its mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import linalg

MARGIN = (
    1.0  # logit that a voxel has at least (foreground), or at most the negative of (background), once it is clicked
)
CUTOFF = 1e-4  # of the kernel; beyond it a click changes nothing
NUGGET = 1e-6  # variance of a measurement, for a matrix that can be inverted
MAX_POINTS = 256  # measurements in one linear system


@dataclass(frozen=True)
class Kernel:
    """How far a measurement speaks for other voxels: ``exp(-d^2 / 2 length^2 - (difference)^2 / 2 contrast^2)``.

    Args:
        length: standard deviation over place, in mm (volumes) or pixels of the network's grid (images).
        contrast: standard deviation over intensity, which lies in [0, 1]; several channels count by their Euclidean
            distance.
        margin: logit that a click on foreground measures at least; one on background, at most its negative.

    Raises:
        ValueError: when ``length`` or ``contrast`` is not above 0, or ``margin`` is below :data:`MARGIN`.
    """

    length: float = 3.0
    contrast: float = 0.15
    margin: float = MARGIN

    def __post_init__(self) -> None:
        if not (self.length > 0 and self.contrast > 0):
            raise ValueError(f"length and contrast must be above 0, got {self.length} and {self.contrast}.")
        if self.margin < MARGIN:
            raise ValueError(f"margin must be {MARGIN:g} or more, got {self.margin}.")

    @property
    def radius(self) -> float:
        """Distance from which on the kernel is below :data:`CUTOFF`, whatever the intensity."""
        return self.length * float(np.sqrt(-2.0 * np.log(CUTOFF)))

    def between(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Kernel between features (N, F) and (M, F), in multiples of the standard deviations: (N, M)."""
        squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2.0 * a @ b.T
        return np.exp(-0.5 * squared.clip(min=0.0))


def newest_labels(voxels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each voxel once, in the order of its newest measurement, which wins.

    Args:
        voxels: (N, dims), oldest first.
        labels: (N,).
    """
    _, last = np.unique(voxels[::-1], axis=0, return_index=True)
    kept = np.sort(len(voxels) - 1 - last)
    return voxels[kept], labels[kept]


def observe(
    logits: np.ndarray,
    image: np.ndarray,
    voxels: np.ndarray,
    labels: np.ndarray,
    spacing: Sequence[float] | np.ndarray,
    kernel: Kernel,
) -> np.ndarray:
    """Let logits agree with what was clicked, there and where place and intensity are alike.

    The logit of a clicked voxel is measured as at least :data:`MARGIN` (foreground), or at most its negative
    (background). The residual between the logits and these measurements, zero where they agree already, is
    interpolated by Gaussian-process regression (kriging) and added. Every clicked voxel carries its label
    afterwards; voxels farther than ``kernel.radius`` from each click that disagreed keep their logits, bit for bit. Of
    clicks that contradict each other on one voxel the newest wins. Of more than :data:`MAX_POINTS` voxels, those that
    lie farthest apart make the interpolation, but all carry their label.

    Args:
        logits: (spatial…), of one mask.
        image: (C, spatial…) with intensities in [0, 1].
        voxels: (N, dims) indices of clicked voxels, oldest first.
        labels: (N,): 1 foreground, 0 background.
        spacing: size of a voxel along each axis, in the unit of ``kernel.length``.
        kernel: how far a click speaks.

    Returns:
        Logits (spatial…), float32.

    Raises:
        ValueError: when shapes disagree, or a voxel lies outside.
    """
    logits = np.asarray(logits, dtype=np.float32)
    voxels, labels = np.asarray(voxels).reshape(-1, logits.ndim), np.asarray(labels).reshape(-1)
    if image.shape[1:] != logits.shape or len(voxels) != len(labels) or len(spacing) != logits.ndim:
        raise ValueError(
            f"logits {logits.shape}, image {image.shape}, {len(voxels)} voxels, {len(labels)} labels and "
            f"{len(spacing)} spacings do not belong together."
        )
    if len(voxels) == 0:
        return logits.copy()
    if (voxels < 0).any() or (voxels >= np.array(logits.shape)).any():
        raise ValueError(f"a clicked voxel lies outside of {logits.shape}.")
    voxels, labels = newest_labels(voxels.astype(np.int64), labels)
    measured = _clamped(logits[tuple(voxels.T)], labels, kernel.margin)
    residual = measured.astype(np.float64) - logits[tuple(voxels.T)]
    out = logits.copy()
    if residual.any():
        out += _interpolated(logits.shape, image, voxels, residual, np.asarray(spacing, dtype=np.float64), kernel)
    out[tuple(voxels.T)] = _clamped(out[tuple(voxels.T)], labels, MARGIN)
    return out


def _clamped(values: np.ndarray, labels: np.ndarray, margin: float) -> np.ndarray:
    return np.where(labels > 0, np.maximum(values, margin), np.minimum(values, -margin)).astype(np.float32)


def _interpolated(
    shape: tuple[int, ...],
    image: np.ndarray,
    voxels: np.ndarray,
    residual: np.ndarray,
    spacing: np.ndarray,
    kernel: Kernel,
) -> np.ndarray:
    """What is added to logits: the interpolated residual, zero beyond the reach of voxels that have one."""
    chosen = _inducing(voxels, residual, image, spacing, kernel)
    voxels, residual = voxels[chosen], residual[chosen]
    features = _features(voxels, image, spacing, kernel)
    covariance = kernel.between(features, features) + NUGGET * np.eye(len(voxels))
    weights = linalg.solve(covariance, residual, assume_a="pos")
    total = np.zeros(shape, dtype=np.float64)
    near = np.zeros(shape, dtype=bool)
    reach = np.maximum(1, np.ceil(kernel.radius / spacing)).astype(int)
    for voxel, feature, weight, own in zip(voxels, features, weights, residual):
        low = np.maximum(voxel - reach, 0)
        high = np.minimum(voxel + reach + 1, shape)
        place = tuple(slice(a, b) for a, b in zip(low, high))
        axes = np.ogrid[tuple(slice(a, b) for a, b in zip(low, high))]
        distance = sum(((axis - v) * s) ** 2 for axis, v, s in zip(axes, voxel, spacing))
        difference = sum(
            (channel[place].astype(np.float64) / kernel.contrast - f) ** 2
            for channel, f in zip(image, feature[len(shape) :])
        )
        total[place] += weight * np.exp(-0.5 * (distance / kernel.length**2 + difference))
        if own:
            near[place] |= distance <= kernel.radius**2
    # Between clicks that contradict each other the interpolation may overshoot all of them.
    total = total.clip(min(0.0, float(residual.min())), max(0.0, float(residual.max())))
    return np.where(near, total, 0.0).astype(np.float32)


def _features(voxels: np.ndarray, image: np.ndarray, spacing: np.ndarray, kernel: Kernel) -> np.ndarray:
    """Place and intensity in multiples of the kernel's standard deviations: (N, dims + C)."""
    everywhere = (slice(None), *voxels.T)
    values = image[everywhere].T.astype(np.float64)
    return np.concatenate([voxels * spacing / kernel.length, values / kernel.contrast], axis=1)


def _inducing(
    voxels: np.ndarray, residual: np.ndarray, image: np.ndarray, spacing: np.ndarray, kernel: Kernel
) -> np.ndarray:
    """Places of the measurements that make the interpolation: near a residual, and few that lie far apart."""
    position = voxels * spacing / kernel.length
    wrong = position[residual != 0]
    bound = (2.0 * kernel.radius / kernel.length) ** 2
    nearest = np.full(len(voxels), np.inf)
    for start in range(0, len(wrong), 512):
        squared = ((position[:, None] - wrong[None, start : start + 512]) ** 2).sum(2).min(1)
        nearest = np.minimum(nearest, squared)
    relevant = np.flatnonzero(nearest <= bound)
    if len(relevant) <= MAX_POINTS:
        return relevant
    features = _features(voxels[relevant], image, spacing, kernel)
    chosen = [len(relevant) - 1]  # the newest; then always the one farthest from those chosen
    distance = ((features - features[-1]) ** 2).sum(1)
    while len(chosen) < MAX_POINTS:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, ((features - features[chosen[-1]]) ** 2).sum(1))
    return relevant[np.sort(chosen)]
