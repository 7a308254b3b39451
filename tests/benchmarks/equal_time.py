"""A MedSA adapter and a UNet, both from their start, against time: what each reaches after so many minutes of a core.

    python tests/benchmarks/equal_time.py --hippocampus Task04_Hippocampus --ct BTCV --lesions ISIC --minutes 5 15 60

Both train through the bundles' own configurations: the same lists, augmentation, optimizer and batches, for MedSA
single slices with all classes in one pass of the decoder (``slices.yaml``), for the UNet what suits it (whole
hippocampi, crops of 96 x 96 x 32 of CT at 3 mm, photographs of 256 x 256; MedSA sees those at 128 x 128, and their
masks are measured at their own size). The learning rate stays constant after its warm-up, and what is measured is the
average of the weights (``ema_decay``), so that one training gives a point of the curve for every time and none of
them is favoured by a schedule. Minutes are process time on one thread, without reading the data set, so that other
work on the machine counts little. Mean Dice without prompt on the held-out images, the same for both; a training that
was stopped goes on after its last epoch, and points that are there are not made again. Writes
equal_time.{md,json,png}.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from ignite.engine import Engine, Events
from monai.bundle import run
from torch import nn

from medsa_nets.data.atomic import temporary_name
from medsa_nets.training import WeightAverage, save_atomically

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
DECAY = 0.98


def unet(spatial_dims: int, in_channels: int, out_channels: int, *channels: int) -> dict[str, Any]:
    """MONAI's UNet and its training step."""
    return {
        "network_def": {
            "_target_": "monai.networks.nets.UNet",
            "spatial_dims": spatial_dims,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "strides": [2] * (len(channels) - 1),
            "num_res_units": 2,
        },
        "train#trainer#iteration_update": "$None",
        "train#trainer#amp": False,
        "same_task": "false",
    }


def unet_of_volumes(classes: int) -> dict[str, Any]:
    """A UNet whose classes exclude each other."""
    return {
        **unet(3, 1, classes + 1, 32, 64, 128, 256),
        "loss_function": {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True},
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": "@roi_size", "overlap": 0.5},
        # classes above the background, so that the highest positive one is the softmax's choice
        "validate#postprocessing#transforms#0": {
            "_target_": "Lambdad",
            "keys": "pred",
            "func": "$lambda x: x[1:] - x[:1]",
        },
    }


AUTOMATIC = {"prompt_none": 1.0, "prompt_points": 0.0, "prompt_boxes": 0.0, "prompt_correction": 0.0, "prompt_draws": 1}
# of each task: bundle, overlays of its training, settings of all, overlays and settings of MedSA, settings of the UNet
TASKS: dict[str, dict[str, Any]] = {
    "hippocampus": {
        "bundle": "medsa_btcv",
        "overlays": ["hippocampus.yaml"],
        "common": {"mirror_axes": []},
        "MedSA": (["slices.yaml"], {"roi_size": [80, 112, 1], "classes_per_pass": 2, "slab_depth": 16}),
        "UNet": {
            **unet_of_volumes(2),
            "pixdim": [1.0, 1.0, 1.0],
            "roi_size": [48, 64, 48],
            "patches_per_volume": 2,
        },
    },
    "ct": {
        "bundle": "medsa_btcv",
        "overlays": [],
        "common": {},
        "MedSA": (["slices.yaml"], {"classes_per_pass": 13}),
        "UNet": {
            **unet_of_volumes(13),
            "roi_size": [96, 96, 32],
            "patches_per_volume": 2,
            "scaling": [0.3, 0.3, 0.0],
            "translation": [12.0, 12.0, 0.0],
        },
    },
    "lesions": {
        "bundle": "medsa_isic",
        "overlays": [],
        "common": {"batch_size": 4},
        "MedSA": ([], {**AUTOMATIC, "prompt_pairs": 0.0, "image_size": 128}),
        "UNet": unet(2, 3, 1, 32, 64, 128, 256, 512),
    },
}


class Snapshots:
    """Handler of a trainer: keeps the averaged weights after each of some times, and ends the training after the last.

    Time of a training that was stopped counts up to its last whole epoch, after which it goes on.

    Args:
        network: the network.
        average: the average of its weights.
        folder: where ``<minutes>.pt`` and ``<minutes>.json`` (steps) go, and ``spent.json`` (seconds).
        minutes: of process time.
    """

    every_process = True

    def __init__(self, network: nn.Module, average: WeightAverage, folder: str, minutes: Sequence[float]) -> None:
        self.network, self.average, self.folder = network, average, Path(folder)
        self.left = sorted(minutes)
        self.began = 0.0

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer, after the average and what keeps its state."""
        engine.add_event_handler(Events.STARTED, self.begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.keep)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.note)

    def begin(self, engine: Engine) -> None:
        """Time counts from here, or from the last whole epoch on."""
        self.began = time.process_time()
        if engine.state.iteration:
            self.began -= json.loads((self.folder / "spent.json").read_text())
            self.left = [m for m in self.left if not (self.folder / f"{m:g}.json").is_file()]

    def note(self, engine: Engine) -> None:
        """Note what a training that goes on has spent."""
        with temporary_name(self.folder / "spent.json") as part:
            part.write_text(json.dumps(time.process_time() - self.began))

    def keep(self, engine: Engine) -> None:
        """Keep the average where it is time."""
        while self.left and time.process_time() - self.began >= 60 * self.left[0]:
            name = f"{self.left.pop(0):g}"
            self.average.put_in(engine)
            save_atomically(self.network.state_dict(), self.folder / f"{name}.pt")
            self.average.put_back(engine)
            (self.folder / f"{name}.json").write_text(json.dumps({"steps": engine.state.iteration}))
        if not self.left:
            engine.terminate()


def settings(task: str, data: Path, folder: Path) -> dict[str, Any]:
    """What training and measurement of both networks share."""
    bundle = BUNDLES / TASKS[task]["bundle"]
    return {
        "bundle_root": str(bundle),
        "meta_file": str(bundle / "configs/metadata.json"),
        "logging_file": str(bundle / "configs/logging.conf"),
        "dataset_dir": str(data),
        "output_dir": str(folder),
        "num_workers": 0,
        "amp": "auto",
        "samples_interval": 0,
        **TASKS[task]["common"],
    }


def configs(task: str, *names: str) -> list[str]:
    """Paths of configuration files."""
    return [str(BUNDLES / TASKS[task]["bundle"] / "configs" / name) for name in names]


def of_network(task: str, network: str) -> tuple[list[str], dict[str, Any]]:
    """Overlays and settings of one of the two."""
    return TASKS[task][network] if network == "MedSA" else ([], TASKS[task][network])


def train(task: str, network: str, data: Path, folder: Path, minutes: Sequence[float]) -> None:
    """Train for the longest of some times, and keep the network after each."""
    overlays, own = of_network(task, network)
    keep = {"_target_": "equal_time.Snapshots", "network": "@network", "average": "@train#average",
            "folder": str(folder), "minutes": list(minutes)}  # fmt: skip
    run("training", config_file=configs(task, "train.yaml", *TASKS[task]["overlays"], *overlays), resume=True,
        ckpt_dir=str(folder / "last"), max_epochs=10**5, val_interval=10**6, ema_decay=DECAY, snapshots=keep,
        **{"train#trainer#train_handlers": "$@train#handlers + [@snapshots]"},
        **settings(task, data, folder), **own)  # fmt: skip


def measure(task: str, network: str, data: Path, snapshot: Path, count: int) -> float:
    """Mean Dice of a snapshot without prompt."""
    _, own = of_network(task, network)
    own = {key: value for key, value in own.items() if not key.startswith(("train#", "prompt"))}
    folder = snapshot.with_suffix("")
    run("evaluating", config_file=configs(task, "train.yaml", *TASKS[task]["overlays"], "evaluate.yaml"),
        checkpoint=str(snapshot), val_limit=count, **settings(task, data, folder), **own)  # fmt: skip
    with open(folder / "metrics.csv", newline="") as file:
        return float(dict(csv.reader(file))["val_mean_dice"])


def write(report: dict[str, Any], root: Path) -> None:
    """Write the table and the picture."""
    minutes = sorted({float(m) for points in report.values() for m in points}, key=float)
    lines = [
        "| task, network | " + " | ".join(f"{m:g} min" for m in minutes) + " | steps |",
        "| --- " * (len(minutes) + 2) + "|",
    ]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, points in report.items():
        cells = [f"{points[f'{m:g}']['dice']:.3f}" if f"{m:g}" in points else "" for m in minutes]
        last = max(points, key=float)
        lines.append(f"| {name} | {' | '.join(cells)} | {points[last]['steps']} |")
        known = sorted(points, key=float)
        axes.plot([float(m) for m in known], [points[m]["dice"] for m in known], marker="o", label=name,
                  linestyle="--" if "UNet" in name else "-")  # fmt: skip
    axes.set(xlabel="minutes of one core", ylabel="mean Dice, held out, no prompt", xscale="log")
    axes.set_xticks(minutes, [f"{m:g}" for m in minutes])
    axes.legend()
    figure.savefig(root / "equal_time.png", dpi=110, bbox_inches="tight")
    (root / "equal_time.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for task in TASKS:
        parser.add_argument(f"--{task}", type=Path, help="folder of the data set; none leaves the task out")
    parser.add_argument("--networks", nargs="+", choices=("MedSA", "UNet"), default=["MedSA", "UNet"])
    parser.add_argument("--minutes", nargs="+", type=float, default=[5.0, 15.0, 60.0])
    parser.add_argument("--held_out", type=int, default=40, help="most validation images to measure on")
    parser.add_argument("--output_dir", type=Path, default=Path("equal_time"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = options.output_dir.resolve()
    root.mkdir(parents=True, exist_ok=True)
    state = root / "equal_time.json"
    report: dict[str, Any] = json.loads(state.read_text()) if state.is_file() else {}
    for task in TASKS:
        data = getattr(options, task)
        for network in options.networks if data is not None else ():
            name, folder = f"{task}, {network}", root / task / network
            times = [f"{m:g}" for m in options.minutes]
            if any(not (folder / f"{m}.json").is_file() for m in times):
                train(task, network, data.resolve(), folder, options.minutes)
            for m in times:
                if m not in report.get(name, {}):
                    dice = measure(task, network, data.resolve(), folder / f"{m}.pt", options.held_out)
                    steps = json.loads((folder / f"{m}.json").read_text())["steps"]
                    report.setdefault(name, {})[m] = {"dice": round(dice, 4), "steps": steps}
                    state.write_text(json.dumps(report, indent=1))
                    print(name, m, report[name][m], flush=True)
    write(report, root)


if __name__ == "__main__":
    main()
