"""The main job in one command: adapt a base to lesions for a few minutes, measure before and after, draw a page.

``python -m medsa_nets.demo`` generates phantoms; with ``DATASET_DIR=/path/to/ISIC`` in front it uses real images.
Everything goes through the bundle ``bundles/medsa_isic``, with its own commands and settings.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from pathlib import Path

from monai.bundle import run
from PIL import Image

from medsa_nets.data.phantoms import write_phantoms
from medsa_nets.errors import find_cause
from medsa_nets.visualize import contact_sheet

PROMPTS = ("none", "point", "box")


def read_metrics(folder: Path) -> dict[str, float]:
    """Read a bundle's ``metrics.csv``."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return {name: float(value) for name, value in csv.reader(file)}


def demo(bundle: Path, dataset_dir: Path, output_dir: Path, *, minutes: float, seed: int = 0) -> Path:
    """Measure, train, measure again, and draw.

    Args:
        bundle: folder of the bundle.
        dataset_dir: data set in a layout that the bundle reads.
        output_dir: adapter, metrics and pictures go here.
        minutes: time limit of the training.
        seed: seed of the training.

    Returns:
        Path of the page of overlays.
    """
    train, evaluate = str(bundle / "configs/train.yaml"), str(bundle / "configs/evaluate.yaml")
    common = {
        "bundle_root": str(bundle),
        "dataset_dir": str(dataset_dir),
        "ckpt_dir": str(output_dir / "models"),
        "logging_file": str(bundle / "configs/logging.conf"),
        "meta_file": str(bundle / "configs/metadata.json"),
        "val_limit": 8,
        "num_workers": 0,
        "seed": seed,
    }

    def measure(stage: str, **settings: str) -> dict[str, dict[str, float]]:
        results = {}
        for prompt in PROMPTS:
            folder = output_dir / stage / prompt
            run("evaluating", config_file=[train, evaluate], prompt=prompt, overlays=4, output_dir=str(folder),
                **common, **settings)  # fmt: skip
            results[prompt] = read_metrics(folder)
        return results

    before = measure("before", checkpoint="")
    run("training", config_file=train, output_dir=str(output_dir / "training"), max_epochs=2, samples_per_epoch=96,
        samples_interval=0, warmup_steps=10, time_limit=60.0 * minutes, **common)  # fmt: skip
    after = measure("after")

    print("\nmean Dice      before   after")
    for prompt in PROMPTS:
        print(f"prompt {prompt:6}  {before[prompt]['val_mean_dice']:6.3f}  {after[prompt]['val_mean_dice']:6.3f}")
    pictures = sorted((output_dir / "after" / "none" / "overlays").glob("*_overlay.png"))
    rows = [
        (
            "",
            [
                (f"{stage}, {prompt}", Image.open(output_dir / stage / prompt / "overlays" / path.name))
                for stage in ("before", "after")
                for prompt in PROMPTS
            ],
        )
        for path in pictures
    ]
    page = contact_sheet(
        rows,
        output_dir / "overlays.png",
        title="green: label, red: prediction, cyan: click, yellow: box; before and after adaptation",
    )
    print(f"\nOverlays: {page}\nAdapter:  {output_dir / 'models' / 'model.pt'}")
    return page


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m medsa_nets.demo", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/medsa_isic"))
    parser.add_argument("--dataset_dir", type=Path, default=os.environ.get("DATASET_DIR") or None)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--minutes", type=float, default=5.0, help="time limit of the training")
    options = parser.parse_args(arguments)
    dataset_dir = options.dataset_dir
    try:
        if dataset_dir is None:
            dataset_dir = write_phantoms(options.output_dir / "phantoms")
            print("No DATASET_DIR: using phantoms, generated pictures that look a little like dermoscopy.")
        demo(options.bundle, Path(dataset_dir), options.output_dir, minutes=options.minutes)
    except Exception as error:
        if (cause := find_cause(error)) is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
