"""What an adapter was made for: an adapter of another task is refused, and one that does not say is not."""

import logging

import pytest
import torch

from medsa_nets import build_medsa
from medsa_nets.errors import SettingError, WeightsError
from medsa_nets.layers import Bottlenecks
from medsa_nets.networks.identity import compare_tasks, decode_identity, decode_task, encode_task

FINE = {"transform": "Spacing", "pixdim": [1.5, 1.5, 1.5]}
COARSE = {"transform": "Spacing", "pixdim": [3.0, 3.0, 3.0]}
SOFT = {"transform": "ScaleIntensityRange", "a_min": -125.0, "a_max": 275.0}
BONE = {"transform": "ScaleIntensityRange", "a_min": -125.0, "a_max": 1000.0}
FACTS = {"grid": COARSE, "intensity": SOFT, "classes": ["liver", "spleen"]}


@pytest.fixture
def build(small_base):
    def build(task=None, **settings):
        return build_medsa(small_base, num_classes=2, adapter_dim=4, task=task, **settings)

    return build


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({"grid": COARSE}, {"grid": FINE}, r"grid pixdim \[3.0, 3.0, 3.0\] \(here \[1.5, 1.5, 1.5\]\).*pixdim or grid"),
        ({"intensity": SOFT}, {"intensity": BONE}, r"intensity a_max 275.0 \(here 1000.0\).*\(intensity_transform\)"),
        ({"grid": COARSE}, {"grid": {"transform": "Resize"}}, r'grid transform "Spacing" \(here "Resize"\)'),
        ({"classes": ["liver"]}, {"classes": ["colon"]}, r'classes \["liver"\] \(here \["colon"\]\)'),
        (FACTS, {**FACTS, "grid": FINE, "intensity": BONE}, r"grid pixdim .*; intensity a_max .*--same_task false"),
    ],
)
def test_an_adapter_of_another_task_is_refused_with_both_values(build, there, here, message):
    network = build(here)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        network.load_state_dict(build(there).state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("there", "here", "refused"), [(256, 512, True), (256, 256, False), (None, 512, False)])
def test_an_adapter_of_another_image_size_is_refused(build, there, here, refused):
    state = build(img_size=there).state_dict()
    if not refused:
        build(img_size=here).load_state_dict(state)
        return
    with pytest.raises(WeightsError, match=r"image_size \[256, 256\] \(here \[512, 512\]\)"):
        build(img_size=here).load_state_dict(state)


def test_a_vit_knows_its_size_though_none_is_given(tiny_base):
    network = build_medsa("tiny", pretrained=False)
    assert decode_task(network.task) == {"image_size": [256, 256]}


def test_an_adapter_of_before_is_taken_and_saved_with_what_is_known_here(build):
    old, network = build(FACTS), build(FACTS)
    state = old.state_dict()
    del state["task"]
    network.load_state_dict(state, strict=True)
    assert decode_task(network.state_dict()["task"]) == FACTS


def test_a_network_that_knows_nothing_learns_it_from_the_file(build):
    network = build()
    network.load_state_dict(build(FACTS).state_dict())
    assert decode_task(network.task) == FACTS


def test_what_was_asked_for_is_taken_logged_and_saved_as_the_own_task(build, caplog):
    network = build({"grid": FINE}, same_task=False)
    with caplog.at_level(logging.WARNING):
        network.load_state_dict(build(FACTS).state_dict())
    assert "grid pixdim [3.0, 3.0, 3.0] (here [1.5, 1.5, 1.5])" in caplog.text
    assert decode_task(network.task) == {**FACTS, "grid": FINE}


def test_any_task_holds_for_a_block_only(build):
    network, state = build({"grid": FINE}), build(FACTS).state_dict()
    with network.any_task():
        network.load_state_dict(state)
    with pytest.raises(WeightsError, match="another task"):
        network.load_state_dict(state)


def test_another_base_is_refused_for_any_task(build, tiny_base):
    network = build_medsa("tiny", pretrained=False, num_classes=2, adapter_dim=4)
    with network.any_task(), pytest.raises(WeightsError, match="belongs to the base 'small'"):
        network.load_state_dict(build().state_dict())


def test_parts_that_one_task_does_not_know_are_no_difference():
    more = {"grid": {**COARSE, "scale_extent": False}, "image_size": [256, 256]}
    assert compare_tasks(more, FACTS) == compare_tasks(FACTS, more) == {}


@pytest.mark.parametrize(
    ("task", "message"), [({"colour": 1}, "no colour; expected image_size"), ({"classes": ["x" * 9000]}, "task takes")]
)
def test_a_task_that_no_file_can_hold_is_refused(task, message):
    with pytest.raises(SettingError, match=message):
        encode_task(task)


def test_a_damaged_task_is_refused(build):
    network = build()
    with pytest.raises(WeightsError, match="'task' is damaged"):
        network.load_state_dict({**network.state_dict(), "task": torch.zeros(8192, dtype=torch.uint8)})


def test_all_organs_of_a_large_label_set_fit():
    names = [f"a structure with a long name, number {number}" for number in range(150)]
    assert decode_task(encode_task({**FACTS, "classes": names}))["classes"] == names


class Wider(Bottlenecks):
    """An adaptation of somebody else's."""

    def describe(self):
        return {"adaptation": "wider", "width": 3}


def test_an_adaptation_says_itself_what_its_files_depend_on(small_base, build):
    network = build_medsa(small_base, num_classes=2, adaptation=Wider(adapter_dim=4))
    settings = decode_identity(network.identity)["adapter"]
    assert settings == {"adaptation": "wider", "width": 3, "num_classes": 2, "train_norms": False}
    with pytest.raises(WeightsError, match=r"adaptation=None \(here 'wider'\)|width=None \(here 3\)"):
        network.load_state_dict(build().state_dict())
