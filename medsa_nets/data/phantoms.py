"""Phantoms: generated pictures that look a little like dermoscopy, with masks known exactly.

They let everything run where no real images are at hand. They say nothing about accuracy on patients.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from medsa_nets.data.photographs import save_png

FOLDERS = {
    "training": ("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
    "validation": ("ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth"),
}


def _smooth_noise(rng: np.random.Generator, size: int, sigma: float) -> np.ndarray:
    noise = gaussian_filter(rng.standard_normal((size, size)), sigma, mode="reflect")
    return noise / (noise.std() + 1e-8)


def _blob(rng: np.random.Generator, size: int) -> np.ndarray:
    """An irregular, connected patch: a disc whose radius varies smoothly with the angle."""
    radius = rng.uniform(0.12, 0.33) * size
    centre = rng.uniform(0.3, 0.7, size=2) * size
    aspect = rng.uniform(0.65, 1.0)
    turn = rng.uniform(0.0, np.pi)
    y, x = np.mgrid[:size, :size] - centre[:, None, None]
    u = x * np.cos(turn) + y * np.sin(turn)
    v = (y * np.cos(turn) - x * np.sin(turn)) / aspect
    angle = np.arctan2(v, u)
    edge = np.ones_like(angle)
    for k in range(2, 7):
        edge += rng.normal(0.0, 0.16 / k) * np.cos(k * angle + rng.uniform(0.0, 2.0 * np.pi))
    return np.hypot(u, v) < radius * edge


def phantom(seed: int, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Generate one picture: skin, a pigmented lesion with an irregular edge, hairs, uneven light.

    Args:
        seed: the picture's number; the same number gives the same picture.
        size: side in pixels.

    Returns:
        Picture (size, size, 3) and mask (size, size), both ``uint8``; the mask is 0 and 255.
    """
    rng = np.random.default_rng(seed)
    mask = _blob(rng, size)
    skin = np.array([205.0, 165.0, 140.0]) + rng.normal(0.0, 14.0, 3)
    pigment = np.array([110.0, 70.0, 50.0]) + rng.normal(0.0, 22.0, 3)
    light = 1.0 + 0.06 * _smooth_noise(rng, size, size / 5)
    picture = skin * (light + 0.02 * _smooth_noise(rng, size, 2.0))[..., None]
    depth = gaussian_filter(mask.astype(np.float64), rng.uniform(1.0, 4.0)) * rng.uniform(0.55, 0.95)
    depth *= 1.0 + 0.18 * _smooth_noise(rng, size, size / 24)
    picture += np.clip(depth, 0.0, 1.0)[..., None] * (pigment - skin)
    canvas = Image.fromarray(np.clip(picture, 0.0, 255.0).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(0, 14)):  # hairs
        points = rng.uniform(0.0, size, size=(2, 2))
        middle = points.mean(axis=0) + rng.normal(0.0, size / 8, 2)
        t = np.linspace(0.0, 1.0, 24)[:, None]
        curve = (1 - t) ** 2 * points[0] + 2 * t * (1 - t) * middle + t**2 * points[1]
        draw.line([tuple(p) for p in curve], fill=(50, 35, 30), width=int(rng.integers(1, 3)))
    shade = 1.0 - rng.uniform(0.0, 0.5) * (np.hypot(*(np.mgrid[:size, :size] / size - 0.5)) ** 3)[..., None]
    noisy = np.asarray(canvas) * shade + rng.normal(0.0, 3.0, (size, size, 1))
    return np.clip(noisy, 0.0, 255.0).astype(np.uint8), mask.astype(np.uint8) * 255


def write_phantoms(folder: str | Path, *, training: int = 48, validation: int = 8, size: int = 256) -> Path:
    """Write phantoms as a data set in the ISIC 2017 challenge's layout; pictures that are there already are kept.

    Args:
        folder: the data set's folder.
        training: number of training pictures.
        validation: number of validation pictures.
        size: side of a picture in pixels.

    Returns:
        ``folder``.
    """
    root = Path(folder)
    seed = 0
    for split, count in (("training", training), ("validation", validation)):
        images, masks = (root / name for name in FOLDERS[split])
        for _ in range(count):
            name = f"PHANTOM_{seed:07d}"
            if not (masks / f"{name}_segmentation.png").is_file():
                picture, mask = phantom(seed, size)
                save_png(Image.fromarray(picture), images / f"{name}.png")
                save_png(Image.fromarray(mask), masks / f"{name}_segmentation.png")
            seed += 1
    return root
