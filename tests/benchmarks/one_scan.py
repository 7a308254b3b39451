"""One scan is enough to start: adapt to one CT, measure on another.

    python tests/benchmarks/one_scan.py --scans /path/to/ct --output_dir results

Trains on ``ct_a.nii.gz`` alone through the bundle medsa_btcv and measures on the DICOM series ``ct_b_dicom``, before
and after, without prompt and with clicks. The labels (``ct_?_totalsegmentator.nii.gz``) are TotalSegmentator's
predictions, renumbered to BTCV's organs: the figures say how far two models agree, not how right either is. Writes
one_scan.{md,json}.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import nibabel
import numpy as np
from monai.bundle import ConfigParser, run

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_btcv"
TRAIN, EVALUATE = (str(BUNDLE / "configs" / f"{name}.yaml") for name in ("train", "evaluate"))
# TotalSegmentator's numbers of spleen, kidneys, … in the order of the bundle's classes
TOTALSEGMENTATOR = (1, 2, 3, 4, 15, 5, 6, 52, 63, 64, 7, 8, 9)
PROMPTS = ("none", "point", "point_per_slice", "box")


def renumber(source: Path, target: Path) -> list[int]:
    """Write a label with the bundle's class numbers; the ids of the classes in it."""
    image = nibabel.load(source)
    values = np.asarray(image.dataobj)
    label = np.zeros(values.shape, np.uint8)
    for i, value in enumerate(TOTALSEGMENTATOR, start=1):
        label[values == value] = i
    target.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(label, image.affine), target)
    return sorted(int(v) - 1 for v in np.unique(label) if v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=Path, required=True, help="folder with ct_a and ct_b")
    parser.add_argument("--output_dir", type=Path, default=Path("one_scan"))
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    root, scans = options.output_dir.resolve(), options.scans.resolve()
    classes = ConfigParser.load_config_file(TRAIN)["classes"]
    present = {name: renumber(scans / f"{name}_totalsegmentator.nii.gz", root / f"{name}_label.nii.gz")
               for name in ("ct_a", "ct_b")}  # fmt: skip
    lists = {
        "training": [{"image": str(scans / "ct_a.nii.gz"), "label": str(root / "ct_a_label.nii.gz")}],
        "validation": [{"image": str(scans / "ct_b_dicom"), "label": str(root / "ct_b_label.nii.gz")}],
    }
    (root / "scans.json").write_text(json.dumps(lists))
    common = {
        "bundle_root": str(BUNDLE),
        "meta_file": str(BUNDLE / "configs/metadata.json"),
        "logging_file": str(BUNDLE / "configs/logging.conf"),
        "dataset_dir": str(scans),
        "datalist": str(root / "scans.json"),
        "ckpt_dir": str(root / "models"),
        "num_workers": 0,
        "pixdim": [2.0, 2.0, 3.0],
        "roi_size": [128, 128, 16],
    }
    start = time.perf_counter()
    run("training", config_file=TRAIN, output_dir=str(root / "training"), max_epochs=5, patches_per_volume=1,
        samples_per_epoch=options.steps // 5, warmup_steps=15, val_interval=10**6, samples_interval=0,
        **common)  # fmt: skip
    minutes = (time.perf_counter() - start) / 60
    table: dict[str, dict[str, list[float]]] = {}
    for stage, extra in (("before", {"checkpoint": ""}), ("after", {})):
        for prompt in PROMPTS:
            folder = root / stage / prompt
            run("evaluating", config_file=[TRAIN, EVALUATE], prompt=prompt, overlays=1, amp=True,
                output_dir=str(folder), **common, **extra)  # fmt: skip
            with open(folder / "val_mean_dice_raw.csv", newline="") as file:
                row = list(csv.reader(file))[1]
            table.setdefault(stage, {})[prompt] = [float(v) for v in row[1:-1]]
    (root / "one_scan.json").write_text(json.dumps({"minutes": minutes, "steps": options.steps, "dice": table}))
    both = [i for i in present["ct_b"] if i in present["ct_a"]]
    heads = [f"{prompt}, {stage}" for prompt in PROMPTS for stage in ("before", "after")]
    lines = ["| organ | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for i in both:
        cells = [f"{table[stage][prompt][i]:.3f}" for prompt in PROMPTS for stage in ("before", "after")]
        lines.append(f"| {classes[i]} | " + " | ".join(cells) + " |")
    lines.append(
        f"\n{options.steps} steps on one scan in {minutes:.0f} minutes; agreement (Dice) with TotalSegmentator."
    )
    (root / "one_scan.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
