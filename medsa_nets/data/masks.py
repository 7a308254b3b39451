"""Binary masks: which of a file's two values is the foreground, judged by the values, never by their frequency.

Label maps come as grey, colour, palette, alpha or floating-point pictures. What is not clearly two-valued is refused
with the list of its values, because a guess would give a wrong mask without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from medsa_nets.errors import DataError

SOFT_VALUES = 8  # fewer distinct values are a label map; as many or more may be soft edges (JPEG, anti-aliasing)
SOFT_RANGE = 64.0  # least range of a mask with soft edges, of 255; a label map's ids lie closer
NEAR = 0.1  # of the range: values so near to an end of it count as that end in a mask with soft edges
EDGE = 8  # pixels that a soft edge reaches; JPEG's blocks have 8
PLATEAU = 5  # pixels: a region of one value in between that is as wide is a class of its own, not an edge
SOFT_SHARE = 0.05  # of the pixels may lie on edges; a grey picture has more
FULL = (1.0, 255.0, 65535.0)  # a mask of this one value is foreground all over
MIDDLE = (64.0, 191.0)  # without 0, background lies below and foreground above
_ADVICE = (
    "expected two, background and foreground. Save the mask with 0 for the background and one other value for the "
    "foreground (for a map of classes: one mask of the class that is wanted)."
)


def binarize_mask(mask: Any, name: str, lossy: bool = False) -> np.ndarray:
    """Which pixels of a two-valued mask are foreground.

    Two values are 0 and any positive one, or one below 64 and one above 191 (of 255). A mask of one value is empty (0)
    or full (1, 255, 65535). Soft edges, as JPEG and resizing leave them, are taken where nothing but edges lies between
    the two values.

    Args:
        mask: (spatial…), values of any type.
        name: what errors call the mask.
        lossy: whether the file was compressed with losses, as JPEG is.

    Returns:
        (spatial…), boolean.

    Raises:
        DataError: when values are not finite, or when they are not clearly two; the message lists them.
    """
    array = np.asarray(mask)
    if not array.size:
        raise DataError(f"{name}: the mask has no pixels; {_ADVICE}")
    if not np.isfinite(array).all():
        raise DataError(f"{name}: the mask holds values that are not finite (NaN or infinite); {_ADVICE}")
    values = np.unique(array)
    low, high = float(values[0]), float(values[-1])
    if len(values) == 1 and (low == 0.0 or low in FULL):
        return np.full(array.shape, low != 0.0)
    # 1 is foreground itself: 1 and 255 are one value
    parted = low == 0.0 or (0.0 < low < MIDDLE[0] and low != 1.0 and high > MIDDLE[1])
    if len(values) == 2 and parted:
        return array == values[1]
    if len(values) > 2 and _has_soft_edges(array, values, lossy):
        return array > (low + high) / 2.0
    raise _refusal(name, [f"{value:g}" for value in values.tolist()], "value")


def _refusal(name: str, listed: Sequence[str], kind: str) -> DataError:
    shown = ", ".join(listed[:12]) + (" …" if len(listed) > 12 else "")
    return DataError(f"{name}: the mask has {len(listed)} {kind}{'s' if len(listed) != 1 else ''} ({shown}); {_ADVICE}")


def _has_soft_edges(array: np.ndarray, values: np.ndarray, lossy: bool) -> bool:
    """Whether what lies between the lowest and the highest value is nothing but edges of one region."""
    low, high = float(values[0]), float(values[-1])
    size = high - low
    fractions = bool((values != np.rint(values)).any())
    if low < 0.0 or (low >= MIDDLE[0] and high > 1.0) or (not lossy and len(values) < SOFT_VALUES):
        return False
    if size < SOFT_RANGE and not (fractions and high <= 1.0 and size > SOFT_RANGE / 255.0):
        return False
    scaled = (array.astype(np.float32) - low) / size
    between = (scaled > NEAR) & (scaled < 1.0 - NEAR)
    if between.mean() > SOFT_SHARE:
        return False
    reach = 2 * EDGE + 1
    by_both = ndimage.maximum_filter(scaled <= NEAR, reach) & ndimage.maximum_filter(scaled >= 1.0 - NEAR, reach)
    if (between & ~by_both).any():
        return False
    inside = ndimage.minimum_filter(between, PLATEAU, mode="constant")
    flat = ndimage.maximum_filter(scaled, PLATEAU) - ndimage.minimum_filter(scaled, PLATEAU) < 2 * NEAR
    return not (inside & flat).any()


def mask_values(image: Image.Image, name: str) -> np.ndarray:
    """The values by which a picture tells background and foreground: grey values, palette indices, alpha, or 0 and 255.

    Args:
        image: as PIL decodes it, of any mode.
        name: what errors call the mask.

    Returns:
        (rows, columns); exact, nothing is scaled.

    Raises:
        DataError: when colours, or colour and alpha, do not say which region is meant.
    """
    if image.mode == "P":
        return _palette_values(image, name)
    if image.mode in ("1", "L") or image.mode.startswith(("I", "F")):
        array = np.asarray(image)
        return array.astype(np.uint8) * 255 if array.dtype == bool else array
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        pixels = np.asarray(image.convert("RGBA"))
        return _alpha_values(pixels[..., :3], pixels[..., 3], name)
    return _colour_values(np.asarray(image.convert("RGB")), name)


def _palette_values(image: Image.Image, name: str) -> np.ndarray:
    """Grey palettes give their greys; others are label maps, whose ids are the indices."""
    index = np.asarray(image)
    used = np.unique(index)
    palette = np.asarray(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    if len(used) == 0 or used[-1] >= len(palette):
        return index
    colours = palette[used]
    distinct = len(np.unique(colours, axis=0)) == len(used)
    if len(used) > 1 and not distinct and "transparency" in image.info:
        pixels = np.asarray(image.convert("RGBA"))
        if len(np.unique(pixels[..., 3])) > 1 and len(np.unique(colours, axis=0)) == 1:
            return pixels[..., 3]
    if distinct and (colours == colours[:, :1]).all():
        return palette[index][..., 0]
    black = used[(colours == 0).all(axis=1)]
    if distinct and len(used) == 2 and len(black) == 1:
        return (index != black[0]).astype(np.uint8) * 255
    return index


def _alpha_values(colours: np.ndarray, alpha: np.ndarray, name: str) -> np.ndarray:
    if alpha.min() == alpha.max():
        return _colour_values(colours, name)
    visible = colours[alpha > 0]
    if (visible == visible[0]).all():  # drawn in one colour: its shape is that of the alpha channel
        hidden = colours[alpha == 0]
        if len(hidden) == 0 or not (hidden != visible[0]).any() or not hidden.any() or (hidden == hidden[0]).all():
            return alpha
    values = _colour_values(colours, name)
    if not values[alpha == 0].any():  # what is transparent is background by its colour too
        return values
    raise DataError(f"{name}: colour and alpha channel of the mask say different things; {_ADVICE}")


def _colour_values(colours: np.ndarray, name: str) -> np.ndarray:
    """Grey of equal channels; of two colours, black is background; of shades of one colour, how bright they are."""
    if (colours == colours[..., :1]).all():
        return np.ascontiguousarray(colours[..., 0])
    packed = (colours.astype(np.uint32) * np.array([65536, 256, 1], np.uint32)).sum(axis=-1, dtype=np.uint32)
    found = np.unique(packed)
    if len(found) == 2 and found[0] == 0:
        return (packed != 0).astype(np.uint8) * 255
    if len(found) >= SOFT_VALUES:
        brightest = colours.max(axis=-1).astype(np.float32)
        strong = brightest > 0.5 * float(brightest.max())
        shades = colours[strong] / brightest[strong][:, None]
        if np.abs(shades - np.median(shades, axis=0)).max() < 3 * NEAR:
            return np.asarray(colours.max(axis=-1))
    raise _refusal(name, [f"({v >> 16}, {(v >> 8) & 255}, {v & 255})" for v in found.tolist()], "colour")
