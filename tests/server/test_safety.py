"""Damaged, foreign and oversized requests: each has an answer, none shows the server's inside or another's data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.server.arrays import pack_array
from medsa_nets.server.work import MAX_MARKED

from .scenes import make_volume

GETS = ("/healthz", "/capabilities", "/lease_status")
JSON = ("/claim", "/release", "/heartbeat", "/set_target_buffer", "/reset_interactions", "/undo", "/predict",
        "/set_do_autozoom", "/add_bbox_interaction", "/add_point_interaction")  # fmt: skip
ARRAYS = ("/set_image", "/add_scribble_interaction", "/add_lasso_interaction", "/add_initial_seg_interaction")
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1e308, float("nan"), "", "x" * 1000, [], [[]], {}, [1, 2, 3], [[1, 2], [3, 4], [5, 6]],
    [10**30] * 3, [[0, 10**9]] * 3, ["a", "b", "c"], [[3, 1], [0, 2], [0, 2]], "../../etc/passwd", {"a": {"b": []}},
)  # fmt: skip
NAMES = ("coordinates", "bbox_coords", "include_interaction", "run_prediction", "shape", "dtype", "interaction_bbox",
         "image_properties", "do_autozoom", "class", "spacing", "affine", "orientation")  # fmt: skip


def bend(random: np.random.Generator, body: bytes) -> bytes:
    """Cut bytes, change some, or leave them."""
    out = bytearray(body)
    if random.random() < 0.3:
        out = out[: random.integers(len(out) + 1)]
    for _ in range(int(random.integers(0, 4))):
        if out:
            out[random.integers(len(out))] = random.integers(256)
    return bytes(out)


def send(random: np.random.Generator, http: httpx.Client, tokens: list[str], volume: bytes) -> httpx.Response:
    """A request that may be anything."""
    entries = {str(random.choice(NAMES)): VALUES[random.integers(len(VALUES))] for _ in range(random.integers(5))}
    headers = {}
    if random.random() < 0.9:
        own = [*tokens, tokens[0][:-1], tokens[0][::-1], "x" * 5000, "é"]
        headers["X-Lease-Token"] = own[random.integers(len(own))].encode("utf-8")
    kind = random.random()
    if kind < 0.1:
        return http.get(str(random.choice(GETS)), headers=headers)
    text = json.dumps(entries).encode()
    if kind < 0.6:
        path = str(random.choice(JSON[3:] if random.random() < 0.98 else JSON))
        return http.post(path, content=bend(random, text) if random.random() < 0.3 else text, headers=headers)
    meta = text if random.random() < 0.7 else b"{}"
    headers["X-Meta"] = (
        (bend(random, meta) if random.random() < 0.2 else meta).replace(b"\n", b" ").replace(b"\r", b" ")
    )
    headers["X-Meta"] = headers["X-Meta"].replace(b"\0", b" ")
    body = volume if random.random() < 0.5 else bend(random, volume)
    return http.post(str(random.choice(ARRAYS)), content=body, headers=headers)


def fuzz(segmenter: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any], count: int) -> None:
    """Send ``count`` requests; a bystander's session must stay as it is."""
    address, server = serve(segmenter, max_voxels=20_000, max_body=2**20)
    bystander = connect(address)
    volume = make_volume(1)
    bystander.set_image(volume, {"class": "anterior"})
    bystander.set_target_buffer(np.zeros(volume.shape[1:], np.uint8))
    bystander.add_point_interaction([8, 8, 8], True)
    shown = bystander.target_buffer.copy()
    random = np.random.default_rng(0)
    drawn = np.zeros(volume.shape[1:], np.uint8)
    drawn[3:6, 3:6, 4] = 1
    packed = [pack_array(volume), pack_array(drawn), pack_array(drawn[3:6]), pack_array(volume.astype(np.float64))]
    seen: Counter[int] = Counter()
    with httpx.Client(base_url=address, timeout=60.0) as http:
        tokens: list[str] = []
        for number in range(count):
            if number % 50 == 0:  # some were released, or hold a damaged image
                for token in tokens:
                    http.post("/release", headers={"X-Lease-Token": token})
                tokens = [http.post("/claim").json()["lease_token"] for _ in range(2)]
                http.post("/set_image", content=packed[0], headers={"X-Lease-Token": tokens[0], "X-Meta": "{}"})
            try:
                answer = send(random, http, tokens, packed[random.integers(len(packed))])
            except httpx.LocalProtocolError:  # the client itself refuses such a header
                continue
            seen[answer.status_code] += 1
            for word in ("Traceback", "medsa_nets", ".py", "anterior"):
                if answer.status_code >= 400:
                    assert word not in answer.text or word == "anterior"
            assert answer.status_code != 500, answer.text
    assert {200, 400, 410, 413} <= set(seen), seen
    np.testing.assert_array_equal(bystander.target_buffer, shown)
    bystander.add_point_interaction([9, 9, 9], False)
    assert bystander.undo()
    np.testing.assert_array_equal(bystander.target_buffer, shown)
    assert server._reserved == 0


def test_some_hundred_damaged_requests(
    volumes: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    fuzz(volumes, serve, connect, 600)


@pytest.mark.slow
def test_ten_thousand_damaged_requests(
    volumes: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    fuzz(volumes, serve, connect, 10_000)


def test_sizes_are_refused_before_they_are_read(
    photographs: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    address, _ = serve(photographs, max_voxels=10_000, max_body=2**20)
    client = connect(address)
    headers = {"X-Lease-Token": client._lease_token, "X-Meta": "{}"}
    big = httpx.post(f"{address}/set_image", content=bytes(2**20 + 1), headers=headers)
    assert big.status_code == 413
    bomb = httpx.post(
        f"{address}/set_image", content=pack_array(np.zeros((1, 400, 400, 400), np.uint8)), headers=headers
    )
    assert bomb.status_code == 413
    long = httpx.post(f"{address}/undo", content=bytes(2**17), headers=headers)
    assert long.status_code == 413

    def chunks() -> Any:
        yield b"{}"

    assert httpx.post(f"{address}/undo", content=chunks(), headers=headers).status_code == 411


def test_values_that_are_not_finite_are_refused(
    volumes: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    client = connect(serve(volumes)[0])
    volume = make_volume().astype(np.float32)
    volume[0, 1, 2, 3] = np.nan
    client.set_image(volume)
    with pytest.raises(httpx.HTTPStatusError) as error:
        client.add_point_interaction([1, 1, 1], True)
    assert "not finite" in error.value.response.json()["detail"]


def test_failure_inside_tells_the_client_nothing(
    volumes: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(serve(volumes)[0])
    volume = make_volume()
    client.set_image(volume, {"class": "anterior"})
    client.set_target_buffer(np.zeros(volume.shape[1:], np.uint8))
    client.add_point_interaction([3, 3, 3], True)
    shown = client.target_buffer.copy()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("/secret/path of a patient")

    with monkeypatch.context() as patch:
        patch.setattr("medsa_nets.interaction.session.make_answer", fail)
        with pytest.raises(httpx.HTTPStatusError) as error:
            client.add_point_interaction([9, 9, 9], True)
    assert error.value.response.status_code == 500
    assert "secret" not in error.value.response.text
    client.add_point_interaction([9, 9, 9], True)  # goes on from where it was
    assert client.undo()
    np.testing.assert_array_equal(client.target_buffer, shown)


def test_what_is_said_of_an_object_is_bounded(
    volumes: NetworkSegmenter, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    volume = np.tile(make_volume(), (1, 3, 3, 3))
    size = volume[0].size
    address, _ = serve(volumes, memory=3 * 2 * size, max_sessions=2)  # three masks, as large as the volume
    client = connect(address)
    client.set_image(volume, {"class": "anterior"})
    client.set_target_buffer(np.zeros(volume.shape[1:], np.uint8))
    mask = np.zeros(volume.shape[1:], np.uint8)
    for number in range(3):
        mask[number] = 1
        client.add_initial_seg_interaction(mask, run_prediction=False)
    with pytest.raises(httpx.HTTPStatusError, match="413") as error:
        client.add_initial_seg_interaction(mask, run_prediction=False)
    assert "Begin another object" in error.value.response.json()["detail"]
    with pytest.raises(httpx.HTTPStatusError, match="413") as error:
        client.add_scribble_interaction(np.ones(volume.shape[1:], np.uint8), True, run_prediction=False)
    assert str(MAX_MARKED) in error.value.response.json()["detail"]
    client.reset_interactions()
    client.add_initial_seg_interaction(mask, run_prediction=False)
