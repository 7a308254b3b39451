"""What a user says of a mask: points, scribbles, boxes, lassos, masks to start from, acceptance; in the file's grid."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from medsa_nets.errors import DataError

KINDS = ("point", "scribble", "box", "lasso", "mask", "accept")


@dataclass(frozen=True, eq=False)
class UserPrompt:
    """One thing that a user said of one class, in the grid of the image's file.

    - ``point``: one position, and ``label``: the voxel that holds it is of the class (1), or is not (0).
    - ``scribble``: every voxel that a brush touched, and their ``label``.
    - ``box``: first and last voxel of a box. It bounds the mask: nothing outside of it is of the class.
    - ``lasso``: corners of a closed polygon in the slice ``slice_index`` across ``axis`` (in images, of the image).
      With label 1 it bounds the mask in that slice: nothing outside of the polygon is of the class there; with label 0
      nothing inside of it is. Other slices are not bound.
    - ``mask``: a mask to start from, in place of what there was.
    - ``accept``: the mask stays as it is.

    Of what contradicts each other at a voxel, the newest holds. Bounds take away and force no voxel to be of the class.

    Attributes:
        kind: one of :data:`KINDS`.
        index: id of the class.
        number: place in the order of the session's prompts.
        time: seconds since the epoch.
        positions: (N, dims), in voxels of the file.
        label: 1 foreground, 0 background.
        axis: of a lasso in a volume.
        slice_index: of a lasso in a volume.
        mask: boolean (file's spatial…), of ``mask``.
    """

    kind: str
    index: int
    number: int
    time: float
    positions: np.ndarray
    label: int = 1
    axis: int | None = None
    slice_index: int | None = None
    mask: np.ndarray | None = None

    @property
    def marks(self) -> bool:
        """Whether it says of single voxels what they are."""
        return self.kind in ("point", "scribble")

    def voxels(self) -> np.ndarray:
        """Voxels (N, dims) of the file that it marks."""
        return np.rint(self.positions).astype(np.int64)

    def bound(self, positions: Sequence[np.ndarray]) -> np.ndarray:
        """Where a box or a lasso lets nothing of the class be.

        Args:
            positions: for each axis of the file, the places that are asked for, shaped to broadcast together.

        Returns:
            Boolean, of the shape that they broadcast to.
        """
        if self.kind == "box":
            first, last = self.positions
            inside = np.ones((1,) * len(positions), dtype=bool)
            for place, low, high in zip(positions, first, last):
                inside = inside & (place >= low - 0.5) & (place <= high + 0.5)
            return ~inside
        plane = [axis for axis in range(len(positions)) if axis != self.axis]
        rows, columns = positions[plane[0]], positions[plane[1]]
        found = _in_polygon(self.positions[:, plane], rows, columns) == (self.label == 0)
        if self.axis is None:
            return found
        return found & (np.abs(positions[self.axis] - float(self.slice_index or 0)) <= 0.5)

    def enforce(self, mask: np.ndarray) -> None:
        """Let a mask (file's spatial…), boolean, be as this says, in place."""
        if self.marks:
            mask[tuple(self.voxels().T)] = bool(self.label)
        elif self.kind == "box":
            kept = tuple(
                slice(max(0, int(np.ceil(a - 0.5))), int(np.floor(b + 0.5)) + 1) for a, b in zip(*self.positions)
            )
            inside = mask[kept].copy()
            mask[...] = False
            mask[kept] = inside
        elif self.kind == "lasso":
            place = tuple(self.slice_index if axis == self.axis else slice(None) for axis in range(mask.ndim))
            plane = [axis for axis in range(mask.ndim) if axis != self.axis]
            polygon = polygon_mask(self.positions[:, plane], (mask.shape[plane[0]], mask.shape[plane[1]]))
            mask[place] &= ~polygon if self.label == 0 else polygon


def polygon_mask(corners: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies in a closed polygon (even-odd rule), or on its line.

    Args:
        corners: (N, 2), positions in pixels; the last corner joins the first.
        shape: of the plane.
    """
    corners = np.asarray(corners, dtype=np.float64)
    inside, on_line = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    for (r0, c0), (r1, c1) in zip(corners, np.roll(corners, -1, axis=0)):
        # only pixels that the edge can say something of
        near = tuple(
            slice(max(0, int(np.floor(min(a, b))) - 1), max(0, int(np.ceil(max(a, b))) + 2))
            for a, b in ((r0, r1), (c0, c1))
        )
        if c0 != c1:
            beside = columns[:, near[1]]
            crosses = (c0 > beside) != (c1 > beside)
            inside[:, near[1]] ^= crosses & (rows < (r1 - r0) * (beside - c0) / (c1 - c0) + r0)
        row, column = rows[near[0]], columns[:, near[1]]
        square = (r1 - r0) ** 2 + (c1 - c0) ** 2
        along = ((row - r0) * (r1 - r0) + (column - c0) * (c1 - c0)) / max(square, 1e-12)
        along = along.clip(0.0, 1.0)
        on_line[near] |= (row - r0 - along * (r1 - r0)) ** 2 + (column - c0 - along * (c1 - c0)) ** 2 <= 1e-12
    return inside | on_line


def _in_polygon(corners: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Whether positions lie in the pixels of a polygon (:func:`polygon_mask`), for positions of any spacing."""
    last = np.ceil(corners.max(0)).astype(int) + 2
    extent = (int(last[0]), int(last[1]))
    pixels = polygon_mask(corners, extent)
    rows, columns = np.broadcast_arrays(np.rint(rows).astype(int), np.rint(columns).astype(int))
    known = (rows >= 0) & (rows < extent[0]) & (columns >= 0) & (columns < extent[1])
    return known & pixels[rows.clip(0, extent[0] - 1), columns.clip(0, extent[1] - 1)]


def read_positions(what: str, positions: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Positions (N, dims) in voxels of a file, checked.

    Raises:
        DataError: when they are no numbers, or lie outside the image.
    """
    dims = len(shape)
    try:
        found = np.asarray(positions, dtype=np.float64)
        found = found[None] if found.ndim == 1 else found
        fitting = found.ndim == 2 and found.shape[1] == dims and len(found) > 0 and bool(np.isfinite(found).all())
    except (TypeError, ValueError):
        fitting = False
    if not fitting:
        raise DataError(f"{what}: expected positions of {dims} voxel indices each, got {positions!r}.")
    outside = ((found < -0.5) | (np.rint(found) > np.array(shape) - 1)).any(axis=1)
    if outside.any():
        size = " x ".join(map(str, shape))
        raise DataError(f"{what}: {found[outside][0].tolist()} lies outside the image, which is {size}.")
    return found


def draw_line(positions: np.ndarray) -> np.ndarray:
    """Voxels (N, dims), each once, of a line that joins positions (M, dims) one after the other."""
    steps = [positions[:1]]
    for first, last in pairwise(positions):
        count = max(1, int(np.ceil(np.abs(last - first).max())))
        steps.append(first + (last - first) * np.arange(1, count + 1)[:, None] / count)
    return np.unique(np.rint(np.concatenate(steps)).astype(np.int64), axis=0)


def make_lasso(corners: Any, label: int, index: int, shape: tuple[int, ...]) -> UserPrompt:
    """A closed line in a slice of a volume, or in an image.

    Args:
        corners: (N, dims) with N of 3 or more, in voxels of the file; in volumes one index is the same for all.
        label: 1 for a line around the class, 0 for one around what is not of it.
        index: id of the class.
        shape: of the file.

    Raises:
        DataError: when corners are too few, lie outside, or in no slice.
    """
    found = read_positions("lasso", corners, shape)
    axis = slice_index = None
    if len(found) < 3:
        raise DataError(f"lasso: expected 3 or more corners, got {len(found)}.")
    if len(shape) == 3:
        whole = np.rint(found)
        flat = [a for a in range(3) if (whole[:, a] == whole[0, a]).all()]
        if not flat:
            raise DataError("lasso: its corners lie in no slice; one of their three indices must be the same for all.")
        axis = flat[-1]
        slice_index = int(whole[0, axis])
    return UserPrompt("lasso", index, 0, 0.0, found, label=label, axis=axis, slice_index=slice_index)


ENTRIES = ("mask", "box", "lasso", "points", "labels", "scribbles")


def read_user_prompts(
    entry: Any, index: int, shape: tuple[int, ...], read_mask: Callable[[str], np.ndarray]
) -> list[UserPrompt]:
    """Prompts of a class as a prompts file lists them, in the order in which a session takes them.

    Args:
        entry: some of ``mask`` (path of a mask to start from), ``box`` (first and last corner in one list), ``lasso``
            (a closed line, or several: ``{"points": […], "label": 1}``), ``points`` with ``labels`` (all 1 where
            absent), and ``scribbles`` (lines: ``[{"points": […], "label": 1}, …]``).
        index: id of the class.
        shape: of the image's file.
        read_mask: reads the mask of a path, boolean (shape).

    Raises:
        ValueError: when an entry has another form.
        DataError: when a position lies outside the image, or the mask can't be read.
    """
    dims = len(shape)
    if not isinstance(entry, Mapping) or not set(entry) & set(ENTRIES) - {"labels"} or set(entry) - set(ENTRIES):
        found = ", ".join(map(str, entry)) if isinstance(entry, (Mapping, list, tuple)) else repr(entry)
        raise ValueError(f"found {found or 'nothing'}; expected some of {', '.join(ENTRIES)}")
    out: list[UserPrompt] = []
    if "mask" in entry:
        out.append(UserPrompt("mask", index, 0, 0.0, np.empty((0, dims)), mask=read_mask(str(entry["mask"]))))
    if "box" in entry:
        box = np.asarray(entry["box"], dtype=np.float64)
        if box.shape != (2 * dims,):
            raise ValueError(f"box: expected {2 * dims} numbers, got {entry['box']!r}")
        corners = read_positions("box", box.reshape(2, dims), shape)
        out.append(UserPrompt("box", index, 0, 0.0, np.stack([corners.min(0), corners.max(0)])))
    for line in _lines("lasso", entry.get("lasso", [])):
        out.append(make_lasso(line["points"], line["label"], index, shape))
    if "points" in entry:
        points = read_positions("points", entry["points"], shape)
        labels = entry.get("labels", [1] * len(points))
        if not isinstance(labels, (list, tuple)):
            raise ValueError(f"labels: expected a list, got {labels!r}")
        if len(labels) != len(points):
            raise ValueError(f"{len(points)} points but {len(labels)} labels")
        if not set(labels) <= {0, 1}:
            raise ValueError("labels other than 1 (foreground) and 0 (background)")
        out += [UserPrompt("point", index, 0, 0.0, p[None], label=int(v)) for p, v in zip(points, labels)]
    elif "labels" in entry:
        raise ValueError("labels without points")
    for line in _lines("scribbles", entry.get("scribbles", [])):
        voxels = draw_line(read_positions("scribbles", line["points"], shape))
        out.append(UserPrompt("scribble", index, 0, 0.0, voxels.astype(np.float64), label=line["label"]))
    return out


def _lines(what: str, entry: Any) -> list[dict[str, Any]]:
    """Lines of a file: one, or several, each with points and a label, 1 where it has none."""
    out = []
    for line in [entry] if isinstance(entry, Mapping) else entry:
        if not isinstance(line, Mapping) or not {"points"} <= set(line) <= {"points", "label"}:
            raise ValueError(f"{what}: expected points and label, got {line!r}")
        label = line.get("label", 1)
        if label not in (0, 1):
            raise ValueError(f"{what}: label {label!r} other than 1 (foreground) and 0 (background)")
        out.append({"points": line["points"], "label": int(label)})
    return out


def pack_mask(mask: np.ndarray) -> str:
    """A boolean mask as text."""
    return base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 6)).decode()


def unpack_mask(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of :func:`pack_mask`.

    Raises:
        ValueError: when the text holds no mask of this shape.
    """
    count = int(np.prod(shape))
    try:
        packed = zlib.decompress(base64.b64decode(text.encode("ascii"), validate=True))
    except (zlib.error, UnicodeEncodeError, AttributeError) as error:
        raise ValueError(f"not a packed mask ({error})") from error
    bits = np.frombuffer(packed, dtype=np.uint8)
    if len(bits) != -(-count // 8):
        raise ValueError(f"{len(bits)} bytes instead of {-(-count // 8)}")
    return np.unpackbits(bits, count=count).reshape(shape).astype(bool)


def prompt_to_json(prompt: UserPrompt, classes: Sequence[str], world: np.ndarray) -> dict[str, Any]:
    """A prompt as it stands in a session's log; ``world`` holds its positions in the world (N, dims)."""
    out: dict[str, Any] = {
        "kind": prompt.kind, "class": classes[prompt.index], "number": prompt.number, "time": prompt.time
    }  # fmt: skip
    if prompt.kind not in ("mask", "accept"):
        out |= {"label": prompt.label, "voxels": prompt.positions.tolist(), "world": world.tolist()}
    if prompt.axis is not None:
        out |= {"axis": prompt.axis, "slice": prompt.slice_index}
    if prompt.mask is not None:
        out["mask"] = pack_mask(prompt.mask)
    return out


def prompt_from_json(entry: Mapping[str, Any], classes: Sequence[str], shape: tuple[int, ...]) -> UserPrompt:
    """Read a prompt of a log back.

    Raises:
        ValueError: when a field is missing or has another form.
        DataError: when a position lies outside the image.
    """
    kind, label = entry["kind"], entry.get("label", 1)
    if kind not in KINDS or entry["class"] not in classes or label not in (0, 1):
        raise ValueError(f"kind {kind!r}, class {entry['class']!r}, label {label!r}")
    axis, slice_index = entry.get("axis"), entry.get("slice")
    if (axis is not None) != (kind == "lasso" and len(shape) == 3):
        raise ValueError(f"{kind} with axis {axis!r}")
    if axis is not None and not (axis in range(3) and slice_index in range(shape[axis])):
        raise ValueError(f"axis {axis!r}, slice {slice_index!r}")
    positions = np.empty((0, len(shape)))
    if kind not in ("mask", "accept"):
        positions = read_positions(kind, entry["voxels"], shape)
    return UserPrompt(
        kind=kind,
        index=list(classes).index(entry["class"]),
        number=int(entry["number"]),
        time=float(entry["time"]),
        positions=positions,
        label=int(label),
        axis=axis,
        slice_index=slice_index,
        mask=unpack_mask(entry["mask"], shape) if kind == "mask" else None,
    )
