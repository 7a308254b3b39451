"""What a click means for the voxels around it: a small U-Net that sees the crop around the click."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsa_nets.interaction.grids import Place
from medsa_nets.interaction.refinement.base import LIMIT, Click, Refinement, box

NEAR, WIDE = 1.5, 5.0  # standard deviations of the marks' maps, in steps
MAPS = ("within the image", "logit before", "logit", "foreground marks", "background marks", "click", "click, wide")
LEVELS = 3
GROUPS = 4  # of channels that are normalised together


class CropRefinement(Refinement):
    """Logits around a click, from the crop around it: a U-Net of three levels.

    The crop lies on a grid of its own, of cubes (squares) with the click in the middle. It shows the image (mean 0,
    standard deviation 1), logits before and after the network and the measurements, and Gaussian maps of all marks and
    of the click (:data:`MAPS`). What comes out is interpolated at the voxels within ``reach``.

    Args:
        dims: 2 (images) or 3 (volumes).
        reach: distance from the click up to which logits may change, in mm (volumes) or pixels of the network's grid
            (images); towards it, what is added fades (a Gaussian with half of it as standard deviation).
        step: size of the crop's voxels, in the same unit.
        channels: of the image.
        width: feature maps of the first level; a multiple of 4.
        asks: whether it refines answers that the network gives to each click anew, or corrects the mask before alone.
        certainty: see :class:`Refinement`.
        mirror_axes: what is added is the mean over the crop and its mirror images along these axes.

    Raises:
        ValueError: when ``dims`` is another, ``reach`` or ``channels`` is below 1, ``step`` is not above 0 or ``width``
            is no multiple of 4.
    """

    kind = "crops"

    def __init__(
        self,
        dims: int,
        reach: float,
        step: float = 1.0,
        channels: int = 1,
        width: int = 16,
        asks: bool = False,
        certainty: float = 0.0,
        mirror_axes: Sequence[int] = (),
    ) -> None:
        super().__init__(dims, reach, asks, certainty)
        if not set(mirror_axes) <= set(range(dims)):
            raise ValueError(f"mirror_axes are axes from 0 to {dims - 1}, got {list(mirror_axes)}.")
        if not step > 0 or channels < 1 or width < GROUPS or width % GROUPS:
            raise ValueError(
                f"expected a step above 0, 1 channel or more and a width that is a multiple of {GROUPS}, got {step}, "
                f"{channels} and {width}."
            )
        self.step, self.channels, self.width = float(step), channels, width
        self.mirror_axes = list(mirror_axes)
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        widths = [width * 2**level for level in range(LEVELS)]
        inputs = [channels + len(MAPS), *widths[:-1]]
        self.down = nn.ModuleList(_block(conv, i, o) for i, o in zip(inputs, widths))
        self.up = nn.ModuleList(_block(conv, i + o, o) for i, o in zip(widths[:0:-1], widths[-2::-1]))
        self.out = conv(width, 1, 1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("nearness", torch.exp(-2.0 * self._apart() / self.reach**2), persistent=False)

    @property
    def arm(self) -> int:
        """Voxels of the crop on each side of the click; a multiple of what the U-Net halves it by."""
        multiple = 2 ** (LEVELS - 1)
        return max(1, math.ceil(self.reach / self.step / multiple)) * multiple

    def forward(self, crops: Tensor) -> Tensor:
        """What is added to the logits (B, side…) of crops (B, channels + maps, side…), before it fades."""
        pool = {2: F.max_pool2d, 3: F.max_pool3d}[self.dims]
        levels: list[Tensor] = []
        for number, block in enumerate(self.down):
            crops = block(pool(crops, 2) if number else crops)
            levels.append(crops)
        crops = levels.pop()
        for block in self.up:
            crops = block(torch.cat([F.interpolate(crops, scale_factor=2.0), levels.pop()], 1))
        out: Tensor = self.out(crops)
        return out[:, 0]

    def _apart(self) -> Tensor:
        """Squared distance of a crop's voxels (side…) from the click."""
        axes = [(torch.arange(-self.arm, self.arm) * self.step) ** 2] * self.dims
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).sum(0)

    def crop(self, click: Click) -> Tensor:
        """What the U-Net sees of a click (channels + maps, side…)."""
        one = np.broadcast_to(np.float32(1.0), (1, *click.previous.shape))
        within = self.around(one, click.voxel, click.spacing)[0] > 0.5
        logits = (click.previous, click.values)
        seen = torch.cat([self.around(one[None], click.voxel, click.spacing) for one in logits])
        seen = torch.where(within, seen.clamp(-LIMIT, LIMIT), -LIMIT) / (LIMIT / 2.0)
        grey = self.around(click.image, click.voxel, click.spacing)
        inner = grey[:, within]
        shape = (-1, *[1] * self.dims)
        grey = (grey - inner.mean(1).reshape(shape)) / (inner.std(1, correction=0).reshape(shape) + 0.02)
        axes = np.arange(-self.arm, self.arm, dtype=np.float32)
        places = np.meshgrid(*[axes] * self.dims, indexing="ij")
        middle = sum(axis**2 for axis in places)
        marks = np.zeros((2, *within.shape), dtype=np.float32)
        away = (click.others - click.voxel) * np.asarray(click.spacing) / self.step
        for offset, kind in itertools.chain(zip(away, click.labels), [(np.zeros(self.dims), click.label)]):
            if np.all(np.abs(offset) <= self.arm + 3.0 * NEAR):
                apart = sum((axis - o) ** 2 for axis, o in zip(places, offset))
                side = marks[0 if kind > 0 else 1]
                np.maximum(side, np.exp(-apart / (2.0 * NEAR**2)), out=side)
        sign = 2.0 * float(click.label > 0) - 1.0
        clicked = np.stack([sign * np.exp(-middle / (2.0 * own**2)) for own in (NEAR, WIDE)])
        maps = torch.from_numpy(np.concatenate([marks, clicked]).astype(np.float32))
        return torch.cat([grey * within, within[None].float(), seen, maps])

    def around(self, values: np.ndarray, click: np.ndarray, spacing: Sequence[float] | np.ndarray) -> Tensor:
        """Values (C, spatial…) of the network's grid, interpolated at the crop's voxels (C, side…); 0 beyond the image.

        Args:
            values: on the network's grid.
            click: voxel (dims,) of that grid, in the crop's middle.
            spacing: of that grid.
        """
        steps = np.asarray(spacing, dtype=np.float64) / self.step
        place = box(click, np.ceil((self.arm + 1) / steps).astype(int), values.shape[1:])
        axes = [np.arange(-self.arm, self.arm) / k + float(c - s.start) for c, k, s in zip(click, steps, place)]
        there = (slice(None), *place)
        return _interpolated(torch.from_numpy(np.ascontiguousarray(values[there])).float(), axes, False)

    def within_reach(self) -> Tensor:
        """Where in a crop (side…) logits may change: 1, elsewhere 0."""
        return (self._apart() <= self.reach**2).float()

    def added(self, click: Click) -> tuple[Place, np.ndarray, np.ndarray]:
        """See :meth:`Refinement.added`."""
        crop = self.crop(click)
        turned = [
            [1 + axis for axis in axes]
            for count in range(len(self.mirror_axes) + 1)
            for axes in itertools.combinations(self.mirror_axes, count)
        ]
        found = self(torch.stack([crop.flip(axes) for axes in turned]))
        mean = torch.stack([one.flip([axis - 1 for axis in axes]) for one, axes in zip(found, turned)]).mean(0)
        return self.spread(mean, click.voxel, click.spacing, click.previous.shape)

    def spread(
        self, crop: Tensor, click: np.ndarray, spacing: Sequence[float] | np.ndarray, shape: tuple[int, ...]
    ) -> tuple[Place, np.ndarray, np.ndarray]:
        """What comes out for a crop (side…), faded, on the network's grid; returns what :meth:`added` does."""
        crop = crop * self.get_buffer("nearness")
        size = np.asarray(spacing, dtype=np.float64)
        place = box(click, np.floor(self.reach / size).astype(int), shape)
        away = [(np.arange(s.start, s.stop) - c) * k for s, c, k in zip(place, click, size)]
        inside = sum(axis**2 for axis in np.meshgrid(*away, indexing="ij", sparse=True)) <= self.reach**2
        found = _interpolated(crop[None], [axis / self.step + self.arm for axis in away], True)[0].numpy()
        return place, inside, found[inside]

    @property
    def unit(self) -> str:
        """See :attr:`Refinement.unit`."""
        return "mm" if self.dims == 3 else "pixels"

    def form(self) -> Any:
        """See :meth:`Refinement.form`."""
        return {
            "kind": self.kind, "dims": self.dims, "reach": self.reach, "step": self.step, "channels": self.channels,
            "width": self.width, "asks": self.asks, "certainty": self.certainty, "mirror_axes": self.mirror_axes,
            "maps": list(MAPS),
        }  # fmt: skip

    @classmethod
    def of_form(cls, form: Any) -> CropRefinement:
        """See :meth:`Refinement.of_form`."""
        own = dict(form)
        if own.pop("kind") != cls.kind or own.pop("maps") != list(MAPS):
            raise ValueError("what it sees is something else")
        return cls(**own)


def _block(conv: type[nn.Module], inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions of 3 voxels along each axis."""
    parts: list[nn.Module] = []
    for number in (inputs, outputs):
        parts += [conv(number, outputs, 3, padding=1), nn.GroupNorm(GROUPS, outputs), nn.GELU()]
    return nn.Sequential(*parts)


def _interpolated(values: Tensor, axes: Sequence[np.ndarray], extend: bool) -> Tensor:
    """Values (C, spatial…), linearly interpolated where axes (dims) of voxel positions cross: (C, …).

    Args:
        values: of a grid.
        axes: ascending positions along each of its axes.
        extend: whether what lies beyond the grid is as its end; else it is 0.
    """
    scaled = [2.0 * axis / max(1, n - 1) - 1.0 for axis, n in zip(axes, values.shape[1:])]
    places = np.stack(np.meshgrid(*scaled, indexing="ij")[::-1], -1)  # the last axis comes first
    grid = torch.from_numpy(places.astype(np.float32))[None]
    mode = "border" if extend else "zeros"
    return F.grid_sample(values[None], grid, align_corners=True, padding_mode=mode)[0]
