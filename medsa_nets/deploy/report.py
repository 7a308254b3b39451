"""Reports of a segmentation: measurements as JSON, overlay pictures, and a page."""

from __future__ import annotations

import base64
import colorsys
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from PIL import Image
from scipy import ndimage

from medsa_nets.data.atomic import temporary_name
from medsa_nets.deploy.settings import Settings
from medsa_nets.deploy.studies import Source
from medsa_nets.visualize import tint

KEY_IMAGES = 6


@dataclass(frozen=True)
class Measurement:
    """Size of one class.

    Args:
        label: name of the class.
        voxels: number of its voxels or pixels.
        value: volume in mL, area in mm², or pixels where the size of a pixel is not known.
        unit: ``mL``, ``mm2`` or ``pixels``.
    """

    label: str
    voxels: int
    value: float
    unit: str


def measure(mask: np.ndarray, image: MetaTensor, source: Source, settings: Settings) -> list[Measurement]:
    """Measure every class of a bundle.

    Args:
        mask: (X, Y, Z) or (W, H) of 0 and 1 + class id.
        image: what was segmented, with its affine.
        source: where it came from.
        settings: of the bundle.
    """
    counts = np.bincount(mask.ravel(), minlength=len(settings.segments) + 1)
    if source.volume:
        unit, size = "mL", abs(float(np.linalg.det(np.asarray(image.affine, dtype=float)[:3, :3]))) / 1000.0
    else:
        spacing = source.headers[0].get("PixelSpacing") if source.headers else None
        unit, size = ("mm2", float(spacing[0]) * float(spacing[1])) if spacing else ("pixels", 1.0)
    return [
        Measurement(segment.label, int(counts[i]), round(int(counts[i]) * size, 3), unit)
        for i, segment in enumerate(settings.segments, start=1)
    ]


def colours(count: int) -> list[tuple[int, int, int]]:
    """Colours that differ clearly: evenly spread hues, every other one paler."""
    pairs = [colorsys.hsv_to_rgb(i / max(count, 1), 1.0 if i % 2 == 0 else 0.6, 1.0) for i in range(count)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in pairs]


def draw(plane: np.ndarray, labels: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    """Draw classes on a picture: tinted, with outlines.

    Args:
        plane: (rows, columns, 3) in 0 to 255.
        labels: (rows, columns) of 0 and 1 + class id.
        palette: colour of each class.
    """
    canvas = plane.astype(np.float32)
    line = max(1, round(max(labels.shape) / 400))
    for value in np.unique(labels[labels > 0]):
        inside = labels == value
        tint(canvas, inside, palette[int(value) - 1], inside & ~ndimage.binary_erosion(inside, iterations=line))
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def key_images(mask: np.ndarray, image: MetaTensor, source: Source, settings: Settings) -> dict[str, Image.Image]:
    """Pictures of a segmentation: the whole photograph, or the slices where classes have their largest area.

    Args:
        mask: (X, Y, Z) or (W, H) of 0 and 1 + class id.
        image: (1, X, Y, Z) or (3, W, H), what was segmented.
        source: where it came from; its window is used where it states one.
        settings: of the bundle.

    Returns:
        At most :data:`KEY_IMAGES` pictures by their name, the largest classes first.
    """
    palette = colours(len(settings.segments))
    values = np.asarray(image.as_tensor())
    if not source.volume:
        return {"overlay": draw(values.transpose(2, 1, 0), mask.T, palette)}
    areas = {i: (mask == i).sum(axis=(0, 1)) for i in np.unique(mask[mask > 0])}
    largest = sorted(areas, key=lambda i: -int(areas[i].sum()))
    places = list(dict.fromkeys(int(areas[i].argmax()) for i in largest))[:KEY_IMAGES] or [mask.shape[2] // 2]
    low, high = _window(values, source)
    out = {}
    for place in sorted(places):
        grey = ((values[0, :, :, place].T - low) / max(high - low, 1e-6)).clip(0, 1) * 255
        drawn = draw(np.repeat(grey[..., None], 3, axis=2), mask[:, :, place].T, palette)
        across, down = np.linalg.norm(np.asarray(image.affine, dtype=float)[:3, :2], axis=0)
        size = (drawn.width, max(1, round(drawn.height * down / across)))
        out[f"slice_{place + 1:04d}"] = drawn.resize(size) if size != drawn.size else drawn
    return out


def _window(values: np.ndarray, source: Source) -> tuple[float, float]:
    header = source.headers[len(source.headers) // 2]
    try:
        centre, width = (float(np.atleast_1d(header[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
        if width > 0:
            return centre - width / 2, centre + width / 2
    except (KeyError, TypeError, ValueError, IndexError):
        pass
    low, high = np.percentile(values, (1.0, 99.0))
    return float(low), float(high)


def describe_source(
    source: Source, settings: Settings, measurements: Sequence[Measurement], warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """Measurements as data: which study and series, by which algorithm, how large each class is; and warnings."""
    first = source.headers[0] if source.headers else {}
    return {
        "algorithm": {"name": settings.name, "version": settings.version},
        "source": {
            "name": source.name,
            "files": len(source.files),
            **{
                name: str(first.get(name, ""))
                for name in ("StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesDescription")
                if first
            },
        },
        "measurements": [asdict(measurement) for measurement in measurements],
        "warnings": list(warnings),
    }


def write_report(
    folder: Path,
    source: Source,
    settings: Settings,
    measurements: Sequence[Measurement],
    pictures: dict[str, Image.Image],
    warnings: Sequence[str] = (),
) -> None:
    """Write ``measurements.json``, the pictures (PNG) and ``report.html``, which holds them all in one file.

    Warnings stand in the data and, before the measurements, in the page.
    """
    data = describe_source(source, settings, measurements, warnings)
    with temporary_name(folder / "measurements.json") as part:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    embedded = []
    for name, picture in pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        with temporary_name(folder / f"{name}.png") as part:
            part.write_bytes(buffer.getvalue())
        text = base64.b64encode(buffer.getvalue()).decode()
        embedded.append(f'<figure><img alt="{name}" src="data:image/png;base64,{text}"><figcaption>{name}</figcaption>')
    palette = colours(len(settings.segments))
    rows = [
        f'<tr><td style="background:rgb{colour}"></td><td>{html.escape(m.label)}</td>'
        f"<td>{f'{m.value:,.1f} {m.unit}' if m.voxels else 'not found'}</td></tr>"
        for m, colour in zip(measurements, palette)
    ]
    page = (
        "<!doctype html><meta charset=utf-8><title>Segmentation</title><style>body{font:15px sans-serif;margin:2em}"
        "td{padding:.2em .8em}.warning{border:2px solid #c00;padding:.5em}"
        "figure{display:inline-block;margin:.5em}img{max-width:30em}</style>"
        f"<h1>{html.escape(settings.name)}</h1><p>Version {html.escape(settings.version)}. "
        f"{html.escape(settings.intended_use)}</p><p>{html.escape(source.name)}</p>"
        f"{''.join(f'<p class=warning>{html.escape(text)}</p>' for text in warnings)}"
        f"<table>{''.join(rows)}</table>{'</figure>'.join(embedded)}</figure>\n"
    )
    with temporary_name(folder / "report.html") as part:
        part.write_text(page, encoding="utf-8")
