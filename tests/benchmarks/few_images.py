"""MedSA against what a user would pick instead: a MONAI UNet from scratch, same images, same time, few images.

    python tests/benchmarks/few_images.py --dataset_dir /path/to/ISIC --minutes 4 --output_dir results

Both train through the bundle's own configuration (same lists, augmentation, loss, batch size, optimizer, a tenth of the
steps for warm-up, cosine), one after the other, for the same wall-clock budget: the number of steps is set from a timed
trial run. Both are measured without prompt, by the last weights, on the same held-out images. Writes
few_images.{md,json,png}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import matplotlib
import monai
import torch
from monai.bundle import run

from medsa_nets.demo import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_isic"
STEPS_PER_EPOCH, BATCH = 5, 4
# Both are measured without prompt; so MedSA too spends its time on that.
MEDSA = {
    "prompt_none": 1.0,
    "prompt_points": 0.0,
    "prompt_boxes": 0.0,
    "prompt_correction": 0.0,
    "prompt_draws": 1,
    "prompt_pairs": 0.0,
}
UNET = {
    "network_def": {
        "_target_": "monai.networks.nets.UNet",
        "spatial_dims": 2,
        "in_channels": 3,
        "out_channels": 1,
        "channels": [32, 64, 128, 256, 512],
        "strides": [2, 2, 2, 2],
        "num_res_units": 2,
    },
    "train#trainer#iteration_update": "$None",
    "train#trainer#amp": False,
}


def settings(dataset_dir: Path, folder: Path, images: int) -> dict:
    """Overrides that both networks share."""
    return {
        "bundle_root": str(BUNDLE),
        "meta_file": str(BUNDLE / "configs/metadata.json"),
        "logging_file": str(BUNDLE / "configs/logging.conf"),
        "dataset_dir": str(dataset_dir),
        "ckpt_dir": str(folder),
        "output_dir": str(folder),
        "train_limit": images,
        "batch_size": BATCH,
        "samples_per_epoch": STEPS_PER_EPOCH * BATCH,
        "samples_interval": 0,
        "num_workers": 0,
        "resume": False,
    }


def train(dataset_dir: Path, folder: Path, images: int, epochs: int, overrides: dict, **extra: object) -> float:
    """Train for a number of epochs without validation; seconds of wall-clock time."""
    start = time.perf_counter()
    options = {"max_epochs": epochs, "warmup_steps": max(1, epochs * STEPS_PER_EPOCH // 10), "val_interval": 10**6}
    shared = settings(dataset_dir, folder, images)
    run("training", config_file=str(BUNDLE / "configs/train.yaml"), **options, **shared, **overrides, **extra)
    return time.perf_counter() - start


def measure(dataset_dir: Path, folder: Path, images: int, count: int, overrides: dict) -> float:
    """Mean Dice without prompt on ``count`` held-out images."""
    configs = [str(BUNDLE / "configs" / name) for name in ("train.yaml", "evaluate.yaml")]
    run("evaluating", config_file=configs, val_limit=count, **settings(dataset_dir, folder, images), **overrides)
    return read_metrics(folder)["val_mean_dice"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("few_images"))
    parser.add_argument("--minutes", type=float, default=4.0, help="time budget of each training")
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--held_out", type=int, default=100, help="validation images to measure on")
    options = parser.parse_args()
    root = options.output_dir
    root.mkdir(parents=True, exist_ok=True)
    state = root / "few_images.json"
    report = json.loads(state.read_text()) if state.is_file() else {"rows": []}
    report.update(
        minutes=options.minutes,
        held_out=options.held_out,
        cores=os.cpu_count(),
        machine=platform.processor() or platform.machine(),
        torch=torch.__version__,
        monai=monai.__version__,
    )
    for images in options.images:
        for name, overrides in (("MedSA", MEDSA), ("UNet", UNET)):
            if any(row["images"] == images and row["network"] == name for row in report["rows"]):
                continue  # measured before an interruption
            folder = root / f"{name}_{images}"
            once = train(options.dataset_dir, folder / "trial", images, 1, overrides)
            trial = train(options.dataset_dir, folder / "trial", images, 3, overrides)
            seconds = max((trial - once) / 2, 1e-3)  # an epoch, without set-up
            epochs = max(1, round(60 * options.minutes / seconds))
            spent = train(options.dataset_dir, folder, images, epochs, overrides, time_limit=75 * options.minutes)
            dice = measure(options.dataset_dir, folder, images, options.held_out, overrides)
            row = {"images": images, "network": name, "steps": epochs * STEPS_PER_EPOCH, "seconds": round(spent)}
            report["rows"].append({**row, "dice": round(dice, 4)})
            state.write_text(json.dumps(report, indent=1))
            print(report["rows"][-1], flush=True)
    write(report, root)


def write(report: dict, root: Path) -> None:
    """Write the table and the plot."""
    rows = {(row["network"], row["images"]): row for row in report["rows"]}
    sizes = sorted({images for _, images in rows})
    lines = ["| training images | MedSA, Dice (steps) | UNet, Dice (steps) | difference |", "| --- | --- | --- | --- |"]
    for n in sizes:
        a, b = rows["MedSA", n], rows["UNet", n]
        cells = [f"{row['dice']:.3f} ({row['steps']})" for row in (a, b)]
        lines.append(f"| {n} | {cells[0]} | {cells[1]} | {a['dice'] - b['dice']:+.3f} |")
    lines.append(
        f"\n{report['minutes']:g} minutes of training each on {report['cores']} cores, {report['held_out']} held-out "
        f"images, no prompt; torch {report['torch']}, monai {report['monai']}."
    )
    (root / "few_images.md").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(figsize=(5, 3.4))
    for name, marker in (("MedSA", "o"), ("UNet", "s")):
        axes.plot(sizes, [rows[name, n]["dice"] for n in sizes], marker=marker, label=name)
    axes.set(xscale="log", xlabel="training images", ylabel="mean Dice, held-out images", ylim=(0, 1), xticks=sizes)
    axes.set_xticklabels([str(n) for n in sizes])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(root / "few_images.png", dpi=110)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
