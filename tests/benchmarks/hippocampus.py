"""The hippocampus adapter on held-out volumes; a MONAI UNet and a MedSA adapter from scratch with the same time.

    python tests/benchmarks/hippocampus.py --dataset_dir /path/to/Task04_Hippocampus --minutes 20 --output_dir results

The adapter ``models/hippocampus.pt`` is measured by each prompt on the validation volumes of the overlay
``hippocampus.yaml``. The UNet trains on the training volumes through the same configuration (lists, augmentation,
optimizer, cosine schedule over the steps that fit) with what suits it: the volumes' own grid of 1 mm, whole volumes in
a step, softmax with Dice and cross-entropy; its last weights are measured. So does a MedSA adapter from its start, with
the overlay's settings but for slabs of 16 slices, which give it more steps. Measured rows are kept and not repeated;
``--rows`` names those to measure, so that two processes can train side by side, in folders of their own.
Writes hippocampus.{md,json}.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

from monai.bundle import run

from medsa_nets.demo import read_metrics

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_btcv"
TRAIN, HIPPOCAMPUS, EVALUATE = (str(BUNDLE / "configs" / f"{n}.yaml") for n in ("train", "hippocampus", "evaluate"))
PROMPTS = ("none", "point", "box")
ROWS = ("adapter", "unet", "medsa")
SHORT = {"steps": 10, "roi_size": [80, 112, 16]}
UNET = {
    "steps": 50,
    "network_def": {
        "_target_": "monai.networks.nets.UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 3,
        "channels": [32, 64, 128, 256],
        "strides": [2, 2, 2],
        "num_res_units": 2,
    },
    "loss_function": {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True},
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": "@roi_size", "overlap": 0.5},
    "train#trainer#iteration_update": "$None",
    # classes above the background, so that the highest positive one is the softmax's choice
    "validate#postprocessing#transforms#0": {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: x[1:] - x[:1]"},
    "pixdim": [1.0, 1.0, 1.0],
    "roi_size": [48, 64, 48],
    "patches_per_volume": 2,
}


def settings(dataset_dir: Path, folder: Path) -> dict:
    """Overrides that every run shares."""
    return {
        "bundle_root": str(BUNDLE),
        "meta_file": str(BUNDLE / "configs/metadata.json"),
        "logging_file": str(BUNDLE / "configs/logging.conf"),
        "dataset_dir": str(dataset_dir),
        "output_dir": str(folder),
        "num_workers": 0,
    }


def train(dataset_dir: Path, folder: Path, epochs: int, *, steps: int, **network: object) -> float:
    """Train for a number of epochs of so many steps without validation; seconds of wall-clock time."""
    start = time.perf_counter()
    run("training", config_file=[TRAIN, HIPPOCAMPUS], max_epochs=epochs, samples_per_epoch=steps,
        warmup_steps=max(1, epochs * steps // 20), val_interval=10**6, samples_interval=0, resume=False,
        ckpt_dir=str(folder), **settings(dataset_dir, folder), **network)  # fmt: skip
    return time.perf_counter() - start


def train_for(minutes: float, dataset_dir: Path, folder: Path, *, steps: int, **network: object) -> dict:
    """Train as many epochs as fit into the time; steps and seconds."""
    once = train(dataset_dir, folder / "trial", 1, steps=steps, **network)
    trial = train(dataset_dir, folder / "trial", 3, steps=steps, **network)
    epochs = max(1, round(60 * minutes / max((trial - once) / 2, 1e-3)))
    seconds = train(dataset_dir, folder, epochs, steps=steps, time_limit=66 * minutes, **network)
    return {"seconds": round(seconds), "steps": epochs * steps}


def measure(dataset_dir: Path, folder: Path, **overrides: object) -> dict:
    """Mean metrics, and the Dice of each class."""
    run("evaluating", config_file=[TRAIN, HIPPOCAMPUS, EVALUATE], **settings(dataset_dir, folder), **overrides)
    with open(folder / "val_mean_dice_raw.csv", newline="") as file:
        rows = [[float(v) for v in row[1:3]] for row in list(csv.reader(file))[1:]]
    return {**read_metrics(folder), "volumes": len(rows), "classes": [sum(v) / len(rows) for v in zip(*rows)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("hippocampus"))
    parser.add_argument("--minutes", type=float, default=20.0, help="time of each training from scratch")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="what to measure")
    options = parser.parse_args()
    root = options.output_dir.resolve()
    root.mkdir(parents=True, exist_ok=True)
    state = root / "hippocampus.json"
    rows: dict[str, dict] = json.loads(state.read_text()) if state.is_file() else {}

    def keep(name: str, row: dict) -> None:
        rows[name] = row
        state.write_text(json.dumps(rows, indent=1))
        print(name, row, flush=True)

    for prompt in PROMPTS if "adapter" in options.rows else ():
        if f"MedSA, {prompt}" not in rows:
            row = measure(options.dataset_dir, root / prompt, prompt=prompt, overlays=4)
            keep(f"MedSA, {prompt}", row)
    name = f"UNet, {options.minutes:g} minutes"
    if "unet" in options.rows and name not in rows:
        spent = train_for(options.minutes, options.dataset_dir, root / "unet", **UNET)
        network = {key: value for key, value in UNET.items() if key != "steps"}
        folder = root / "unet"
        keep(name, measure(options.dataset_dir, folder / "measured", ckpt_dir=str(folder), **network) | spent)
    folder = root / "medsa"
    for prompt in PROMPTS if "medsa" in options.rows else ():
        name = f"MedSA, {options.minutes:g} minutes, {prompt}"
        if name not in rows:
            spent_file = folder / "spent.json"
            if not spent_file.is_file():
                spent = train_for(options.minutes, options.dataset_dir, folder, **SHORT)
                spent_file.write_text(json.dumps(spent))
            row = measure(options.dataset_dir, folder / prompt, prompt=prompt, ckpt_dir=str(folder), mirror_axes=[])
            keep(name, row | json.loads(spent_file.read_text()))
    lines = ["| network, prompt | anterior | posterior | mean Dice | HD95, mm | NSD |", "| --- " * 6 + "|"]
    for name, row in rows.items():
        values = [*row["classes"], row["val_mean_dice"], row["val_hd95"], row["val_nsd"]]
        lines.append(f"| {name} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    lines.append(f"\n{next(iter(rows.values()))['volumes']} held-out volumes, at their own grid.")
    (root / "hippocampus.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
