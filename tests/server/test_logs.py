"""Sessions that go on after their server was killed, by their logs."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medsa_nets.data.atomic import temporary_name
from medsa_nets.interaction import session
from medsa_nets.server import logs
from medsa_nets.server.logs import SessionLogs, hash_image

from .scenes import SPACING, make_photograph, make_volume, random_action


def open_image(client: Any, image: np.ndarray, **properties: Any) -> None:
    client.set_image(image, {"spacing": np.array(SPACING), **properties})
    client.set_target_buffer(np.zeros(image.shape[1:], np.uint8))


def do(client: Any, action: dict[str, Any]) -> None:
    kind, include = action["kind"], bool(action["label"])
    if kind == "undo":
        client.undo()
    elif kind == "reset":
        client.reset_interactions()
        client.set_target_buffer(np.zeros(client.target_buffer.shape, np.uint8))
    elif kind == "point":
        client.add_point_interaction(action["position"], include)
    elif kind == "box":
        client.add_bbox_interaction(action["box"].tolist(), include)
    elif kind == "mask":
        client.add_initial_seg_interaction(action["drawn"])
    else:
        getattr(client, f"add_{kind}_interaction")(action["drawn"], include)


def attempt(client: Any, action: dict[str, Any]) -> None:
    with suppress(httpx.HTTPStatusError):  # as of a finished object; what follows shows whether both refused it
        do(client, action)


@pytest.mark.parametrize("kind", ["volumes", "photographs"])
def test_a_client_of_a_killed_server_goes_on_where_it_was(request, kind, serve, connect, tmp_path):
    segmenter = request.getfixturevalue(kind)
    image = make_volume() if kind == "volumes" else make_photograph()
    random = np.random.default_rng(7)
    actions = [random_action(random, image.shape[1:]) for _ in range(44)]
    actions = [action for action in actions if action["kind"] != "buffer"]  # one object
    whole = connect(serve(segmenter)[0])
    open_image(whole, image)
    address, _ = serve(segmenter, sessions=str(tmp_path))
    client = connect(address)
    open_image(client, image)
    went_on = 0
    for number, action in enumerate(actions):
        if number in (9, 23, 24):  # another server on the same folder: the first one is as good as killed
            address, _ = serve(segmenter, sessions=str(tmp_path))
            client = connect(address)
            open_image(client, image)
            client.set_target_buffer(np.zeros(image.shape[1:], np.uint8))  # viewers make several before they begin
            client._predict()
            assert np.array_equal(client.target_buffer, whole.target_buffer)
            went_on += int(whole.target_buffer.any())
        attempt(whole, action)
        attempt(client, action)
        assert np.array_equal(client.target_buffer, whole.target_buffer), (number, action["kind"])
    assert went_on


@pytest.mark.parametrize("damage", [None, "cut", "changed"])
def test_what_was_answered_before_is_not_answered_again(volumes, serve, connect, tmp_path, monkeypatch, damage, caplog):
    monkeypatch.setattr(logs, "ANSWER_PAUSE", 0.0)
    monkeypatch.setattr(logs, "ANSWER_RATE", math.inf)
    answered: list[int] = []
    make_answer = session.make_answer

    def count(*arguments):
        answered.append(1)
        return make_answer(*arguments)

    first = connect(serve(volumes, sessions=str(tmp_path))[0])
    open_image(first, make_volume())
    for place, label in (([9, 11, 8], True), ([3, 5, 6], True), ([10, 11, 8], False)):
        first.add_point_interaction(place, label)
    (path,) = tmp_path.glob("*.answer")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "changed":
        tensors = load_file(path)
        with safe_open(str(path), framework="pt") as opened:
            facts = opened.metadata()
        tensors["logits"].view(-1)[0] += 1.0
        save_file(tensors, path, facts)
    monkeypatch.setattr(session, "make_answer", count)
    second = connect(serve(volumes, sessions=str(tmp_path))[0])
    open_image(second, make_volume())
    second._predict()
    assert np.array_equal(second.target_buffer, first.target_buffer)
    assert len(answered) == (3 if damage else 0)
    assert bool(damage) == (path.name in caplog.text)
    for _ in range(4):
        second.add_point_interaction([12, 12, 12], True)
        first.add_point_interaction([12, 12, 12], True)
        assert np.array_equal(second.target_buffer, first.target_buffer)
        for _ in range(2):
            assert first.undo() == second.undo()
            assert np.array_equal(second.target_buffer, first.target_buffer)


def test_an_answer_to_something_else_is_left_alone(volumes, serve, connect, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "ANSWER_PAUSE", 0.0)
    kept = connect(serve(volumes, sessions=str(tmp_path))[0])
    open_image(kept, make_volume())
    kept.add_point_interaction([9, 11, 8], True)
    kept.add_point_interaction([3, 5, 6], True)
    (path,) = tmp_path.glob("*.answer")
    content = path.read_bytes()
    kept.undo()
    kept.undo()
    kept.add_point_interaction([12, 12, 12], False)  # of no class yet: it shows none
    path.write_bytes(content)
    other = connect(serve(volumes, sessions=str(tmp_path))[0])
    open_image(other, make_volume())
    other._predict()
    assert np.array_equal(other.target_buffer, kept.target_buffer)
    kept.add_point_interaction([9, 11, 8], True)
    other.add_point_interaction([9, 11, 8], True)
    assert np.array_equal(other.target_buffer, kept.target_buffer)


def test_answers_are_bounded(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.answer").write_bytes(bytes(100))
        os.utime(tmp_path / f"{number}.answer", (time.time(), time.time() - 10 + number))
    (tmp_path / "4.answer").write_bytes(bytes(100))
    os.utime(tmp_path / "4.answer", (0, 0))
    monkeypatch.setattr(logs, "MAX_ANSWERS", 250)
    SessionLogs(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.answer", "3.answer"]


def test_a_lease_of_a_killed_server_is_over(volumes, serve, connect, tmp_path):
    client = connect(serve(volumes, sessions=str(tmp_path))[0])
    open_image(client, make_volume())
    address, _ = serve(volumes, sessions=str(tmp_path))
    token = client._http.headers.get("X-Lease-Token")
    assert token
    response = httpx.post(f"{address}/predict", headers={"X-Lease-Token": token})
    assert response.status_code == 410


def test_another_image_class_or_a_held_session_begins_anew(volumes, serve, connect, tmp_path):
    address, _ = serve(volumes, sessions=str(tmp_path))
    first = connect(address)
    open_image(first, make_volume())
    first.add_point_interaction([9, 11, 8], True)
    for image, properties in ((make_volume(), {}), (make_volume(1), {}), (make_volume(), {"class": "anterior"})):
        other = connect(address)
        open_image(other, image, **properties)
        other._predict()
        assert not other.target_buffer.any()
        other.close()
    other = connect(address)
    open_image(other, make_volume())
    other._predict()
    assert not other.target_buffer.any()


def test_a_client_that_ends_by_itself_leaves_nothing_unless_it_named_its_session(volumes, serve, connect, tmp_path):
    address, _ = serve(volumes, sessions=str(tmp_path))
    masks = []
    for name in ("", "mine", "mine"):
        client = connect(address)
        open_image(client, make_volume(), session=name)
        if len(masks) < 2:
            client.add_point_interaction([9, 11, 8], True)
        else:
            client._predict()
        masks.append(client.target_buffer.copy())
        client.close()
        assert {path.suffix for path in tmp_path.iterdir()} == (set() if name == "" else {".session", ".answer"})
    assert masks[1].any()
    assert np.array_equal(masks[1], masks[2])


def test_logs_hold_no_image_and_no_name(volumes, serve, connect, tmp_path):
    client = connect(serve(volumes, sessions=str(tmp_path))[0])
    open_image(client, make_volume(), session="John Doe")
    client.add_point_interaction([9, 11, 8], True)
    (path,) = tmp_path.glob("*.session")
    assert "John" not in path.name + path.read_text(encoding="utf-8")
    assert set(json.loads(path.read_text(encoding="utf-8"))["prompts"][0]) == {
        "kind", "class", "number", "time", "label", "voxels"
    }  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({"schema": 2}),
        lambda text: json.dumps({"schema": 1}),
        lambda text: text.replace('"voxels": [[', '"voxels": [[9999, '),
        lambda text: text.replace('"interactions": [1', '"interactions": [7'),
    ],
)
def test_a_damaged_log_begins_a_session_anew(volumes, serve, connect, tmp_path, damage: Callable[[str], str]):
    client = connect(serve(volumes, sessions=str(tmp_path))[0])
    open_image(client, make_volume())
    client.add_point_interaction([9, 11, 8], True)
    expected = client.target_buffer.copy()
    (path,) = tmp_path.glob("*.session")
    damaged = damage(path.read_text(encoding="utf-8"))
    assert damaged != path.read_text(encoding="utf-8")
    path.write_text(damaged, encoding="utf-8")
    client = connect(serve(volumes, sessions=str(tmp_path))[0])
    open_image(client, make_volume())
    client._predict()
    assert not client.target_buffer.any()
    client.add_point_interaction([9, 11, 8], True)
    assert np.array_equal(client.target_buffer, expected)


def test_several_unnamed_sessions_of_an_image_are_nobody_s(tmp_path):
    logs = SessionLogs(tmp_path)
    first, second = logs.open("image"), logs.open("image")
    assert first.path != second.path
    first.write({"who": "first"})
    second.write({"who": "second"})
    again = SessionLogs(tmp_path)
    assert again.open("image").saved is None
    second.close(done=True)
    again = SessionLogs(tmp_path)
    assert again.open("image").saved["who"] == "first"
    assert again.open("image").saved is None
    assert again.open("other").saved is None


def test_a_named_session_goes_to_who_asked_last_and_old_logs_are_removed(tmp_path):
    logs = SessionLogs(tmp_path)
    log = logs.open("image", "name")
    log.write({"x": 1})
    second = logs.open("image", "name")
    assert second.saved["x"] == 1
    second.write({"x": 2})
    log.write({"x": 3})  # by a client that is as good as gone
    log.close()
    second.close(done=True)
    assert logs.open("image", "name").saved["x"] == 2
    assert SessionLogs(tmp_path, days=-1.0).open("image", "name").saved is None


def test_a_session_is_not_taken_while_its_log_is_written(tmp_path, monkeypatch):
    begun, goes_on = threading.Event(), threading.Event()

    @contextmanager
    def slow(path: Path) -> Iterator[Path]:
        begun.set()
        assert goes_on.wait(60.0)
        with temporary_name(path) as part:
            yield part

    logs = SessionLogs(tmp_path)
    first = logs.open("image", "name")
    first.write({"said": 1})
    monkeypatch.setattr("medsa_nets.server.logs.temporary_name", slow)
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(first.write, {"said": 2})
        assert begun.wait(60.0)
        taking = pool.submit(logs.open, "image", "name")
        time.sleep(0.3)
        assert not taking.done()
        goes_on.set()
        writing.result()
        second = taking.result()
    assert second.saved["said"] == 2  # what was answered is there
    second.write({"said": 3})
    first.write({"said": 4})
    assert json.loads(second.path.read_text(encoding="utf-8"))["said"] == 3


def test_an_image_is_known_by_values_type_place_network_and_class():
    image, affine = np.arange(8, dtype=np.int16).reshape(1, 2, 2, 2), np.eye(4)
    known = hash_image(image, affine, {"base": "a"}, "")
    assert known == hash_image(image.copy(), affine, {"base": "a"}, "")
    others = [(image + 1, affine, {"base": "a"}, ""), (image.astype(np.int32), affine, {"base": "a"}, ""),
              (image, 2 * affine, {"base": "a"}, ""), (image, affine, {"base": "b"}, ""),
              (image, affine, {"base": "a"}, "liver"),
              (image.reshape(1, 4, 2, 1), affine, {"base": "a"}, "")]  # fmt: skip
    assert len({known, *(hash_image(*other) for other in others)}) == 1 + len(others)


def test_a_folder_that_can_t_be_written_to_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="--sessions"):
        SessionLogs(tmp_path / "file")
