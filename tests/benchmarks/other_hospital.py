"""A CT of a hospital that trained nothing, by the bundle medsa_btcv's adapter, and by its base without adaptation.

    python tests/benchmarks/other_hospital.py --scans /path/to/ct --output_dir results

Measures on the DICOM series ``ct_b_dicom`` without prompt, by one click for each organ and volume, one for each organ
and slice, and exact boxes; then a simulated user corrects the automatic masks by five clicks. The label
(``ct_b_totalsegmentator.nii.gz``) is TotalSegmentator's prediction, renumbered to BTCV's organs: the figures say how
far two models agree, not how right either is. Writes other_hospital.{md,json}.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from monai.bundle import run

from medsa_nets.bundles import read_task

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_btcv"
TRAIN, EVALUATE = (str(BUNDLE / "configs" / f"{name}.yaml") for name in ("train", "evaluate"))
# TotalSegmentator's numbers of spleen, kidneys, … in the order of the bundle's classes
TOTALSEGMENTATOR = (1, 2, 3, 4, 15, 5, 6, 52, 63, 64, 7, 8, 9)
PROMPTS = ("none", "point", "point_per_slice", "box")
AFTER = (0, 1, 2, 3, 5)  # clicks


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


def evaluate(output: Path, **settings: Any) -> dict[str, str]:
    """Run the bundle's evaluation; its metrics."""
    run("evaluating", config_file=[TRAIN, EVALUATE], output_dir=str(output), **settings)
    with open(output / "metrics.csv", newline="") as file:
        return dict(csv.reader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=Path, required=True, help="folder with ct_b_dicom and its label")
    parser.add_argument("--checkpoint", type=Path, default=BUNDLE / "models" / "model.pt")
    parser.add_argument("--output_dir", type=Path, default=Path("other_hospital"))
    options = parser.parse_args()
    root, scans = options.output_dir.resolve(), options.scans.resolve()
    classes = read_task("btcv", BUNDLE)["classes"]
    organs = renumber(scans / "ct_b_totalsegmentator.nii.gz", root / "ct_b_label.nii.gz")
    case = {"image": str(scans / "ct_b_dicom"), "label": str(root / "ct_b_label.nii.gz")}
    (root / "list.json").write_text(json.dumps({"training": [case], "validation": [case]}))
    common = {"bundle_root": str(BUNDLE), "meta_file": str(BUNDLE / "configs/metadata.json"),
              "logging_file": str(BUNDLE / "configs/logging.conf"), "dataset_dir": str(scans),
              "datalist": str(root / "list.json"), "num_workers": 0, "amp": "auto"}  # fmt: skip
    checkpoints = {"base": "", "MedSA": str(options.checkpoint.resolve())}
    report: dict[str, Any] = {"dice": {name: {} for name in checkpoints}}
    for prompt in PROMPTS:
        for name, checkpoint in checkpoints.items():
            folder = root / name / prompt
            evaluate(folder, prompt=prompt, checkpoint=checkpoint, **common)
            with open(folder / "val_mean_dice_raw.csv", newline="") as file:
                report["dice"][name][prompt] = [float(v) for v in list(csv.reader(file))[1][1:-1]]
    metrics = evaluate(root / "MedSA" / "session", prompt="session", session_clicks=max(AFTER),
                       checkpoint=checkpoints["MedSA"], **common)  # fmt: skip
    report["session"] = {name: float(value) for name, value in metrics.items() if name.startswith("val_")}
    (root / "other_hospital.json").write_text(json.dumps(report, indent=1) + "\n")
    heads = [f"{prompt}, {name}" for prompt in PROMPTS for name in checkpoints]
    lines = ["| organ | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for title, rows in [(classes[i], [i]) for i in organs] + [("mean", organs)]:
        cells = [f"{np.mean([report['dice'][name][prompt][i] for i in rows]):.3f}"
                 for prompt in PROMPTS for name in checkpoints]  # fmt: skip
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", "| from the automatic mask, after clicks | " + " | ".join(map(str, AFTER)) + " | harmful |",
              "| --- " * (len(AFTER) + 2) + "|"]  # fmt: skip
    curve = [f"{report['session'][f'val_dice_after_{n}']:.3f}" for n in AFTER]
    lines.append(f"| mean Dice | {' | '.join(curve)} | {100 * report['session']['val_harmful_clicks']:.1f} % |")
    (root / "other_hospital.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
