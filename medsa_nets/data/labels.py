"""Class names of data sets: what a dataset.json says of its labels, and how that fits the classes of a bundle."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medsa_nets.errors import DataError

logger = logging.getLogger(__name__)

BACKGROUND = ("background", "bg", "none")
# Names of public data sets for what the bundle's classes mean: BTCV's short ones (MONAI's list of it), AMOS's,
# TotalSegmentator's. The order of words, underscores and upper case do not matter (:func:`same_name`).
_SYNONYMS = {
    "rkid": "right kidney",
    "lkid": "left kidney",
    "gall": "gallbladder",
    "gall bladder": "gallbladder",
    "eso": "esophagus",
    "oesophagus": "esophagus",
    "sto": "stomach",
    "pan": "pancreas",
    "ivc": "inferior vena cava",
    "postcava": "inferior vena cava",
    "veins": "portal and splenic veins",
    "portal vein and splenic vein": "portal and splenic veins",
    "rad": "right adrenal gland",
    "lad": "left adrenal gland",
    "right adrenal": "right adrenal gland",
    "left adrenal": "left adrenal gland",
}


def _words(name: str) -> tuple[str, ...]:
    return tuple(sorted(set(re.split(r"[\W_]+", name.lower())) - {"", "and", "the", "of"}))


_KNOWN = {_words(short): _words(name) for short, name in _SYNONYMS.items()}


def same_name(name: str) -> tuple[str, ...]:
    """What names of one class have in common: their words in any order, and one of their synonyms for all."""
    words = _words(name)
    return _KNOWN.get(words, words)


def read_labels(content: Any, source: str) -> dict[int, str]:
    """Names of the labels of a data set, by their id, background left out.

    Args:
        content: of a ``dataset.json``: ``labels`` maps ids to names (Medical Segmentation Decathlon, nnU-Net 1), or
            names to ids (nnU-Net 2).
        source: what errors name.

    Returns:
        Names by id; nothing where there are no labels, or where they have numbers for names.

    Raises:
        DataError: when ``labels`` has another form, a name stands for several ids (nnU-Net's regions), or an id is to
            be ignored.
    """
    labels = content.get("labels") if isinstance(content, Mapping) else None
    if not labels:
        return {}
    form = "expected names by id ({'1': 'liver'}), or ids by name ({'liver': 1})"
    if not isinstance(labels, Mapping):
        raise DataError(f"{source}: 'labels' is {labels!r}; {form}.")
    out: dict[int, str] = {}
    for key, value in labels.items():
        if isinstance(value, (list, tuple)):
            raise DataError(
                f"{source}: the label {key!r} stands for the ids {list(value)}. Regions of several ids are not "
                "supported; write labels in which each voxel has one class, and name each id once."
            )
        name, number = (key, value) if not str(key).lstrip("-").isdigit() else (value, key)
        if isinstance(number, bool) or not str(number).isdigit() or not isinstance(name, (str, int)):
            raise DataError(f"{source}: 'labels' has {key!r}: {value!r}; {form}.")
        name = str(name)
        if name.lower() == "ignore":
            raise DataError(
                f"{source}: the label {name!r} (id {number}) marks voxels to be left out, which is not supported. "
                "Write labels without it, and take it out of 'labels'."
            )
        if int(number) in out:
            raise DataError(f"{source}: 'labels' gives the id {number} to {out[int(number)]!r} and to {name!r}.")
        out[int(number)] = name
    if 0 in out and out[0].lower() not in BACKGROUND and not out[0].isdigit():
        raise DataError(f"{source}: 'labels' calls the id 0 {out[0]!r}; 0 has to be the background.")
    out.pop(0, None)
    return {} if all(name.isdigit() for name in out.values()) else out


@dataclass(frozen=True)
class Renumbering:
    """How ids of a data set become those of a bundle.

    Attributes:
        ids: new id of each old one, with 0 for what is no class of the bundle.
        annotated: classes of the bundle that the data set names.
    """

    ids: tuple[int, ...]
    annotated: tuple[str, ...]

    @property
    def needed(self) -> bool:
        """Whether an id changes."""
        return any(new != old for old, new in enumerate(self.ids))


def match_labels(labels: Mapping[int, str], classes: Sequence[str], source: str) -> Renumbering | None:
    """How the labels of a data set become 1 + id of a bundle's classes, by their names.

    Labels that are no class of the bundle become background, where every class of the bundle has its label; the log
    says so. Where the data set names a part of the classes, the others are taken as not annotated.

    Args:
        labels: names by id (:func:`read_labels`).
        classes: names of the bundle's classes, in the order of their ids.
        source: what errors and log name.

    Returns:
        None where the data set gives no names.

    Raises:
        DataError: when labels have names that no class has, while classes have no label: either may mean the other.
    """
    if not labels:
        return None
    places = {same_name(name): 1 + i for i, name in enumerate(classes)}
    ids = [0] * (1 + max(labels))
    for number, name in labels.items():
        place = places.get(same_name(name), 0)
        if place and place in ids:
            raise DataError(
                f"{source}: two labels, {ids.index(place)} and {number}, mean the class {classes[place - 1]!r}."
            )
        ids[number] = place
    unknown = [f"{name} ({number})" for number, name in labels.items() if not ids[number]]
    absent = [name for i, name in enumerate(classes, start=1) if i not in ids]
    if unknown and absent:
        raise DataError(
            f"{source}: its labels {', '.join(unknown)} are no classes of this bundle, and the bundle's "
            f"{', '.join(absent)} have no label in it. Name the labels as the bundle does, or pass the classes of the "
            "--classes option by the names and in the order of the data set, as --classes \"['liver','tumour']\"."
        )
    if unknown:
        logger.warning(
            "%s: labels that are no classes of this bundle become background: %s", source, ", ".join(unknown)
        )
    found = Renumbering(tuple(ids), tuple(name for name in classes if name not in absent))
    if absent:
        logger.warning("%s: it has no labels for %s; these are taken as not annotated", source, ", ".join(absent))
    if found.needed:
        changed = [f"{old} to {new} ({classes[new - 1]})" for old, new in enumerate(ids) if new not in (0, old)]
        logger.info("%s: labels are renumbered by their names: %s", source, ", ".join(changed) or "none")
    return found


def renumber(values: np.ndarray, ids: Sequence[int], source: str) -> np.ndarray:
    """Labels with their new ids.

    Args:
        values: ids, of any shape and kind of number.
        ids: see :class:`Renumbering`.
        source: what errors name.

    Raises:
        DataError: when a value is no id of the data set.
    """
    table = np.asarray(ids)
    whole = np.rint(values)
    known = (whole >= 0) & (whole < len(table)) & (np.abs(values - whole) < 1e-3)
    if not known.all():
        found = np.unique(values[~known])
        listed = ", ".join(f"{value:g}" for value in found[:10]) + (", …" if len(found) > 10 else "")
        raise DataError(
            f"{source}: the label holds {listed}; the data list names the ids 0 to {len(table) - 1} alone. Name the "
            "others under its 'labels' too."
        )
    return table[whole.astype(np.int64)].astype(values.dtype)
