"""Prompts as dictionary transforms: drawn from a label, read from a file, and carried to the network's grid.

They travel with the image (:mod:`medsa_nets.prompts.images`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from torch import Tensor

from medsa_nets.data.dataset import stable_seed
from medsa_nets.errors import DataError
from medsa_nets.prompts import Prompts, prompts_of, protocol_prompts, transform_positions, with_prompts


class SamplePromptsd(MapTransform):
    """Draw the prompts of an evaluation protocol from a label, the same for an image in every run.

    Args:
        keys: key of the label (1, spatial…), foreground above 0.5.
        prompt: protocol, see :func:`medsa_nets.prompts.protocol_prompts`.
        image_key: key of the image, whose file name seeds the draw.
        seed: seed of the draw.
    """

    def __init__(self, keys: KeysCollection, prompt: str = "none", image_key: str = "image", seed: int = 0) -> None:
        super().__init__(keys)
        self.prompt = prompt
        self.image_key = image_key
        self.seed = seed

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add points or a box to the image, in the label's grid."""
        out = dict(data)
        for key in self.key_iterator(out):
            out[self.image_key] = with_prompts(out[self.image_key], self.draw(out, torch.as_tensor(out[key])[0]))
        return out

    def draw(self, data: Mapping[Hashable, Any], label: Tensor) -> Prompts:
        """The prompts for a label (spatial…) of an item."""
        return protocol_prompts(label > 0.5, self.prompt, self.generator(data))

    def generator(self, data: Mapping[Hashable, Any]) -> torch.Generator:
        """Source of randomness that depends on the seed and the image's file name alone."""
        name = os.path.basename(str(getattr(data[self.image_key], "meta", {}).get("filename_or_obj", "")))
        return torch.Generator().manual_seed(stable_seed(self.seed, name))


class ReadPromptsd(MapTransform):
    """Read an image's prompts from a JSON file; images that it does not name are segmented automatically.

    The file maps a file name to ``points`` (list of pixel positions [x, y]), ``labels`` (1 foreground, 0 background;
    all 1 where absent) and ``box`` ([x0, y0, x1, y1])::

        {"ISIC_0000001.jpg": {"points": [[512, 380]], "labels": [1]}, "ISIC_0000002.jpg": {"box": [90, 60, 700, 540]}}

    Args:
        prompts: path of the file; none or empty reads nothing.
        image_key: key of the image.

    Raises:
        DataError: when the file is missing or malformed, or a prompt lies outside its image.
    """

    def __init__(self, prompts: str | None = None, image_key: str = "image") -> None:
        super().__init__(image_key)  # MONAI Deploy asks the first transform whether it takes a dictionary
        self.image_key = image_key
        self.path = prompts
        self.table = read_prompt_table(prompts)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the image's prompts, in its own grid."""
        out = dict(data)
        image = out[self.image_key]
        name = os.path.basename(str(image.meta.get("filename_or_obj", "")))
        if self.table:  # images of a batch carry prompts all or none
            prompts = Prompts()
            if name in self.table:
                prompts = parse_prompts(self.table[name], tuple(image.shape[1:]), f"prompts {self.path}, {name}")
            out[self.image_key] = with_prompts(image, prompts)
        return out


def read_prompt_table(path: str | Path | None) -> dict[str, Any]:
    """Read a JSON file that maps file names to prompts; nothing where there is no path."""
    if not path:
        return {}
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"prompts {path}: not readable as JSON ({error}).") from error
    if not isinstance(table, dict):
        raise DataError(f"prompts {path}: expected an object that maps file names to prompts.")
    return table


def parse_prompts(entry: Any, shape: tuple[int, ...], source: str) -> Prompts:
    """One prompt set (K = 1) from ``points``, ``labels`` and ``box`` of a file, checked against the image's shape."""
    out = Prompts()
    try:
        if not set(entry) & {"points", "box"} or set(entry) - {"points", "labels", "box"}:
            raise ValueError(f"found {', '.join(map(str, entry)) or 'nothing'}")
        if "points" in entry:
            points = torch.tensor(entry["points"], dtype=torch.float32).reshape(1, -1, len(shape))
            labels = torch.tensor(entry.get("labels", [1] * points.shape[1]), dtype=torch.float32).reshape(1, -1)
            if labels.shape[1] != points.shape[1]:
                raise ValueError(f"{points.shape[1]} points but {labels.shape[1]} labels")
            if not set(labels.flatten().tolist()) <= {0.0, 1.0}:
                raise ValueError("labels other than 1 (foreground) and 0 (background)")
            out = Prompts(points=points, labels=labels)
        if "box" in entry:
            out = replace(out, boxes=torch.tensor(entry["box"], dtype=torch.float32).reshape(1, 2 * len(shape)))
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DataError(f"{source}: {error}. Expected points, labels, box.") from error
    _require_inside(out, shape, source)
    return out


def _require_inside(prompts: Prompts, shape: tuple[int, ...], source: str) -> None:
    last = torch.tensor(shape, dtype=torch.float32) - 1.0
    for places in (prompts.points, prompts.boxes):
        if places is not None:
            corners = places.reshape(-1, len(shape))
            outside = ((corners < 0) | (corners > last)).any(dim=1)
            if bool(outside.any()):
                position = corners[outside][0].tolist()
                raise DataError(f"{source}: {position} lies outside the image, which is {' x '.join(map(str, shape))}.")


class PromptsToNetworkd(Transform):
    """Carry prompts from the source's grid to that of the transformed image, by the image's affines.

    A position p of the file's grid lies at ``inverse(image.affine) @ original_affine @ p`` of the tensor, whatever
    spatial transforms the image went through.

    Args:
        image_key: key of the image, a :class:`monai.data.MetaTensor`.
    """

    def __init__(self, image_key: str = "image") -> None:
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Convert the prompts that travel with the image, where there are any."""
        out = dict(data)
        image = out[self.image_key]
        prompts = prompts_of(image)
        if prompts:
            out[self.image_key] = with_prompts(image, prompts.through(source_to_tensor(image)))
        return out


def source_to_tensor(image: MetaTensor) -> Tensor:
    """Affine map (4, 4) from voxel indices of the file's grid to those of the image's tensor."""
    return torch.linalg.solve(image.affine.to(torch.float64), file_affine(image))


def tensor_to_source(image: MetaTensor) -> Tensor:
    """Affine map (4, 4) from voxel indices of the image's tensor to those of the file's grid."""
    return torch.linalg.solve(file_affine(image), image.affine.to(torch.float64))


def to_tensor_grid(positions: Tensor, image: MetaTensor) -> Tensor:
    """Positions (N, dims) in the file's grid to the tensor's grid."""
    return transform_positions(positions, source_to_tensor(image))


def to_source_grid(positions: Tensor, image: MetaTensor) -> Tensor:
    """Positions (N, dims) in the tensor's grid to the file's grid: the inverse of :func:`to_tensor_grid`."""
    return transform_positions(positions, tensor_to_source(image))


def file_affine(image: MetaTensor) -> Tensor:
    """Affine of the file's grid: the identity for photographs, which have none and whose tensors start at it."""
    affine = image.meta.get("original_affine")
    return torch.eye(len(image.affine), dtype=torch.float64) if affine is None else torch.as_tensor(affine).double()
