"""What a click means for the voxels around it: a perceptron that sees each voxel alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from medsa_nets.interaction.grids import Place
from medsa_nets.interaction.refinement.base import LIMIT, Click, Refinement, box

FAR = 12.0  # distance of other clicks from which on they count as none, in steps
DEEP = 10.0  # distance to the mask's border from which on all voxels are alike, in steps
MARGIN = 6  # steps beyond the region that averages and derivatives there see
NAMES = (
    "logit before", "logit", "mean logit, 3 steps", "mean logit, 7 steps", "depth in the mask", "distance",
    "nearness, 2 steps", "nearness, 4 steps", "distance along the normal", "distance across the normal",
    "depth of the click", "logit of the click before", "difference of intensity", "intensity of the click's side",
    "signed difference of intensity", "gradient", "gradient along the normal", "slope of the logit",
    "nearest click of its kind", "nearest click of the other kind", "clicks", "kind",
)  # fmt: skip


class VoxelRefinement(Refinement):
    """Logits around a click, from what is known of each voxel there: a perceptron of two hidden layers.

    It sees no absolute place and no class, only how a voxel lies to the newest click, to earlier ones and to the mask's
    border, and what logits and intensities both have (:data:`NAMES`).

    Args:
        dims: 2 (images) or 3 (volumes).
        reach: distance from the click up to which logits may change, in steps: multiples of the smallest spacing.
        width: of the hidden layers.
        asks: whether it refines answers that the network gives to each click anew, or corrects the mask before alone.
        certainty: see :class:`Refinement`.

    Raises:
        ValueError: when ``dims`` is another, or ``reach`` or ``width`` is below 1.
    """

    kind = "voxels"

    def __init__(self, dims: int, reach: float, width: int = 64, asks: bool = False, certainty: float = 0.0) -> None:
        super().__init__(dims, reach, asks, certainty)
        if width < 1:
            raise ValueError(f"expected a width of 1 or more, got {width}.")
        self.width = width
        self.register_buffer("mean", torch.zeros(len(NAMES)))
        self.register_buffer("std", torch.ones(len(NAMES)))
        self.layers = nn.Sequential(
            nn.Linear(len(NAMES), width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)
        )
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """What is added to logits towards the click's label (N,), of features (N, F)."""
        out: Tensor = self.layers((features - self.get_buffer("mean")) / self.get_buffer("std"))
        return out[:, 0]

    def added(self, click: Click) -> tuple[Place, np.ndarray, np.ndarray]:
        """See :meth:`Refinement.added`."""
        place, inside, features = describe(self.reach, click)
        return place, inside, (2.0 * float(click.label > 0) - 1.0) * self(torch.from_numpy(features)).numpy()

    @property
    def unit(self) -> str:
        """See :attr:`Refinement.unit`."""
        return "steps (of the smallest spacing)"

    def form(self) -> Any:
        """See :meth:`Refinement.form`."""
        form = [self.dims, self.reach, self.width, self.asks, list(NAMES)]
        return [*form, self.certainty] if self.certainty else form  # files from before have no such number

    @classmethod
    def of_form(cls, form: Any) -> VoxelRefinement:
        """See :meth:`Refinement.of_form`."""
        dims, reach, width, asks, names, *certainty = form
        if names != list(NAMES):
            raise ValueError("its features are others")
        return cls(dims, reach, width, asks, *certainty)


def describe(reach: float, click: Click) -> tuple[Place, np.ndarray, np.ndarray]:
    """What is known of each voxel around a click, foreground and background exchanged where the click is on background.

    Lengths are in steps, multiples of the smallest spacing; intensities in multiples of their standard deviation around
    the click.

    Args:
        reach: distance up to which voxels are described, in steps.
        click: the click.

    Returns:
        A box around the click, where in it voxels are described (boolean), and their features (M, F), float32.
    """
    steps = np.asarray(click.spacing, dtype=np.float64) / float(np.min(click.spacing))
    sign, shape = np.float32(2 * click.label - 1), click.previous.shape
    half = np.floor(reach / steps).astype(int)
    place = box(click.voxel, half, shape)
    wide = box(click.voxel, half + np.ceil(MARGIN / steps).astype(int), shape)
    axes = tuple(range(1, 1 + len(steps)))
    inner = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(place, wide))
    centre = tuple(int(c) - s.start for c, s in zip(click.voxel, wide))

    lines = [(np.arange(s.start, s.stop) - c) * k for s, c, k in zip(place, click.voxel, steps)]
    away = np.meshgrid(*lines, indexing="ij")
    distance = np.sqrt(sum(a**2 for a in away))
    inside = distance <= reach

    before = click.previous[wide].clip(-LIMIT, LIMIT).astype(np.float32)
    depth, normal = _border(before > 0, centre, steps)
    deep = float(np.linalg.norm(normal))
    unit = normal / max(deep, 1e-6)
    along = sum(a * u for a, u in zip(away, unit))
    across = np.sqrt(np.maximum(0.0, distance**2 - along**2))

    everywhere = (slice(None), *wide)
    grey = click.image[everywhere].astype(np.float32)
    smooth = np.stack([ndimage.gaussian_filter(channel, 1.0 / steps) for channel in grey])
    spread = float(np.sqrt(((grey - grey.mean(axes, keepdims=True)) ** 2).mean())) + 0.02
    middle = smooth.mean(0)
    slopes = [ndimage.gaussian_filter1d(middle, 1.0 / k, axis, order=1) / k for axis, k in enumerate(steps)]
    rises = [ndimage.gaussian_filter1d(before, 1.0 / k, axis, order=1) / k for axis, k in enumerate(steps)]
    own = smooth.reshape(len(smooth), -1)[:, np.ravel_multi_index(centre, before.shape)]
    difference = np.sqrt(((smooth - own.reshape(-1, *[1] * len(steps))) ** 2).mean(0)) / spread
    mask = before > 0
    side = middle[mask].mean() if mask.any() else middle.mean()

    nearest = [np.full(distance.shape, FAR), np.full(distance.shape, FAR)]
    for other, kind in zip(click.others, click.labels):
        if np.all(np.abs(other - click.voxel) * steps <= reach + FAR):
            apart = sum((a - (o - c) * k) ** 2 for a, o, c, k in zip(away, other, click.voxel, steps))
            kind = int((kind > 0) == (click.label > 0))
            nearest[kind] = np.minimum(nearest[kind], np.sqrt(apart))

    def constant(number: float) -> np.ndarray:
        return np.full(distance.shape, number, dtype=np.float32)

    def mean(size: int) -> np.ndarray:
        return ndimage.uniform_filter(before, [max(1, 2 * round((size / k - 1) / 2) + 1) for k in steps])

    features = [
        sign * before[inner], sign * click.values[place].clip(-LIMIT, LIMIT), sign * mean(3)[inner],
        sign * mean(7)[inner], sign * depth[inner].clip(-DEEP, DEEP), distance, np.exp(-(distance**2) / 8.0),
        np.exp(-(distance**2) / 32.0), along, across, constant(min(deep, 2.0 * DEEP)), sign * constant(before[centre]),
        difference[inner], constant(float((own.mean() - side) / spread)), (middle[inner] - own.mean()) / spread,
        np.sqrt(sum(s**2 for s in slopes))[inner] / spread,
        sum(s * u for s, u in zip(slopes, unit))[inner] / spread,
        sign * sum(r * u for r, u in zip(rises, unit))[inner],
        nearest[1], nearest[0], constant(math.log1p(1 + len(click.others))), sign * constant(1.0),
    ]  # fmt: skip
    return place, inside, np.stack([feature[inside] for feature in features], 1).astype(np.float32)


def _border(mask: np.ndarray, centre: tuple[int, ...], steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to a mask's border (spatial…), negative outside; and from the border's nearest voxel to the centre."""
    if mask.all() or not mask.any():
        depth = np.full(mask.shape, DEEP if mask.all() else -DEEP)
        return depth, np.zeros(len(centre))
    within, nearest_out = ndimage.distance_transform_edt(mask, steps, return_indices=True)
    outside, nearest_in = ndimage.distance_transform_edt(~mask, steps, return_indices=True)
    nearest = np.array([axis[centre] for axis in (nearest_out if mask[centre] else nearest_in)])
    return within - outside, (np.array(centre) - nearest) * steps
