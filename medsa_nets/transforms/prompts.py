"""Prompts as dictionary transforms: drawn from a label, read from a file, and carried to the network's grid.

They travel with the image (:mod:`medsa_nets.prompts.images`).
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from torch import Tensor

from medsa_nets.data.dataset import stable_seed
from medsa_nets.data.masks import binarize_mask
from medsa_nets.data.outputs import image_path
from medsa_nets.data.photographs import PhotographReader
from medsa_nets.errors import DataError
from medsa_nets.prompts import (
    Prompts,
    UserPrompt,
    prompts_of,
    protocol_prompts,
    read_user_prompts,
    transform_positions,
    user_prompts_of,
    with_prompts,
    with_user_prompts,
)


class SamplePromptsd(MapTransform):
    """Draw the prompts of an evaluation protocol from a label, the same for an image in every run.

    Args:
        keys: key of the label (1, spatial…), foreground above 0.5; of several classes a mask for each (classes,
            spatial…), where those that are in the image are prompted for.
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
            label = torch.as_tensor(out[key])
            prompts = self.draw(out, label[0]) if len(label) == 1 else self.draw_classes(out, label)
            out[self.image_key] = with_prompts(out[self.image_key], prompts)
        return out

    def draw(self, data: Mapping[Hashable, Any], label: Tensor) -> Prompts:
        """The prompts for a label (spatial…) of an item."""
        return protocol_prompts(label > 0.5, self.prompt, self.generator(data))

    def draw_classes(self, data: Mapping[Hashable, Any], masks: Tensor) -> Prompts:
        """The prompts for each class of an item that its masks (classes, spatial…) hold."""
        generator = self.generator(data)
        there = [k for k, mask in enumerate(masks) if bool((mask > 0.5).any())]
        drawn = [protocol_prompts(masks[k] > 0.5, self.prompt, generator) for k in there]
        if not any(drawn):
            return Prompts()
        return replace(Prompts.join(drawn), classes=torch.tensor(there))

    def generator(self, data: Mapping[Hashable, Any]) -> torch.Generator:
        """Source of randomness that depends on the seed and the image's file name alone."""
        name = os.path.basename(str(getattr(data[self.image_key], "meta", {}).get("filename_or_obj", "")))
        return torch.Generator().manual_seed(stable_seed(self.seed, name))


class ReadPromptsd(MapTransform):
    """Read an image's prompts from a JSON file; images that it does not name are segmented automatically.

    The file maps a file name to some of these, in pixel positions [x, y] of the file:

    - ``points``, and ``labels`` (1 foreground, 0 background; all 1 where absent);
    - ``box``: [x0, y0, x1, y1];
    - ``scribbles``: lines ``{"points": [[x, y], …], "label": 1}``;
    - ``lasso``: closed lines of that form, around what is the lesion (label 1), or is not (0);
    - ``mask``: path of a mask to start from, as seen from the folder of the JSON file.

    ::

        {"ISIC_0000001.jpg": {"points": [[512, 380]], "labels": [1]}, "ISIC_0000002.jpg": {"box": [90, 60, 700, 540]}}

    Where there are several classes, it maps a file name to classes, and these to the same::

        {"V0001.jpg": {"disc": {"box": [520, 480, 700, 690]}, "cup": {"points": [[611, 590]]}}}

    Place it after the image is loaded, before any spatial transform.

    Args:
        prompts: path of the file; none or empty reads nothing.
        image_key: key of the image.
        classes: names of the classes, in the order of their ids; with one or none, entries name no class.

    Raises:
        DataError: when the file is missing or malformed, it names an unknown class, or a prompt lies outside its image.
    """

    def __init__(self, prompts: str | None = None, image_key: str = "image", classes: Sequence[str] = ()) -> None:
        super().__init__(image_key)  # MONAI Deploy asks the first transform whether it takes a dictionary
        self.image_key = image_key
        self.path = prompts
        self.table = read_prompt_table(prompts)
        self.classes = list(classes)
        self.named = len(self.classes) > 1

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the image's prompts, in its own grid."""
        out = dict(data)
        if self.table:  # images of a batch carry prompts all or none
            out[self.image_key] = self.add(out[self.image_key])
        return out

    def add(self, image: MetaTensor) -> MetaTensor:
        """The image with its prompts of the table."""
        name = os.path.basename(str(image.meta.get("filename_or_obj", "")))
        given: list[UserPrompt] = []
        if name in self.table:
            parse = self.parse_classes if self.named else self.parse
            given = parse(self.table[name], image, f"prompts {self.path}, {name}")
        return with_user_prompts(with_prompts(image, prompts_of_user(given, image.dim() - 1, self.named)), given)

    def parse_classes(self, entry: Any, image: MetaTensor, source: str) -> list[UserPrompt]:
        """Prompts of all classes of an image, from its entry in the file."""
        if not isinstance(entry, dict) or not entry or set(entry) - set(self.classes):
            named = ", ".join(map(str, entry)) if isinstance(entry, dict) else repr(entry)
            raise DataError(
                f"{source}: found {named or 'nothing'}; expected classes out of {', '.join(self.classes)}, each with "
                "points and labels, box, scribbles, lasso or mask."
            )
        given: list[UserPrompt] = []
        for number in sorted(self.classes.index(name) for name in entry):
            given += self.parse(entry[self.classes[number]], image, f"{source}, {self.classes[number]}", number)
        return given

    def parse(self, entry: Any, image: MetaTensor, source: str, index: int = 0) -> list[UserPrompt]:
        """Prompts of a class of an image, from its entry in the file."""

        def read_mask(path: str) -> np.ndarray:
            there = Path(self.path or "").parent / path
            if not there.exists():
                raise DataError(f"mask {there}: there is no such file.")
            return self.read_mask(there, image)

        try:
            return read_user_prompts(entry, index, tuple(image.shape[1:]), read_mask)
        except (DataError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise DataError(f"{source}: {str(error).removesuffix('.')}.") from error

    def read_mask(self, path: Path, image: MetaTensor) -> np.ndarray:
        """A mask of an image, boolean on the image's own grid."""
        reader = PhotographReader(mode="L")
        mask, meta = reader.get_data(reader.read(path))
        if mask.shape != image.shape[1:]:
            sizes = [" x ".join(map(str, shape)) for shape in (mask.shape, image.shape[1:])]
            raise DataError(f"mask {path}: its size is {sizes[0]}, that of the image {sizes[1]}. Resample the mask.")
        return binarize_mask(mask, f"mask {path}", bool(meta["lossy"]))


def prompts_of_user(prompts: Sequence[UserPrompt], dims: int, named: bool = True) -> Prompts:
    """Of what a user said of an image, what a network can be asked at once and what pictures show: points or boxes.

    Args:
        prompts: in the grid of the file.
        dims: of the image.
        named: whether they say which class is meant.

    Returns:
        A prompt set for each class with points, and the boxes too where all of these have one; sets of boxes alone
        where no class has points. Empty where there are neither.
    """
    points: dict[int, list[UserPrompt]] = {}
    boxes: dict[int, UserPrompt] = {}
    for prompt in prompts:
        if prompt.kind == "point":
            points.setdefault(prompt.index, []).append(prompt)
        elif prompt.kind == "box":
            boxes[prompt.index] = prompt
    sets = []
    for index in sorted(points or boxes):
        one = Prompts(classes=torch.tensor([index]) if named else None)
        if points:
            own = np.stack([prompt.positions[0] for prompt in points[index]])
            labels = torch.tensor([[float(prompt.label) for prompt in points[index]]])
            one = one.with_points(torch.from_numpy(own).float()[None], labels)
        if set(boxes) >= set(points):
            one = replace(one, boxes=torch.from_numpy(boxes[index].positions).float().reshape(1, 2 * dims))
        sets.append(one)
    return Prompts.join(sets) if sets else Prompts()


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


def check_prompt_keys(path: str | Path | None, entries: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a prompts file that names images which are not there, before the first image is segmented.

    Args:
        path: of the file; none or empty has nothing to check.
        entries: the data list, with ``image``. What lies in the folder of one of its images may be named too, so that
            one file serves a folder and each of its images.

    Raises:
        DataError: when the file is missing or malformed, or a key is the name of no image; the message lists them.
    """
    table = read_prompt_table(path)
    if not table:
        return
    images = [Path(image_path(entry)) for entry in entries]
    names = {image.name for image in images}
    folders = {image.parent for image in images}
    for key in table:
        if sum(image.name == key for image in images) > 1:
            raise DataError(
                f"prompts {path}: {key!r} is the name of several images. Segment them one by one (--dataset_dir FILE)."
            )
    stray = [key for key in table if key not in names and not _lies_in(key, folders)]
    if stray:
        near = difflib.get_close_matches(stray[0], sorted(names), n=1, cutoff=0.5)
        listed = ", ".join(repr(key) for key in stray[:10]) + (
            f" and {len(stray) - 10} more" if len(stray) > 10 else ""
        )
        raise DataError(
            f"prompts {path}: no image has the name {listed}; expected names of files (or DICOM folders) with their "
            f"suffix, as {(near or sorted(names))[0]!r}. Correct the keys, or take them out."
        )


def _lies_in(key: str, folders: Iterable[Path]) -> bool:
    return os.path.basename(key) == key and any((folder / key).exists() for folder in folders)


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


class EnforceUserPromptsd(MapTransform):
    """Let masks on the grid of the image's file be as its user said (:class:`~medsa_nets.prompts.UserPrompt`).

    Marked voxels get their label and bounds hold, the newest last; on the network's grid, which may be coarser, a click
    stands for more than its voxel, and two may fall on one. Place it after masks came back to the file's grid.

    Args:
        keys: keys of masks (1 or classes, spatial…), foreground above 0.5, or of a label map of 0 and 1 + class id.
        image_key: key of the image that the prompts travel with.
        label_map: whether masks are label maps.
        overlap: whether a voxel may lie in the masks of several classes.
    """

    def __init__(
        self, keys: KeysCollection, image_key: str = "image", label_map: bool = False, overlap: bool = True
    ) -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.label_map = label_map
        self.overlap = overlap

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change voxels that prompts speak of."""
        out = dict(data)
        prompts = user_prompts_of(out[self.image_key])
        if not prompts:
            return out
        for key in self.key_iterator(out):
            pred = out[key].clone()
            tensor = pred.as_tensor() if isinstance(pred, MetaTensor) else pred
            for prompt in prompts:
                values = tensor[prompt.index if len(tensor) > 1 else 0]
                value = float(prompt.index + 1) if self.label_map else 1.0
                if prompt.marks:
                    place = tuple(torch.from_numpy(prompt.voxels().T).to(values.device))
                    held = values[place]
                    if prompt.label and not self.overlap:
                        tensor[(slice(None),) + place] = 0.0  # noqa: RUF005
                    values[place] = value if prompt.label else torch.where(held == value, 0.0, held)
                else:
                    before = (values == value).cpu().numpy()
                    after = before.copy()
                    prompt.enforce(after)
                    values[torch.from_numpy(before & ~after).to(values.device)] = 0.0
            out[key] = pred
        return out
