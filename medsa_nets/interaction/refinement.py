"""What a click means for the voxels around it: a small network that learnt it from sessions of a simulated user."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from medsa_nets.checksums import file_sha256
from medsa_nets.data.atomic import temporary_name
from medsa_nets.errors import WeightsError
from medsa_nets.errors import describe as error_text
from medsa_nets.interaction.grids import Place

LIMIT = 8.0  # of the logits that it sees
FAR = 12.0  # distance of other clicks from which on they count as none, in steps
DEEP = 10.0  # distance to the mask's border from which on all voxels are alike, in steps
MARGIN = 6  # steps beyond the region that averages and derivatives there see
POINTS = 8  # of a scribble that are taken as clicks, one after the other
NAMES = (
    "logit before", "logit", "mean logit, 3 steps", "mean logit, 7 steps", "depth in the mask", "distance",
    "nearness, 2 steps", "nearness, 4 steps", "distance along the normal", "distance across the normal",
    "depth of the click", "logit of the click before", "difference of intensity", "intensity of the click's side",
    "signed difference of intensity", "gradient", "gradient along the normal", "slope of the logit",
    "nearest click of its kind", "nearest click of the other kind", "clicks", "kind",
)  # fmt: skip
SUFFIX = ".clicks.pt"


class Refinement(nn.Module):
    """Logits around a click, from what is known of each voxel there: a perceptron of two hidden layers.

    It sees no absolute place and no class, only how a voxel lies to the newest click, to earlier ones and to the mask's
    border, and what logits and intensities both have (:data:`NAMES`). What clicks mean depends on the masks that they
    correct: it lies beside the adapter whose masks taught it (:func:`beside`). Untrained, it changes nothing.

    Args:
        dims: 2 (images) or 3 (volumes).
        reach: distance from the click up to which logits may change, in steps: multiples of the smallest spacing.
        width: of the hidden layers.
        asks: whether it refines answers that the network gives to each click anew, or corrects the mask before alone.

    Raises:
        ValueError: when ``dims`` is another, or ``reach`` or ``width`` is below 1.
    """

    def __init__(self, dims: int, reach: float, width: int = 64, asks: bool = False) -> None:
        super().__init__()
        if dims not in (2, 3) or reach < 1 or width < 1:
            raise ValueError(f"expected dims 2 or 3, reach and width of 1 or more, got {dims}, {reach} and {width}.")
        self.dims, self.reach, self.width, self.asks = dims, float(reach), width, bool(asks)
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

    def _form(self) -> list[Any]:
        return [self.dims, self.reach, self.width, self.asks, list(NAMES)]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of its form and weights."""
        digest = hashlib.sha256(json.dumps(self._form()).encode())
        for tensor in self.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write it to a file, whole or not at all."""
        with temporary_name(path) as part:
            torch.save({"form": self._form(), "state": self.state_dict()}, part)

    @classmethod
    def load(cls, path: str | Path) -> Refinement:
        """Read one from a file that :meth:`save` wrote.

        Args:
            path: of the file.

        Raises:
            WeightsError: when the file is missing, damaged or something else.
        """
        path = Path(path)
        if not path.is_file():
            raise WeightsError(f"{path}: there is no such file. Name a refinement, which configs/refine.yaml trains.")
        try:
            kept = torch.load(path, map_location="cpu", weights_only=True)
            dims, reach, width, asks, names = kept["form"]
            if names != list(NAMES):
                raise ValueError("its features are others")
            out = cls(dims, reach, width, asks)
            out.load_state_dict(kept["state"])
        except Exception as error:  # torch names damaged files in many ways
            raise WeightsError(
                f"{path}: no refinement of clicks of this version ({error_text(error)}). Train one with "
                "configs/refine.yaml of a bundle."
            ) from error
        return out.eval().requires_grad_(False)


def place_beside(adapter: str | Path) -> Path:
    """Where the refinement of an adapter lies: ``model.clicks.pt`` beside ``model.pt``."""
    path = Path(adapter).with_suffix("")
    return path.with_name(path.name + SUFFIX)


def beside(adapter: str | Path | None) -> str:
    """Path of the refinement that lies beside an adapter; empty where none does."""
    path = place_beside(adapter) if adapter else None
    return str(path) if path is not None and path.is_file() else ""


def is_refinement(path: str | Path) -> bool:
    """Whether a file is a refinement, by its name or, where it has another, by what it holds; damaged ones too."""
    path = Path(path)
    if path.name.endswith(SUFFIX):
        return True
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch names damaged and missing files in many ways
        return False
    return isinstance(content, dict) and content.keys() == {"form", "state"}


def describe_file(path: str | Path) -> str:
    """What a refinement's file holds: lines on its size, its use, the adapter that it goes with, its checksum.

    Raises:
        WeightsError: when the file is missing, damaged or something else.
    """
    path = Path(path)
    refinement = Refinement.load(path)
    weights = sum(parameter.numel() for parameter in refinement.parameters())
    adapter = path.with_name(path.name.removesuffix(SUFFIX) + ".pt")
    if not path.name.endswith(SUFFIX):
        goes_with = f"no adapter by its name; NAME{SUFFIX} goes with the adapter NAME.pt beside it"
    elif adapter.is_file():
        goes_with = f"the adapter {adapter.name} beside it"
    else:
        goes_with = f"the adapter {adapter.name}, which is not beside it"
    return "\n  ".join(
        [
            f"{path}: a refinement of clicks on {'volumes' if refinement.dims == 3 else 'images'}, {weights:,} weights",
            f"changes: logits up to {refinement.reach:g} steps (of the smallest spacing) from a click",
            f"of: {'the answers of the network to each click' if refinement.asks else 'the mask before the click'}",
            f"goes with: {goes_with}",
            f"sha256: {file_sha256(path)}",
        ]
    )


@lru_cache(maxsize=8)
def kept(path: str) -> Refinement:
    """A refinement from its file, read once."""
    return Refinement.load(path)


@torch.no_grad()
def refine(
    refinement: Refinement,
    previous: np.ndarray,
    values: np.ndarray,
    image: np.ndarray,
    voxels: np.ndarray,
    labels: np.ndarray,
    newest: int,
    spacing: Sequence[float] | np.ndarray,
) -> np.ndarray:
    """Logits that take the newest click for what such clicks mostly meant.

    Args:
        refinement: learnt from sessions.
        previous: logits (spatial…) that the user saw.
        values: logits (spatial…) of the answer so far: the network's, with clicks as measurements.
        image: (C, spatial…), in [0, 1].
        voxels: (N, dims) that are marked, oldest first.
        labels: (N,): 1 foreground, 0 background.
        newest: how many of them the newest prompt marked; of a scribble, a few points are clicks one after the other.
        spacing: size of a voxel along each axis.

    Returns:
        Logits (spatial…), other than ``values`` within the refinement's reach of the newest marks alone.
    """
    marks = np.linspace(len(voxels) - newest, len(voxels) - 1, min(newest, POINTS)).round().astype(int)
    for mark in marks:
        sign = 2.0 * float(labels[mark] > 0) - 1.0
        place, inside, features = describe(
            refinement.reach, previous, values, image, np.delete(voxels, mark, 0), np.delete(labels, mark),
            voxels[mark], int(labels[mark]), spacing,
        )  # fmt: skip
        out = values.copy()
        added = sign * refinement(torch.from_numpy(features)).numpy()
        before = values[place][inside]
        after = before.clip(-LIMIT, LIMIT) + added
        out[place][inside] = np.where((after > 0) == (before > 0), before + added, after)
        values = out
    return values


def describe(
    reach: float,
    previous: np.ndarray,
    values: np.ndarray,
    image: np.ndarray,
    voxels: np.ndarray,
    labels: np.ndarray,
    click: np.ndarray,
    label: int,
    spacing: Sequence[float] | np.ndarray,
) -> tuple[Place, np.ndarray, np.ndarray]:
    """What is known of each voxel around a click, foreground and background exchanged where the click is on background.

    Lengths are in steps, multiples of the smallest spacing; intensities in multiples of their standard deviation around
    the click.

    Args:
        reach: distance up to which voxels are described, in steps.
        previous: logits (spatial…) that the user saw.
        values: logits (spatial…) of the answer so far.
        image: (C, spatial…).
        voxels: (N, dims) of the other marks.
        labels: (N,) of these.
        click: (dims,).
        label: of the click.
        spacing: size of a voxel along each axis.

    Returns:
        A box around the click, where in it voxels are described (boolean), and their features (M, F), float32.
    """
    steps = np.asarray(spacing, dtype=np.float64) / float(np.min(spacing))
    sign = np.float32(2 * label - 1)
    half = np.floor(reach / steps).astype(int)
    place = _box(click, half, previous.shape)
    wide = _box(click, half + np.ceil(MARGIN / steps).astype(int), previous.shape)
    axes = tuple(range(1, 1 + len(steps)))
    inner = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(place, wide))
    centre = tuple(int(c) - s.start for c, s in zip(click, wide))

    away = np.meshgrid(*[(np.arange(s.start, s.stop) - c) * k for s, c, k in zip(place, click, steps)], indexing="ij")
    distance = np.sqrt(sum(a**2 for a in away))
    inside = distance <= reach

    before = previous[wide].clip(-LIMIT, LIMIT).astype(np.float32)
    depth, normal = _border(before > 0, centre, steps)
    deep = float(np.linalg.norm(normal))
    unit = normal / max(deep, 1e-6)
    along = sum(a * u for a, u in zip(away, unit))
    across = np.sqrt(np.maximum(0.0, distance**2 - along**2))

    everywhere = (slice(None), *wide)
    grey = image[everywhere].astype(np.float32)
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
    for other, kind in zip(voxels, labels):
        if np.all(np.abs(other - click) * steps <= reach + FAR):
            apart = sum((a - (o - c) * k) ** 2 for a, o, c, k in zip(away, other, click, steps))
            kind = int((kind > 0) == (label > 0))
            nearest[kind] = np.minimum(nearest[kind], np.sqrt(apart))

    def constant(number: float) -> np.ndarray:
        return np.full(distance.shape, number, dtype=np.float32)

    def mean(size: int) -> np.ndarray:
        return ndimage.uniform_filter(before, [max(1, 2 * round((size / k - 1) / 2) + 1) for k in steps])

    features = [
        sign * before[inner], sign * values[place].clip(-LIMIT, LIMIT), sign * mean(3)[inner], sign * mean(7)[inner],
        sign * depth[inner].clip(-DEEP, DEEP), distance, np.exp(-(distance**2) / 8.0), np.exp(-(distance**2) / 32.0),
        along, across, constant(min(deep, 2.0 * DEEP)), sign * constant(before[centre]), difference[inner],
        constant(float((own.mean() - side) / spread)), (middle[inner] - own.mean()) / spread,
        np.sqrt(sum(s**2 for s in slopes))[inner] / spread,
        sum(s * u for s, u in zip(slopes, unit))[inner] / spread,
        sign * sum(r * u for r, u in zip(rises, unit))[inner],
        nearest[1], nearest[0], constant(math.log1p(1 + len(voxels))), sign * constant(1.0),
    ]  # fmt: skip
    return place, inside, np.stack([feature[inside] for feature in features], 1).astype(np.float32)


def _box(centre: np.ndarray, half: np.ndarray, shape: tuple[int, ...]) -> Place:
    return tuple(slice(max(0, int(c - h)), min(n, int(c + h) + 1)) for c, h, n in zip(centre, half, shape))


def _border(mask: np.ndarray, centre: tuple[int, ...], steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to a mask's border (spatial…), negative outside; and from the border's nearest voxel to the centre."""
    if mask.all() or not mask.any():
        depth = np.full(mask.shape, DEEP if mask.all() else -DEEP)
        return depth, np.zeros(len(centre))
    within, nearest_out = ndimage.distance_transform_edt(mask, steps, return_indices=True)
    outside, nearest_in = ndimage.distance_transform_edt(~mask, steps, return_indices=True)
    nearest = np.array([axis[centre] for axis in (nearest_out if mask[centre] else nearest_in)])
    return within - outside, (np.array(centre) - nearest) * steps
