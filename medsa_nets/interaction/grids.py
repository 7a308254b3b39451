"""The grid of an image's file and that of the network: positions and masks from one to the other."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor

from medsa_nets.transforms.prompts import file_affine
from medsa_nets.transforms.volumes import source_grid

Place = tuple[slice, ...]
MAX_VOXELS = 4_000_000  # resampled at once


class Grids:
    """How voxels of an image's file and of the network's tensor belong together.

    Args:
        image: (C, spatial…) as the network sees it, after the bundle's spatial transforms, which are affine.
    """

    def __init__(self, image: MetaTensor) -> None:
        self.dims = image.dim() - 1
        self.shape = tuple(int(n) for n in image.shape[1:])
        self.file_shape, affine = source_grid(image)
        keep = [*range(self.dims), -1]
        file, tensor = affine[keep][:, keep], image.affine.double().cpu()[keep][:, keep]
        self.to_tensor = torch.linalg.solve(tensor, file).numpy()
        self.to_file = torch.linalg.solve(file, tensor).numpy()
        self.world = np.asarray(file_affine(image)[keep][:, keep])
        corners = np.array(list(itertools.product(*((-1.0, n) for n in self.file_shape))))
        reached = _mapped(corners, self.to_tensor)
        self._outermost = (np.minimum(reached.min(0), -1.0), np.maximum(reached.max(0), self.shape))
        # Pixels of photographs have no size; those of the network are the unit.
        size = np.linalg.norm(np.asarray(tensor)[: self.dims, : self.dims], axis=0)
        self.spacing = size if self.dims == 3 else np.ones(self.dims)

    def part(self, place: Place) -> Grids:
        """Those of a box of the network's grid, taken for the whole of it."""
        out = copy.copy(self)
        start = np.array([box.start for box in place], dtype=np.float64)
        out.shape = tuple(box.stop - box.start for box in place)
        out.to_tensor, out.to_file = self.to_tensor.copy(), self.to_file.copy()
        out.to_tensor[:-1, -1] -= start
        out.to_file[:-1, -1] += self.to_file[:-1, :-1] @ start
        out._outermost = (self._outermost[0] - start, self._outermost[1] - start)
        return out

    def positions(self, positions: np.ndarray) -> np.ndarray:
        """Positions (N, dims) of the file's grid as those of the network's."""
        return _mapped(positions, self.to_tensor)

    def voxels(self, positions: np.ndarray) -> np.ndarray:
        """Voxels (N, dims) of the network's grid that hold positions of the file's grid; the nearest at its edge."""
        return np.clip(np.rint(self.positions(positions)), 0, np.array(self.shape) - 1).astype(np.int64)

    def file_voxels(self, positions: np.ndarray) -> np.ndarray:
        """Voxels (N, dims) of the file's grid that hold positions of it."""
        return np.clip(np.rint(positions), 0, np.array(self.file_shape) - 1).astype(np.int64)

    def world_coordinates(self, positions: np.ndarray) -> np.ndarray:
        """Positions (N, dims) of the file's grid in the world, in mm (RAS); pixels for photographs."""
        return _mapped(positions, self.world)

    def file_place(self, place: Place) -> Place:
        """Box of the file's grid on which what happens in a box of the network's grid can have an effect."""
        ends = []
        for axis, (box, count) in enumerate(zip(place, self.shape)):
            # What stands at the network's outermost voxels goes on to the end of the file.
            low = box.start - 1.0 if box.start > 0 else self._outermost[0][axis]
            high = float(box.stop) if box.stop < count else self._outermost[1][axis]
            ends.append((low, high))
        found = _mapped(np.array(list(itertools.product(*ends))), self.to_file)
        low = np.clip(np.floor(found.min(0) + 1e-6), 0, self.file_shape).astype(int)
        high = np.clip(np.ceil(found.max(0) - 1e-6) + 1, low, self.file_shape).astype(int)
        return tuple(slice(int(a), int(b)) for a, b in zip(low, high))

    def on_file(self, values: Tensor, place: Place) -> Tensor:
        """Values (spatial…) of the network's grid, interpolated on a box of the file's grid.

        Args:
            values: float, on the network's grid; beyond its outermost voxels they go on as they are there.
            place: box of the file's grid.
        """
        return _resampled(values, self.to_tensor, place)

    def above(self, values: Tensor, level: float, place: Place) -> np.ndarray:
        """Where values of the network's grid, interpolated on a box of the file's grid, lie above a level.

        The same as ``on_file(values, place) > level``, but interpolated only near voxels that lie above it: between
        voxels that don't, nothing does.

        Args:
            values: see :meth:`on_file`.
            level: 0 or more.
            place: box of the file's grid.
        """
        out = np.zeros([max(0, s.stop - s.start) for s in place], dtype=bool)
        # Weights that sum to 1 are rounded: what lies a little below the level may come out above it, unless it is 0.
        found = bounding_place((values > level * (1.0 - 1e-5)).numpy())
        if found is None:
            return out
        near = tuple(
            slice(max(own.start, s.start), max(own.start, s.start, min(own.stop, s.stop)))
            for own, s in zip(self.file_place(found), place)
        )
        inner = tuple(slice(own.start - s.start, own.stop - s.start) for own, s in zip(near, place))
        out[inner] = (self.on_file(values, near) > level).numpy()
        return out

    def on_tensor(self, mask: np.ndarray) -> Tensor:
        """Share in [0, 1] of a mask of the file's grid, interpolated at voxels of the network's grid."""
        values = torch.from_numpy(np.ascontiguousarray(mask, dtype=np.float32))
        return _resampled(values, self.to_file, tuple(slice(0, n) for n in self.shape))


def _mapped(positions: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    positions = np.asarray(positions, dtype=np.float64).reshape(-1, len(matrix) - 1)
    return positions @ matrix[:-1, :-1].T + matrix[:-1, -1]


def _resampled(values: Tensor, matrix: np.ndarray, place: Place) -> Tensor:
    """Values at the voxels of a box of another grid; ``matrix`` carries its indices to those of ``values``."""
    dims = values.dim()
    sizes = torch.tensor([max(n - 1, 1) for n in values.shape], dtype=torch.float64)
    shape = [max(0, s.stop - s.start) for s in place]
    out = torch.empty(shape)
    if out.numel() == 0:
        return out
    rows = max(1, MAX_VOXELS // max(1, int(np.prod(shape[1:]))))
    affine = torch.from_numpy(matrix)
    for first in range(0, shape[0], rows):
        last = min(first + rows, shape[0])
        steps = [torch.arange(place[0].start + first, place[0].start + last, dtype=torch.float64)]
        steps += [torch.arange(s.start, s.stop, dtype=torch.float64) for s in place[1:]]
        coordinates = []
        for axis in range(dims):
            line = affine[axis, -1] + sum(
                (affine[axis, other] * steps[other]).reshape([-1 if a == other else 1 for a in range(dims)])
                for other in range(dims)
            )
            coordinates.append((2.0 * line / sizes[axis] - 1.0).float().expand(last - first, *shape[1:]))
        grid = torch.stack(coordinates[::-1], dim=-1)[None]
        sampled = F.grid_sample(values[None, None].float(), grid, padding_mode="border", align_corners=True)
        out[first:last] = sampled[0, 0]
    return out


def bounding_place(mask: np.ndarray, margin: int | Sequence[int] = 0) -> Place | None:
    """Smallest box that holds a boolean mask, widened by a margin; none where the mask is empty."""
    margins = [margin] * mask.ndim if isinstance(margin, int) else list(margin)
    out = []
    rest = mask  # cut as far as it is known, so that most of the mask is looked at once
    for axis in range(mask.ndim):
        found = np.flatnonzero(rest.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not len(found):
            return None
        first, last = int(found[0]), int(found[-1]) + 1
        rest = rest[(slice(None),) * axis + (slice(first, last),)]
        out.append(slice(max(0, first - margins[axis]), min(mask.shape[axis], last + margins[axis])))
    return tuple(out)
