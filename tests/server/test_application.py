"""What a server answers, and what it refuses, through the published client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.server import application
from medsa_nets.server.settings import ServerSettings
from medsa_nets.server.studies import Properties, Study, affine_of

from .scenes import SPACING, make_photograph, make_volume, write_volume

remote = pytest.importorskip("nnInteractive.inference.remote")


def open_volume(client: Any, seed: int = 0, **properties: Any) -> np.ndarray:
    volume = make_volume(seed)
    client.set_image(volume, {"spacing": SPACING, **properties})
    client.set_target_buffer(np.zeros(volume.shape[1:], np.uint8))
    return volume


def test_prompts_that_wait_are_answered_together(
    volumes: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    address, _ = serve(volumes)
    waiting, direct = connect(address), connect(address)
    for client in (waiting, direct):
        open_volume(client, **{"class": "posterior"})
    assert waiting._predict() is None
    assert waiting.add_point_interaction([5, 5, 5], True, run_prediction=False) is None
    assert waiting.add_point_interaction([9, 9, 9], False, run_prediction=False) is None
    assert waiting.add_point_interaction([1, 1, 1], False, run_prediction=False) is None
    assert waiting.undo()
    assert not waiting.target_buffer.any()
    assert waiting._predict() is not None
    direct.add_point_interaction([5, 5, 5], True)
    direct.add_point_interaction([9, 9, 9], False)
    assert waiting.target_buffer.any()
    np.testing.assert_array_equal(waiting.target_buffer, direct.target_buffer)


def test_autozoom_changes_nothing_and_the_server_says_so(
    volumes: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    client = connect(serve(volumes)[0])
    assert client.do_autozoom is False
    masks = []
    for chosen in (True, False):
        client.set_do_autozoom(chosen)
        open_volume(client, **{"class": "posterior"})
        client.add_point_interaction([5, 5, 5], True)
        masks.append(client.target_buffer.copy())
    assert masks[0].any()
    np.testing.assert_array_equal(*masks)


def test_finished_objects_are_not_overwritten_and_can_be_gone_on_with(
    volumes: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    address, _ = serve(volumes)
    client = connect(address)
    volume = open_volume(client, **{"class": "foreground"})
    whole = np.zeros(volume.shape[1:], np.uint8)
    whole[2:10, 2:10, 2:10] = 1
    client.add_initial_seg_interaction(whole)
    first = client.target_buffer.copy()
    assert first.sum() == 512
    client.set_target_buffer(np.zeros_like(first))  # the next object
    client.reset_interactions()
    more = np.zeros_like(first)
    more[8:16, 2:10, 2:10] = 1
    client.add_initial_seg_interaction(more)
    second = client.target_buffer.copy()
    np.testing.assert_array_equal(second, more & ~first)
    with pytest.raises(httpx.HTTPStatusError, match="409"):
        client.add_point_interaction([3, 3, 3], True)
    np.testing.assert_array_equal(client.target_buffer, second)
    client.reset_interactions()  # before the new buffer, as some viewers do
    client.set_target_buffer(np.zeros_like(first))
    client.add_initial_seg_interaction(first)  # the first object again
    np.testing.assert_array_equal(client.target_buffer, first)
    client.reset_interactions()  # given up
    client.add_initial_seg_interaction(more)
    np.testing.assert_array_equal(client.target_buffer, more)  # it is more or less the second object, gone on with


def test_class_is_that_of_the_first_click_in_the_automatic_mask(
    volumes: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any], tmp_path: Path
) -> None:
    address, server = serve(volumes)
    client = connect(address)
    volume = open_volume(client)
    path = write_volume(volume, tmp_path / "volume.nii.gz")
    session = InteractiveSession(volumes, start="automatic")
    session.open(str(path))
    automatic = session.automatic
    assert automatic is not None
    chosen = set()
    work = next(iter(server.leases._leases.values())).held
    for position in np.random.default_rng(0).integers(0, volume.shape[1:], (12, 3)):
        client.add_point_interaction(position.tolist(), True)
        voxel = session.grids.voxels(position[None].astype(float))[0]
        # the slab around the click alone decides, the session's automatic mask blends slabs
        slabs = work._study().slabs[()]
        start = min((g[0] for g in slabs.groups), key=lambda s: abs(s + (slabs.depth - 1) / 2 - voxel[2]))
        inside = slabs.depth // 4 <= voxel[2] - start < slabs.depth - slabs.depth // 4
        logits = automatic[(slice(None), *voxel)]
        found = work._object.class_name
        if inside and float(logits.abs().min()) > 1.0:
            assert found == (volumes.classes[int(logits.argmax())] if logits.max() > 0 else "foreground")
        chosen.add(found)
        client.reset_interactions()
    assert len(chosen) > 1


def test_clicked_slab_answers_before_the_volume_is_encoded(
    volumes: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medsa_nets.server.studies.Study.encode_ahead", lambda _: None)
    monkeypatch.setattr("medsa_nets.server.work.SegmentedObject._run", lambda _: None)
    address, server = serve(volumes, patience=0.0)
    hurried, patient = connect(address), connect(serve(volumes)[0])
    open_volume(hurried, **{"class": "posterior"})
    assert hurried.add_point_interaction([10, 12, 10], True) is not None
    first = hurried.target_buffer.copy()
    assert first[10, 12, 10]
    study = next(iter(server.leases._leases.values())).held._study()
    assert [sum(slabs.encoded_groups()) for slabs in study.slabs.values()] == [1]
    hurried.add_point_interaction([3, 4, 5], False)
    assert hurried.undo()
    np.testing.assert_array_equal(hurried.target_buffer, first)
    monkeypatch.undo()
    hurried._predict()
    open_volume(patient, **{"class": "posterior"})
    patient.add_point_interaction([10, 12, 10], True)
    assert (patient.target_buffer != first).any()  # the object goes on in other slabs
    np.testing.assert_array_equal(hurried.target_buffer, patient.target_buffer)


def test_a_photograph_answers_before_it_is_encoded_in_all_positions(
    photographs: NetworkSegmenter,
    serve: Callable[..., Any],
    connect: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert photographs.inferer.turns == (0, 2)  # type: ignore[union-attr]
    monkeypatch.setattr("medsa_nets.server.studies.Study.encode_ahead", lambda _: None)
    monkeypatch.setattr("medsa_nets.server.work.SegmentedObject._run", lambda _: None)
    address, server = serve(photographs, patience=0.0)
    hurried, patient = connect(address), connect(serve(photographs)[0])
    for client in (hurried, patient):
        client.set_image(make_photograph(3))
        client.set_target_buffer(np.zeros(client.original_image_shape[1:], np.uint8))
    hurried.add_point_interaction([20, 10, 0], True)
    study = next(iter(server.leases._leases.values())).held._study()
    assert [study.store.get((study.key, 0, turn)) is not None for turn in (0, 2)] == [True, False]
    assert not study.encoded
    assert hurried.target_buffer[20, 10, 0]
    first = hurried.target_buffer.copy()
    monkeypatch.undo()
    hurried._predict()
    assert study.encoded
    patient.add_point_interaction([20, 10, 0], True)
    assert (patient.target_buffer != first).any()
    np.testing.assert_array_equal(hurried.target_buffer, patient.target_buffer)


def test_photographs_may_lie_either_way(
    photographs: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    address, _ = serve(photographs)
    image = make_photograph(3)
    one, other = connect(address), connect(address)
    one.set_image(image)
    other.set_image(np.moveaxis(image, -1, 1).swapaxes(2, 3))  # (3, 1, Y, X)
    for client in (one, other):
        client.set_target_buffer(np.zeros(client.original_image_shape[1:], np.uint8))
    one.add_point_interaction([20, 10, 0], True)
    other.add_point_interaction([0, 10, 20], True)
    one.add_bbox_interaction([[4, 40], [2, 30], [0, 1]], True)
    other.add_bbox_interaction([[0, 1], [2, 30], [4, 40]], True)
    assert one.target_buffer.any()
    np.testing.assert_array_equal(one.target_buffer[..., 0], other.target_buffer[0].T)


def test_boxes_that_exclude_hold(
    volumes: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    client = connect(serve(volumes)[0])
    whole = np.ones_like(open_volume(client)[0], np.uint8)
    client.add_initial_seg_interaction(whole)
    client.add_bbox_interaction([[4, 9], [5, 9], [6, 8]], False)
    client.add_bbox_interaction([[12, 15], [5, 9], [7, 8]], False)
    expected = whole.copy()
    expected[4:9, 5:9, 6:8] = expected[12:15, 5:9, 7] = 0
    np.testing.assert_array_equal(client.target_buffer, expected)
    assert client.undo()
    assert client.undo()
    np.testing.assert_array_equal(client.target_buffer, whole)


def test_orientation_and_affine_of_arrays(
    volumes: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    """The same head as RAS, as Slicer's arrays have it (slices, rows, columns; LPS), and with its affine."""
    address, _ = serve(volumes)
    ras = make_volume(5)
    kji = np.ascontiguousarray(ras[:, ::-1, ::-1].transpose(0, 3, 2, 1))
    masks = []
    for image, place, properties in (
        (ras, [7, 8, 9], {"spacing": SPACING}),
        (kji, [9, ras.shape[2] - 9, ras.shape[1] - 8], {"spacing": SPACING[::-1], "orientation": "SPL"}),
    ):
        client = connect(address)
        client.set_image(image, {**properties, "class": "anterior"})
        client.set_target_buffer(np.zeros(image.shape[1:], np.uint8))
        client.add_point_interaction(place, True)
        masks.append(client.target_buffer)
        client.close()
    assert masks[0].any()
    np.testing.assert_array_equal(masks[0], masks[1].transpose(2, 1, 0)[::-1, ::-1])


@pytest.mark.parametrize("spacing", [SPACING, (1.0, 1.0, 1.0)], ids=["resampled", "as it is"])
def test_whole_numbers_are_read_as_floats_are(
    volumes: NetworkSegmenter, serve: Callable[..., Any], spacing: tuple[float, ...]
) -> None:
    _, server = serve(volumes)
    whole = make_volume(7)
    images = []
    for array in (whole, whole.astype(np.float32), whole.astype(np.float64)):
        study = Study(volumes, server.queue, server.store, len(images), array, Properties(affine_of("SPL", spacing)))
        images.append(study.image)
        study.close()
    assert images[0].dtype == torch.float32
    for other in images[1:]:
        assert torch.equal(images[0].as_tensor(), other.as_tensor())
        assert torch.equal(images[0].affine, other.affine)


def test_lease_that_is_over_and_server_that_is_full(
    photographs: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    address, server = serve(photographs, max_sessions=2)
    client = connect(address)
    assert client.ping()
    assert client.supports_undo
    assert client.supported_interactions["bbox2d"]
    assert client.lease_status()["idle_timeout_seconds"] == 600
    connect(address)
    with pytest.raises(remote.ServerAtCapacityError, match="in use"):
        connect(address)
    server.leases.release(client._lease_token)
    with pytest.raises(remote.SessionExpiredError):
        client.add_point_interaction([1, 1, 0], True)
    with pytest.raises(remote.SessionExpiredError):
        client.heartbeat()
    connect(address)


def test_key_is_required(photographs: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any]) -> None:
    address, _ = serve(photographs, api_key="secret")
    for key in (None, "other", "secret2"):
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            connect(address, api_key=key)
    assert connect(address, api_key="secret").ping()
    assert httpx.get(f"{address}/healthz").status_code == 401


def test_other_names_of_the_host_are_refused(photographs: NetworkSegmenter, serve: Callable[..., Any]) -> None:
    address, _ = serve(photographs, hosts=("127.0.0.1",))
    assert httpx.get(f"{address}/healthz").status_code == 200
    assert httpx.get(f"{address}/healthz", headers={"Host": "evil.example"}).status_code == 400


def test_what_is_segmented_first_is_small_on_a_fine_grid(
    volumes: NetworkSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Study] = []

    class Seen(Study):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            opened.append(self)

    monkeypatch.setattr(application, "Study", Seen)
    server = application.Server(volumes, ServerSettings(memory=2**28))
    server.warm_up()
    sizes = [max(study.image.shape[1:3]) for study in opened]
    assert sizes[0] > application.WARM_UP >= sizes[-1] > 0
    assert all(study.closed for study in opened)
    assert server.store.bytes == 0
