"""The main job in one command: adapt a base to lesions in a few minutes, measure before and after, draw a page.

``python -m medsa_nets.demo`` generates phantoms; with ``DATASET_DIR=/path/to/ISIC`` in front it uses real images.
Everything goes through the bundle ``bundles/medsa_isic``, with its own commands and settings. The decoder's adapters
train alone (``configs/decoder.yaml``): each picture is encoded once, so that minutes are enough on any processor. How
much is trained, and on pictures of which size, depends on how fast the machine is: a few steps are timed first.
"""

from __future__ import annotations

import csv
import inspect
import logging.config
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from monai.bundle import run
from PIL import Image

from medsa_nets.bundles import Bundle
from medsa_nets.commands import command
from medsa_nets.data.phantoms import write_phantoms
from medsa_nets.errors import DataError, find_cause
from medsa_nets.machine import limit_threads
from medsa_nets.visualize import contact_sheet

PROMPTS = ("none", "point", "box")
GOOD = 0.85  # mean Dice, in each way of prompting, from which the masks count as good
IMAGES, VALIDATION, BATCH = 96, 8, 4  # most images that are learned from, images that are measured, images of a step
EPOCHS = 2  # parts of the training, with a validation after each
TIMED_SIZE = 128  # of the pictures of the steps that are timed; time goes with the number of pixels
TIMED_STEPS = 3  # the first also encodes


@dataclass(frozen=True)
class Speed:
    """Seconds that this machine takes for pictures of :data:`TIMED_SIZE`.

    Args:
        step: a training step of the decoder, on embeddings that are there.
        encode: the encoding of the images of a step.
        start: to read a configuration and to build the network.
    """

    step: float
    encode: float
    start: float


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Args:
        image_size: side of the square that the network sees, in pixels.
        steps: training steps of :data:`BATCH` images.
    """

    image_size: int
    steps: int

    def step(self, speed: Speed) -> float:
        """Seconds of a step."""
        return speed.step * (self.image_size / TIMED_SIZE) ** 2

    def around(self, speed: Speed) -> float:
        """Seconds of all but the steps: starts, embeddings, validations and measurements before and after."""
        encoded = IMAGES + 2 * VALIDATION  # these twice, for measurements are in full precision
        decoded = VALIDATION * (2 * len(PROMPTS) + EPOCHS)
        images = (encoded * speed.encode + decoded * speed.step) / BATCH
        return (2 * len(PROMPTS) + 1) * speed.start + images * (self.image_size / TIMED_SIZE) ** 2

    def seconds(self, speed: Speed) -> float:
        """Seconds of the whole."""
        return self.around(speed) + self.steps * self.step(speed)


# The best first; a machine takes the first that it has the time for.
PLANS = (Plan(image_size=160, steps=200), Plan(image_size=128, steps=160))


def choose_plan(speed: Speed, seconds: float) -> Plan:
    """The first of :data:`PLANS` that ends in this time; the last where none does."""
    return next((plan for plan in PLANS if plan.seconds(speed) <= seconds), PLANS[-1])


def announce(plan: Plan, speed: Speed, seconds: float) -> str:
    """Say what this machine is going to do, for how long, and whether that is enough."""
    size = f"{plan.image_size} x {plan.image_size}"
    step, around = plan.step(speed), plan.around(speed)
    text = (
        f"This machine takes {step:.2f} s a step: about {plan.steps * step / 60:.1f} minutes for {plan.steps} steps of "
        f"{BATCH} pictures of {size}, and {around / 60:.1f} minutes around them."
    )
    if plan.seconds(speed) > seconds:
        done = max(0, int((seconds - around) / step))
        text += (
            f"\nThat is more than the {seconds / 60:.1f} minutes there are: about {done} of {plan.steps} steps will be "
            f"done, and the masks may not be good. --minutes {plan.seconds(speed) / 60 + 1:.0f} is enough for all."
        )
    return text


def judge(after: dict[str, float], out_of_time: bool, command: str) -> str:
    """Say whether the masks are good, and how to go on where they are not.

    Args:
        after: mean Dice of each way of prompting.
        out_of_time: whether the training was stopped before its end.
        command: goes on from the adapter.
    """
    low = {prompt: dice for prompt, dice in after.items() if not dice >= GOOD}  # not a number is low too
    if not low:
        return f"The adapter is good: mean Dice is {GOOD} or more without prompt, by a click and by a box."
    named = ", ".join(f"{dice:.3f} for prompt {prompt}" for prompt, dice in low.items())
    why = "The time was over before the training's end." if out_of_time else "The training came to its end."
    return (
        f"THE MASKS ARE NOT GOOD YET: mean Dice is below {GOOD} ({named}). {why}\nTo go on from this adapter: {command}"
    )


def read_metrics(folder: Path) -> dict[str, float]:
    """Read a bundle's ``metrics.csv``."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return {name: float(value) for name, value in csv.reader(file)}


class Demo:
    """Measurements and training of one bundle on one data set, by the bundle's own configurations.

    Args:
        bundle: folder of the bundle.
        dataset_dir: data set in a layout that the bundle reads.
        output_dir: adapter, embeddings, metrics and pictures go here.
        seed: seed of the training.
    """

    def __init__(self, bundle: Path, dataset_dir: Path, output_dir: Path, seed: int = 0) -> None:
        self.configs = bundle / "configs"
        self.output_dir = output_dir
        self.adapter = output_dir / "models" / "model.pt"
        self.common = {
            "bundle_root": str(bundle),
            "dataset_dir": str(dataset_dir),
            "ckpt_dir": str(self.adapter.parent),
            "logging_file": str(self.configs / "logging.conf"),
            "meta_file": str(self.configs / "metadata.json"),
            "train_limit": IMAGES,
            "val_limit": VALIDATION,
            "batch_size": BATCH,
            "num_workers": 0,
            "seed": seed,
        }

    def files(self, *names: str) -> list[str]:
        """Paths of configurations, laid over each other."""
        return [str(self.configs / name) for name in names]

    def settings(self, plan: Plan) -> dict[str, Any]:
        """Settings that all commands share."""
        return {**self.common, "embedding_dir": str(self.output_dir / "embeddings"), "image_size": plan.image_size}

    def time_steps(self) -> Speed:
        """Time a few training steps; the log says what they compute in."""
        # the bundle's commands set this up for themselves, but the precision is chosen, and logged, once a process
        logging.config.fileConfig(self.configs / "logging.conf", disable_existing_loggers=False)
        start = time.perf_counter()
        steps = self.take_steps()
        last = steps[-1]
        return Speed(last, max(0.0, steps[0] - last), time.perf_counter() - start - sum(steps))

    def take_steps(self) -> list[float]:
        """Take training steps on one batch with a network that is thrown away: the seconds of each."""
        seconds = []
        with TemporaryDirectory(prefix="medsa_") as folder:
            places = {"embedding_dir": f"{folder}/embeddings", "output_dir": folder}
            settings = {**self.common, **places, "image_size": TIMED_SIZE, "samples_interval": 0}
            parser = Bundle.of_files(self.files("train.yaml", "decoder.yaml"), settings).parser()
            iteration, trainer, batches = (
                parser.get_parsed_content(f"train#{name}") for name in ("iteration", "trainer", "dataloader")
            )
            batch = next(iter(batches))
            for _ in range(TIMED_STEPS):
                start = time.perf_counter()
                iteration(trainer, batch)
                seconds.append(time.perf_counter() - start)
        return seconds

    def measure(self, stage: str, plan: Plan, **settings: Any) -> dict[str, float]:
        """Mean Dice of each way of prompting; pictures are written too."""
        files = self.files("train.yaml", "evaluate.yaml", "decoder.yaml")
        results = {}
        for prompt in PROMPTS:
            folder = self.output_dir / stage / prompt
            run("evaluating", config_file=files, prompt=prompt, overlays=4, output_dir=str(folder),
                **self.settings(plan), **settings)  # fmt: skip
            results[prompt] = read_metrics(folder)["val_mean_dice"]
        return results

    def train(self, plan: Plan, seconds: float, start_from: Path | None = None) -> bool:
        """Train for at most so many seconds; returns whether that was too short."""
        start, files = time.monotonic(), self.files("train.yaml", "decoder.yaml")
        run("training", config_file=files, output_dir=str(self.output_dir / "training"),
            max_epochs=EPOCHS, samples_per_epoch=plan.steps // EPOCHS * BATCH, samples_interval=0,
            warmup_steps=10, time_limit=seconds, resume=False, start_from=str(start_from) if start_from else None,
            **self.settings(plan))  # fmt: skip
        return time.monotonic() - start >= seconds

    def draw(self) -> Path:
        """Draw the page of overlays."""
        pictures = sorted((self.output_dir / "after" / "none" / "overlays").glob("*_overlay.png"))
        rows = [
            (
                "",
                [
                    (f"{stage}, {prompt}", Image.open(self.output_dir / stage / prompt / "overlays" / path.name))
                    for stage in ("before", "after")
                    for prompt in PROMPTS
                ],
            )
            for path in pictures
        ]
        return contact_sheet(
            rows,
            self.output_dir / "overlays.png",
            title="green: label, red: prediction, cyan: click, yellow: box; before and after adaptation",
        )


def run_demo(demo: Demo, *, minutes: float, go_on: bool = False, next_command: str = "") -> Path:
    """Time a few steps, measure, train, measure again, judge, and draw.

    Args:
        demo: bundle, data set and folders.
        minutes: time limit of all of it.
        go_on: whether to begin with the adapter of an earlier demo.
        next_command: goes on with this demo.

    Returns:
        Path of the page of overlays.
    """
    end = time.monotonic() + 60.0 * minutes
    print("Timing a few training steps ...", flush=True)
    speed = demo.time_steps()
    plan = choose_plan(speed, end - time.monotonic())
    print(announce(plan, speed, end - time.monotonic()), flush=True)
    start = time.monotonic()
    before = demo.measure("before", plan, checkpoint="")
    again = time.monotonic() - start  # what measuring takes after the training
    left = max(1.0, end - time.monotonic() - again)
    out_of_time = demo.train(plan, left, demo.adapter if go_on else None)
    after = demo.measure("after", plan)
    print("\nmean Dice      before   after")
    for prompt in PROMPTS:
        print(f"prompt {prompt:6}  {before[prompt]:6.3f}  {after[prompt]:6.3f}")
    page = demo.draw()
    print(f"\nOverlays: {page}\nAdapter:  {demo.adapter}\n\n{judge(after, out_of_time, next_command)}")
    return page


def demonstrate(
    *,
    bundle: Path = Path("bundles/medsa_isic"),
    dataset_dir: Path | None = None,
    output_dir: Path = Path("demo"),
    minutes: float = 4.5,
    go_on: bool = False,
) -> None:
    """Adapt a base to lesions in a few minutes, measure before and after, and draw a page of overlays.

    Args:
        bundle: folder of the bundle medsa_isic.
        dataset_dir: a data set in a layout that the bundle reads; by default that of the environment variable
            DATASET_DIR, else generated pictures.
        output_dir: adapter, metrics and pictures go here.
        minutes: time limit, measuring before and after included.
        go_on: begin with the adapter that an earlier demo left.
    """
    limit_threads()
    if not (bundle / "configs" / "train.yaml").is_file():
        raise DataError(
            f"--bundle {bundle}: there is no configs/train.yaml. Run this in the project's folder, or pass the folder "
            "of the bundle medsa_isic."
        )
    if dataset_dir is None and os.environ.get("DATASET_DIR"):
        dataset_dir = Path(os.environ["DATASET_DIR"])
    next_command = f"{sys.executable} -m medsa_nets.demo --go_on --minutes {2 * minutes:g}"
    given = {"bundle": bundle, "dataset_dir": dataset_dir, "output_dir": output_dir}
    usual = {name: own.default for name, own in inspect.signature(demonstrate).parameters.items()}
    next_command += "".join(f" --{name} {value}" for name, value in given.items() if value not in (None, usual[name]))
    if dataset_dir is None:
        dataset_dir = write_phantoms(output_dir / "phantoms", training=IMAGES, validation=VALIDATION)
        print("No DATASET_DIR: using phantoms, generated pictures that look a little like dermoscopy.")
    try:
        run_demo(Demo(bundle, dataset_dir, output_dir), minutes=minutes, go_on=go_on, next_command=next_command)
    except Exception as error:
        if (cause := find_cause(error)) is None:
            raise
        raise cause from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return command(demonstrate, arguments, name="python -m medsa_nets demo")


if __name__ == "__main__":
    sys.exit(main())
