"""Ignite handlers: checkpoints that survive a kill, tables that are whole, and pictures of samples during training."""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ignite.handlers
import monai.handlers
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from monai.handlers import CheckpointLoader, from_engine
from monai.utils import CommonKeys as Keys
from torch import nn

from medsa_nets.data import output_name, save_png, unique_names
from medsa_nets.data.atomic import make_folder, remove_leftovers, temporary_name
from medsa_nets.engines import plain
from medsa_nets.errors import OutputError, SettingError, WeightsError, describe
from medsa_nets.networks import MedSA
from medsa_nets.prompts import prompts_of
from medsa_nets.visualize import overlay_sample, overlay_volume

try:
    from ignite.handlers import ProgressBar
except ImportError:  # before 0.5, as MONAI Label pins it
    from ignite.contrib.handlers import ProgressBar


def save_atomically(obj: Any, path: str | Path) -> Path:
    """``torch.save`` under a temporary name in the same folder, then rename: a reader never sees half a file."""
    path = Path(path)
    make_folder(path.parent)
    buffer = io.BytesIO()  # torch hides why it can't write to a file
    torch.save(obj, buffer)
    with temporary_name(path) as part, open(part, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    return path


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside ``DistributedDataParallel``, or itself."""
    return getattr(network, "module", network)


def writes_files() -> bool:
    """Whether this process is the one that writes: the only one, or the first of a distributed run."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def for_this_process(handlers: Sequence[Any]) -> list[Any]:
    """Of a bundle's handlers, those that this process of a distributed run attaches.

    All processes schedule, validate, load and stop alike; only the first prints, logs and writes.
    """
    shared = (
        "CheckpointLoader",
        "EpochLoss",
        "EarlyStop",
        "EpochSeed",
        "LrScheduleHandler",
        "MetricsSaver",
        "RankBudget",
        "StartFrom",
        "TrainingCheckpoint",
        "ValidationHandler",
    )
    return [handler for handler in handlers if writes_files() or type(handler).__name__ in shared]


class EpochSeed:
    """Tells the sampler, and through it the dataset, which epoch's random numbers to draw.

    Args:
        sampler: with ``set_epoch``, as :class:`medsa_nets.data.EpochSampler`.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: self.sampler.set_epoch(e.state.epoch))


class EpochLoss:
    """Keeps the mean of an epoch's losses as the metric ``train_loss``, for logs. Attach it before what prints it."""

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


_OF_EPOCHS = ("t_total", "warmup_steps")  # of a schedule


def _as_text(value: Any) -> str:
    """A setting's value; 0.001, 1e-3 and "0.001" are one."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_as_text(part) for part in value)}]"
    try:
        return f"{float(value):g}" if float(f"{float(value):g}") == float(value) else repr(float(value))
    except (TypeError, ValueError):
        return str(value).lower() if str(value).lower() in ("true", "false", "none", "null") else str(value)


def data_files(data: Sequence[Any]) -> list[str]:
    """A data list by names and sizes: ``<bytes> <image>, <label>`` for each entry, as seen from their common folder.

    Folders count the files in them; what is no path has none.
    """
    entries = []
    for entry in data:
        values = [entry.get(key) for key in ("image", "label")] if isinstance(entry, Mapping) else []
        entries.append([os.path.abspath(v) for v in values if isinstance(v, (str, os.PathLike))])
    paths = [path for entry in entries for path in entry]
    try:
        root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    except ValueError:  # drives of Windows
        root = ""
    out = []
    for entry in entries:
        sizes = [len(os.listdir(p)) if os.path.isdir(p) else os.path.getsize(p) for p in entry if os.path.exists(p)]
        names = [os.path.relpath(path, root) if root else path for path in entry]
        out.append(f"{'+'.join(map(str, sizes))} {', '.join(names)}")
    return out if paths else []


class TrainingCheckpoint:
    """Saves the best and the last adapter, and everything that an interrupted training needs to go on.

    MONAI's ``CheckpointSaver`` writes in place and forgets the best metric of an interrupted run; this handler writes
    under temporary names, and restores network, optimizer, schedule, epoch and best metric. Attach it to the trainer
    after the ``ValidationHandler``.

    - ``<save_dir>/<best_filename>``: adapter with the best validation metric (the last one where nothing validates).
    - ``<save_dir>/<last_filename>``: adapter after the last epoch.
    - ``<save_dir>/<resume_filename>``: the state of a run that has not finished; it is removed when the run ends.

    A run that goes on has the settings and the data of the one that was interrupted. With other settings it is refused;
    with other data, as an annotator's next training has them, the state is set aside and the run starts anew. Other
    epochs alone are neither: the schedule of the learning rate takes the new number.

    Args:
        save_dir: folder of the files.
        network: the network.
        optimizer: its optimizer.
        lr_scheduler: its schedule.
        evaluator: validates during training; none where nothing does.
        best_filename: see above.
        last_filename: see above.
        resume_filename: see above.
        resume: whether an unfinished run in ``save_dir`` is continued; else it is started anew.
        settings: what decides how the run learns, by name; kept with its state.
        data: its data list, entries with ``image`` and ``label``; kept with its state, by names and sizes of files, so
            that a copy of the data in another folder is the same.

    Raises:
        SettingError: at the start, when an unfinished run had other settings; it names them.
        WeightsError: at the start, when the state can't be read, or belongs to another network.
    """

    def __init__(
        self,
        *,
        save_dir: str,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any = None,
        evaluator: Engine | None = None,
        best_filename: str = "model.pt",
        last_filename: str = "model_last.pt",
        resume_filename: str = "training_state.pt",
        resume: bool = True,
        settings: Mapping[str, Any] | None = None,
        data: Sequence[Any] | None = None,
    ) -> None:
        self.settings = {name: _as_text(value) for name, value in (settings or {}).items()}
        self.data = data_files(data or ())
        self.folder = Path(save_dir)
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.evaluator = evaluator
        self.best, self.last, self.state = (
            self.folder / name for name in (best_filename, last_filename, resume_filename)
        )
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.restore)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save_state)
        engine.add_event_handler(Events.COMPLETED, self.finish)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.COMPLETED, self.save_best)

    def save_best(self, evaluator: Engine) -> None:
        """Save the adapter if this validation was the best so far."""
        if writes_files() and evaluator.state.best_metric_epoch == evaluator.state.epoch:
            save_atomically(unwrap(self.network).state_dict(), self.best)
            evaluator.logger.info(f"Saved {self.best}: {evaluator.state.best_metric:.4f} is the best metric so far.")

    def save_state(self, engine: Engine) -> None:
        """Save what a continued run needs."""
        if not writes_files():
            return
        state = {
            "network": unwrap(self.network).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "epoch_length": engine.state.epoch_length,
            "max_epochs": engine.state.max_epochs,
            "settings": self.settings,
            "data": self.data,
        }
        if self.lr_scheduler is not None:
            state["lr_scheduler"] = self.lr_scheduler.state_dict()
        if engine.scaler is not None and (scaler := engine.scaler.state_dict()):
            state["scaler"] = scaler
        if self.evaluator is not None:
            state["best_metric"] = float(self.evaluator.state.best_metric)
            state["best_metric_epoch"] = int(self.evaluator.state.best_metric_epoch)
        save_atomically(state, self.state)

    def restore(self, engine: Engine) -> None:
        """Go on from the state of an unfinished run, if there is one."""
        if writes_files():
            for path in (self.best, self.last, self.state):
                remove_leftovers(path)
        if not self.state.is_file():
            return
        if not self.resume:
            engine.logger.info(f"{self.state} holds an unfinished run; it is started anew (resume is false).")
            return
        try:
            state = torch.load(self.state, map_location="cpu", weights_only=True)
            epoch, iteration = int(state["epoch"]), int(state["iteration"])
        except Exception as error:  # torch, zipfile and pickle raise errors of their own
            raise WeightsError(
                f"{self.state}: the state of the unfinished run can't be read ({describe(error)}). "
                "Delete it, or pass --resume false, to start anew."
            ) from error
        self._check_settings(state.get("settings", {}))
        other = self._other_data(state, engine)
        if other:  # an annotator's next training has another case or two
            aside = self.state.with_name(f"{self.state.stem}_of_other_data{self.state.suffix}")
            engine.logger.warning(
                f"{self.state}: the unfinished run had {other}. This run starts anew, as with --resume false; to go on "
                f"with the other one, restore those and rename {aside} to {self.state.name}."
            )
            if writes_files():
                os.replace(self.state, aside)
            return
        try:
            unwrap(self.network).load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
        except WeightsError as error:
            raise WeightsError(
                f"{self.state}: the unfinished run was another one. {error} Or pass --resume false, to start anew."
            ) from error
        except (RuntimeError, ValueError, KeyError) as error:
            raise WeightsError(
                f"{self.state}: the state of the unfinished run belongs to another network ({describe(error)}). "
                "Restore the settings that it began with, or pass --resume false to start anew."
            ) from error
        self._restore_schedule(state, engine)
        if "scaler" in state:  # of a run in float16
            if engine.scaler is None:
                engine.scaler = torch.amp.GradScaler(engine.state.device.type)
            engine.scaler.load_state_dict(state["scaler"])
        if self.evaluator is not None:
            self.evaluator.state.best_metric = state["best_metric"]
            self.evaluator.state.best_metric_epoch = state["best_metric_epoch"]
        engine.state.epoch, engine.state.iteration = epoch, iteration
        engine.logger.info(f"Resuming from {self.state}: {epoch} of {engine.state.max_epochs} epochs are done.")

    def _check_settings(self, before: Mapping[str, str]) -> None:
        """Compare the settings with those of the unfinished run.

        Raises:
            SettingError: when any differ.
        """
        if not before or not self.settings:
            return
        differing = [
            f"{name} {before.get(name, 'not set')} (now {self.settings.get(name, 'not set')})"
            for name in {**self.settings, **before}
            if before.get(name) != self.settings.get(name)
        ]
        if differing:
            raise SettingError(
                f"{self.state}: the unfinished run that would go on had other settings: {', '.join(differing)}. "
                "Restore them to go on with it, or pass --resume false to start anew with these."
            )

    def _other_data(self, state: Mapping[str, Any], engine: Engine) -> str:
        """What data the unfinished run had, where this one has others."""
        before, now = set(state.get("data", self.data)), set(self.data)
        found = []
        for text, files in (("that are not in this one's", before - now), ("fewer than this one's", now - before)):
            if files:
                named = ", ".join(file.partition(" ")[2] for file in sorted(files)[:3])
                found.append(f"{len(files)} entries {text} ({named}{', …' if len(files) > 3 else ''})")
        if found:
            return f"other data: {' and '.join(found)}"
        if state["epoch_length"] != engine.state.epoch_length:
            return (
                f"{state['epoch_length']} iterations an epoch, this one has {engine.state.epoch_length}: other data, "
                "batch size or number of processes"
            )
        return ""

    def _restore_schedule(self, state: Mapping[str, Any], engine: Engine) -> None:
        if self.lr_scheduler is None:
            return
        # what depends on the number of epochs is this run's own
        own = {name: getattr(self.lr_scheduler, name) for name in _OF_EPOCHS if hasattr(self.lr_scheduler, name)}
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        vars(self.lr_scheduler).update(own)
        if (before := state.get("max_epochs", engine.state.max_epochs)) != engine.state.max_epochs:
            engine.logger.info(
                f"{self.state}: the unfinished run was to have {before} epochs, this one {engine.state.max_epochs}; "
                "the schedule of the learning rate goes on with the new number."
            )

    def finish(self, engine: Engine) -> None:
        """Save the last adapter and drop the state of the run, which has ended."""
        if not writes_files():
            return
        state = unwrap(self.network).state_dict()
        save_atomically(state, self.last)
        if self.evaluator is None or self.evaluator.state.best_metric_epoch < 0:
            save_atomically(state, self.best)
        self.state.unlink(missing_ok=True)


class MetricsSaver(monai.handlers.MetricsSaver):
    """MONAI's ``MetricsSaver``, whose tables are whole or absent; a name with a comma or a quote stays one field.

    Raises:
        OutputError: when they can't be written; it names the folder.
    """

    save_dir: Any
    _filenames: list[str]

    def _get_filenames(self, engine: Engine) -> None:
        before = len(self._filenames)
        super()._get_filenames(engine)
        for i in range(before, len(self._filenames)):
            if set(self._filenames[i]) & set(',"\n'):
                self._filenames[i] = '"' + self._filenames[i].replace('"', '""') + '"'

    def __call__(self, engine: Engine) -> None:
        """Write the tables."""
        folder = self.save_dir
        try:
            make_folder(folder)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".metrics-") as part:
                self.save_dir = part
                super().__call__(engine)
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


class StartFrom(CheckpointLoader):
    """MONAI's ``CheckpointLoader`` for an adapter that a training goes on from.

    An adapter that was made for another image size, grid, intensity window or other classes is taken too, for it is to
    learn; the log says what differs. What is saved from then on names what this training shows it.
    """

    def __call__(self, engine: Engine) -> None:
        """Load the adapter."""
        network = unwrap(self.load_dict["model"])
        with network.any_task() if isinstance(network, MedSA) else nullcontext():
            super().__call__(engine)


class EarlyStop:
    """Ends a training that no longer gains, judged by the evaluator's best metric, which a resumed run keeps.

    MONAI's ``EarlyStopHandler`` counts in memory, so that a resumed run would stop later than an uninterrupted one.

    Args:
        evaluator: validates during training.
        patience: epochs without a better metric; 0 never stops.
    """

    def __init__(self, evaluator: Engine, patience: int = 0) -> None:
        self.evaluator = evaluator
        self.patience = patience

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer, after the ``ValidationHandler``."""
        if self.patience > 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Stop the trainer if the best metric is too old."""
        best = self.evaluator.state.best_metric_epoch
        if best > 0 and engine.state.epoch - best >= self.patience:
            engine.logger.info(f"Stopping early: the best metric is {self.patience} epochs old.")
            engine.terminate()


class TimeLimit:
    """Ignite's ``TimeLimit`` as a handler that a configuration can switch off.

    Args:
        seconds: the trainer stops after the iteration in which this much time has passed; 0 never stops it.
    """

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        if self.seconds > 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED, ignite.handlers.TimeLimit(math.ceil(self.seconds)))


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
        self.names = unique_names(entry["image"] for entry in getattr(dataset, "data", ()))

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
