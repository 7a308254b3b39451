"""What is encoded is kept by what the network sees, in memory and on disk, within bounds."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from medsa_nets.embeddings import read_embeddings
from medsa_nets.errors import SettingError
from medsa_nets.inferers.queues import AHEAD, DECODE, ENCODE, NEAREST, DeviceQueue
from medsa_nets.server.command import serve as start_server
from medsa_nets.server.store import Embeddings
from medsa_nets.server.studies import Study

from .scenes import SPACING, make_volume

PROPERTIES = {"spacing": np.array(SPACING), "class": "posterior"}


def one(size: int = 4) -> torch.Tensor:
    """An embedding of so many bytes."""
    return torch.zeros(size // 4)


def ask(client, image) -> np.ndarray:
    """The mask of one click, whole."""
    client.set_image(image, PROPERTIES)
    client.set_target_buffer(np.zeros(image.shape[1:], np.uint8))
    client.add_point_interaction([9, 11, 8], True)
    client._predict()
    return client.target_buffer.copy()


@pytest.fixture
def passes(volumes):
    """Grows by one with each pass through the encoder."""
    found: list[int] = []
    handle = volumes.network.image_encoder.register_forward_hook(lambda *_: found.append(1))
    yield found
    handle.remove()
    volumes.network.kept_embeddings = None


def test_those_of_closed_images_leave_first_and_then_the_oldest():
    store = Embeddings(16)
    for image in "abc":
        store.open(image)
    for image in "abc":
        store.put((image, 0, 0), one())
    store.get(("a", 0, 0))
    store.close("c")
    store.put(("a", 0, 1), one())
    assert store.bytes == 16
    store.put(("a", 0, 2), one())
    assert store.get(("c", 0, 0)) is None
    store.put(("a", 0, 3), one())
    assert store.get(("b", 0, 0)) is None
    assert store.get(("a", 0, 0)) is not None
    assert store.bytes == 16
    store.put(("c", 0, 0), one())  # closed while it was computed
    assert store.get(("c", 0, 0)) is None


def test_an_image_is_open_until_all_have_closed_it():
    store = Embeddings(64)
    store.open("a")
    store.open("a")
    store.put(("a", 0, 0), one())
    store.close("a", forget=True)
    assert store.get(("a", 0, 0)) is not None
    store.close("a", forget=True)
    assert store.get(("a", 0, 0)) is None
    assert store.bytes == 0


def test_two_who_wait_for_the_same_have_it_computed_once():
    store, queue, computed = Embeddings(64), DeviceQueue(), []
    begin = threading.Event()
    queue.submit(begin.wait, 0)
    store.open("a")

    def encode() -> None:
        computed.append(1)
        store.put(("a", 0, 0), one())

    threads = [
        threading.Thread(target=store.prepare, args=(("a", 0, 0), encode, queue, AHEAD), daemon=True) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    begin.set()
    for thread in threads:
        thread.join(20)
    queue.stop()
    assert computed == [1]


def test_an_image_is_encoded_once_for_all_and_for_who_comes_back(volumes, serve, connect, passes):
    address, server = serve(volumes)
    image = make_volume()
    first = connect(address)
    expected = ask(first, image)
    once = len(passes)
    second = connect(address)
    assert np.array_equal(ask(second, image), expected)
    assert len(passes) == once
    second.close()
    ask(first, image[:, ::-1])  # another image in its place
    twice = len(passes)
    assert twice == 2 * once
    assert np.array_equal(ask(first, image), expected)
    assert len(passes) == twice
    assert server.store.bytes <= server.settings.memory


def test_what_a_first_answer_shows_is_encoded_before_what_whole_ones_need(volumes, serve, connect, monkeypatch):
    address, server = serve(volumes, patience=0.0)
    order: list[int] = []
    submit = server.queue.submit

    def note(work, priority=DECODE):
        order.append(priority)
        return submit(work, priority)

    monkeypatch.setattr(server.queue, "submit", note)
    monkeypatch.setattr(Study, "encode_ahead", lambda self: None)
    ask(connect(address), make_volume())
    assert order[0] == NEAREST
    assert set(order) == {NEAREST, DECODE, ENCODE}


def test_a_first_answer_sees_no_mirror_image(make_segmenter, serve, connect, monkeypatch):
    address, server = serve(make_segmenter("medsa_btcv", slab_depth=6, mirror_axes=[0, 1]), patience=0.0)
    order: list[int] = []
    submit = server.queue.submit
    monkeypatch.setattr(
        server.queue, "submit", lambda work, priority=DECODE: order.append(priority) or submit(work, priority)
    )
    monkeypatch.setattr(Study, "encode_ahead", lambda self: None)
    ask(connect(address), make_volume())
    assert order.count(NEAREST) == 1
    assert order.count(ENCODE) >= 4


def test_a_server_that_was_killed_encodes_nothing_again(volumes, serve, connect, passes, tmp_path):
    read_embeddings(volumes.network, tmp_path / "kept", True, 2**28)
    expected = ask(connect(serve(volumes)[0]), make_volume())
    assert passes
    passes.clear()
    read_embeddings(volumes.network, tmp_path / "kept", True, 2**28)  # as another process does
    assert np.array_equal(ask(connect(serve(volumes)[0]), make_volume()), expected)
    assert not passes


def test_the_folder_is_bounded_and_the_answers_are_the_same(volumes, serve, connect, passes, tmp_path):
    expected = [ask(connect(serve(volumes)[0]), make_volume(number)) for number in range(3)]
    kept = tmp_path / "kept"
    read_embeddings(volumes.network, kept, True, 2**28)
    ask(connect(serve(volumes)[0]), make_volume(0))
    size = sum(path.stat().st_size for path in kept.iterdir())
    bound = int(1.5 * size)
    read_embeddings(volumes.network, kept, True, bound)
    for _ in range(2):
        for number in range(3):
            assert np.array_equal(ask(connect(serve(volumes)[0]), make_volume(number)), expected[number])
            assert size / 2 < sum(path.stat().st_size for path in kept.iterdir()) <= bound
    assert {path.suffix for path in kept.iterdir()} == {".safetensors"}
    read_embeddings(volumes.network, kept, True, 1000)  # a smaller bound, with the next start
    assert sum(path.stat().st_size for path in kept.iterdir()) <= 1000


def test_one_folder_and_a_size_are_expected(tmp_path: Path):
    bundle = Path(__file__).resolve().parents[2] / "bundles" / "medsa_btcv"
    with pytest.raises(SettingError, match="not both"):
        start_server(str(bundle), ["hippocampus.yaml"], embeddings=str(tmp_path), precomputed=str(tmp_path))
    with pytest.raises(SettingError, match="embeddings_gib"):
        start_server(str(bundle), ["hippocampus.yaml"], embeddings=str(tmp_path), embeddings_gib=0.0)
