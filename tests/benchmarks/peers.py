"""Other means by which a user corrects a mask, under the verbs that a simulated user needs of a session.

- ``boxes``: the base without adapter, by the truth's box; in volumes by one in each slice that the class is in. Each
  side lies 0 to 5 of 256 pixels too far out, as LiteMedSAM's training draws its boxes. It takes no clicks.
- ``feedback``: the base without adapter, by SAM's own feedback: with each click the clicks so far, and the logits of
  the answer before as a mask prompt. In volumes a click is answered in its own slice.
- ``oracle``: who knows the truth: a click mends all that is wrong within 4 mm of it (10 pixels in images), and nothing
  else. No answer that reaches so far can do better.
- ``walker``: scikit-image's random walker on the network's grid, from the seeds of :func:`walker_seeds`.

The base sees slices as it was trained: in their own proportions, the longer side of its image's size (256 pixels for
LiteMedSAM), padded, intensities from 0 to 1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from medsa_nets import build_medsa
from medsa_nets.interaction.answers import within
from medsa_nets.interaction.session import START_LOGIT, InteractiveSession
from medsa_nets.prompts.earlier import as_earlier
from medsa_nets.weights.bases import get_base

SHIFT = 5 / 256  # share of the image by which a side of a box lies too far out, at most
DEPTH = 0.5  # of the mask's greatest depth, from which on a voxel is a seed
BALL = {2: 2.0, 3: 1.0}  # pixels of the network's grid, or mm, of a click that is drawn as a seed
REACH = {2: 10.0, 3: 4.0}  # pixels of the file, or mm, within which an oracle mends
BETA = 130.0  # scikit-image's own: how hard it is to walk from one intensity to another


class Peer:
    """A session's verbs without its answers: clicks are kept, and :meth:`answer` is asked for a mask.

    Args:
        session: gives the image, its grids and the masks to start from.
        base: name of the base, for those that ask one.
    """

    def __init__(self, session: InteractiveSession, base: str = "lite_medsam") -> None:
        self.session, self.base = session, base

    def open(self, path: str) -> None:
        """Open an image."""
        self.session.open(path)
        self.reset()

    def reset(self) -> None:
        """Forget all clicks."""
        self.session.reset()
        self.voxels, self.labels = np.empty((0, self.session.grids.dims), dtype=np.int64), np.empty(0, dtype=np.int64)

    def mask(self, class_name: str | None) -> np.ndarray:
        """The mask to start from."""
        return self.session.mask(class_name)

    def start_from(self, mask: np.ndarray, class_name: str | None) -> np.ndarray:
        """Start from another tool's mask."""
        return self.session.start_from(mask, class_name)

    def point(self, position: list[int], label: int, class_name: str | None) -> np.ndarray:
        """Click on a voxel of the file; the mask that answers."""
        grids = self.session.grids
        self.voxels = np.concatenate([self.voxels, grids.voxels(np.array([position]))])
        self.labels = np.append(self.labels, label)
        return self._on_file(self.answer(class_name))

    def answer(self, class_name: str | None) -> Tensor:
        """Logits (network's spatial…) by all clicks so far."""
        raise NotImplementedError

    def _on_file(self, logits: Tensor) -> np.ndarray:
        place = tuple(slice(0, n) for n in self.session.file_shape)
        return (self.session.grids.on_file(logits, place) > 0).numpy()

    def _start(self, class_name: str | None) -> Tensor:
        """Logits of the mask to start from: the network's own where it has some."""
        found = self.session.logits(class_name)
        return torch.full(self.session.grids.shape, -START_LOGIT) if found is None else found


class Plane:
    """A slice of the network's grid as the base sees it.

    Args:
        network: the base.
        size: of its image.
        image: (C, rows, columns) with C of 1 or 3.
        extent: height and width of the slice, in any unit.
    """

    def __init__(self, network: Any, size: int, image: Tensor, extent: tuple[float, float]) -> None:
        self.network, self.size = network, size
        self.shape = (int(image.shape[1]), int(image.shape[2]))
        longest = max(extent)
        self.inner = tuple(max(1, round(size * side / longest)) for side in extent)
        self.scale = np.array(self.inner) / np.array(self.shape)
        small = F.interpolate(image[None].float(), self.inner, mode="bilinear", align_corners=False, antialias=True)
        small = small.expand(-1, 3, -1, -1)
        low, high = small.min(), small.max()
        small = (small - low) / (high - low).clamp_min(1e-8)
        self.embedding = network.encode_image(self._padded(small))

    def positions(self, voxels: np.ndarray) -> Tensor:
        """Places of voxels (N, 2) in the base's image (1, 1, N, 2)."""
        return torch.from_numpy((voxels + 0.5) * self.scale - 0.5).float()[None, None]

    def box(self, mask: np.ndarray, random: np.random.Generator) -> Tensor:
        """Box of a mask (rows, columns) in the base's image (1, 1, 4), each side a little too far out."""
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        corners = np.array([[rows[0], columns[0]], [rows[-1], columns[-1]]])
        first, last = self.positions(corners)[0, 0].numpy()
        most = round(SHIFT * self.size)
        first = np.maximum(first - random.integers(0, most + 1, 2), 0)
        last = np.minimum(last + random.integers(0, most + 1, 2), np.array(self.inner) - 1)
        return torch.from_numpy(np.concatenate([first, last])).float()[None, None]

    def earlier(self, logits: Tensor) -> Tensor:
        """Logits (rows, columns) of a mask as the base's mask prompt."""
        inner = F.interpolate(logits[None, None].float(), self.inner, mode="bilinear", align_corners=False)
        return as_earlier(self._padded(inner, float(inner.min())), self.embedding.shape[2:])

    def _padded(self, values: Tensor, by: float = 0.0) -> Tensor:
        return F.pad(values, (0, self.size - self.inner[1], 0, self.size - self.inner[0]), value=by)

    def decode(self, **prompts: Tensor) -> Tensor:
        """Logits (1, 1, size, size) of the base's answer."""
        return self.network.decode(self.embedding, **prompts)

    def back(self, logits: Tensor) -> Tensor:
        """An answer on the slice's own grid (rows, columns)."""
        inner = logits[..., : self.inner[0], : self.inner[1]]
        return F.interpolate(inner, self.shape, mode="bilinear", align_corners=False)[0, 0]


@lru_cache(1)
def unadapted(base: str) -> Any:
    """A base without adapter."""
    return build_medsa(base, adaptation="none").eval()


class OnBase(Peer):
    """What asks the base without adapter, slice by slice."""

    def open(self, path: str) -> None:
        self.planes: dict[int, Plane] = {}
        super().open(path)

    def slice_of(self, values: np.ndarray, index: int) -> np.ndarray:
        """A slice (…, rows, columns) of values (…, network's spatial…), as people look at it; a view."""
        if self.session.grids.dims == 2:
            return values.swapaxes(-1, -2)  # the first axis of a photograph runs along its rows
        return values[..., index].swapaxes(-1, -2)[..., ::-1, ::-1]  # to the left and to the back of a patient

    def place_of(self, voxels: np.ndarray) -> np.ndarray:
        """Rows and columns (N, 2) of voxels (N, dims) in their slice."""
        own = voxels[:, :2]
        if self.session.grids.dims == 3:
            own = np.array(self.session.grids.shape[:2]) - 1 - own
        return own[:, ::-1]

    def plane(self, index: int) -> Plane:
        """A slice, encoded once."""
        if index not in self.planes:
            grids = self.session.grids
            size = np.array(grids.shape) * grids.spacing if grids.dims == 3 else grids.file_shape
            image = np.ascontiguousarray(self.slice_of(self.session.image.numpy(), index))
            extent = (float(size[1]), float(size[0]))
            self.planes[index] = Plane(
                unadapted(self.base), get_base(self.base).img_size, torch.from_numpy(image), extent
            )
        return self.planes[index]


class Boxes(OnBase):
    """The base by boxes around the truth, which :meth:`show` is told."""

    def show(self, target: np.ndarray, random: np.random.Generator) -> None:
        """Draw boxes around the truth (file's spatial…)."""
        wanted = self.session.grids.on_tensor(target).numpy() > 0.5
        out = np.full(wanted.shape, -START_LOGIT, dtype=np.float32)
        for index in range(wanted.shape[2] if wanted.ndim == 3 else 1):
            mask = self.slice_of(wanted, index)
            if mask.any():
                plane = self.plane(index)
                self.slice_of(out, index)[...] = plane.back(plane.decode(boxes=plane.box(mask, random))).numpy()
        self.drawn = self._on_file(torch.from_numpy(out))

    def mask(self, class_name: str | None) -> np.ndarray:
        return self.drawn


class Feedback(OnBase):
    """The base by clicks, with the answer before as a mask prompt."""

    def reset(self) -> None:
        super().reset()
        self.logits: Tensor | None = None
        self.begun: dict[int, Tensor] = {}  # the answer of a slice, as it goes back in

    def answer(self, class_name: str | None) -> Tensor:
        start = self._start(class_name) if self.logits is None else self.logits
        out = start.numpy().copy()
        index = int(self.voxels[-1, 2]) if out.ndim == 3 else 0
        there = self.voxels[:, 2] == index if out.ndim == 3 else np.full(len(self.voxels), True)
        plane = self.plane(index)
        prompts = {
            "point_coords": plane.positions(self.place_of(self.voxels[there])),
            "point_labels": torch.from_numpy(self.labels[there]).float()[None, None],
        }
        own = self.slice_of(out, index)
        if index not in self.begun and (own > 0).any():
            self.begun[index] = plane.earlier(torch.from_numpy(own.copy()))
        if index in self.begun:
            prompts["masks"] = self.begun[index]
        answer = plane.decode(**prompts)
        self.begun[index] = as_earlier(answer, plane.embedding.shape[2:])
        own[...] = plane.back(answer).numpy()
        self.logits = torch.from_numpy(out)
        return self.logits


class Oracle(Peer):
    """Mends what is wrong near a click, by the truth, which :meth:`show` is told."""

    def show(self, target: np.ndarray, random: np.random.Generator) -> None:
        """Say what the truth is (file's spatial…)."""
        self.target = target

    def reset(self) -> None:
        super().reset()
        self.mended: np.ndarray | None = None

    def point(self, position: list[int], label: int, class_name: str | None) -> np.ndarray:
        if self.mended is None:
            self.mended = self.session.mask(class_name)
        dims = self.session.grids.dims
        affine = np.asarray(self.session.image.meta["original_affine"]) if dims == 3 else np.eye(dims)
        spacing = np.linalg.norm(affine[:dims, :dims], axis=0)
        near = within(self.mended.shape, np.array([position]), spacing, REACH[dims])
        self.mended = np.where(near, self.target, self.mended)
        return self.mended


class Walker(Peer):
    """A random walker from clicks and from what lies deep in the mask to start from, or far out of it."""

    def answer(self, class_name: str | None) -> Tensor:
        from skimage.segmentation import random_walker

        grids = self.session.grids
        seeds = walker_seeds(self._start(class_name).numpy() > 0, self.voxels, self.labels, grids.spacing)
        if not (seeds == 1).any():
            return torch.full(grids.shape, -START_LOGIT)
        image = np.moveaxis(self.session.image.numpy(), 0, -1)
        shares = random_walker(
            image,
            seeds,
            beta=BETA,
            mode="cg_j",
            tol=1e-4,
            channel_axis=-1,
            spacing=grids.spacing,
            return_full_prob=True,
        )
        return torch.from_numpy((shares[0] - 0.5).astype(np.float32))


def walker_seeds(start: np.ndarray, voxels: np.ndarray, labels: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Seeds (spatial…) of a random walker: 1 foreground, 2 background, 0 for what it has to decide.

    What lies in the mask to start from at least half as deep as its deepest voxel is foreground, and what lies as far
    out of it background; where there is no mask, the image's outermost voxels are background. A click is a ball, and
    takes away the other label's seeds up to twice its own distance from the mask's border. The newest click holds.

    Args:
        start: mask to start from, boolean.
        voxels: (N, dims) that were clicked, oldest first.
        labels: (N,) of these: 1 foreground, 0 background.
        spacing: size of a voxel along each axis.
    """
    seeds = np.zeros(start.shape, dtype=np.int64)
    if start.any() and not start.all():
        inside, outside = (ndimage.distance_transform_edt(side, sampling=list(spacing)) for side in (start, ~start))
        deep = DEPTH * inside.max()
        seeds[inside >= deep] = 1
        seeds[outside >= deep] = 2
        away = np.maximum(inside, outside)
    else:
        seeds[...] = 2
        seeds[(slice(1, -1),) * start.ndim] = 0
        away = np.zeros(start.shape)
    radius = BALL[start.ndim]
    for voxel, label in zip(voxels, labels):
        own, other = (1, 2) if label else (2, 1)
        wrong = 0.0 if bool(start[tuple(voxel)]) == bool(label) else 2.0 * float(away[tuple(voxel)])
        near = within(start.shape, voxel[None], spacing, radius + wrong)
        seeds[near & (seeds == other)] = 0
        seeds[within(start.shape, voxel[None], spacing, radius)] = own
    return seeds


PEERS = {"boxes": Boxes, "feedback": Feedback, "oracle": Oracle, "walker": Walker}
