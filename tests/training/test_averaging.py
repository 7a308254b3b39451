from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from torch import nn

from medsa_nets import build_medsa
from medsa_nets.errors import SettingError, WeightsError
from medsa_nets.training import TrainingCheckpoint, WeightAverage

EPOCHS, STEPS, DECAY = 3, 4, 0.6


class Killed(BaseException):
    """Stands for a kill: nothing of the engine handles it."""


class Tracked(nn.Module):
    """One weight that trains and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.tensor([5.0]), requires_grad=False)
        self.weight = nn.Parameter(torch.tensor([0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.frozen


class Run:
    """A training that moves the weight by 1 in each step, and validations that note what they see."""

    def __init__(self, folder: Path, *, decay: float = DECAY, kill_at: int = 0, interval: int = 1) -> None:
        self.network = Tracked()
        self.seen: list[float] = []
        self.trained: list[float] = []
        optimizer = torch.optim.SGD([self.network.weight], lr=1.0)

        def validate(engine: Engine, batch: dict) -> dict:
            self.seen.append(self.network.weight.item())
            return {}

        def step(engine: Engine, batch: dict) -> dict:
            self.trained.append(self.network.weight.item())
            optimizer.zero_grad()
            (-self.network.weight).sum().backward()
            optimizer.step()
            return {}

        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"), val_data_loader=[{"image": torch.zeros(1, 1)}], network=self.network,
            iteration_update=validate, decollate=False,
        )  # fmt: skip

        @evaluator.on(Events.EPOCH_COMPLETED)
        def score(engine: Engine) -> None:
            engine.state.best_metric, engine.state.best_metric_epoch = engine.state.epoch, engine.state.epoch

        average = WeightAverage(self.network, decay=decay, evaluator=evaluator)
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"), max_epochs=EPOCHS, train_data_loader=[{"image": torch.zeros(1, 1)}] * STEPS,
            network=self.network, optimizer=optimizer, loss_function=nn.MSELoss(), iteration_update=step,
            decollate=False,
            train_handlers=[
                ValidationHandler(interval=interval, validator=evaluator, epoch_level=True),
                TrainingCheckpoint(save_dir=str(folder), network=self.network, optimizer=optimizer, evaluator=evaluator,
                                   average=average),
            ],
        )  # fmt: skip
        if kill_at:

            @self.trainer.on(Events.ITERATION_STARTED)
            def kill(engine: Engine) -> None:
                if engine.state.iteration == kill_at:
                    raise Killed

    def __call__(self) -> Run:
        with contextlib.suppress(Killed):
            self.trainer.run()
        return self


def expected() -> list[float]:
    """The average after each step: weights are 1, 2, 3, and so on."""
    average, found = 0.0, []
    for step in range(1, EPOCHS * STEPS + 1):
        decay = min(DECAY, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * step
        found.append(average)
    return found


def stored(path: Path) -> float:
    return float(torch.load(path, weights_only=True)["weight"])


def test_validations_see_and_adapters_hold_the_average_while_the_weights_train_on(tmp_path: Path) -> None:
    run = Run(tmp_path)()
    averages = expected()
    assert run.seen == pytest.approx([averages[STEPS * (e + 1) - 1] for e in range(EPOCHS)])
    assert run.trained == list(range(EPOCHS * STEPS))
    assert stored(tmp_path / "model.pt") == stored(tmp_path / "model_last.pt") == pytest.approx(averages[-1])
    assert float(run.network.frozen) == 5.0


@pytest.mark.parametrize("kill_at", [STEPS + 2, 2 * STEPS + 1])
def test_a_killed_run_goes_on_with_weights_and_average(tmp_path: Path, kill_at: int) -> None:
    whole = Run(tmp_path / "whole")()
    first = Run(tmp_path / "cut", kill_at=kill_at)()
    assert (tmp_path / "cut" / "training_state.pt").is_file()
    second = Run(tmp_path / "cut")()
    done = (kill_at - 1) // STEPS
    assert first.seen[:done] + second.seen == pytest.approx(whole.seen)
    for name in ("model.pt", "model_last.pt"):
        assert stored(tmp_path / "cut" / name) == stored(tmp_path / "whole" / name)


def test_where_nothing_validates_the_average_is_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, interval=EPOCHS + 1)()
    assert run.seen == []
    assert stored(tmp_path / "model.pt") == stored(tmp_path / "model_last.pt") == pytest.approx(expected()[-1])


def test_without_decay_the_weights_themselves_are_seen_and_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, decay=0.0)()
    assert run.seen == [STEPS * (e + 1) for e in range(EPOCHS)]
    assert stored(tmp_path / "model.pt") == EPOCHS * STEPS


def test_a_state_without_average_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, decay=0.0, kill_at=STEPS + 2)()
    with pytest.raises(WeightsError, match=r"training_state.pt: .*--resume false"):
        Run(tmp_path)()


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_out_of_range_is_one_error(decay: float) -> None:
    with pytest.raises(SettingError, match=r"ema_decay must be 0 .* or more and less than 1"):
        WeightAverage(Tracked(), decay=decay)


@pytest.mark.usefixtures("small_base")
def test_adalora_is_refused() -> None:
    network = build_medsa("small", pretrained=False, adaptation="adalora")
    with pytest.raises(SettingError, match="ema_decay and adaptation: adalora do not go together"):
        WeightAverage(network, decay=0.99)
    WeightAverage(network, decay=0.0)
