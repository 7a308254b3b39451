from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from ignite.engine import Events
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.handlers import StatsHandler
from monai.losses import DiceCELoss
from torch import nn

from medsa_nets import build_medsa
from medsa_nets.backends import compile_for_training
from medsa_nets.inferers import PromptInferer
from medsa_nets.losses import AnnotatedDiceCELoss
from medsa_nets.precision import Precision
from medsa_nets.prompts import Prompts, PromptSampler
from medsa_nets.runtime import for_this_process, plain, unwrap
from medsa_nets.training import (
    EpochLoss,
    EpochSeed,
    Progress,
    PromptedIteration,
    VolumeIteration,
    answer_prompts,
    beside_another,
    call_through,
    choose_classes,
    trainable_parameters,
)

pytestmark = pytest.mark.usefixtures("small_base")
SIZE = 64


@pytest.fixture(scope="module")
def untrained() -> nn.Module:
    torch.manual_seed(0)
    return build_medsa("small", pretrained=False)


@pytest.fixture
def network(untrained: nn.Module) -> nn.Module:
    return copy.deepcopy(untrained)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """One picture with a bright square, and its mask."""
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(1, 1, SIZE, SIZE)
    label[..., 16:40, 20:50] = 1
    return {
        "image": 0.7 * label.expand(1, 3, -1, -1) + 0.3 * torch.rand(1, 3, SIZE, SIZE, generator=generator),
        "label": label,
    }


def train(
    network: nn.Module,
    batch: dict,
    epochs: int,
    loss: nn.Module | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **settings,
) -> list[float]:
    """Losses of a training on one batch, one iteration an epoch."""
    losses = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=[batch],
        epoch_length=1,
        network=network,
        optimizer=torch.optim.AdamW(trainable_parameters(network), lr=2e-3),
        loss_function=loss or DiceCELoss(sigmoid=True),
        iteration_update=PromptedIteration(**{"sampler": PromptSampler(), "amp": False, **settings}),
        decollate=False,
    )
    trainer.add_event_handler(Events.STARTED, lambda engine: setattr(engine, "scaler", scaler))
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(float(engine.state.output["loss"]))
    )
    trainer.run()
    return losses


class Wrapper(nn.Module):
    """Stands for ``DistributedDataParallel``: counts what goes through its forward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args):
        self.calls += 1
        return self.module(*args)


def test_call_through_goes_through_the_forward_pass_of_a_wrapper():
    layer = nn.Linear(2, 3)
    wrapper = Wrapper(layer)
    seen = []
    for number in (1, 2):
        result = call_through(wrapper, lambda module, x, y: (module, x + y), 2, 3)
        assert result == (layer, 5)
        assert wrapper.calls == number
        if not seen:  # what a wrapper calls, and hooks, as its module
            wrapper.module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert seen == [(layer, 5)]
    assert unwrap(wrapper) is layer
    x = torch.rand(4, 2)
    assert torch.equal(wrapper(x), layer(x))
    assert "forward" not in vars(layer)


def test_handlers_say_whether_every_process_attaches_them(monkeypatch):
    class Own:
        every_process = True

    handlers = [EpochSeed(None), EpochLoss(), Progress(), StatsHandler(), Own(), object()]
    assert for_this_process(handlers) == handlers
    monkeypatch.setattr("medsa_nets.runtime.processes.writes_files", lambda: False)
    assert for_this_process(handlers) == [handlers[0], handlers[1], handlers[4]]


def test_call_through_serves_a_network_without_wrapper():
    layer = nn.Linear(2, 3)
    assert call_through(layer, lambda module, x: (module is layer, x), 7) == (True, 7)


def test_call_through_leaves_the_forward_pass_as_it_was():
    layer = nn.Linear(2, 3)
    x = torch.rand(4, 2)
    before = layer(x)

    def fail(module):
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        call_through(Wrapper(layer), fail)
    assert torch.equal(layer(x), before)


def test_only_adapters_and_class_embeddings_are_trained(network):
    trained = {id(parameter) for parameter in trainable_parameters(network)}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in trained}
    assert names == {n for n in network.state_dict() if n in dict(network.named_parameters())}
    assert all("adapter" in name or "class_embedding" in name for name in names)


def test_prompts_are_answered_on_one_encoding(network, batch):
    encoded = []
    network.image_encoder.register_forward_hook(lambda *_: encoded.append(1))
    sampler = PromptSampler(correction=1.0)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        answers = answer_prompts(network, batch["image"], batch["label"], batch["label"], sampler, 3, *generators)
    assert len(encoded) == 1
    assert len(answers) == 6  # three draws, each followed by a correction
    assert all(logits.shape == target.shape == (1, 1, SIZE, SIZE) for logits, target in answers)


def test_corrections_follow_each_other_and_the_last_one_trains(network, batch, monkeypatch):
    asked = []
    decode = type(network).decode

    def spy(self, embedding, **prompts):
        asked.append((prompts["point_labels"].shape[2], torch.is_grad_enabled()))
        return decode(self, embedding, **prompts)

    monkeypatch.setattr(type(network), "decode", spy)
    sampler = PromptSampler(none=0.0, boxes=0.0, max_points=1, correction=1.0, max_corrections=5)
    seen = set()
    for seed in range(8):
        asked.clear()
        generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
        answers = answer_prompts(network, batch["image"], batch["label"], batch["label"], sampler, 1, *generators)
        clicks = len(asked) - 1
        assert asked == [(1, True), *((n, n == clicks + 1) for n in range(2, clicks + 2))]
        assert len(answers) == 2
        seen.add(clicks)
    assert seen <= set(range(1, 6))
    assert len(seen) > 2


@pytest.mark.parametrize("feedback", [False, True])
def test_corrections_are_made_from_the_mask_before_them_where_the_decoder_sees_it(batch, monkeypatch, feedback):
    torch.manual_seed(0)
    network = build_medsa("small", pretrained=False, click_feedback=feedback)
    asked, answered = [], []
    decode = type(network).decode

    def spy(self, embedding, **prompts):
        asked.append(prompts)
        answered.append(decode(self, embedding, **prompts))
        return answered[-1]

    monkeypatch.setattr(type(network), "decode", spy)
    sampler = PromptSampler(none=0.0, boxes=0.0, max_points=1, correction=1.0, max_corrections=3)
    generators = [torch.Generator().manual_seed(1 + i) for i in range(2)]
    answer_prompts(network, batch["image"], batch["label"], batch["label"], sampler, 1, *generators)
    assert len(asked) > 2
    assert "masks" not in asked[0]
    for before, prompts in zip(answered, asked[1:]):
        assert ("masks" in prompts) == feedback
        if feedback:
            torch.testing.assert_close(prompts["masks"], before.detach().clamp(-12, 12), atol=0.0, rtol=0.0)


def test_an_automatic_answer_is_the_forward_pass_without_prompts(network, batch):
    network.eval()
    sampler = PromptSampler(none=1.0, points=0.0, boxes=0.0, correction=0.0)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        answers = answer_prompts(network, batch["image"], batch["label"], batch["label"], sampler, 1, *generators)
        torch.testing.assert_close(answers[0][0], network(batch["image"]))


@pytest.mark.parametrize(
    ("sampler", "automatic"), [({"none": 1.0, "points": 0.0, "boxes": 0.0}, True), ({"none": 0.0}, False)]
)
def test_prompts_ask_for_one_object_and_the_automatic_mode_for_all(network, batch, sampler, automatic):
    other = 1.0 - batch["label"]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        answers = answer_prompts(
            network, batch["image"], batch["label"], other, PromptSampler(**sampler, correction=1.0), 2, *generators
        )
    assert len(answers) == 4
    assert all(target is (other if automatic else batch["label"]) for _, target in answers)


@pytest.mark.parametrize("seed", range(8))
def test_a_pair_shows_both_images_and_asks_for_each(seed):
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    image = colours[:, :, None, None].expand(-1, -1, 32, 33).clone()
    label = torch.zeros(3, 1, 32, 33)
    for index in range(3):
        label[index, :, 10 : 14 + 4 * index, 8:20] = 1
    pair, own, both = beside_another(image, label, torch.Generator().manual_seed(seed))
    assert pair.shape == image.shape
    assert own.shape == both.shape == label.shape
    for index in range(3):
        shown, asked = pair[index], own[index, 0] > 0
        assert asked.any()
        assert (shown[index] > 0.99)[asked].all(), "the object that is asked for lies in its own image"
        assert (shown[index - 1] > 0.99)[(both[index, 0] > 0) & ~asked].all(), "the other one in the other image"
        assert float(shown[index].mean()) == pytest.approx(0.5, abs=0.02)
        # half the extent, half the area
        assert int(asked.sum()) == pytest.approx(int(label[index].sum()) / 2, rel=0.2)
        assert int((both[index] - own[index]).sum()) == pytest.approx(int(label[index - 1].sum()) / 2, rel=0.2)


def test_pairs_change_the_training_and_need_two_images(untrained, batch):
    two = {key: torch.cat([value, value.flip(-1)]) for key, value in batch.items()}
    for data, same in ((batch, True), (two, False)):
        losses = [train(copy.deepcopy(untrained), data, epochs=1, pairs=pairs)[0] for pairs in (0.0, 1.0)]
        assert (losses[0] == losses[1]) == same


def test_training_lowers_the_loss_on_one_image_and_changes_nothing_frozen(network, batch):
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    losses = train(
        network, batch, epochs=30, sampler=PromptSampler(none=1.0, points=0.0, boxes=0.0, correction=0.0), draws=1
    )
    assert len(losses) == 30
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
    assert any(not torch.equal(p, before[n]) for n, p in network.named_parameters() if p.requires_grad)


def test_two_identical_runs_give_identical_weights(untrained, batch):
    runs = []
    for _ in range(2):
        network = copy.deepcopy(untrained)
        runs.append((train(network, batch, epochs=2), network.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def test_another_seed_draws_other_prompts(untrained, batch):
    losses = [train(copy.deepcopy(untrained), batch, epochs=1, seed=seed)[0] for seed in (0, 1, 2)]
    assert len(set(losses)) > 1


def test_a_wrapped_network_learns_as_the_network_itself(untrained, batch):
    alone, wrapper = copy.deepcopy(untrained), Wrapper(copy.deepcopy(untrained))
    assert train(alone, batch, epochs=2) == train(wrapper, batch, epochs=2)
    assert wrapper.calls == 2


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("compiled", [True, False])
def test_a_compiled_encoder_learns_as_the_network_itself(tiny_base, randomise, batch, compiled, monkeypatch):
    """Traced forward and backward, without the minute that the default compiler takes to make code of them."""
    compilations = []
    compile_module = nn.Module.compile

    def compile_fast(module):
        compilations.append(module)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_fast)
    network = randomise(build_medsa("tiny", pretrained=False, img_size=SIZE, adapter_dim=4)).train()
    alone = copy.deepcopy(network)
    compile_for_training(network, compiled)
    assert compilations == ([network.image_encoder] if compiled else [])
    assert train(network, batch, epochs=3) == pytest.approx(train(alone, batch, epochs=3), abs=1e-4)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_training_before_the_weights_change(network, batch, value):
    class Broken(nn.Module):
        def forward(self, prediction, label):
            return prediction.mean() * value

    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError, match=r"The loss is (nan|inf|-inf) at iteration 1.*learning rate"):
        train(network, batch, epochs=1, loss=Broken(), draws=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


FLOAT16 = Precision(torch.float16, scale=True)


def trained(network: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainable_parameters(network)]


def test_a_training_in_float16_learns_as_one_in_float32(untrained, batch):
    half, single = (train(copy.deepcopy(untrained), batch, 4, amp=amp) for amp in (FLOAT16, False))
    assert half != single
    assert half == pytest.approx(single, abs=0.02)
    assert half[-1] < half[0] - 0.05


def test_gradients_are_clipped_by_their_norm_without_the_scale(untrained, batch):
    plain_steps, scaled = copy.deepcopy(untrained), copy.deepcopy(untrained)
    train(plain_steps, batch, 2, clip_grad_norm=1e-4)
    single = Precision(scale=True)  # float32, so that the scale alone makes a difference
    train(scaled, batch, 2, clip_grad_norm=1e-4, amp=single, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    for one, other in zip(trained(plain_steps), trained(scaled)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_step_whose_gradients_overflow_is_left_out_and_the_scale_halves(network, batch):
    before, scaler = trained(network), torch.amp.GradScaler("cpu", init_scale=2.0**60)
    train(network, batch, 1, amp=FLOAT16, scaler=scaler)
    assert scaler.get_scale() == 2.0**59
    assert all(torch.equal(one, other) for one, other in zip(before, trained(network)))
    scaler.update(2.0**10)
    train(network, batch, 1, amp=FLOAT16, scaler=scaler)
    assert not all(torch.equal(one, other) for one, other in zip(before, trained(network)))


class NoGradient(nn.Module):
    """A loss of finite value whose gradient is not."""

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (logits * 0).sum().sqrt()


def test_gradients_that_are_never_finite_stop_the_training(network, batch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-15)
    with pytest.raises(RuntimeError, match=r"not finite, however small their scale, at iteration 2\..*--amp false"):
        train(network, batch, 9, NoGradient(), amp=FLOAT16, scaler=scaler)


def test_gradients_are_clipped_to_their_largest_norm(untrained, batch):
    norms = {}
    for limit in (0.0, 1e-3):
        network = copy.deepcopy(untrained)
        train(network, batch, epochs=1, draws=1, clip_grad_norm=limit)
        gradients = [p.grad for p in trainable_parameters(network) if p.grad is not None]
        norms[limit] = float(torch.stack([g.norm() for g in gradients]).norm())
    assert norms[0.0] > 2e-3
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_plain_takes_metadata_off_and_leaves_other_tensors_as_they_are():
    tensor = torch.rand(2)
    assert plain(tensor) is tensor
    assert type(plain(MetaTensor(tensor))) is torch.Tensor
    assert torch.equal(plain(MetaTensor(tensor)), tensor)


@pytest.mark.parametrize("amp", [False, True])
def test_the_inferer_hands_prompts_on_and_gives_single_precision(network, batch, amp):
    network.eval()
    prompts = Prompts(boxes=torch.tensor([[16.0, 20.0, 39.0, 49.0]]))
    with torch.no_grad():
        logits = PromptInferer(amp)(MetaTensor(batch["image"]), network, prompts=prompts)
        expected = network(batch["image"], **prompts.arguments())
    assert logits.dtype == torch.float32
    assert logits.shape == (1, 1, SIZE, SIZE)
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits, expected, atol=0.1 * scale if amp else 1e-5, rtol=0)


# ---------------------------------------------------------------- volumes


@pytest.fixture(scope="module")
def two_classes() -> dict[str, torch.Tensor]:
    """Two pictures with a square in a brighter square; masks of the whole and of the inner one, which overlap."""
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(2, 2, SIZE, SIZE)
    label[:, 0, 12:50, 14:54] = 1
    label[0, 1, 24:40, 26:42] = 1
    shade = 0.3 * label.sum(1, keepdim=True)
    return {
        "image": shade.expand(-1, 3, -1, -1) + 0.3 * torch.rand(2, 3, SIZE, SIZE, generator=generator),
        "label": label,
    }


def test_classes_of_the_pictures_are_prompted_for_and_no_more_than_asked(two_classes):
    label = torch.cat([two_classes["label"], torch.zeros(2, 2, SIZE, SIZE)], dim=1)
    chosen = [choose_classes(label, 4, torch.Generator().manual_seed(seed)).tolist() for seed in range(8)]
    assert chosen == [[0, 1]] * 8
    one = {tuple(choose_classes(label, 1, torch.Generator().manual_seed(seed)).tolist()) for seed in range(20)}
    assert one == {(0,), (1,)}
    none = {tuple(choose_classes(0 * label, 3, torch.Generator().manual_seed(seed)).tolist()) for seed in range(40)}
    assert none == {(0,), (1,), (2,), (3,)}


@pytest.mark.parametrize(("weights", "kind"), [((1, 0, 0), set()), ((0, 1, 0), {"points"}), ((0, 0, 1), {"boxes"})])
def test_prompts_of_several_classes_say_which_one_is_meant(two_classes, monkeypatch, weights, kind):
    torch.manual_seed(0)
    network = build_medsa("small", pretrained=False, num_classes=2, classes_per_pass=2)
    asked = []
    decode = network.decode
    monkeypatch.setattr(network, "decode", lambda embedding, **given: asked.append(given) or decode(embedding, **given))
    none, points, boxes = weights
    sampler = PromptSampler(none=none, points=points, boxes=boxes, correction=1.0)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    answers = answer_prompts(
        network,
        two_classes["image"],
        two_classes["label"],
        two_classes["label"],
        sampler,
        1,
        generators[0],
        generators[1:],
    )
    assert [(logits.shape, target.shape) for logits, target in answers] == [((2, 2, SIZE, SIZE),) * 2] * 2
    assert all(torch.equal(target, two_classes["label"]) for _, target in answers)
    assert [given["classes"].tolist() for given in asked] == [[0, 1], [0, 1]]
    given = {name for name in ("point_coords", "boxes") if asked[0].get(name) is not None}
    assert given == {{"points": "point_coords", "boxes": "boxes"}[one] for one in kind}
    assert asked[1]["point_coords"].shape[:2] == (2, 2)  # a correction for each class of each picture


@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_training_on_two_classes_lowers_the_loss(two_classes, pairs):
    torch.manual_seed(0)
    network = build_medsa("small", pretrained=False, num_classes=2, classes_per_pass=2, click_feedback=True)
    losses = train(network, two_classes, epochs=40, loss=AnnotatedDiceCELoss(), pairs=pairs, max_classes=1)
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert bool((network.class_embeddings[0] != network.class_embeddings[1]).any())


def test_a_step_prompts_for_one_class_at_least():
    with pytest.raises(ValueError, match="max_classes must be 1 or more, got 0"):
        PromptedIteration(sampler=PromptSampler(), max_classes=0)


@pytest.fixture(scope="module")
def untrained_volumes() -> nn.Module:
    torch.manual_seed(0)
    return build_medsa("small", pretrained=False, spatial_dims=3, num_classes=3, adapter_dim=8)


@pytest.fixture(scope="module")
def slab() -> dict[str, torch.Tensor]:
    """Two slabs of four slices: class 1 in both, class 3 in the second."""
    label = torch.zeros(2, 1, 32, 32, 4)
    label[:, :, 4:16, 4:20] = 1
    label[1, :, 20:30, 8:28, 1:] = 3
    image = label / 4 + 0.2 * torch.rand(2, 1, 32, 32, 4, generator=torch.Generator().manual_seed(0))
    return {"image": image, "label": label}


def train_volumes(network, batch, epochs=1, **settings) -> list[float]:
    losses = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=[batch],
        epoch_length=1,
        network=network,
        optimizer=torch.optim.AdamW(trainable_parameters(network), lr=2e-3),
        loss_function=AnnotatedDiceCELoss(),
        iteration_update=VolumeIteration(**{"sampler": PromptSampler(), "num_classes": 3, "amp": False, **settings}),
        decollate=False,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(float(e.state.output["loss"])))
    trainer.run()
    return losses


def test_training_on_volumes_lowers_the_loss(untrained_volumes, slab):
    network = copy.deepcopy(untrained_volumes)
    losses = train_volumes(network, slab, epochs=40, sampler=PromptSampler(points=0.0, boxes=0.0), draws=1)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("weights", [{"none": 0.0, "boxes": 0.0}, {"none": 0.0, "points": 0.0}])
def test_prompts_ask_for_present_classes(untrained_volumes, slab, weights):
    iteration = VolumeIteration(
        sampler=PromptSampler(**weights, correction=1.0), num_classes=3, unnamed=0.0, draws=2, amp=False
    )
    asked = []
    network = copy.deepcopy(untrained_volumes)
    original = network.decode
    network.decode = lambda *args, **prompts: asked.append(prompts) or original(*args, **prompts)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    annotated = torch.ones(2, 3, dtype=torch.bool)
    with torch.no_grad():
        answers = iteration.answer_slab(network, slab["image"], slab["label"], annotated, *generators)
    assert len(answers) == len(asked) == 4
    for logits, masks, known in answers:
        assert logits.shape == masks.shape == (2, 2, 32, 32, 4)
        assert known.all()
    assert all(prompts["classes"].tolist() == [0, 2] for prompts in asked)
    assert len({"point_coords", "boxes"} & asked[0].keys()) == 1
    assert all("point_coords" in prompts for prompts in asked[1::2]), "corrections are clicks"


def test_a_class_that_is_not_annotated_is_not_asked_for_and_not_learned(untrained_volumes, slab):
    annotated = torch.tensor([[True, False, False], [True, True, False]])
    iteration = VolumeIteration(sampler=PromptSampler(), num_classes=3, amp=False)
    for seed in range(10):
        chosen = iteration.choose_classes(slab["label"], annotated, torch.Generator().manual_seed(seed))
        assert chosen.tolist() == [0]
    changed = {**slab, "label": torch.where(slab["label"] == 3, 0.0, slab["label"])}
    automatic = {"sampler": PromptSampler(points=0.0, boxes=0.0, correction=0.0), "draws": 1}
    losses = [
        train_volumes(copy.deepcopy(untrained_volumes), {**batch, "annotated": annotated}, **automatic)
        for batch in (slab, changed)
    ]
    assert losses[0] == losses[1]
    assert train_volumes(copy.deepcopy(untrained_volumes), slab, **automatic) != losses[0]


def test_a_share_of_prompts_does_not_name_its_class(untrained_volumes, slab):
    named = []
    for unnamed in (0.0, 1.0):
        iteration = VolumeIteration(
            sampler=PromptSampler(none=0.0, correction=0.0), num_classes=3, unnamed=unnamed, draws=1, amp=False
        )
        network = copy.deepcopy(untrained_volumes)
        original = network.decode
        network.decode = lambda *a, o=original, **p: named.append("classes" in p) or o(*a, **p)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        with torch.no_grad():
            iteration.answer_slab(
                network, slab["image"], slab["label"], torch.ones(2, 3, dtype=torch.bool), *generators
            )
    assert named == [True, False]


def test_prompts_lie_on_slices_that_are_not_encoded_too(untrained_volumes, slab):
    iteration = VolumeIteration(
        sampler=PromptSampler(none=0.0, boxes=0.0, max_points=1, correction=0.0),
        num_classes=3, slab_depth=2, draws=1, amp=False,
    )  # fmt: skip
    network = copy.deepcopy(untrained_volumes)
    encoded, depths = [], set()
    original, decode = network.encode_image, network.decode
    network.encode_image = lambda image: encoded.append(image) or original(image)
    network.decode = lambda *a, **p: depths.update(p["point_coords"][..., 2].flatten().tolist()) or decode(*a, **p)
    middle = slab["label"].shape[-1] // 2
    for seed in range(12):
        generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
        with torch.no_grad():
            answers = iteration.answer_slab(
                network, slab["image"], slab["label"], torch.ones(2, 3, dtype=torch.bool), *generators
            )
        (logits, masks, _), part = answers[0], encoded[-1]
        assert logits.shape == masks.shape == (2, masks.shape[1], 32, 32, 2)
        starts = [s for s in range(3) if torch.equal(slab["image"][..., s : s + 2], part)]
        assert len(starts) == 1
        assert starts[0] <= middle < starts[0] + 2
        present = torch.stack([(slab["label"] == i + 1)[..., starts[0] : starts[0] + 2] for i in range(3)], 2)
        assert any(torch.equal(masks[:, 0], present[:, 0, i]) for i in range(3))
    assert min(depths) < 0 or max(depths) > 1, "some clicks lie outside of what is encoded"
    with pytest.raises(ValueError, match="slab_depth"):
        VolumeIteration(sampler=PromptSampler(), num_classes=3, slab_depth=-1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_memory_is_given_back_after_growth_alone() -> None:
    code = """
from pathlib import Path
import os
import torch
from medsa_nets.runtime import keep_freed_memory, release_freed_memory

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

assert not release_freed_memory(0)  # nothing is kept: nothing to give back
if keep_freed_memory():
    held = [torch.ones(2**18) for _ in range(200)]  # 1 MiB each
    del held[::2]  # holes
    grown = resident_bytes()
    keep_freed_memory()  # said twice, it forgets nothing
    assert not release_freed_memory(10 * 2**30)
    assert resident_bytes() > 0.9 * grown
    assert release_freed_memory(2**26)
    assert resident_bytes() < grown - 80 * 2**20
    assert not release_freed_memory(2**26)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
