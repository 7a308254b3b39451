"""Draw the curves of a training from its TensorBoard events: loss of each epoch, and the validation's metrics.

    python tests/benchmarks/curves.py bundles/medsa_isic/eval --output curves.png

Runs that were interrupted and resumed are joined. Several folders are drawn one after the other, as stages of one
training (``--start_from``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """All scalars of a folder's event files, by tag and step; later files win where runs overlap."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        raise SystemExit(f"error: {folder}: no TensorBoard events; pass the output_dir of a training.")
    found: dict[str, dict[int, float]] = {}
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="output_dir of each stage, in order")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    step = epoch = 0
    for index, folder in enumerate(options.folders):
        found = scalars(folder)
        losses = sorted(found.get("train_loss", {}).items())
        width = max(1, len(losses) // 40)  # a mean over this many iterations for each point
        groups = [losses[i : i + width] for i in range(0, len(losses) - width + 1, width)]
        left.plot(
            [step + group[-1][0] for group in groups],
            [sum(value for _, value in group) / width for group in groups],
            color="C0",
        )
        last = 0
        for colour, tag in (("C1", "val_mean_dice"), ("C2", "val_mean_iou")):
            points = sorted(found.get(tag, {}).items())
            right.plot(
                [epoch + e for e, _ in points],
                [value for _, value in points],
                color=colour,
                marker="o",
                label=tag if index == 0 and points else None,
            )
            last = max([last, *(e for e, _ in points)])
        step, epoch = step + max(dict(losses), default=0), epoch + last
    left.set(xlabel="iteration", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="validation")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(options.output, dpi=110)
    print(options.output)


if __name__ == "__main__":
    main()
