"""Names of output files: one name per image, used in every file about it; and a check of the output folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.data import FolderLayoutBase

from medsa_nets import errors
from medsa_nets.data.atomic import check_writable, make_folder
from medsa_nets.errors import DataError

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff",
            ".webp", ".gif", ".ppm.gz", ".pgm.gz", ".ppm", ".pgm", ".dcm", ".dicom", ".ima")  # fmt: skip


def output_name(path: str | Path) -> str:
    """Name of an image without folder, and without the suffix where it is that of a format.

    What only looks like a suffix stays, as the last part of a UID that a DICOM folder or file is named by.
    """
    name = Path(path).name
    suffix = next((s for s in SUFFIXES if name.lower().endswith(s) and len(name) > len(s)), "")
    return name[: len(name) - len(suffix)]


def image_path(entry: Mapping[str, Any]) -> str:
    """Path of the image of an entry; of several files (channels), the first one's."""
    image = entry["image"]
    return str(image[0] if isinstance(image, (list, tuple)) and image else image)


def unique_names(paths: Iterable[str | Path]) -> dict[str, str]:
    """A name of its own for each of several images, by its path: :func:`output_name` where that is enough.

    Images of one name get as many of their folders as tell them apart, as ``patient1_IMG_1`` and ``patient2_IMG_1``;
    those of one folder their suffix too, as ``a.jpg`` and ``a.png``. Upper and lower case count as one, as some file
    systems have it. What is no path, as an image in memory, gets none.
    """
    groups: dict[str, list[str]] = {}
    for path in sorted({str(path) for path in paths if isinstance(path, (str, os.PathLike))}):
        groups.setdefault(output_name(path).casefold(), []).append(path)
    names = {path: output_name(path) for path, *others in groups.values() if not others}
    taken = {name.casefold() for name in names.values()}
    for group in groups.values():
        if len(group) > 1:
            for path, name in _distinct_names(group).items():
                number, names[path] = 1, name
                while names[path].casefold() in taken:
                    number += 1
                    names[path] = f"{name}_{number}"
                taken.add(names[path].casefold())
    return names


def _distinct_names(paths: Sequence[str]) -> dict[str, str]:
    """Names of images whose :func:`output_name` is the same."""
    folders = {path: Path(os.path.abspath(path)).parts[1:-1] for path in paths}
    in_one_folder = len(set(folders.values())) < len(paths)
    last = {path: Path(path).name if in_one_folder else output_name(path) for path in paths}
    names = dict(last)
    for depth in range(max(map(len, folders.values())) + 1):
        names = {path: "_".join([*folders[path][len(folders[path]) - depth :], last[path]]) for path in paths}
        if len({name.casefold() for name in names.values()}) == len(paths):
            break
    return names


def class_postfix(name: str, postfix: str) -> str:
    """What stands behind an image's name in the file of one of its classes: the class, safe in names of files."""
    return f"{re.sub(r'[^A-Za-z0-9-]+', '-', name).strip('-')}_{postfix}"


def class_endings(classes: Sequence[str], overlap: bool, postfix: str = "segmentation") -> list[str]:
    """Endings of an image's results: one mask or map, or a mask for each of several classes that overlap.

    Raises:
        DataError: when two classes would share a file.
    """
    if not overlap or len(classes) == 1:
        return [f"_{postfix}.png"]
    endings = [f"_{class_postfix(name, postfix)}.png" for name in classes]
    if len({ending.casefold() for ending in endings}) < len(endings):
        raise DataError(f"classes {', '.join(classes)}: two of them would share a file. Rename one of them.")
    return endings


def result_endings(classes: Sequence[str], overlap: bool) -> list[str]:
    """Endings of all that inference may write for an image: masks, probabilities, a picture.

    Args:
        classes: names of the classes.
        overlap: whether they overlap.

    Raises:
        DataError: when two classes would share a file.
    """
    return [*class_endings(classes, overlap), *class_endings(classes, True, "probability"), "_overlay.png"]


class NamedOutputs(FolderLayoutBase):
    """Where ``SaveImage`` puts the file of an image: ``<output_dir>/<name>_<postfix><extension>``.

    MONAI's own layout takes whatever stands behind the last dot of a name for a suffix, so that the results of two
    DICOM folders that are named by their UIDs become one file.

    Args:
        output_dir: folder of the files; it is made with the first one.
        postfix: what stands behind the image's name (:func:`output_name`).
        extension: suffix of the files.
        data: entries of all images, with ``image``, where those of one name are told apart by their folders
            (:func:`unique_names`), as a layout of a task has them; none names each by its file alone.
    """

    def __init__(
        self, output_dir: str | Path, postfix: str, extension: str, data: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        self.output_dir = Path(output_dir)
        self.ending = f"_{postfix}{extension}"
        self.names = unique_names(image_path(entry) for entry in data)

    def filename(self, subject: str | Path = "image", idx: Any = None, **kwargs: Any) -> Path:
        """Path of the file of an image (``subject``, its path)."""
        name = self.names.get(str(subject)) or output_name(subject)
        return make_folder(self.output_dir) / (name + ("" if idx is None else f"_{idx}") + self.ending)


def prepare_outputs(
    entries: Iterable[Mapping[str, Any]], output_dir: str | Path, *endings: str, by_folder: bool = False
) -> None:
    """Refuse an inference whose results would be lost, before its first image.

    Args:
        entries: the data list, with ``image``.
        output_dir: folder of the results.
        endings: of the files that each image gives behind its name, as ``_segmentation.png``.
        by_folder: whether images of one name are told apart by their folders (:class:`NamedOutputs`).

    Raises:
        DataError: when the results of two images would have one name, or would replace an image.
        OutputError: when the folder can't be made or written to.
    """
    paths = [image_path(entry) for entry in entries]
    names = unique_names(paths) if by_folder else {}
    if not by_folder:
        check_names(paths)
    there = {os.path.realpath(path) for path in paths}
    for path in paths:
        for ending in endings:
            target = Path(output_dir) / (names.get(path, output_name(path)) + ending)
            if os.path.realpath(target) in there:
                raise DataError(
                    f"{target}: the result of {path} would replace this image. Name another folder (--output_dir)."
                )
    prepare_folders(output_dir=output_dir)


def check_names(paths: Iterable[str]) -> None:
    """Check that the results of several images have names of their own.

    Raises:
        DataError: when those of two have one name, upper and lower case being the same.
    """
    known: dict[str, str] = {}
    for path in paths:
        other = known.setdefault(output_name(path).casefold(), path)
        if os.path.abspath(other) != os.path.abspath(path):
            raise DataError(
                f"{other} and {path}: their results would have one name ({output_name(path)}_…). Rename one of them, "
                "or segment them into different folders."
            )


def prepare_folders(**folders: str | Path) -> None:
    """Test whether files can be written to the folders of a run, and leave these as they were.

    Args:
        folders: by the option that names another one, as ``output_dir``.

    Raises:
        OutputError: when one can't be made or written to.
    """
    for option, folder in folders.items():
        check_writable(folder, f"--{option}")
        if str(folder) not in errors.output_folders:
            errors.output_folders.append(str(folder))
