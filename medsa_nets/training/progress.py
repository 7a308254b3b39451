"""Shows the progress of a training: bar, mean loss, tables of metrics, pictures of samples."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai.handlers
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from monai.handlers import from_engine
from monai.utils import CommonKeys as Keys
from torch import nn

from medsa_nets.data import image_path, output_name, save_png, unique_names
from medsa_nets.data.atomic import make_folder
from medsa_nets.errors import OutputError
from medsa_nets.prompts import prompts_of
from medsa_nets.runtime import plain, unwrap, writes_files
from medsa_nets.visualize import overlay_sample, overlay_volume

try:
    from ignite.handlers import ProgressBar
except ImportError:  # before 0.5, as MONAI Label pins it
    from ignite.contrib.handlers import ProgressBar


class EpochLoss:
    """Keeps the mean of an epoch's losses as the metric ``train_loss``, for logs. Attach it before what prints it."""

    every_process = True

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        Average(output_transform=from_engine([Keys.LOSS], first=True)).attach(engine, "train_loss")


class Progress:
    """A progress bar of an engine's iterations, with the loss where there is one; in the first process only."""

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer or evaluator."""
        if writes_files():
            bar = ProgressBar(desc=type(engine).__name__.removeprefix("Supervised"), persist=False)
            bar.attach(engine, output_transform=self._loss)

    @staticmethod
    def _loss(output: Any) -> dict[str, float]:
        first = next(iter(output), None) if isinstance(output, list) else output  # one entry per image, or the batch
        return {"loss": float(first[Keys.LOSS])} if isinstance(first, dict) and Keys.LOSS in first else {}


def _one_field(text: str) -> str:
    """A text as one field of a table, quoted where it has to be."""
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n') else text


class MetricsSaver(monai.handlers.MetricsSaver):
    """MONAI's ``MetricsSaver``, whose tables are whole or absent; a name with a comma or a quote stays one field.

    Args:
        classes: names of the classes; of several, ``metrics.csv`` also has each metric of each class, as
            ``val_mean_dice_disc``: the mean over the images in which it is defined.
        settings: of MONAI's ``MetricsSaver``.

    Raises:
        OutputError: when they can't be written; it names the folder.
    """

    every_process = True

    save_dir: Any
    _filenames: list[str]

    def __init__(self, *args: Any, classes: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.classes = list(classes)

    def _get_filenames(self, engine: Engine) -> None:
        before = len(self._filenames)
        super()._get_filenames(engine)
        for i in range(before, len(self._filenames)):
            self._filenames[i] = _one_field(self._filenames[i])

    def __call__(self, engine: Engine) -> None:
        """Write the tables."""
        folder = self.save_dir
        try:
            make_folder(folder)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".metrics-") as part:
                self.save_dir = part
                super().__call__(engine)
                self._add_classes(engine, Path(part) / "metrics.csv")
                for file in Path(part).iterdir():
                    file.replace(Path(folder) / file.name)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"{folder}: the tables of metrics can't be written ({error.strerror or error}). Make room there, or "
                "name another folder (--output_dir)."
            ) from error
        finally:
            self.save_dir = folder

    def _add_classes(self, engine: Engine, table: Path) -> None:
        """Add the mean of each class to the table of metrics; other processes than the first write none."""
        if len(self.classes) < 2 or not table.is_file():
            return
        with table.open("a", encoding="utf-8") as file:
            for metric in self.metric_details or ():
                if metric not in engine.state.metric_details:  # switched off, as MONAI takes it
                    continue
                values = torch.as_tensor(engine.state.metric_details[metric])
                for name, mean in zip(self.classes, values.nanmean(dim=0).tolist()):
                    file.write(f"{_one_field(f'{metric}_{name}')}{self.deli}{mean}\n")


class SampleOverlays:
    """Writes pictures of a few samples every ``interval`` epochs: image, label, prediction and prompt.

    Args:
        output_dir: pictures go to ``<output_dir>/samples/epoch_0010_<image>.png``.
        network: the network.
        dataset: items with ``image``, with which prompts may travel, and ``label``, in the network's grid or its own.
        inferer: as the evaluator's.
        device: device of the network.
        interval: epochs between pictures; 0 switches them off.
        count: number of samples.
    """

    def __init__(
        self,
        *,
        output_dir: str,
        network: nn.Module,
        dataset: Sequence[Any],
        inferer: Any,
        device: torch.device | str = "cpu",
        interval: int = 10,
        count: int = 4,
    ) -> None:
        if interval < 0:
            raise ValueError(f"samples_interval must be 0 or more, got {interval}.")
        self.folder = Path(output_dir) / "samples"
        self.network = network
        self.dataset = dataset
        self.inferer = inferer
        self.device = device
        self.interval = interval
        self.count = count
        self.names = unique_names(image_path(entry) for entry in getattr(dataset, "data", ()))

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        if self.interval > 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)

    def __call__(self, engine: Engine) -> None:
        """Write the pictures."""
        if not writes_files():
            return
        network = unwrap(self.network)
        network.eval()
        for i in range(min(self.count, len(self.dataset))):
            item = self.dataset[i]
            with torch.no_grad():
                logits = self.inferer(item["image"][None].to(self.device), network)
            label = item.get("label")
            if label is not None and label.shape[1:] != logits.shape[2:]:
                label = nn.functional.interpolate(plain(label)[None].float(), size=logits.shape[2:])[0]
            prompts = prompts_of(item["image"])
            if logits.dim() == 5:
                picture = overlay_volume(item["image"], logits[0], label=label, prompts=prompts)
            else:
                picture = overlay_sample(plain(item["image"]), prediction=logits[0] > 0, label=label, prompts=prompts)
            path = str(item["image"].meta.get("filename_or_obj", f"sample_{i}"))
            name = self.names.get(path) or output_name(path)
            save_png(picture, self.folder / f"epoch_{engine.state.epoch:04d}_{name}.png")
        network.train()
