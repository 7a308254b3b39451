"""Checks whether segmented organs lie as in a body; where not, the file's directions or spacing may be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from medsa_nets.data.labels import same_name

# Organs of the trunk along each axis of the patient: the first of two lies further to the right, to the front, to the
# head. Everyday anatomy; pairs that neighbours of changing shape would make unsure are left out.
_ORDER = (
    (
        (0, "right", "left", "mirrored left to right, or the patient has situs inversus"),
        (
            ("liver", "spleen"),
            ("liver", "stomach"),
            ("liver", "left kidney"),
            ("gallbladder", "spleen"),
            ("gallbladder", "stomach"),
            ("right kidney", "spleen"),
            ("right kidney", "left kidney"),
            ("inferior vena cava", "spleen"),
        ),
    ),
    (
        (1, "in front of", "behind", "mirrored front to back"),
        (
            ("liver", "right kidney"),
            ("gallbladder", "right kidney"),
            ("stomach", "left kidney"),
            ("stomach", "aorta"),
            ("pancreas", "left kidney"),
            ("portal and splenic veins", "aorta"),
            ("liver", "aorta"),
        ),
    ),
    (
        (2, "above", "below", "upside down"),
        (
            ("liver", "right kidney"),
            ("spleen", "left kidney"),
            ("stomach", "left kidney"),
            ("esophagus", "right kidney"),
            ("esophagus", "left kidney"),
            ("esophagus", "gallbladder"),
            ("right adrenal gland", "right kidney"),
            ("left adrenal gland", "left kidney"),
        ),
    ),
)
# Volumes in mL and greatest lengths in mm, from a small child's to those of disease: wide on purpose, as a mask may be
# a little wrong. The lower bounds hold for organs that the scan shows whole.
_SIZES = {
    "liver": (150.0, 6000.0, 400.0),
    "spleen": (10.0, 5000.0, 350.0),
    "right kidney": (12.0, 1500.0, 240.0),
    "left kidney": (12.0, 1500.0, 240.0),
    "stomach": (8.0, 5000.0, 450.0),
    "gallbladder": (0.5, 600.0, 200.0),
    "pancreas": (3.0, 500.0, 320.0),
    "aorta": (4.0, 1500.0, 800.0),
    "inferior vena cava": (3.0, 800.0, 600.0),
    "right adrenal gland": (0.1, 100.0, 300.0),
    "left adrenal gland": (0.1, 100.0, 300.0),
}
_SURE = 10.0  # mm that two organs have to lie apart, in the wrong order, before it is said
_LEAST = 0.3  # mL of an organ whose place counts
_ORGANS = {same_name(name): name for name in {*_SIZES, "esophagus", "portal and splenic veins"}}


@dataclass(frozen=True)
class _Organ:
    centre: np.ndarray  # in mm, to the right, to the front, to the head
    volume: float  # mL
    length: float  # mm, along the longest axis of the grid, without the outermost hundredths: a mask has stray voxels
    whole: bool  # whether it ends inside the scan


def check_anatomy(label_map: np.ndarray, affine: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Compare the layout and size of organs of the trunk with a body's.

    A file whose stated directions or spacing are wrong reads without an error, and all of its measurements are wrong:
    only the masks of organs show it. Masks may be wrong as well, so this warns and changes nothing. Directions are
    doubted where most of the pairs of organs that are found contradict them.

    Args:
        label_map: (X, Y, Z) of 0 and 1 + class id, on the grid of the file.
        affine: (4, 4) from its voxels to mm in RAS.
        classes: names of the classes; those that are no organ of the trunk are passed over.

    Returns:
        A sentence for each contradiction; none where nothing contradicts.
    """
    organs = _measure(np.asarray(label_map), np.asarray(affine, dtype=np.float64), classes)
    found = []
    for (axis, first_side, other_side, meaning), pairs in _ORDER:
        wrong, right = [], 0
        for first, second in pairs:
            if first in organs and second in organs:
                apart = float(organs[first].centre[axis] - organs[second].centre[axis])
                right += apart > 0
                if apart < -_SURE:
                    wrong.append((first, second, -apart))
        if len(wrong) > right and (len(wrong) > 1 or not right):
            listed = ", ".join(f"the {a} lies {mm:.0f} mm {_side(other_side)} the {b}" for a, b, mm in wrong[:3])
            found.append(
                f"The organs contradict the directions that the file states: {listed}, where a body has it "
                f"{_side(first_side).removesuffix(' of')}. The image may be {meaning}; compare it with its source."
            )
    sizes = []
    for name, organ in organs.items():
        least, most, longest = _SIZES.get(name, (0.0, np.inf, np.inf))
        if organ.volume > most or (organ.whole and organ.volume < least):
            sizes.append(f"the {name} has {organ.volume:,.1f} mL (a body's has {least:g} to {most:g})")
        elif organ.length > longest:
            sizes.append(f"the {name} is {organ.length:.0f} mm long (a body's at most {longest:g})")
    if sizes:
        found.append(
            f"Organs are not of a body's size: {', '.join(sizes)}. The spacing that the file states may be wrong, or "
            "the mask; compare both with their source."
        )
    return found


def _side(side: str) -> str:
    return {"right": "to the right of", "left": "to the left of"}.get(side, side)


def _measure(label_map: np.ndarray, affine: np.ndarray, classes: Sequence[str]) -> dict[str, _Organ]:
    """The organs of the trunk that a label map holds."""
    values = label_map.astype(np.uint16, copy=False) if label_map.dtype.kind in "iu" else np.rint(label_map).astype(int)
    voxel = abs(float(np.linalg.det(affine[:3, :3]))) / 1000.0
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    out = {}
    for index, place in enumerate(ndimage.find_objects(values, max_label=len(classes))):
        name = _ORGANS.get(same_name(classes[index]))
        if place is None or name is None:
            continue
        inside = values[place] == index + 1
        count = int(inside.sum())
        if count * voxel < _LEAST:
            continue
        shares = [inside.sum(axis=tuple(a for a in range(3) if a != axis)) / count for axis in range(3)]
        centre = [share @ np.arange(len(share)) + part.start for share, part in zip(shares, place)]
        ends = [part.start > 0 and part.stop < size for part, size in zip(place, values.shape)]
        lengths = [((share.cumsum() > 0.01) & (share.cumsum() < 0.99)).sum() * mm for share, mm in zip(shares, spacing)]
        out[name] = _Organ(affine[:3, :3] @ centre + affine[:3, 3], count * voxel, float(max(lengths)), all(ends))
    return out
