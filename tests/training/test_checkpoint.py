from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from monai.losses import DiceCELoss
from monai.transforms import Compose, MapTransform, RandFlipd, RandGaussianNoised
from PIL import Image
from torch import nn

from medsa_nets import MedSA, build_medsa
from medsa_nets.data import EpochSampler, SeededDataset
from medsa_nets.errors import SettingError, WeightsError
from medsa_nets.inferers import PromptInferer
from medsa_nets.precision import Amp, Precision
from medsa_nets.prompts import Prompts, PromptSampler, with_prompts
from medsa_nets.runtime import unwrap
from medsa_nets.training import (
    EarlyStop,
    EpochSeed,
    Progress,
    PromptedIteration,
    SampleOverlays,
    TrainingCheckpoint,
    save_atomically,
    trainable_parameters,
)
from medsa_nets.training.checkpoint import data_files

pytestmark = pytest.mark.usefixtures("small_base")

SIZE, ITEMS, EPOCHS = 64, 4, 3


class CopyTensorsd(MapTransform):
    """Keeps the stored tensors from being changed in place."""

    def __call__(self, data):
        return {key: value.clone() for key, value in data.items()}


@pytest.fixture(scope="module")
def untrained() -> nn.Module:
    torch.manual_seed(0)
    return build_medsa("small", pretrained=False)


@pytest.fixture(scope="module")
def stand_in() -> nn.Module:
    """A network that trains in no time, for what does not depend on the network."""
    torch.manual_seed(0)
    return nn.Conv2d(3, 1, kernel_size=1)


@pytest.fixture(scope="module")
def items() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(ITEMS):
        label = torch.zeros(1, SIZE, SIZE)
        label[:, 8 + 4 * i : 40, 10 : 30 + 6 * i] = 1
        found.append(
            {
                "image": 0.5 * label.expand(3, -1, -1) + 0.5 * torch.rand(3, SIZE, SIZE, generator=generator),
                "label": label,
            }
        )
    return found


class Interruption(BaseException):
    """Stands for a kill: nothing of the engine handles it."""


class Run:
    """A small training as the bundle sets it up: 2 iterations an epoch, validation by given scores or by none."""

    def __init__(
        self,
        network,
        items,
        folder: Path,
        *,
        scores=None,
        interrupt_at: int = 0,
        batch_size=2,
        patience=0,
        amp: Amp = False,
        **settings,
    ):
        self.network = copy.deepcopy(network)
        medsa = isinstance(network, MedSA)
        random = [
            RandFlipd(["image", "label"], prob=0.5, spatial_axis=0),
            RandGaussianNoised("image", prob=0.5, std=0.1),
        ]
        dataset = SeededDataset(items, Compose([CopyTensorsd(["image", "label"]), *random]), seed=0)
        sampler = EpochSampler(dataset, seed=0)
        self.optimizer = torch.optim.AdamW(trainable_parameters(self.network), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.8)
        self.evaluator = self._evaluator(scores) if scores is not None else None
        handlers = [EpochSeed(sampler), LrScheduleHandler(scheduler, epoch_level=False, print_lr=False)]
        if self.evaluator is not None:
            handlers.append(ValidationHandler(interval=1, validator=self.evaluator, epoch_level=True))
        handlers.append(
            TrainingCheckpoint(
                save_dir=str(folder),
                network=self.network,
                optimizer=self.optimizer,
                lr_scheduler=scheduler,
                evaluator=self.evaluator,
                **settings,
            )
        )
        if patience:
            handlers.append(EarlyStop(self.evaluator, patience))
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=EPOCHS if scores is None else len(scores),
            train_data_loader=DataLoader(dataset, batch_size=batch_size, sampler=sampler),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=DiceCELoss(sigmoid=True),
            # the stand-in network takes MONAI's own step
            iteration_update=PromptedIteration(sampler=PromptSampler(), draws=1, amp=amp) if medsa else None,
            train_handlers=handlers,
            decollate=False,
        )
        self.epochs: list[int] = []
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: self.epochs.append(engine.state.epoch))
        if interrupt_at:

            @self.trainer.on(Events.ITERATION_STARTED)
            def interrupt(engine: Engine) -> None:
                if engine.state.iteration == interrupt_at:
                    raise Interruption

    def _evaluator(self, scores: list[float]) -> SupervisedEvaluator:
        """An evaluator whose metric in epoch e is ``scores[e - 1]``."""
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=[{"image": torch.zeros(1, 1)}],
            network=nn.Identity(),
            iteration_update=lambda engine, batch: {},
            decollate=False,
            key_val_metric=None,
        )

        @evaluator.on(Events.EPOCH_COMPLETED)
        def score(engine: Engine) -> None:
            # what MONAI's Evaluator does with its key metric
            value = scores[engine.state.epoch - 1]
            if value > engine.state.best_metric:
                engine.state.best_metric, engine.state.best_metric_epoch = value, engine.state.epoch

        return evaluator

    def run(self) -> Run:
        with contextlib.suppress(Interruption):
            self.trainer.run()
        return self


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 1e-6) -> bool:
    assert a.keys() == b.keys()
    return all(torch.allclose(a[name].float(), b[name].float(), rtol=0, atol=atol) for name in a)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def uninterrupted(untrained, items, tmp_path_factory) -> Path:
    """Folder of a training that ran to its end: the measure of resumed ones."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    Run(untrained, items, folder).run()
    return folder


def test_a_finished_training_leaves_best_and_last_and_no_state(uninterrupted, untrained):
    assert files_in(uninterrupted) == ["model.pt", "model_last.pt"]
    last = weights(uninterrupted / "model_last.pt")
    assert close(weights(uninterrupted / "model.pt"), last, atol=0)  # nothing validates: the last is the best
    assert not close(last, untrained.state_dict())


# 2 iterations an epoch: 2 stops in the first one (nothing saved yet), 3 at the start and 6 in the middle of later ones
@pytest.mark.parametrize("interrupt_at", [2, 3, 6])
def test_an_interrupted_training_goes_on_to_the_same_weights(untrained, items, uninterrupted, tmp_path, interrupt_at):
    Run(untrained, items, tmp_path, interrupt_at=interrupt_at).run()
    done = (interrupt_at - 1) // 2
    assert files_in(tmp_path) == (["training_state.pt"] if done else [])
    resumed = Run(untrained, items, tmp_path).run()
    assert resumed.epochs == list(range(done + 1, EPOCHS + 1))
    assert resumed.trainer.state.iteration == 2 * EPOCHS
    assert close(weights(tmp_path / "model_last.pt"), weights(uninterrupted / "model_last.pt"))
    assert files_in(tmp_path) == ["model.pt", "model_last.pt"]


SCALED = Precision(scale=True)  # float16's way to train, in a type that a CPU is quick in


def overflow(network: torch.nn.Module) -> None:
    """Let gradients that float16 can't hold be infinite, as they would be in it."""
    largest = torch.finfo(torch.float16).max
    for parameter in trainable_parameters(network):
        parameter.register_hook(lambda gradient: gradient.masked_fill(gradient.abs() > largest, float("inf")))


def test_an_interrupted_training_with_a_scaler_goes_on_with_its_scale_to_the_same_weights(untrained, items, tmp_path):
    def run(folder: str, **settings) -> Run:
        one = Run(untrained, items, tmp_path / folder, amp=SCALED, **settings)
        overflow(one.network)
        # the first steps overflow: without its scale, a resumed run would take steps that the whole one leaves out
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-12)
        one.trainer.add_event_handler(Events.STARTED, lambda engine: setattr(engine, "scaler", scaler))
        return one.run()

    whole = run("whole")
    run("parts", interrupt_at=3)
    state = torch.load(tmp_path / "parts" / "training_state.pt", weights_only=True)
    assert state["scaler"]["scale"] == 2.0**36
    resumed = Run(untrained, items, tmp_path / "parts", amp=SCALED)
    overflow(resumed.network)
    resumed.run()
    assert resumed.trainer.scaler.state_dict() == whole.trainer.scaler.state_dict()
    assert resumed.trainer.scaler.get_scale() < 2.0**36
    assert close(weights(tmp_path / "parts" / "model_last.pt"), weights(tmp_path / "whole" / "model_last.pt"))


def test_a_run_of_another_precision_is_resumed_without_scaler(untrained, items, tmp_path):
    Run(untrained, items, tmp_path, amp=SCALED, interrupt_at=3).run()
    resumed = Run(untrained, items, tmp_path).run()
    assert resumed.epochs == [2, 3]


def test_a_run_killed_after_its_last_epoch_only_finishes(untrained, items, uninterrupted, tmp_path):
    run = Run(untrained, items, tmp_path)

    @run.trainer.on(Events.EPOCH_COMPLETED(once=EPOCHS))
    def interrupt(engine: Engine) -> None:
        raise Interruption

    run.run()
    assert files_in(tmp_path) == ["training_state.pt"]
    resumed = Run(untrained, items, tmp_path).run()
    assert resumed.epochs == []
    assert close(weights(tmp_path / "model_last.pt"), weights(uninterrupted / "model_last.pt"), atol=0)
    assert files_in(tmp_path) == ["model.pt", "model_last.pt"]


def test_without_resume_a_training_starts_anew(untrained, items, uninterrupted, tmp_path):
    Run(untrained, items, tmp_path, interrupt_at=3).run()
    anew = Run(untrained, items, tmp_path, resume=False).run()
    assert anew.epochs == [1, 2, 3]
    assert close(weights(tmp_path / "model_last.pt"), weights(uninterrupted / "model_last.pt"))


def test_a_state_of_another_epoch_length_is_set_aside(stand_in, items, tmp_path):
    Run(stand_in, items, tmp_path, interrupt_at=3).run()
    before = weights(tmp_path / "training_state.pt")
    other = Run(stand_in, items, tmp_path, batch_size=1).run()
    assert other.epochs == [1, 2, 3]
    kept = weights(tmp_path / "training_state_of_other_data.pt")
    assert kept["epoch_length"] == before["epoch_length"] == 2
    assert not (tmp_path / "training_state.pt").exists()


def test_a_setting_that_an_unfinished_run_did_not_know_is_none(stand_in, items, tmp_path):
    Run(stand_in, items, tmp_path, interrupt_at=3, settings={"seed": 0, "gone": None}).run()
    with pytest.raises(SettingError, match=r"class_values not set \(now \[1, 2\]\)"):
        Run(stand_in, items, tmp_path, settings={"seed": 0, "class_values": [1, 2]}).run()
    assert Run(stand_in, items, tmp_path, settings={"seed": 0, "class_values": None}).run().epochs == [2, 3]


def test_other_settings_are_refused_by_name_with_the_way_out(stand_in, items, tmp_path):
    before = {"learning_rate": 1e-3, "base": "small", "roi_size": [8, 8], "amp": True, "start_from": None}
    Run(stand_in, items, tmp_path, interrupt_at=3, settings=before).run()
    state = (tmp_path / "training_state.pt").read_bytes()
    other = {**before, "learning_rate": 2e-3, "roi_size": [8, 16], "session_clicks": 3}
    with pytest.raises(SettingError) as caught:
        Run(stand_in, items, tmp_path, settings=other).run()
    told = str(caught.value)
    assert told.startswith(
        f"{tmp_path / 'training_state.pt'}: the unfinished run that would go on had other settings: "
    )
    assert "learning_rate 0.001 (now 0.002), roi_size [8, 8] (now [8, 16])" in told
    assert "session_clicks not set (now 3)" in told
    assert "base" not in told
    assert "--resume false" in told
    assert (tmp_path / "training_state.pt").read_bytes() == state
    same = {"learning_rate": "0.001", "base": "small", "roi_size": (8, 8), "amp": "True", "start_from": None}
    assert Run(stand_in, items, tmp_path, settings=same).run().epochs == [2, 3]
    Run(stand_in, items, tmp_path, interrupt_at=3, settings=before).run()
    new = {**before, "raters": None}  # a setting that the run knew nothing of, as it was then
    assert Run(stand_in, items, tmp_path, settings=new).run().epochs == [2, 3]
    Run(stand_in, items, tmp_path, interrupt_at=3, settings=before).run()
    assert Run(stand_in, items, tmp_path, settings=other, resume=False).run().epochs == [1, 2, 3]


def test_files_of_channels_and_raters_are_part_of_the_data(tmp_path):
    for i, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(b"x" * (1 + i))
    paths = [str(tmp_path / name) for name in "abcd"]
    assert data_files([{"image": paths[:2], "label": paths[2:]}]) == ["1+2+3+4 a, b, c, d"]
    assert data_files([{"image": paths[0], "label": paths[2]}]) == ["1+3 a, c"]


@pytest.mark.parametrize("change", ["another image", "another label", "the data moved"])
def test_other_data_start_anew_and_are_named(stand_in, items, tmp_path, caplog, change):
    def write(root: Path, size: int = 10) -> list[dict[str, str]]:
        for kind in ("images", "labels"):
            (root / kind).mkdir(parents=True, exist_ok=True)
            for i in range(ITEMS):
                (root / kind / f"{i}.png").write_bytes(b"x" * (size if kind == "labels" and i == 2 else 10))
        return [{k: str(root / f"{k}s" / f"{i}.png") for k in ("image", "label")} for i in range(ITEMS)]

    models = tmp_path / "models"
    Run(stand_in, items, models, interrupt_at=3, data=write(tmp_path / "a")).run()
    data = write(tmp_path / ("b" if change == "the data moved" else "a"), 11 if change == "another label" else 10)
    if change == "another image":
        (tmp_path / "a" / "images" / "9.png").write_bytes(b"x" * 10)
        data[2] = {**data[2], "image": str(tmp_path / "a" / "images" / "9.png")}
    with caplog.at_level("WARNING"):
        run = Run(stand_in, items, models, data=data).run()
    if change == "the data moved":
        assert run.epochs == [2, 3]
        return
    assert run.epochs == [1, 2, 3]
    told = caplog.text
    assert "other data: 1 entries that are not in this one's (images/2.png, labels/2.png)" in told
    assert "--resume false" in told
    assert weights(models / "training_state_of_other_data.pt")["epoch"] == 1


def test_a_state_of_another_network_is_refused_by_name(stand_in, items, tmp_path):
    Run(stand_in, items, tmp_path, interrupt_at=3).run()
    with pytest.raises(WeightsError, match=r"training_state\.pt: .*another network.*--resume false"):
        Run(nn.Sequential(nn.Conv2d(3, 1, kernel_size=3, padding=1)), items, tmp_path).run()


def test_more_epochs_lengthen_the_schedule_of_a_resumed_run(tmp_path):
    from monai.optimizers import WarmupCosineSchedule

    def schedule(steps: int) -> WarmupCosineSchedule:
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
        return WarmupCosineSchedule(optimizer, warmup_steps=steps // 10, t_total=steps)

    short, long = schedule(20), schedule(40)
    for _ in range(10):
        short.optimizer.step()
        short.step()
    handler = TrainingCheckpoint(
        save_dir=str(tmp_path), network=nn.Linear(1, 1), optimizer=long.optimizer, lr_scheduler=long
    )
    engine = Engine(lambda engine, batch: None)
    engine.state.max_epochs = 4
    handler._restore_schedule({"lr_scheduler": short.state_dict(), "max_epochs": 2}, engine)
    assert (long.last_epoch, long.t_total, long.warmup_steps) == (10, 40, 4)
    long.optimizer.step()
    long.step()
    assert long.get_last_lr()[0] == pytest.approx(schedule(40).lr_lambda(11))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other object"])
def test_a_damaged_state_is_refused_by_name(stand_in, items, tmp_path, damage):
    path = tmp_path / "training_state.pt"
    if damage == "truncated":
        Run(stand_in, items, tmp_path, interrupt_at=3).run()
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a checkpoint")
    else:
        torch.save({"network": {}}, path)
    with pytest.raises(WeightsError, match=r"training_state\.pt: .*can't be read.*Delete it"):
        Run(stand_in, items, tmp_path).run()


def test_the_best_adapter_is_that_of_the_best_validation(stand_in, items, tmp_path):
    run = Run(stand_in, items, tmp_path, scores=[0.3, 0.9, 0.5])
    after: dict[int, dict] = {}
    run.trainer.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda engine: after.update({engine.state.epoch: copy.deepcopy(run.network.state_dict())}),
    )
    run.run()
    assert close(weights(tmp_path / "model.pt"), after[2], atol=0)
    assert close(weights(tmp_path / "model_last.pt"), after[3], atol=0)
    assert not close(after[2], after[3])


@pytest.mark.parametrize(("later", "kept"), [(0.5, True), (0.95, False)])
def test_the_best_metric_survives_a_resume(stand_in, items, tmp_path, later, kept):
    scores = [0.3, 0.9, later]
    Run(stand_in, items, tmp_path, scores=scores, interrupt_at=5).run()  # in the third epoch
    best = weights(tmp_path / "model.pt")
    resumed = Run(stand_in, items, tmp_path, scores=scores).run()
    assert resumed.epochs == [3]
    assert close(weights(tmp_path / "model.pt"), best, atol=0) is kept
    assert resumed.evaluator.state.best_metric == max(scores)
    assert resumed.evaluator.state.best_metric_epoch == (2 if kept else 3)


@pytest.mark.parametrize("interrupt_at", [0, 5], ids=["in one go", "resumed"])
@pytest.mark.parametrize(
    ("scores", "patience", "last"),
    [([0.5, 0.4, 0.3, 0.2, 0.1], 2, 3), ([0.5, 0.4, 0.6, 0.2, 0.1], 2, 5), ([0.5, 0.4, 0.3, 0.2], 0, 4)],
)
def test_a_training_stops_when_its_best_metric_is_too_old(
    stand_in, items, tmp_path, scores, patience, last, interrupt_at
):
    if interrupt_at:
        Run(
            stand_in, items[:2], tmp_path, scores=scores, patience=patience, batch_size=1, interrupt_at=interrupt_at
        ).run()
    run = Run(stand_in, items[:2], tmp_path, scores=scores, patience=patience, batch_size=1).run()
    assert run.trainer.state.epoch == last
    assert files_in(tmp_path) == ["model.pt", "model_last.pt"]


def test_saving_replaces_the_file_whole(tmp_path):
    path = tmp_path / "new" / "a.pt"
    assert save_atomically({"x": torch.ones(3)}, path) == path
    save_atomically({"x": torch.zeros(2)}, path)
    assert torch.equal(weights(path)["x"], torch.zeros(2))
    assert files_in(path.parent) == ["a.pt"]


@pytest.mark.parametrize("before", [True, False])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, before):
    path = tmp_path / "a.pt"
    if before:
        save_atomically({"x": torch.ones(3)}, path)

    def fail(obj, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_atomically({"x": torch.zeros(2)}, path)
    monkeypatch.undo()
    assert files_in(tmp_path) == (["a.pt"] if before else [])
    assert not before or torch.equal(weights(path)["x"], torch.ones(3))


def test_unwrap_finds_the_network_inside_a_wrapper():
    layer = nn.Linear(1, 1)
    assert unwrap(layer) is layer
    assert unwrap(nn.DataParallel(layer)) is layer


def sample_items(labels: bool = True) -> list[dict]:
    found = []
    for i in range(3):
        image = MetaTensor(torch.full((3, SIZE, 32), 0.5), meta={"filename_or_obj": f"/data/ISIC_{i}.jpg"})
        click = Prompts(points=torch.tensor([[[50.0, 8.0]]]), labels=torch.ones(1, 1))
        found.append({"image": with_prompts(image, click)})
        if labels:
            found[-1]["label"] = torch.zeros(1, 2 * SIZE, 64)  # at the photograph's own size
            found[-1]["label"][:, 8:40, 10:30] = 1
    return found


class Threshold(nn.Module):
    """Stands for a network: foreground in the lower half of the picture."""

    def forward(self, image, point_coords=None, point_labels=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert point_coords.shape == (1, 1, 1, 2)
        logits = -torch.ones(1, 1, *image.shape[2:])
        logits[..., 16:] = 1
        return logits


def idle(epochs: int, handler) -> None:
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)
    engine.run([0], max_epochs=epochs)


def overlays(folder: Path, interval: int, count: int = 2, labels: bool = True) -> SampleOverlays:
    return SampleOverlays(
        output_dir=str(folder),
        network=Threshold(),
        dataset=sample_items(labels),
        inferer=PromptInferer(),
        interval=interval,
        count=count,
    )


@pytest.mark.parametrize(("interval", "epochs"), [(0, []), (1, [1, 2, 3, 4]), (3, [3])])
def test_pictures_are_written_every_interval_epochs(tmp_path, interval, epochs):
    idle(4, overlays(tmp_path, interval))
    expected = [f"epoch_{epoch:04d}_ISIC_{i}.png" for epoch in epochs for i in range(2)]
    assert (files_in(tmp_path / "samples") if epochs else files_in(tmp_path)) == expected


@pytest.mark.parametrize("labels", [True, False])
def test_a_picture_shows_prediction_label_and_prompt(tmp_path, labels):
    handler = overlays(tmp_path, 1, count=9, labels=labels)
    idle(1, handler)
    assert len(files_in(tmp_path / "samples")) == 3  # as many as there are
    picture = np.asarray(Image.open(tmp_path / "samples" / "epoch_0001_ISIC_0.png"))
    assert picture.shape == (32, SIZE, 3)  # PIL: rows, columns
    assert tuple(picture[8, 50]) == (0, 200, 255)  # the click
    assert tuple(picture[28, 60]) != (127, 127, 127)  # tinted
    assert tuple(picture[2, 60]) == (127, 127, 127)
    green = (picture == (60, 220, 60)).all(axis=-1)
    assert green.any() == labels
    if labels:  # scaled to the network's grid: rows 5 to 15, columns 4 to 20
        rows, columns = np.nonzero(green)
        assert abs(rows.min() - 5) <= 1
        assert abs(rows.max() - 14) <= 1
        assert abs(columns.min() - 4) <= 1
        assert abs(columns.max() - 19) <= 1
    assert handler.network.training


def test_a_negative_interval_is_refused(tmp_path):
    with pytest.raises(ValueError, match="samples_interval must be 0 or more, got -1"):
        overlays(tmp_path, -1)


@pytest.mark.parametrize(
    ("output", "shown"),
    [({"loss": torch.tensor(0.625)}, True), ([{"loss": 0.625}, {"loss": 9.0}], True), ([], False), ({}, False)],
)
def test_progress_shows_the_loss_where_there_is_one(capsys, output, shown):
    engine = Engine(lambda engine, batch: output)
    Progress().attach(engine)
    engine.run([0, 1], max_epochs=1)
    printed = capsys.readouterr().err
    assert "Engine" in printed
    assert ("loss=0.625" in printed) is shown
