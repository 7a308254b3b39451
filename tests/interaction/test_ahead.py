"""First answers on volumes that were not encoded yet: from the clicked slab, and in the end the same as ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from torch import Tensor

from medsa_nets.inferers import EmbeddingCache
from medsa_nets.interaction.ahead import VolumeAhead
from medsa_nets.interaction.inferer import SessionInferer
from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.networks import VolumeMedSA
from medsa_nets.prompts import UserPrompt, with_user_prompts
from medsa_nets.transforms.volumes import ABSENT

CONFIGS = Path(__file__).resolve().parents[2] / "bundles" / "medsa_btcv" / "configs"
SHAPE = (16, 20, 30)


def click(*position: float, label: int = 1, index: int = 0) -> UserPrompt:
    return UserPrompt("point", index, 0, 0.0, np.array([position], dtype=float), label=label)


FIRST, FAR, AGAINST = click(8, 9, 3), click(6, 7, 26), click(12, 4, 4, label=0)


def make_image(seed: int = 0) -> MetaTensor:
    blocks = np.random.default_rng(seed).random([-(-n // 4) for n in SHAPE])
    values = np.kron(blocks, np.ones((4, 4, 4)))[tuple(slice(0, n) for n in SHAPE)]
    image = MetaTensor(torch.from_numpy(values[None]).float(), affine=np.eye(4))
    image.meta["spatial_shape"], image.meta["original_affine"] = np.array(SHAPE), np.eye(4)
    return image


@pytest.fixture
def parser(small_base: str) -> ConfigParser:
    """The bundle as MONAI Label has it, with a network of random weights, in slabs of six slices."""
    out = ConfigParser()
    out.read_config([str(CONFIGS / name) for name in ("inference.yaml", "hippocampus.yaml", "server.yaml")])
    chosen = {"base": small_base, "amp": False, "slab_depth": 6, "mirror_axes": [], "click_refinement": ""}
    out.update({**chosen, "bundle_root": str(CONFIGS.parent), "slab_inferer#progress": False})
    return out


@pytest.fixture
def network(parser: ConfigParser) -> VolumeMedSA:
    out: VolumeMedSA = parser.get_parsed_content("network").eval()
    with torch.no_grad():
        out.class_embeddings.copy_(torch.randn(out.class_embeddings.shape))
    return out


@pytest.fixture
def make(parser: ConfigParser) -> Callable[[float | None], SessionInferer]:
    """Makes the bundle's inferer with a cache of its own."""

    def made(patience: float | None) -> SessionInferer:
        out: SessionInferer = parser.get_parsed_content("inferer", instantiate=True, lazy=False)
        assert out.patience == 1.0
        out.patience = patience
        base = out.inferer
        while hasattr(base, "inferer"):
            base = base.inferer
        base.cache = EmbeddingCache(2**28)
        return out

    return made


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Lets what is encoded behind go on once it is set."""
    out, own = threading.Event(), VolumeAhead._encode_next

    def wait(self: VolumeAhead) -> bool:
        assert out.wait(60)
        return own(self)

    monkeypatch.setattr(VolumeAhead, "_encode_next", wait)
    return out


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slices of each slab that was encoded."""
    out: list[int] = []
    own = VolumeMedSA.compute_embedding

    def note(self: VolumeMedSA, image: Tensor) -> Tensor:
        out.append(image.shape[4])
        return own(self, image)

    monkeypatch.setattr(VolumeMedSA, "compute_embedding", note)
    return out


def ask(inferer: SessionInferer, network: VolumeMedSA, image: MetaTensor, said: Sequence[UserPrompt]) -> Tensor:
    with torch.no_grad():
        return inferer(with_user_prompts(image, said)[None], network)[0]


def finish(inferer: SessionInferer, gate: threading.Event) -> VolumeAhead:
    """Wait for what is encoded behind."""
    (volume,) = inferer._volumes.values()
    gate.set()
    assert volume._done.wait(60)
    return volume


def test_the_first_answer_is_that_of_the_clicked_slab_and_the_rest_follows(make, network, gate, encoded):
    image, inferer = make_image(), make(0.0)
    found = ask(inferer, network, image, [FIRST])
    assert encoded == [6]
    assert found[0, 8, 9, 3] > 0
    assert not bool((found[0, ..., 6:] > 0).any())
    assert bool((found[1] <= ABSENT).all())  # nothing is known of other classes yet
    ask(inferer, network, image, [FIRST, AGAINST])
    ask(inferer, network, image, [FIRST, FAR, AGAINST])  # a request lists foreground first
    assert finish(inferer, gate).failure is None
    whole, count = ask(inferer, network, image, [FIRST, FAR, AGAINST]), len(encoded)
    assert count == 7  # each slab once
    at_once = make(None)
    for said in ([FIRST], [FIRST, AGAINST], [FIRST, FAR, AGAINST]):
        expected = ask(at_once, network, image, said)
    assert torch.equal(whole, expected)
    assert torch.equal(ask(inferer, network, image, [FIRST]), ask(make(None), network, image, [FIRST]))  # taken back
    assert not inferer._volumes


def test_what_is_taken_back_meanwhile_does_not_count(make, network, gate):
    image, inferer = make_image(), make(0.0)
    for said in ([FIRST], [FIRST, FAR], [FIRST]):
        near = ask(inferer, network, image, said)
    finish(inferer, gate)
    whole = ask(inferer, network, image, [FIRST])
    assert not torch.equal(whole, near)
    assert torch.equal(whole, ask(make(None), network, image, [FIRST]))


def test_each_user_of_a_volume_gets_the_order_that_was_brought(make, network, gate):
    image, inferer = make_image(), make(0.0)
    one, two = ([FIRST], [FIRST, AGAINST], [FIRST, FAR, AGAINST]), ([FAR], [FAR, AGAINST], [FAR, FIRST, AGAINST])
    for said in [own for pair in zip(one, two) for own in pair]:
        ask(inferer, network, image, said)
    finish(inferer, gate)
    for requests in (one, two):
        at_once = make(None)
        for said in requests:
            expected = ask(at_once, network, image, said)
        assert torch.equal(ask(inferer, network, image, requests[-1]), expected)


def test_an_adapter_that_comes_meanwhile_changes_nothing_of_what_is_encoded(make, network, gate):
    image, inferer = make_image(), make(0.0)
    before = ask(make(None), network, image, [FIRST])
    ask(inferer, network, image, [FIRST])
    old = network.class_embeddings.detach().clone()
    with torch.no_grad():
        network.class_embeddings.add_(1.0)
    volume = finish(inferer, gate)
    after = ask(inferer, network, image, [FIRST])  # of the new adapter: another volume
    assert len(inferer._volumes) == 2
    assert not torch.equal(after, before)
    with torch.no_grad():
        network.class_embeddings.copy_(old)
    assert volume.whole(0.0) is not None
    assert torch.equal(ask(inferer, network, image, [FIRST]), before)


def test_the_oldest_of_many_volumes_is_given_up(make, network, gate):
    inferer = make(0.0)
    seen: list[VolumeAhead] = []
    for seed in range(3):
        ask(inferer, network, make_image(seed), [FIRST])
        seen.append(list(inferer._volumes.values())[-1])
    assert list(inferer._volumes.values()) == seen[1:]
    assert [volume.stopped for volume in seen] == [True, False, False]
    gate.set()


def test_an_answer_that_can_wait_sees_all_slabs(make, network, gate):
    gate.set()
    image = make_image()
    assert torch.equal(ask(make(60.0), network, image, [FIRST]), ask(make(None), network, image, [FIRST]))


def test_a_volume_that_the_cache_cannot_hold_is_waited_for(make, network):
    inferer = make(0.0)
    inferer.cache.max_bytes = 1000
    assert torch.equal(ask(inferer, network, make_image(), [FIRST]), ask(make(None), network, make_image(), [FIRST]))
    assert not inferer._volumes


def test_what_fails_behind_is_asked_for_again(make, network, monkeypatch):
    def fail(self: VolumeAhead) -> bool:
        raise RuntimeError("no memory")

    monkeypatch.setattr(VolumeAhead, "_encode_next", fail)
    found = ask(make(60.0), network, make_image(), [FIRST])
    assert torch.equal(found, ask(make(None), network, make_image(), [FIRST]))


def test_patience_is_a_number_of_seconds():
    with pytest.raises(ValueError, match="patience must be a number of seconds"):
        SessionInferer(NetworkSegmenter, ["liver"], patience=-1.0)  # type: ignore[arg-type]
