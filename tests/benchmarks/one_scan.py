"""One scan is enough to start: adapt to one CT, measure on another, with and without what joins slices.

    python tests/benchmarks/one_scan.py --scans /path/to/ct --output_dir results

Trains on ``ct_a.nii.gz`` alone through the bundle medsa_btcv with its overlay ``ct_3mm.yaml`` and measures on the DICOM
series ``ct_b_dicom`` without prompt, by one click per organ and volume, one per organ and slice, and boxes: the base
alone, the adapted network, one that trained alike but for SD-Trans's depth branch, which stayed at zero, and the
adapted network without the embedding of clicks on other slices (set to zero after training). The labels
(``ct_?_totalsegmentator.nii.gz``) are TotalSegmentator's predictions, renumbered to BTCV's organs: the figures say how
far two models agree, not how right either is. Measured rows are kept and not repeated. Writes one_scan.{md,json}.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import nibabel
import numpy as np
import torch
from monai.bundle import run

from medsa_nets.bundles import read_task
from medsa_nets.training import save_atomically

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_btcv"
TRAIN, COARSE, EVALUATE = (str(BUNDLE / "configs" / f"{name}.yaml") for name in ("train", "ct_3mm", "evaluate"))
# TotalSegmentator's numbers of spleen, kidneys, … in the order of the bundle's classes
TOTALSEGMENTATOR = (1, 2, 3, 4, 15, 5, 6, 52, 63, 64, 7, 8, 9)
SILENCED = "MedSA, distant clicks silenced"
PROMPTS = ("none", "point", "point_per_slice", "box")
# name: part of the names of the adapters that do not train; none: nothing trains
VARIANTS: dict[str, str | None] = {"base": None, "MedSA": "", "without SD-Trans": ".depth.", SILENCED: None}


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
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="rows to measure")
    options = parser.parse_args()
    root, scans = options.output_dir.resolve(), options.scans.resolve()
    classes = read_task("btcv", BUNDLE)["classes"]
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
        "num_workers": 0,
        "checkpoint_filename": "model.pt",
    }
    state = root / "one_scan.json"
    report = json.loads(state.read_text()) if state.is_file() else {"rows": {}}
    for name in options.only:
        if name not in report["rows"]:
            folder = root / name.replace(" ", "_")
            if name == SILENCED:
                silence(root / "MedSA/models/model.pt", folder / "models/model.pt")
            report["rows"][name] = measure(folder, name, options.steps, common)
            state.write_text(json.dumps(report, indent=1))
            print(name, report["rows"][name], flush=True)
    if set(report["rows"]) == set(VARIANTS):
        organs = [i for i in present["ct_b"] if i in present["ct_a"]]
        write({name: report["rows"][name] for name in VARIANTS}, classes, organs, options.steps, root)


def silence(adapter: Path, target: Path) -> None:
    """Copy an adapter without its embedding of clicks on other slices."""
    state = torch.load(adapter, weights_only=True)
    for name in ("distant_prompt.up.weight", "distant_prompt.up.bias"):
        state[name] = torch.zeros_like(state[name])
    save_atomically(state, target)


def measure(folder: Path, name: str, steps: int, common: dict) -> dict:
    """Train a variant and measure it: minutes of training, Dice of each class by prompt."""
    frozen = VARIANTS[name]
    shared = {**common, "ckpt_dir": str(folder / "models")}
    start = time.perf_counter()
    if frozen is not None:
        trained = f"$[p for n, p in @network.named_parameters() if p.requires_grad and {frozen or '/'!r} not in n]"
        run("training", config_file=[TRAIN, COARSE], output_dir=str(folder), samples_interval=0, max_epochs=5,
            samples_per_epoch=steps // 5, val_interval=10**6, **{"optimizer#params": trained}, **shared)  # fmt: skip
    row: dict = {"minutes": (time.perf_counter() - start) / 60, "dice": {}}
    for prompt in PROMPTS:
        run("evaluating", config_file=[TRAIN, COARSE, EVALUATE], prompt=prompt, overlays=1,
            output_dir=str(folder / prompt), **({"checkpoint": ""} if name == "base" else {}), **shared)  # fmt: skip
        with open(folder / prompt / "val_mean_dice_raw.csv", newline="") as file:
            row["dice"][prompt] = [float(v) for v in list(csv.reader(file))[1][1:-1]]
    return row


def write(rows: dict, classes: list[str], organs: list[int], steps: int, root: Path) -> None:
    """Write two tables: organs before and after, means of the variants."""
    heads = [f"{prompt}, {stage}" for prompt in PROMPTS for stage in ("base", "MedSA")]
    lines = ["| organ | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for i in organs:
        cells = [f"{rows[stage]['dice'][prompt][i]:.3f}" for prompt in PROMPTS for stage in ("base", "MedSA")]
        lines.append(f"| {classes[i]} | " + " | ".join(cells) + " |")
    lines += ["", "| mean over organs | " + " | ".join(PROMPTS) + " |", "| --- " * (len(PROMPTS) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{np.mean([row['dice'][prompt][i] for i in organs]):.3f}" for prompt in PROMPTS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    minutes = rows["MedSA"]["minutes"]
    lines.append(f"\n{steps} steps on one scan, {minutes:.0f} minutes; agreement (Dice) with TotalSegmentator.")
    (root / "one_scan.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
