"""Arrays on the wire against the client's own code, and what is damaged or too large against nothing at all."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest

blosc2 = pytest.importorskip("blosc2")
wire = pytest.importorskip("nnInteractive.inference.remote.serialization")

from medsa_nets.server.arrays import TYPES, pack_array, unpack_array  # noqa: E402
from medsa_nets.server.errors import RequestError  # noqa: E402

ROOM = 10**7


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 20, 30, 7), (1, 1, 1, 1)])
def test_client_and_server_read_each_other(name: str, shape: tuple[int, ...]) -> None:
    array = (np.random.default_rng(0).random(shape) * 100).astype(name)
    for own in (array, np.zeros_like(array), np.ones_like(array)):
        for codec in (blosc2.Codec.ZSTD, blosc2.Codec.LZ4):
            read = unpack_array(wire.pack_array(own, codec=codec), ROOM)
            assert read.dtype == own.dtype
            np.testing.assert_array_equal(read, own)
        np.testing.assert_array_equal(wire.unpack_array(pack_array(own)), own)


def header(name: bytes, *shape: int) -> bytes:
    return struct.pack("<4sBBBB", b"NNIA", 1, 1, len(shape), len(name)) + name + struct.pack(f"<{len(shape)}q", *shape)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"NNIA", 400),
        (b"PK\x03\x04" + bytes(40), 400),
        (header(b"object", 4, 4) + struct.pack("<I", 0), 400),
        (header(b"str32", 4, 4) + struct.pack("<I", 0), 400),
        (header(b"float32", -4, 4) + struct.pack("<I", 0), 400),
        (header(b"float32", 0, 4) + struct.pack("<I", 0), 400),
        (header(b"float32", 10**12) + struct.pack("<I", 0), 400),
        (header(b"float32", 10**4, 10**4, 10**4) + struct.pack("<I", 0), 413),
        (header(b"uint8", 2**20, 2**20, 2**20, 2**20) + struct.pack("<I", 2**32 - 1), 413),
        (header(b"uint8", 100, 100) + struct.pack("<I", 2**32 - 1), 400),
        (header(b"uint8", 100, 100) + struct.pack("<IQQ", 1, 10000, 2**63), 400),
        (header(b"uint8", 100, 100) + struct.pack("<IQQ", 1, 2**63, 32) + bytes(32), 400),
    ],
)
def test_what_is_no_array_is_refused_before_memory_is_taken(body: bytes, status: int) -> None:
    tracemalloc.start()
    with pytest.raises(RequestError) as error:
        unpack_array(body, ROOM)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.value.status == status
    assert peak < 100_000


def test_bomb_is_refused() -> None:
    bomb = wire.pack_array(np.zeros((1, 512, 512, 512), np.uint8))
    assert len(bomb) < 200
    with pytest.raises(RequestError, match="at most"):
        unpack_array(bomb, ROOM)
    lying = header(b"uint8", 10) + bomb[len(header(b"uint8", 1, 512, 512, 512)) :]  # a small array, a large chunk
    with pytest.raises(RequestError):
        unpack_array(lying, ROOM)
    place = len(header(b"uint8", 10)) + 4
    worse = lying[:place] + struct.pack("<Q", 10) + lying[place + 8 :]  # a chunk that says so too
    with pytest.raises(RequestError, match="damaged"):
        unpack_array(worse, ROOM)


def test_chunks_that_name_other_compressors_are_refused() -> None:
    array = (np.random.default_rng(0).random((8, 64)) * 9).astype(np.float32)
    body = wire.pack_array(array, filters=[blosc2.Filter.NOFILTER])
    start = len(header(b"float32", 8, 64)) + 4 + 16
    for place, value in (
        (2, 0xE0),
        (16, 35),
        (31, 0x08),
        (31, 0x01),
    ):  # codec and filter of a plug-in; on disk; dictionary
        damaged = bytearray(body)
        damaged[start + place] = value
        with pytest.raises(RequestError, match="damaged"):
            unpack_array(bytes(damaged), ROOM)


def test_damaged_bytes_give_an_error_or_an_array_of_that_shape() -> None:
    random = np.random.default_rng(0)
    array = (random.random((1, 20, 20, 20)) * 100).astype(np.int16)
    body = wire.pack_array(array)
    seen = set()
    for turn in range(2000):
        damaged = bytearray(body)
        for _ in range(int(random.integers(1, 5))):
            damaged[random.integers(len(body) if turn % 2 else 100)] = random.integers(256)
        try:
            found = unpack_array(bytes(damaged[: random.integers(len(body))] if turn % 5 == 0 else damaged), ROOM)
        except RequestError as error:
            seen.add(str(error))
        else:
            assert found.nbytes <= ROOM
            seen.add("read")
    assert len(seen) > 5
