"""Checkpoints that survive a kill: the best adapter, the last one, and the state of an unfinished run."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointLoader
from torch import nn

from medsa_nets.data.atomic import make_folder, remove_leftovers, temporary_name
from medsa_nets.errors import SettingError, WeightsError, describe
from medsa_nets.networks import MedSA
from medsa_nets.runtime import unwrap, writes_files
from medsa_nets.training.averaging import WeightAverage


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

    Images and labels of several files (channels, raters) stand with all of them.

    Folders count the files in them; what is no path has none.
    """
    entries = []
    for entry in data:
        values = [entry.get(key) for key in ("image", "label")] if isinstance(entry, Mapping) else []
        values = [own for value in values for own in (value if isinstance(value, (list, tuple)) else [value])]
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
        average: of the weights, which then is what validations see and the adapters hold; attached by this, and kept
            with the state.

    Raises:
        SettingError: at the start, when an unfinished run had other settings; it names them.
        WeightsError: at the start, when the state can't be read, or belongs to another network.
    """

    every_process = True

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
        average: WeightAverage | None = None,
    ) -> None:
        self.average = average if average is not None and average.decay else None
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
        if self.average is not None:
            self.average.attach(engine)
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
        if self.average is not None:
            state["average"] = self.average.state_dict()
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
            if self.average is not None:
                self.average.load_state_dict(state["average"])
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
        """Compare the settings with those of the unfinished run; one that is not there is as one of null.

        Raises:
            SettingError: when any differ.
        """
        if not before or not self.settings:
            return
        differing = [
            f"{name} {before.get(name, 'not set')} (now {self.settings.get(name, 'not set')})"
            for name in {**self.settings, **before}
            if before.get(name, _as_text(None)) != self.settings.get(name, _as_text(None))
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


class StartFrom(CheckpointLoader):
    """MONAI's ``CheckpointLoader`` for an adapter that a training goes on from.

    An adapter that was made for another image size, grid, intensity window or other classes is taken too, for it is to
    learn; the log says what differs. What is saved from then on names what this training shows it.
    """

    every_process = True

    def __call__(self, engine: Engine) -> None:
        """Load the adapter."""
        network = unwrap(self.load_dict["model"])
        with network.any_task() if isinstance(network, MedSA) else nullcontext():
            super().__call__(engine)
