"""Data lists: which image belongs to which mask and split, from folders as they are published or a Decathlon JSON."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from monai.data import load_decathlon_datalist

from medsa_nets.data.layouts import SPLITS, hash_of, read_layout, split_groups
from medsa_nets.data.outputs import output_name
from medsa_nets.data.photographs import read_mask, read_photograph
from medsa_nets.data.slices import is_dicom
from medsa_nets.errors import DataError

logger = logging.getLogger(__name__)

PHOTOGRAPH_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".ppm.gz", ".pgm.gz", ".dcm")
RATERS = ("each", "majority", "random")
# folder prefixes of the ISIC challenges, per split: images in <prefix>_Data, masks in <prefix>…GroundTruth
_ISIC_FOLDERS = (
    {
        "training": ("ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Training_GroundTruth"),
        "testing": ("ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth"),
    },
    {
        "training": ("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
        "validation": ("ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth"),
        "testing": ("ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth"),
    },
)
_KVASIR_FOLDERS = ("images", "masks")
_NNUNET_FOLDERS = ("imagesTr", "labelsTr")


def image_id(item: dict[str, Any]) -> str:
    """Name of an image without folder and suffix."""
    return output_name(str(item["image"]))


def paths_of(value: str | Sequence[str]) -> list[str]:
    """The files of an image or label: one, or several (channels, raters)."""
    return [value] if isinstance(value, str) else list(value)


def is_photograph(path: Path) -> bool:
    """Whether a file's name is that of a photograph that this package reads."""
    return path.name.lower().endswith(PHOTOGRAPH_SUFFIXES)


def load_datalist(
    split: str,
    dataset_dir: str | Path,
    datalist: str | Path | None = None,
    *,
    layout: Any = None,
    raters: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    limit: int = 0,
    skip_unreadable: bool = False,
    required: bool = True,
) -> list[dict[str, Any]]:
    """List the images and masks of a split.

    Where the data set has no validation split, a share of the training images, chosen by a hash of their names, is kept
    for validation: the same images on every machine. Test images are never among them.

    Args:
        split: ``training``, ``validation`` or ``testing``.
        dataset_dir: folder of the data set: ISIC 2016 or 2017 challenge (part 1), Kvasir-SEG (``images/``,
            ``masks/``), nnU-Net (``imagesTr/``, ``labelsTr/``), or any folder together with ``datalist``.
        datalist: file in the Decathlon JSON form (keys ``training``, ``validation``, ``testing``; each entry has
            ``image`` and ``label``, paths relative to ``dataset_dir``).
        layout: where a data set of another folder shape has its images and masks
            (:func:`~medsa_nets.data.layouts.read_layout`); none looks for the shapes above.
        raters: what is learned from masks of several raters, a list under ``label``
            (:class:`~medsa_nets.transforms.ChooseRaterd`): ``majority``, ``random``, or ``each``: then an image stands
            in the list with each of its masks, in ``rater`` (0, 1, …). None expects one mask.
        validation_fraction: share of the training images kept for validation where the data set has no such split.
        seed: seed of that choice.
        limit: if above 0, this many images of the split, chosen by the same hash.
        skip_unreadable: read every file now, leave out entries that can't be read, and name them in the log.
        required: whether an empty split is an error; a training goes on without validation.

    Returns:
        Entries with ``image`` and ``label``, absolute paths (of several masks, lists of them), sorted by name.

    Raises:
        DataError: when folder, file or split is missing, when ``raters`` is something else, when the list is empty, or
            when files are not there.
    """
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")
    root = Path(dataset_dir).expanduser()
    if not root.is_dir():
        raise DataError(f"dataset_dir {root}: there is no such folder. Pass the data set's folder (--dataset_dir).")
    if datalist:
        several = ("label",) if raters else ()
        splits = read_datalist(Path(datalist).expanduser(), root, _scan, several)
    else:
        splits = read_layout(root, layout, is_photograph) if layout else _scan(root)
    items = choose_split(splits, split, validation_fraction, seed, limit, str(datalist or root), image_id, required)
    items = keep_readable(items) if skip_unreadable and items else items
    return list_raters(items, raters) if raters else items


def list_raters(items: Sequence[dict[str, Any]], raters: str) -> list[dict[str, Any]]:
    """Entries of images with masks of several raters, as :func:`load_datalist` says.

    Raises:
        DataError: when ``raters`` is no way to choose, or an image has one mask.
    """
    if raters not in RATERS:
        raise DataError(f"raters must be one of {', '.join(RATERS)}; got {raters!r}.")
    single = next((item for item in items if not isinstance(item["label"], list) or len(item["label"]) < 2), None)
    if single is not None:
        raise DataError(
            f"{single['image']}: it has one mask; with raters ({raters}), several are expected, in a list under "
            "'label' or by the layout of the task. Set raters to null (--raters None)."
        )
    if raters != "each":
        return list(items)
    return [{**item, "rater": rater} for item in items for rater in range(len(item["label"]))]


def choose_split(
    splits: dict[str, list[dict[str, Any]]],
    split: str,
    validation_fraction: float,
    seed: int,
    limit: int,
    source: str,
    name_of: Callable[[dict[str, Any]], str],
    required: bool = True,
) -> list[dict[str, Any]]:
    """Entries of a split, sorted; where there is no validation split, a share of the training entries stands for it.

    Both that share and ``limit`` choose by a hash of ``name_of(entry)``; other arguments as in :func:`load_datalist`.
    The share is one entry or more, where there are two or more and it is not 0. Entries that name their ``group`` are
    not parted from it (:func:`~medsa_nets.data.layouts.split_groups`).

    Raises:
        DataError: when the split is empty and ``required``; the message begins with ``source`` and counts what was
            found. Where it is not required, the log says what follows.
    """
    if not splits.get("validation") and split != "testing":
        training = splits.get("training", [])
        if training and all("group" in item for item in training):
            splits["validation"], splits["training"] = split_groups(training, validation_fraction, seed)
        else:
            count = round(validation_fraction * len(training)) if len(training) > 1 else 0
            if validation_fraction > 0 and len(training) > 1:
                count = min(max(count, 1), len(training) - 1)
            ranked = sorted(training, key=lambda item: hash_of(name_of(item), seed))
            splits["validation"], splits["training"] = ranked[:count], ranked[count:]
    items = splits.get(split, [])
    if not items:
        counts = ", ".join(f"{name} {len(splits.get(name, []))}" for name in SPLITS)
        if not required and any(splits.values()):
            logger.warning(
                "%s: the split %r is empty (found: %s). The training goes on without it; its last adapter counts as "
                "its best.", source, split, counts,
            )  # fmt: skip
            return []
        remedy = {
            "training": "Add images with masks, or lower --validation_fraction",
            "validation": "Raise --validation_fraction, name entries under 'validation' in a data list (--datalist), "
            "or choose another split (--split testing)",
            "testing": "Name entries under 'testing' in a data list (--datalist), or choose another split",
        }[split]
        raise DataError(f"{source}: the split {split!r} is empty (found: {counts}). {remedy}.")
    if limit > 0:
        items = sorted(items, key=lambda item: hash_of(name_of(item), seed))[:limit]
    items = sorted(items, key=lambda item: item["image"])
    return [{key: value for key, value in item.items() if key != "group"} for item in items]


def keep_readable(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries whose image and mask can be read; the others are named in the log.

    Raises:
        DataError: when none can be read.
    """
    kept, skipped = [], []
    for item in items:
        try:
            for key, read in (("image", read_photograph), ("label", read_mask)):
                for path in paths_of(item[key]) if key in item else ():
                    read(path)
            kept.append(item)
        except DataError as error:
            skipped.append(str(error))
    for reason in skipped:
        logger.warning("Skipped %s", reason)
    if skipped:
        logger.warning("Skipped %d of %d entries that can't be read.", len(skipped), len(items))
    if not kept:
        raise DataError(f"None of the {len(items)} entries can be read; the first: {skipped[0]}")
    return kept


def read_json(path: Path) -> Any:
    """Read a data list.

    Raises:
        DataError: when it is missing, or no JSON.
    """
    if not path.is_file():
        raise DataError(f"datalist {path}: there is no such file. Expected a Decathlon JSON (--datalist).")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"datalist {path}: not JSON ({error}).") from error


def read_datalist(
    path: Path,
    root: Path,
    scan: Callable[[Path], dict[str, list[dict[str, Any]]]] | None = None,
    several: Sequence[str] = (),
) -> dict[str, list[dict[str, Any]]]:
    """Read the splits of a Decathlon JSON whose paths are relative to ``root``.

    Args:
        path: the file. That of nnU-Net may name ``case.nii.gz`` where the image is ``case_0000.nii.gz``.
        root: folder of the data set.
        several: keys that may name several files: ``label`` (raters), ``image`` (channels).
        scan: finds the cases of a folder; used where the file names labels, as that of nnU-Net does, but no cases.

    Raises:
        DataError: when it is missing, no such JSON, or names files that are not there.
    """
    content = read_json(path)
    present = [name for name in SPLITS if isinstance(content, dict) and content.get(name)]
    if not present and scan is not None and isinstance(content, dict) and "labels" in content:
        return scan(root)
    if not present:
        raise DataError(f"datalist {path}: it has no entries under {', '.join(SPLITS)}.")
    splits = {}
    for name in present:
        if not isinstance(content[name], list):
            raise DataError(f"datalist {path}: {name} is {content[name]!r}; expected a list of entries.")
        for i, entry in enumerate(content[name]):
            _check_entry(entry, f"datalist {path}: {name}[{i}]", several)
        splits[name] = load_decathlon_datalist(str(path), True, name, str(root))
        for item in splits[name]:
            if isinstance(item["image"], str):
                item["image"] = _first_channel(item["image"], f"datalist {path}")
        named = (file for item in splits[name] for key in ("image", "label") for file in paths_of(item[key]))
        require_files(named, f"datalist {path}, {name}")
    return splits


def _check_entry(entry: Any, place: str, several: Sequence[str] = ()) -> None:
    """Check an entry of a data list.

    Raises:
        DataError: when it is none, or names several images or labels where that is not in ``several``.
    """
    if not isinstance(entry, dict) or "image" not in entry or "label" not in entry:
        raise DataError(f"{place} is {entry!r}; expected {{'image': …, 'label': …}}.")
    for key, remedy in (
        ("image", "Join them into one file, or keep the one to learn from"),
        ("label", "Join them into one file: a mask where they mean one class, else a label map of 1, 2, …"),
    ):
        files = entry[key]
        if key in several and isinstance(files, list) and files and all(isinstance(file, str) for file in files):
            continue
        if isinstance(entry[key], (list, tuple)):
            raise DataError(
                f"{place} has {len(entry[key])} files as its {key} ({', '.join(map(str, entry[key][:3]))}"
                f"{', …' if len(entry[key]) > 3 else ''}); expected one. {remedy}."
            )
        if not isinstance(entry[key], str):
            raise DataError(f"{place} has {entry[key]!r} as its {key}; expected the path of a file.")


def _first_channel(path: str, source: str) -> str:
    """The image that nnU-Net's list means by a case: itself, or its only channel, ``case_0000``.

    Raises:
        DataError: when the case has several channels.
    """
    if Path(path).exists():
        return path
    name = output_name(path)
    suffix = Path(path).name[len(name) :]
    channel = Path(path).with_name(f"{name}_0000{suffix}")
    if not channel.exists():
        return path
    if channel.with_name(f"{name}_0001{suffix}").exists():
        raise DataError(
            f"{source}: the case {name} has several channels ({name}_0000, {name}_0001, …); expected one. Make a data "
            "set of one of them."
        )
    return str(channel)


def require_files(paths: Iterable[str], source: str) -> None:
    """Raise a :class:`DataError` that counts and names the files that are not there."""
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        raise DataError(f"{source}: {len(missing)} files are not there, the first is {missing[0]}.")


def _scan(root: Path) -> dict[str, list[dict[str, str]]]:
    for layout in _ISIC_FOLDERS:
        splits = {
            name: _pair(root, *folders) for name, folders in layout.items() if all((root / f).is_dir() for f in folders)
        }
        if splits:
            return splits
    if all((root / folder).is_dir() for folder in _KVASIR_FOLDERS):
        return _split_kvasir(_pair(root, *_KVASIR_FOLDERS))
    if all((root / folder).is_dir() for folder in _NNUNET_FOLDERS):
        return {"training": _pair(root, *_NNUNET_FOLDERS)}
    looked = [f"{a}/ with {b}/" for layout in _ISIC_FOLDERS for a, b in layout.values()]
    looked += [f"{a}/ with {b}/" for a, b in (_KVASIR_FOLDERS, _NNUNET_FOLDERS)]
    found = sorted(p.name + ("/" if p.is_dir() else "") for p in root.iterdir())
    raise DataError(
        f"dataset_dir {root}: no data set found. Looked for {'; '.join(looked)}. "
        f"Found {', '.join(found[:10]) or 'nothing'}{' …' if len(found) > 10 else ''}. "
        "For another layout, pass a Decathlon JSON (--datalist)."
    )


def _split_kvasir(items: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Kvasir-SEG is published without splits: 80 % training, 10 % validation, 10 % testing by a hash of the name."""
    ranked = sorted(items, key=lambda item: hash_of(image_id(item), 0))
    tenth = round(len(ranked) / 10)
    return {"testing": ranked[:tenth], "validation": ranked[tenth : 2 * tenth], "training": ranked[2 * tenth :]}


def _pair(root: Path, image_folder: str, mask_folder: str) -> list[dict[str, str]]:
    """Pair images and masks of two folders by name, or by the CSV file that lies beside the masks."""
    table = root / f"{mask_folder}.csv"
    if not table.is_file():
        table = root / mask_folder / f"{mask_folder}.csv"
    if table.is_file() and (items := _read_csv(table, root, image_folder, mask_folder)):
        return items
    masks = {_mask_id(path): path for path in _photographs(root / mask_folder)}
    images = [path for path in _photographs(root / image_folder) if not path.stem.endswith("_superpixels")]
    if image_folder == _NNUNET_FOLDERS[0]:
        second = [path for path in images if path.stem.endswith("_0001")]
        if second:
            raise DataError(
                f"{second[0]}: the channel of a case in a file of its own; expected one picture a case, as "
                f"{second[0].stem.removesuffix('_0001')}_0000. Write grey or RGB pictures."
            )
    unpaired = [path for path in images if _case(path) not in masks]
    if unpaired:
        raise DataError(
            f"{unpaired[0]}: no mask (looked in {root / mask_folder} for {unpaired[0].stem}_segmentation or "
            f"{unpaired[0].stem}); {len(unpaired)} of {len(images)} images have none."
        )
    return [{"image": str(path), "label": str(masks[_case(path)])} for path in images]


def _case(path: Path) -> str:
    return path.stem.lower().removesuffix("_0000")


def _mask_id(path: Path) -> str:
    return path.stem.lower().removesuffix("_segmentation")


def _photographs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_photograph(path))


def _read_csv(table: Path, root: Path, image_folder: str, mask_folder: str) -> list[dict[str, str]]:
    """Read a table with columns ``img`` and ``seg`` (paths relative to the data set); none if it has other columns."""
    with open(table, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"img", "seg"} <= rows[0].keys():
        return []  # the challenge's own CSV lists diagnoses, not files
    items = []
    for row in rows:
        image = _first_file((root / row["img"], root / image_folder / row["img"]), table)
        label = _first_file((root / row["seg"], root / mask_folder / row["seg"]), table)
        items.append({"image": image, "label": label})
    return items


def _first_file(places: Sequence[Path], table: Path) -> str:
    for place in places:
        if place.is_file():
            return str(place)
    raise DataError(f"{table}: a file that it names is not there (looked for {' and '.join(map(str, places))}).")


def list_photographs(folder: str | Path, *, skip_unreadable: bool = False) -> list[dict[str, str]]:
    """List the photographs of a folder for inference, by name, as entries with ``image``; no masks are needed.

    Args:
        folder: folder of JPEG, PNG, BMP, TIFF, PPM or DICOM photographs, or one such file. DICOM files need no suffix.
        skip_unreadable: read every file now, leave out those that can't be read, and name them in the log.

    Raises:
        DataError: when there is no such folder, or no photograph in it; the message says what was found.
    """
    root = Path(folder).expanduser()
    if root.is_file():
        return [{"image": str(root)}]
    if not root.is_dir():
        raise DataError(f"dataset_dir {root}: no such folder or file. Pass the images' folder (--dataset_dir).")
    files = sorted(path for path in root.iterdir() if path.is_file())
    images = [path for path in files if is_photograph(path) or is_dicom(path)]
    if not images:
        found = ", ".join(path.name for path in sorted(root.iterdir())[:10]) or "nothing"
        raise DataError(f"dataset_dir {root}: no photographs ({', '.join(PHOTOGRAPH_SUFFIXES)}); found {found}.")
    items = [{"image": str(path)} for path in images]
    return keep_readable(items) if skip_unreadable else items
