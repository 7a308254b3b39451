"""What each adaptation reaches in the same minutes: adapters, LoRA, AdaLoRA, the decoder alone, the whole decoder.

    python tests/benchmarks/adaptations.py --dataset_dir /path/to/ISIC --minutes 10 --output_dir results

All train through the bundle's own configuration (same lists, augmentation, prompts, loss, optimizer), one after the
other, for the same process time (minutes of a core; with OMP_NUM_THREADS=1 other work on the machine counts little):
the number of epochs is set from a timed trial, so that each schedule ends with its time. All are measured by their last
weights on the same validation images, without prompt, with one click and with a box. Writes adaptations.{md,json}; what
was measured before an interruption is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import monai
import torch
from monai.bundle import run

from medsa_nets import build_medsa
from medsa_nets.demo import read_metrics

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_isic"
FORMS: dict[str, dict[str, Any]] = {
    "adapters": {"adaptation": "adapters"},
    "LoRA": {"adaptation": "lora"},
    "LoRA, decoder too": {"adaptation": "lora", "train_decoder": "adapted"},
    "AdaLoRA": {"adaptation": "adalora"},
    "decoder's adapters alone": {"adaptation": "adapters", "frozen_encoder": True},
    "whole decoder alone": {"adaptation": "none", "train_decoder": "whole"},
    "adapters and whole decoder": {"adaptation": "adapters", "train_decoder": "whole"},
    "LoRA and whole decoder": {"adaptation": "lora", "train_decoder": "whole"},
}
PROMPTS = ("none", "point", "box")
STEPS_PER_EPOCH, BATCH = 5, 4


def settings(options: argparse.Namespace, folder: Path, form: dict[str, Any]) -> dict[str, Any]:
    """Overrides that a form's training and its measurement share."""
    own = {name: value for name, value in form.items() if name != "frozen_encoder"}
    if form.get("frozen_encoder"):  # as configs/decoder.yaml, but with the augmentation that the others have
        own["network"] = "$(@network_def.image_encoder.requires_grad_(False), @network_def.to(@device))[1]"
    return {
        "bundle_root": str(BUNDLE),
        "meta_file": str(BUNDLE / "configs/metadata.json"),
        "logging_file": str(BUNDLE / "configs/logging.conf"),
        "dataset_dir": str(options.dataset_dir),
        "ckpt_dir": str(folder),
        "output_dir": str(folder),
        "checkpoint_filename": "model_last.pt",
        "base": options.base,
        "image_size": options.image_size,
        "train_limit": options.images,
        "batch_size": BATCH,
        "num_workers": 0,
        "seed": options.seed,
        **own,
    }


def train(options: argparse.Namespace, folder: Path, form: dict[str, Any], epochs: int) -> float:
    """Train for a number of epochs without validation; seconds of process time."""
    start = time.process_time()
    given = settings(options, folder, form) | {"checkpoint_filename": "model.pt"}
    run("training", config_file=str(BUNDLE / "configs/train.yaml"), max_epochs=epochs, val_interval=10**6,
        warmup_steps=max(1, epochs * STEPS_PER_EPOCH // 10), samples_per_epoch=STEPS_PER_EPOCH * BATCH,
        samples_interval=0, resume=False, **given)  # fmt: skip
    return time.process_time() - start


def measure(options: argparse.Namespace, folder: Path, form: dict[str, Any]) -> dict[str, float]:
    """Mean Dice on the held-out images, by prompt."""
    configs = [str(BUNDLE / "configs" / name) for name in ("train.yaml", "evaluate.yaml")]
    dice = {}
    for prompt in PROMPTS:
        run("evaluating", config_file=configs, val_limit=options.held_out, prompt=prompt,
            **settings(options, folder, form))  # fmt: skip
        dice[prompt] = round(read_metrics(folder)["val_mean_dice"], 4)
    return dice


def count(options: argparse.Namespace, form: dict[str, Any]) -> int:
    """Parameters that train, without the branch of clicks, which all forms share."""
    own = {name: value for name, value in form.items() if name != "frozen_encoder"}
    with torch.device("meta"):
        network = build_medsa(options.base, pretrained=False, **own)
    if form.get("frozen_encoder"):
        network.image_encoder.requires_grad_(False)
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("adaptations"))
    parser.add_argument("--minutes", type=float, default=10.0, help="of a core, for each training")
    parser.add_argument("--images", type=int, default=0, help="training images; 0 takes all")
    parser.add_argument("--held_out", type=int, default=100, help="validation images to measure on")
    parser.add_argument("--base", default="lite_medsam")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    options = parser.parse_args()
    root = options.output_dir
    root.mkdir(parents=True, exist_ok=True)
    state = root / "adaptations.json"
    report = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {"rows": []}
    keys = ("minutes", "images", "held_out", "base", "image_size", "seed")
    here = {name: getattr(options, name) for name in keys}
    if report["rows"] and (before := {name: report[name] for name in keys}) != here:
        raise SystemExit(f"{state} was measured with {before}, now asked for {here}: name another --output_dir.")
    report.update(**here, cores=os.cpu_count(), machine=platform.processor() or platform.machine(),
                  torch=torch.__version__, monai=monai.__version__)  # fmt: skip
    for name in options.forms:
        if any(row["form"] == name for row in report["rows"]):
            continue
        form, folder = FORMS[name], root / name.replace(" ", "_")
        once = train(options, folder / "trial", form, 1)
        epoch = max((train(options, folder / "trial", form, 3) - once) / 2, 1e-3)  # seconds, without set-up
        epochs = max(1, round(60 * options.minutes / epoch))
        spent = train(options, folder, form, epochs)
        report["rows"].append(
            {
                "form": name,
                "trained": count(options, form),
                "steps": epochs * STEPS_PER_EPOCH,
                "seconds": round(spent),
                "bytes": (folder / "model_last.pt").stat().st_size,
                "dice": measure(options, folder, form),
            }
        )
        state.write_text(json.dumps(report, indent=1), encoding="utf-8")
        write(report, root)


def write(report: dict[str, Any], root: Path) -> None:
    """Write the table."""
    lines = [
        "| adaptation | trained | file | steps | seconds | Dice: no prompt | click | box |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        dice = " | ".join(f"{row['dice'][prompt]:.3f}" for prompt in PROMPTS)
        size = f"{row['bytes'] / 1e6:.1f} MB"
        lines.append(f"| {row['form']} | {row['trained']:,} | {size} | {row['steps']} | {row['seconds']} | {dice} |")
    images = report["images"] or "all"
    lines.append(
        f"\n{report['minutes']:g} minutes of training each, {images} images, {report['base']} at "
        f"{report['image_size']}, {report['held_out']} validation images, {report['cores']} cores; torch "
        f"{report['torch']}, monai {report['monai']}. Files hold the branch of clicks too, which all share."
    )
    (root / "adaptations.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
