"""Training on sessions of clicks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from torch import nn

from medsa_nets import build_medsa
from medsa_nets.interaction.users import SimulatedUser
from medsa_nets.losses import AnnotatedDiceCELoss, NearClickLoss
from medsa_nets.prompts import PromptSampler
from medsa_nets.prompts.earlier import as_earlier
from medsa_nets.training import trainable_parameters
from medsa_nets.training.sessions import (
    SPOILT,
    STARTS,
    SessionIteration,
    SessionSampler,
    VolumeSessionIteration,
    nearness,
    run_session,
    spoil,
)

pytestmark = pytest.mark.usefixtures("small_base")
SIZE = 64


@pytest.fixture(scope="module")
def untrained() -> dict[int, nn.Module]:
    torch.manual_seed(0)
    return {
        dims: build_medsa("small", pretrained=False, click_feedback=True, spatial_dims=dims, num_classes=dims - 1)
        for dims in (2, 3)
    }


def _places(count=1):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def _target(*shape):
    target = torch.zeros(shape, dtype=torch.bool)
    target[..., 16:40, 20:50] = True
    return target


class Recorder:
    """Stands for a network whose answer is the first half of the image's columns; keeps what it was asked."""

    def __init__(self, target):
        self.asked = []
        self.answer = torch.full(target.shape, -1.0)
        self.answer[..., : SIZE // 2] = 1.0

    def decode(self, embedding, **prompts):
        self.asked.append({name: value.clone() for name, value in prompts.items()})
        return self.answer.clone() + 0.001 * len(self.asked)


def _run(start, answers=3, target=None, **settings):
    target = _target(1, 1, SIZE, SIZE) if target is None else target
    recorder = Recorder(target)
    embedding = torch.zeros(1, 256, SIZE // 4, SIZE // 4)
    automatic = torch.where(target, 3.0, -3.0)
    automatic[..., 30, :] = -4.0
    out = run_session(
        recorder, embedding, target, start, automatic, answers, settings.get("classes"), SimulatedUser(), _places()
    )
    return recorder.asked, out, automatic


def test_each_answer_is_asked_for_with_the_one_before_it_and_one_click_more():
    asked, out, _ = _run("nothing", 4)
    assert len(out) == 4
    assert [prompts["point_coords"].shape[2] for prompts in asked] == [1, 2, 3, 4]
    assert "masks" not in asked[0]
    for number in range(1, 4):
        torch.testing.assert_close(asked[number]["masks"], out[number - 1][0])
        assert torch.equal(asked[number]["point_coords"][:, :, :number], asked[number - 1]["point_coords"])
    assert asked[0]["point_labels"].tolist() == [[[1.0]]]
    assert _target(SIZE, SIZE)[tuple(asked[0]["point_coords"][0, 0, 0].long())]


def test_clicks_lie_on_the_error_of_the_answer_before():
    asked, out, _ = _run("nothing", 3)
    for number in (1, 2):
        place = tuple(asked[number]["point_coords"][0, 0, -1].long())
        label = asked[number]["point_labels"][0, 0, -1]
        assert bool(_target(SIZE, SIZE)[place]) == bool(label)
        assert bool(out[number - 1][0][0, 0][place] > 0) != bool(label)


def test_a_session_begins_with_the_automatic_mask():
    asked, _, automatic = _run("automatic", 1, classes=torch.tensor([0]))
    torch.testing.assert_close(asked[0]["masks"], automatic)
    assert asked[0]["classes"].tolist() == [0]
    assert asked[0]["point_coords"][0, 0, 0, 0] == 30  # the row that it misses


def test_a_session_begins_with_a_box_and_keeps_it():
    asked, out, _ = _run("box", 3)
    assert [("boxes" in prompts, "point_coords" in prompts) for prompts in asked] == [
        (True, False),
        (True, True),
        (True, True),
    ]
    assert len(out) == 3
    assert not out[0][1].any()
    assert out[1][1].max() > 0.9


def test_a_session_begins_with_a_wrong_mask_that_is_not_the_target():
    asked, _, _ = _run("wrong", 1)
    wrong = asked[0]["masks"] > 0
    assert bool((wrong != _target(1, 1, SIZE, SIZE)).any())
    assert bool(torch.isfinite(asked[0]["masks"]).all())


@pytest.mark.parametrize("shape", [(48, 40), (24, 20, 10)])
def test_spoilt_masks_are_of_all_kinds_and_never_the_same(shape):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(n // 4, 3 * n // 4) for n in shape)] = True
    seen = [spoil(mask, np.random.default_rng(seed)) for seed in range(40)]
    assert all(one.shape == shape and one.dtype == bool for one in seen)
    assert sum((one != mask).any() for one in seen) >= 36
    assert any((one & ~mask).any() for one in seen)
    assert any((mask & ~one).any() for one in seen)
    assert spoil(np.zeros(shape, dtype=bool), np.random.default_rng(0)).shape == shape
    kinds = {kind: spoil(mask, np.random.default_rng(0), kind) for kind in SPOILT}
    assert not (kinds["eroded"] & ~mask).any()
    assert (kinds["dilated"] & mask).sum() == (kinds["leaked"] & mask).sum() == mask.sum()
    assert kinds["leaked"].sum() > mask.sum()


def test_an_earlier_answer_has_the_size_and_the_range_that_the_network_takes():
    logits = torch.full((1, 2, 64, 64, 3), 50.0)
    earlier = as_earlier(logits, [4, 4])
    assert earlier.shape == (1, 2, 16, 16, 3)
    assert earlier.max() == 12.0


def test_nearness_is_one_at_the_click_and_zero_for_padding():
    near = nearness(torch.tensor([[[10.0, 20.0], [3.0, 3.0]]]), torch.tensor([[1.0, -1.0]]), (32, 32))
    assert near[0, 0].flatten().argmax() == 10 * 32 + 20
    assert near[0, 0].max() == 1.0
    assert not near[0, 1].any()


def test_sessions_begin_in_the_shares_that_are_asked_for():
    generator = torch.Generator().manual_seed(0)
    sampler = SessionSampler(nothing=1, automatic=2, wrong=1, box=0)
    drawn = [start for _ in range(400) for start in sampler.starts(1, generator)]
    shares = [drawn.count(start) / len(drawn) for start in STARTS]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25, 0.0], atol=0.08)
    counts = [sampler.answers(generator) for _ in range(400)]
    assert (min(counts), max(counts)) == (1, 11)


@pytest.mark.parametrize("settings", [{"nothing": -1.0}, {"max_answers": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SessionSampler(**settings)


def _train(network, batch, iteration, loss, epochs):
    losses = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=epochs, train_data_loader=[batch], epoch_length=1, network=network,
        optimizer=torch.optim.AdamW(trainable_parameters(network), lr=3e-3), loss_function=NearClickLoss(loss),
        iteration_update=iteration, decollate=False,
    )  # fmt: skip
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"]))
    trainer.run()
    return [float(loss) for loss in losses]


SETTINGS = {"user": SimulatedUser(jitter=1), "sampler": PromptSampler(), "amp": False, "draws": 2}


def test_images_are_learned_from_sessions(untrained):
    network = copy.deepcopy(untrained[2])
    label = _target(2, 1, SIZE, SIZE).float()
    batch = {"image": 0.7 * label.expand(-1, 3, -1, -1) + 0.3 * torch.rand(2, 3, SIZE, SIZE), "label": label}
    iteration = SessionIteration(sessions=SessionSampler(max_answers=3), **SETTINGS)
    losses = _train(network, batch, iteration, DiceCELoss(sigmoid=True), 14)
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert network.click_feedback.to_embedding[-1].weight.abs().sum() > 0
    assert network.click_feedback.to_logits[-1].weight.abs().sum() > 0


def test_volumes_are_learned_from_sessions_where_they_are_annotated(untrained):
    network = copy.deepcopy(untrained[3])
    label = torch.zeros(1, 1, SIZE, SIZE, 6)
    label[..., 10:30, 20:50, 1:5] = 1
    label[..., 40:60, 20:50, 1:5] = 2
    batch = {
        "image": 0.4 * label + 0.2 * torch.rand(label.shape),
        "label": label,
        "annotated": torch.tensor([[True, False]]),
    }
    iteration = VolumeSessionIteration(
        num_classes=2, slab_depth=4, sessions=SessionSampler(max_answers=2), **{**SETTINGS, "draws": 1}
    )
    seen = []
    loss = AnnotatedDiceCELoss()

    class Spy(nn.Module):
        def forward(self, logits, target, annotated):
            seen.append((logits.shape, annotated.shape))
            return loss(logits, target, annotated)

    losses = _train(network, batch, iteration, Spy(), 8)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert all(shape[2:] == (SIZE, SIZE, 4) and annotated == shape[:2] for shape, annotated in seen)


@pytest.mark.parametrize("held", [[], [0], [9], [4, 5], list(range(10))])
def test_sessions_see_slices_around_one_that_holds_a_class(held):
    iteration = VolumeSessionIteration(num_classes=2, session_depth=4, sessions=SessionSampler(), **SETTINGS)
    label = torch.zeros(1, 1, 8, 8, 10)
    label[..., held] = 2.0
    seen = set()
    for seed in range(40):
        shown = iteration.choose_slices(label, torch.Generator().manual_seed(seed))
        assert 0 <= shown.start < shown.stop == shown.start + 4 <= 10
        assert not held or label[..., shown].any()
        seen.add(shown.start)
    assert len(seen) > 1 or len(held) == 1
    assert iteration.choose_slices(label[..., :3], torch.Generator()) == slice(0, 3)


def test_answers_of_sessions_have_the_slices_that_they_see(untrained):
    label = _target(1, 1, SIZE, SIZE).float().unsqueeze(-1).expand(-1, -1, -1, -1, 6).contiguous()
    iteration = VolumeSessionIteration(
        num_classes=2, session_depth=3, sessions=SessionSampler(max_answers=2), **{**SETTINGS, "draws": 1}
    )
    answers = iteration.answer_slab(
        untrained[3], label, label, torch.ones(1, 2, dtype=torch.bool), torch.Generator(), _places()
    )
    assert all(logits.shape[-1] == target.shape[-1] == 3 for logits, target, *_ in answers)
    with pytest.raises(ValueError, match="session_depth must be 0"):
        VolumeSessionIteration(num_classes=2, session_depth=-1, sessions=SessionSampler(), **SETTINGS)


def test_the_same_seed_gives_the_same_step(untrained):
    label = _target(1, 1, SIZE, SIZE).float()
    batch = {"image": label.expand(-1, 3, -1, -1), "label": label}
    runs = []
    for _ in range(2):
        iteration = SessionIteration(sessions=SessionSampler(max_answers=3), **SETTINGS)
        runs.append(_train(copy.deepcopy(untrained[2]), batch, iteration, DiceCELoss(sigmoid=True), 2))
    assert runs[0] == runs[1]
