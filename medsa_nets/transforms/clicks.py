"""Clicks and scribbles of an annotation tool (MONAI Label's requests) as prompts."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from monai.data import MetaTensor
from monai.transforms import Transform

from medsa_nets.data.volumes import read_volume
from medsa_nets.errors import DataError
from medsa_nets.prompts import UserPrompt, with_prompts, with_user_prompts
from medsa_nets.transforms.prompts import file_affine, prompts_of_user

logger = logging.getLogger(__name__)

DRAWN = {"foreground_scribbles": 1, "background_scribbles": 0}  # layers of MONAI Label's module for 3D Slicer
OFF_GRID = 0.1  # voxels that a drawn voxel may lie beside one of the image


class ReadClicksd(Transform):
    """Turn a request's clicks into prompts, in the grid of the image's file.

    A request names, at the top level of the data dictionary, lists of voxel indices of the file's own grid:

    - one list per class (``"spleen": [[14, 10, 16]]``, the form of DeepEdit and of the Slicer and OHIF plugins), names
      compared without regard to case;
    - ``foreground``, which belongs to the class that ``label`` names (the form of DeepGrow) or to the only class there
      is;
    - ``background``: negative clicks on the class that ``label`` names, where that one is clicked, else on all clicked
      ones.

    Or ``label`` is the path of a label map of scribbles that came with the request (3D Slicer's *Scribbles*): every
    voxel that holds the value of ``foreground_scribbles`` or of ``background_scribbles`` in ``label_info``
    (``[{"name": …, "id": …}]``) is one of the class that ``selected_label_name`` names, or is not; without
    ``label_info`` the values are those after the classes', background first. Other values say nothing. ``roi``
    (first and last voxel of each axis in turn) is a box around that class. Only files of the system's folder for
    temporary files are read, where MONAI Label keeps what came with a request.

    Lists that can't be used (unknown names, places outside the image, something other than indices), and label maps of
    another grid, are left out; what was left out, and why, stands in ``result["messages"]``, which MONAI Label puts
    into its reply. Without a usable click or scribble nothing is added: the image is segmented automatically. Place it
    after the image is loaded, before any spatial transform.

    Args:
        classes: names of the classes, in the order of their ids.
        image_key: key of the image (C, spatial…).
        result_key: key of the reply.
    """

    def __init__(self, classes: Sequence[str], image_key: str = "image", result_key: str = "result") -> None:
        self.classes = [name.lower() for name in classes]
        self.image_key = image_key
        self.result_key = result_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the points of the clicked classes to the image, and what could not be used to the reply."""
        out = dict(data)
        shape = tuple(int(n) for n in out[self.image_key].shape[1:])
        messages: list[str] = []
        lists: dict[str, list[list[float]]] = {}
        for key, value in data.items():
            if isinstance(key, str) and (key.lower() in (*self.classes, "foreground", "background") or _is_list(value)):
                inside = self._check(key, value, shape, messages)
                if inside:
                    lists[key.lower()] = lists.get(key.lower(), []) + inside
        drawn = self._scribbles(data, out[self.image_key], messages)
        focus = self._focus(data, bool(lists), messages)
        negative = lists.pop("background", [])
        unnamed = lists.pop("foreground", [])
        positive = {self.classes.index(name): clicks for name, clicks in lists.items()}
        if unnamed or (negative and not positive):
            if focus is None:
                messages.append(f"label: expected the class that is clicked on, one of {', '.join(self.classes)}.")
            else:
                positive[focus] = positive.get(focus, []) + unnamed
        prompts = self._prompts(positive, negative, focus) + drawn
        if prompts:
            network = prompts_of_user(prompts, len(shape))
            out[self.image_key] = with_user_prompts(with_prompts(out[self.image_key], network), prompts)
        if messages:
            for message in messages:
                logger.warning(message)
            reply = dict(out.get(self.result_key) or {})
            out[self.result_key] = {**reply, "messages": [*reply.get("messages", []), *messages]}
        return out

    def _focus(self, data: Mapping[Hashable, Any], clicked: bool, messages: list[str]) -> int | None:
        """The class that the request is about."""
        name = data.get("selected_label_name") if _is_file(data.get("label")) else data.get("label")
        if isinstance(name, str) and name and name.lower() != "background":
            if name.lower() in self.classes:
                return self.classes.index(name.lower())
            if clicked:
                messages.append(f"label: {name!r} is unknown; expected one of {', '.join(self.classes)}.")
        return 0 if len(self.classes) == 1 else None

    def _check(self, key: str, value: Any, shape: tuple[int, ...], messages: list[str]) -> list[list[float]]:
        """Clicks of a list that lie in the image."""
        if not value:
            return []
        if key.lower() not in (*self.classes, "foreground", "background"):
            messages.append(f"{key}: unknown label; expected one of {', '.join(self.classes)}, or background.")
            return []
        inside = []
        for click in value if isinstance(value, (list, tuple)) else [value]:
            if not _is_position(click) or len(click) < len(shape):
                messages.append(f"{key}: {click!r} is no click; expected {len(shape)} voxel indices.")
            elif any(not 0 <= c <= n - 1 for c, n in zip(click, shape)) or any(click[len(shape) :]):
                size = " x ".join(str(n) for n in shape)
                messages.append(f"{key}: the click {list(click)} lies outside the image, which is {size}.")
            else:
                inside.append([float(c) for c in click[: len(shape)]])
        return inside

    def _scribbles(self, data: Mapping[Hashable, Any], image: MetaTensor, messages: list[str]) -> list[UserPrompt]:
        """What a label map says of a class: a box, and a scribble of each label."""
        path = data.get("label")
        if not _is_file(path):
            return []
        name = str(data.get("selected_label_name") or (self.classes[0] if len(self.classes) == 1 else "")).lower()
        if name not in self.classes:
            found = f"{name!r} is unknown; " if name else ""
            messages.append(f"selected_label_name: {found}expected one of {', '.join(self.classes)}.")
            return []
        index, shape = self.classes.index(name), tuple(int(n) for n in image.shape[1:])
        try:
            voxels = _drawn(Path(path), self._values(data), image)
            box = _read_roi(data.get("roi"), shape)
        except DataError as error:
            messages.append(str(error))
            return []
        out = [] if box is None else [UserPrompt("box", index, 0, 0.0, box)]
        return out + [
            UserPrompt("scribble", index, 0, 0.0, own.astype(np.float64), label=label)
            for label, own in sorted(voxels.items(), reverse=True)
            if len(own)
        ]

    def _values(self, data: Mapping[Hashable, Any]) -> dict[int, int]:
        """Labels, 1 and 0, and the values of a label map that mean them."""
        entries = data.get("label_info")
        if not isinstance(entries, list):
            return {0: len(self.classes) + 1, 1: len(self.classes) + 2}
        named = [(entry.get("name"), entry.get("id")) for entry in entries if isinstance(entry, Mapping)]
        return {DRAWN[name]: value for name, value in named if name in DRAWN and isinstance(value, int)}

    @staticmethod
    def _prompts(
        positive: Mapping[int, list[list[float]]], negative: list[list[float]], focus: int | None
    ) -> list[UserPrompt]:
        out = []
        for index in sorted(positive):
            against = negative if focus not in positive or index == focus else []
            for clicks, label in ((positive[index], 1), (against, 0)):
                out += [UserPrompt("point", index, 0, 0.0, np.array([click]), label=label) for click in clicks]
        return out


def _is_position(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(c, (int, float)) and not isinstance(c, bool) and c == c for c in value
    )


def _is_list(value: Any) -> bool:
    """Whether a value looks like a list of clicks."""
    return isinstance(value, list) and bool(value) and all(_is_position(v) and 2 <= len(v) <= 3 for v in value)


def _is_file(value: Any) -> TypeGuard[str]:
    """Whether it is the path of a file that came with a request."""
    try:
        path = Path(value).resolve()
        return path.is_relative_to(Path(tempfile.gettempdir()).resolve()) and path.is_file()
    except (OSError, TypeError, ValueError):  # of what is no path, or too long for one
        return False


def _drawn(path: Path, values: Mapping[int, int], image: MetaTensor) -> dict[int, np.ndarray]:
    """Voxels (N, dims) of an image's file that a label map marks with each of some values.

    Args:
        path: of the label map; its axes may run otherwise than the image's.
        values: what means each label.
        image: (C, spatial…) as it was read.

    Raises:
        DataError: when it can't be read, or its voxels are not those of the image.
    """
    drawn = read_volume(path)
    shape = tuple(int(n) for n in image.shape[1:])
    held = np.rint(drawn[0].numpy())
    volume = len(shape) == 3
    to_image = None
    if volume:
        to_image = np.linalg.inv(np.asarray(file_affine(image))) @ np.asarray(drawn.affine)
    out = {}
    for label, value in values.items():
        places = np.argwhere(held == value).astype(np.float64)
        if to_image is not None:
            places = places @ to_image[:3, :3].T + to_image[:3, 3]
        whole = np.rint(places[:, : len(shape)]).astype(np.int64)
        far = np.abs(places[:, : len(shape)] - whole).max(initial=0.0) > OFF_GRID
        if far or (whole < 0).any() or (whole >= np.array(shape)).any() or (not volume and held.shape[2] != 1):
            sizes = [" x ".join(map(str, size)) for size in (held.shape, shape)]
            raise DataError(
                f"label: the scribbles ({sizes[0]} voxels) do not lie on the voxels of the image ({sizes[1]}). Draw "
                "them on the study itself."
            )
        out[label] = whole
    return out


def _read_roi(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """First and last voxel (2, dims) of a region of interest, cut to the image; none where there is none.

    Raises:
        DataError: when it is something else, or lies outside.
    """
    if not value:
        return None
    dims = len(shape)
    if not _is_position(value) or len(value) < 2 * dims:
        raise DataError(f"roi: expected {2 * dims} voxel indices, first and last of each axis, got {value!r}.")
    corners = np.sort(np.asarray(value[: 2 * dims], dtype=np.float64).reshape(dims, 2).T, axis=0)
    if (corners[1] < 0).any() or (corners[0] > np.array(shape) - 1).any():
        raise DataError(f"roi: {list(value)} lies outside the image, which is {' x '.join(map(str, shape))}.")
    return np.clip(corners, 0, np.array(shape) - 1)
