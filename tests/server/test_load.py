"""Several clients on a server in a process of its own that is killed and started again: nothing is lost or mixed up."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from medsa_nets.bundles import ADAPTER, Bundle, copy_bundle
from medsa_nets.interaction.segmenters import NetworkSegmenter

from .load import replay, run
from .scenes import SPACING, make_volume, write_volume

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_btcv"


@pytest.fixture
def bundle(small_base: str, tmp_path: Path) -> Path:
    """A bundle with random weights."""
    target = tmp_path / "bundle"
    settings = {"base": small_base, "amp": False, "slab_depth": 6, "mirror_axes": []}
    copy_bundle(BUNDLE, target, ["hippocampus.yaml"], settings)
    network = Bundle.open(target).value("network_def")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        network.class_embeddings.copy_(torch.randn(network.class_embeddings.shape, generator=generator))
    torch.save(network.state_dict(), target / ADAPTER)
    return target


def test_clients_of_a_killed_server_lose_nothing_and_see_nobody_else_s(bundle, tmp_path):
    paths = [write_volume(make_volume(number // 2), tmp_path / f"{number}.nii.gz") for number in range(5)]
    properties = {"spacing": np.array(SPACING), "class": "posterior"}
    images = [(make_volume(number // 2), properties) for number in range(5)]
    users, server, complaints = run(
        [str(bundle), "--device", "cpu"], images, answers=80, kills=1, pause=0.2, seats=4, turn=4.0
    )
    assert server.largest < 1536 << 20  # the libraries take the half of it
    assert complaints == []
    assert [user.failure for user in users] == [""] * 5
    segmenter = NetworkSegmenter.from_bundle(bundle, (), {"device": "cpu"})
    assert [replay(segmenter, path, "posterior", user) for user, path in zip(users, paths)] == [""] * 5
    counts = sum((user.counts for user in users), Counter())
    assert len(server.kills) == 1
    assert counts["lease over"] > 0  # told so by the server that was started again
    assert counts["no seat"] > 0
    kinds = {event.action["kind"] for user in users for event in user.events if event.action}
    assert kinds == {"point", "scribble", "box", "lasso", "mask", "undo", "reset"}
    assert sum(int(event.mask.any()) for user in users for event in user.events if event.mask is not None) > 5
