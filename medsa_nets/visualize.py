"""Pictures to look at: image with label, prediction and prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation, binary_erosion
from torch import Tensor

from medsa_nets.data.photographs import save_png

LABEL_COLOUR, PREDICTION_COLOUR = (60, 220, 60), (255, 70, 40)
POSITIVE_COLOUR, NEGATIVE_COLOUR, BOX_COLOUR = (0, 200, 255), (255, 0, 255), (255, 230, 0)


def _outline(mask: np.ndarray, width: int) -> np.ndarray:
    grown = binary_dilation(mask, iterations=max(1, width // 2))
    return grown & ~binary_erosion(mask, iterations=max(1, width - width // 2), border_value=1)


def overlay(
    image: np.ndarray,
    *,
    prediction: np.ndarray | None = None,
    label: np.ndarray | None = None,
    point_coords: np.ndarray | None = None,
    point_labels: np.ndarray | None = None,
    boxes: np.ndarray | None = None,
) -> Image.Image:
    """Draw outlines of label (green) and prediction (red, tinted) and the prompts on an image.

    Args:
        image: (3, W, H) in [0, 1], the layout of MONAI's readers.
        prediction: boolean (W, H).
        label: boolean (W, H).
        point_coords: (P, 2) indices into (W, H).
        point_labels: (P,): 1 drawn cyan, 0 magenta, -1 not drawn.
        boxes: (N, 4) corners as indices into (W, H), drawn yellow.

    Returns:
        RGB picture of W x H pixels.
    """
    canvas = (np.clip(image, 0.0, 1.0) * 255.0).transpose(1, 2, 0).astype(np.float32)
    line = max(1, round(max(canvas.shape[:2]) / 200))
    if prediction is not None and prediction.any():
        canvas[prediction] = 0.75 * canvas[prediction] + 0.25 * np.array(PREDICTION_COLOUR)
        canvas[_outline(prediction, line)] = PREDICTION_COLOUR
    if label is not None and label.any():
        canvas[_outline(label, line)] = LABEL_COLOUR
    picture = Image.fromarray(canvas.astype(np.uint8).swapaxes(0, 1))
    draw = ImageDraw.Draw(picture)
    for x0, y0, x1, y1 in boxes if boxes is not None else ():
        draw.rectangle((float(x0), float(y0), float(x1), float(y1)), outline=BOX_COLOUR, width=line)
    if point_coords is not None and point_labels is not None:
        for (x, y), kind in zip(point_coords, point_labels):
            if kind >= 0:
                colour, r = (POSITIVE_COLOUR if kind > 0 else NEGATIVE_COLOUR), 2.5 * line
                draw.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=(0, 0, 0))
    return picture


def overlay_sample(
    image: Tensor, *, prediction: Tensor | None = None, label: Tensor | None = None, prompts: dict[str, Tensor]
) -> Image.Image:
    """:func:`overlay` for one item of a batch: image (3, W, H), masks (1, W, H), prompts with K = 1."""
    points, labels, boxes = (prompts.get(key) for key in ("point_coords", "point_labels", "boxes"))
    return overlay(
        np.asarray(image.cpu(), dtype=np.float32),
        prediction=None if prediction is None else np.asarray(prediction[0].cpu()) > 0.5,
        label=None if label is None else np.asarray(label[0].cpu()) > 0.5,
        point_coords=None if points is None else points[0].cpu().numpy(),
        point_labels=None if labels is None else labels[0].cpu().numpy(),
        boxes=None if boxes is None else boxes.cpu().numpy(),
    )


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]], path: str | Path, *, title: str, cell: int = 256
) -> Path:
    """Save a page of pictures: one row per subject, one titled column per variant.

    Args:
        rows: name of the row and its (caption, picture) cells.
        path: PNG file to write.
        title: text above the page.
        cell: side of a picture on the page, in pixels.
    """
    columns = max(len(cells) for _, cells in rows)
    head, caption, gap = 30, 18, 6
    page = Image.new(
        "RGB", (columns * (cell + gap) + gap, head + len(rows) * (cell + caption + gap) + gap), (255, 255, 255)
    )
    draw = ImageDraw.Draw(page)
    draw.text((gap, 8), title, fill=(0, 0, 0))
    for i, (name, cells) in enumerate(rows):
        for j, (text, picture) in enumerate(cells):
            left, top = gap + j * (cell + gap), head + i * (cell + caption + gap)
            draw.text((left, top + 3), f"{name} {text}".strip(), fill=(0, 0, 0))
            scale = cell / max(picture.size)
            size = (math.ceil(picture.width * scale), math.ceil(picture.height * scale))
            page.paste(picture.resize(size), (left, top + caption))
    return save_png(page, path)
