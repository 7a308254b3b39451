"""Pictures to look at: image with label, prediction and prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation, binary_erosion
from torch import Tensor

from medsa_nets.data.photographs import save_png
from medsa_nets.prompts import Prompts

LABEL_COLOUR, PREDICTION_COLOUR = (60, 220, 60), (255, 70, 40)
POSITIVE_COLOUR, NEGATIVE_COLOUR, BOX_COLOUR = (0, 200, 255), (255, 0, 255), (255, 230, 0)


def tint(canvas: np.ndarray, mask: np.ndarray, colour: Sequence[float], line: np.ndarray | None = None) -> None:
    """Colour a mask on a picture, in place: a quarter of the colour on it, all of it on its outline.

    Args:
        canvas: float32 picture, with the colours (0 to 255) on its last axis.
        mask: boolean, of the picture's other axes.
        colour: its three values.
        line: boolean outline; none draws none.
    """
    canvas[mask] = 0.75 * canvas[mask] + 0.25 * np.array(colour)
    if line is not None:
        canvas[line] = colour


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
        prediction: boolean (W, H), or a map of classes above 0, each of which is outlined.
        label: likewise.
        point_coords: (P, 2) indices into (W, H).
        point_labels: (P,): 1 drawn cyan, 0 magenta, -1 not drawn.
        boxes: (N, 4) corners as indices into (W, H), drawn yellow.

    Returns:
        RGB picture of W x H pixels.
    """
    canvas = (np.clip(image, 0.0, 1.0) * 255.0).transpose(1, 2, 0).astype(np.float32)
    line = max(1, round(max(canvas.shape[:2]) / 200))
    if prediction is not None:
        tint(canvas, prediction > 0, PREDICTION_COLOUR)
    for masks, colour in ((prediction, PREDICTION_COLOUR), (label, LABEL_COLOUR)):
        for value in np.unique(masks[masks > 0]) if masks is not None else ():
            canvas[_outline(masks == value, line)] = colour
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
    image: Tensor, *, prediction: Tensor | None = None, label: Tensor | None = None, prompts: Prompts
) -> Image.Image:
    """:func:`overlay` for one item of a batch: image (3, W, H), masks (1 or classes, W, H), prompts."""
    points, labels, boxes = prompts.points, prompts.labels, prompts.boxes
    return overlay(
        np.asarray(image.cpu(), dtype=np.float32),
        prediction=None if prediction is None else _regions(prediction),
        label=None if label is None else _regions(label),
        point_coords=None if points is None else points.flatten(0, 1).cpu().numpy(),
        point_labels=None if labels is None else labels.flatten(0, 1).cpu().numpy(),
        boxes=None if boxes is None else boxes.cpu().numpy(),
    )


def _regions(masks: Tensor) -> np.ndarray:
    """A mask (1, W, H) as booleans; masks of classes as a map whose values tell apart which of them hold a pixel."""
    held = np.asarray(masks.cpu()) > 0.5
    if len(held) == 1:
        return np.asarray(held[0])
    return np.asarray((held * (1 << np.arange(len(held), dtype=np.int64))[:, None, None]).sum(0))


def overlay_volume(
    image: MetaTensor,
    logits: Tensor,
    *,
    label: Tensor | None = None,
    prompts: Prompts,
    height: int = 320,
) -> Image.Image:
    """Draw an axial, a coronal and a sagittal plane of a volume beside each other, as a radiologist sees them.

    The planes meet in the first foreground click; without clicks in the middle of the boxes, of the label, or of the
    prediction. Only clicks and boxes of a plane are drawn on it.

    Args:
        image: (C, X, Y, Z) in [0, 1], its axes to the right, to the front and to the head (RAS), with its spacing.
        logits: (K, X, Y, Z), one mask per class.
        label: (1, X, Y, Z) of 0 and 1 + class id.
        prompts: of the volume; points and boxes are drawn.
        height: of the picture, in pixels: that of the tallest plane. All planes have one scale.
    """
    highest, index = logits.detach().cpu().max(dim=0)
    prediction = torch.where(highest > 0, index + 1, 0)
    truth = None if label is None else torch.as_tensor(label)[0].cpu()
    points = torch.zeros(0, 3) if prompts.points is None else prompts.points.reshape(-1, 3).cpu().float()
    labels = torch.zeros(0) if prompts.labels is None else prompts.labels.reshape(-1).cpu()
    boxes = torch.zeros(0, 6) if prompts.boxes is None else prompts.boxes.cpu().float()
    size = torch.tensor(image.shape[1:])
    if bool((labels > 0).any()):
        centre = points[labels > 0][0]
    elif len(boxes):
        centre = (boxes[0, :3] + boxes[0, 3:]) / 2
    else:
        inside = next((m.nonzero() for m in (truth, prediction) if m is not None and bool((m > 0).any())), None)
        centre = inside.float().mean(0) if inside is not None else (size - 1) / 2
    centre = torch.minimum(centre.round().long().clamp_min(0), size - 1)
    spacing = [float(s) for s in image.pixdim]
    grey = torch.as_tensor(image).detach().cpu().float().mean(0)
    scale = height / max(float(size[i]) * spacing[i] for i in (1, 2))  # pixels per mm
    pictures = []
    for axis in (2, 1, 0):
        across, down = (i for i in range(3) if i != axis)
        shape = [max(1, round(float(size[i]) * spacing[i] * scale)) for i in (across, down)]

        def plane(volume: Tensor, mode: str, axis: int = axis, shape: list[int] = shape) -> np.ndarray:
            chosen = volume.select(axis, int(centre[axis]))[None, None].float()
            return F.interpolate(chosen, size=shape, mode=mode)[0, 0].flip(0, 1).numpy()

        def place(position: Tensor, across: int = across, down: int = down, shape: list[int] = shape) -> np.ndarray:
            moved = [shape[j] * (1 - (position[..., i] + 0.5) / size[i]) - 0.5 for j, i in enumerate((across, down))]
            return torch.stack(moved, dim=-1).numpy()

        here = (points[:, axis] - centre[axis]).abs() <= 0.5
        cut = (boxes[:, axis] <= centre[axis] + 0.5) & (boxes[:, axis + 3] >= centre[axis] - 0.5)
        corners = [place(boxes[cut][:, 3:]), place(boxes[cut][:, :3])]  # the flip exchanges first and last
        pictures.append(
            overlay(
                np.repeat(plane(grey, "bilinear")[None], 3, axis=0),
                prediction=plane(prediction, "nearest"),
                label=None if truth is None else plane(truth, "nearest"),
                point_coords=place(points[here]),
                point_labels=labels[here].numpy(),
                boxes=np.concatenate(corners, axis=1),
            )
        )
    page = Image.new("RGB", (sum(p.width for p in pictures) + 8, height), (255, 255, 255))
    left = 0
    for picture in pictures:
        page.paste(picture, (left, 0))
        left += picture.width + 4
    return page


LINE_COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (148, 103, 189))


def draw_curves(
    lines: Mapping[str, Sequence[float]], axis: str, title: str, size: tuple[int, int] = (420, 320)
) -> Image.Image:
    """Draw shares between 0 and 1 over 0, 1, 2… as lines with a legend.

    Args:
        lines: values by name; NaN are left out.
        axis: name of the horizontal axis.
        title: text above.
        size: width and height of the picture, in pixels.
    """
    values = [value for line in lines.values() for value in line if not math.isnan(value)]
    # Curves of good masks lie close together: the axis begins where they do.
    lowest = math.floor(10.0 * min(values, default=0.0)) / 10.0
    lowest = min(max(lowest, 0.0), 0.9)
    last = max(1, *(len(line) - 1 for line in lines.values()))
    left, top, right, bottom = 42, 26, size[0] - 14, size[1] - 40

    def at(step: float, value: float) -> tuple[float, float]:
        share = (value - lowest) / (1.0 - lowest)
        return left + (right - left) * step / last, bottom - (bottom - top) * max(0.0, min(1.0, share))

    page = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(page)
    draw.text((left, 6), title, fill=(0, 0, 0))
    for tick in range(round(10 * lowest), 11):
        (x, y) = at(0, tick / 10)
        draw.line((x, y, right, y), fill=(225, 225, 225))
        draw.text((8, y - 6), f"{tick / 10:.1f}", fill=(0, 0, 0))
    for step in range(last + 1):
        draw.text((at(step, lowest)[0] - 3, bottom + 5), str(step), fill=(0, 0, 0))
    draw.text((left, size[1] - 18), axis, fill=(0, 0, 0))
    for number, (name, line) in enumerate(lines.items()):
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        places = [at(step, value) for step, value in enumerate(line) if not math.isnan(value)]
        draw.line(places, fill=colour, width=2)
        for x, y in places:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        draw.text((right - 150, bottom - 16 * (len(lines) - number)), name, fill=colour)
    return page


def side_by_side(pictures: Sequence[Image.Image], title: str, height: int = 320) -> Image.Image:
    """Pictures of one height beside each other, a line of text above."""
    scaled = [p.resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    page = Image.new("RGB", (sum(p.width + 6 for p in scaled) + 6, height + 28), (255, 255, 255))
    ImageDraw.Draw(page).text((6, 6), title, fill=(0, 0, 0))
    left = 6
    for picture in scaled:
        page.paste(picture, (left, 24))
        left += picture.width + 6
    return page


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
