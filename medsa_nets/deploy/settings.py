"""Settings of an application, read from its bundle: accepted series, classes and their codes, name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.utils import str2bool

from medsa_nets.bundles import Bundle
from medsa_nets.deploy.studies import Rules
from medsa_nets.errors import DataError

TEXT = 64  # characters of a DICOM long string
ANATOMY = ("91723000", "Anatomical Structure")
SIDES = {"right": ("24028007", "Right"), "left": ("7771000", "Left")}
SCHEME = "SCT"


@dataclass(frozen=True)
class Segment:
    """How DICOM names a class.

    Args:
        label: the class's name in the bundle.
        code: SNOMED CT code and meaning of what it is.
        category: code and meaning of its category.
        side: code and meaning of a modifier of the code, or none.
        region: code and meaning of where in the body it lies, or none.
    """

    label: str
    code: tuple[str, str]
    category: tuple[str, str] = ANATOMY
    side: tuple[str, str] | None = None
    region: tuple[str, str] | None = None


@dataclass(frozen=True)
class Settings:
    """What an application has to know of a bundle.

    Args:
        name: of the algorithm, from the bundle's metadata.
        version: of the algorithm, from the bundle's metadata.
        rules: which series and photographs it takes.
        segments: its classes in the order of their ids.
        intended_use: what the bundle's metadata says of its use.
    """

    name: str
    version: str
    rules: Rules
    segments: tuple[Segment, ...]
    intended_use: str = ""


def read_settings(bundle: Path) -> Settings:
    """Read the settings of a bundle.

    Args:
        bundle: folder of a bundle, or a TorchScript file of one (``python -m medsa_nets.deploy export``).

    Raises:
        DataError: when it is no bundle, or does not say which series it takes and how its classes are coded.
    """
    opened = Bundle.open(bundle) if bundle.is_dir() else Bundle.of_torchscript(bundle)
    metadata = opened.metadata
    place = f"{bundle}: inference.yaml"
    deploy = opened.value("deploy")
    if not isinstance(deploy, Mapping) or not deploy.get("modality") or not isinstance(deploy.get("codes"), Mapping):
        raise DataError(
            f"{place} has no key 'deploy' with 'modality' (a list) and 'codes' (a code for each class): a DICOM "
            "segmentation needs them. Add it, as in bundles/medsa_btcv/configs/tasks/btcv.yaml."
        )
    if str2bool(opened.value("overlap", False)) and len(opened.classes) > 1:
        raise DataError(
            f"{place}: its classes ({', '.join(opened.classes)}) overlap; the DICOM segmentation that is written here "
            "holds one class at each pixel. Write a mask for each class by python -m monai.bundle run inferring."
        )
    try:
        channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
        volumes = len(metadata["network_data_format"]["inputs"]["image"]["spatial_shape"]) == 3
        labels = [channels[key] for key in sorted(channels, key=int) if channels[key] != "background"]
        name, version = str(metadata["name"]), str(metadata["version"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{bundle}: its metadata.json does not describe the network's input and output: {error!r}."
        ) from error
    segments = tuple(_segment(label, deploy["codes"], place) for label in labels)
    fewest, most = deploy.get("slices", (1, 2000))
    rules = Rules(tuple(deploy["modality"]), (int(fewest), int(most)), volumes)
    return Settings(name[:TEXT], version[:TEXT], rules, segments, str(metadata.get("intended_use", "")))


def _segment(label: str, codes: Mapping[str, Any], place: str) -> Segment:
    entry = codes.get(label)
    if not isinstance(entry, Mapping) or not entry.get("code") or not entry.get("meaning"):
        raise DataError(
            f"{place}: 'deploy' has no code for the class {label!r}; expected 'code' and 'meaning' of SNOMED CT under "
            f"'codes'. Found {', '.join(map(repr, codes)) or 'nothing'}."
        )
    side = entry.get("side")
    if side is not None and side not in SIDES:
        raise DataError(f"{place}: the side of {label!r} is {side!r}; expected right or left.")
    pairs = {key: (str(entry[key][0]), str(entry[key][1])) for key in ("category", "region") if key in entry}
    return Segment(
        label[:TEXT],
        (str(entry["code"]), str(entry["meaning"])),
        side=SIDES[side] if side else None,
        category=pairs.get("category", ANATOMY),
        region=pairs.get("region"),
    )
