"""Pieces of work in the device's queue: their order, and urgent ones between the blocks of an encoder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from medsa_nets.inferers.queues import AHEAD, DECODE, ENCODE, NEAREST, DeviceQueue


class Encoder(nn.Module):
    """Three blocks that wait for a sign each, and note what they do."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(3))
        self.log, self.begun, self.go_on = log, threading.Event(), threading.Semaphore(0)

    def forward(self, name: str) -> None:
        for number, block in enumerate(self.blocks):
            block(torch.zeros(1))
            self.log.append(f"{name} {number}")
            self.begun.set()
            assert self.go_on.acquire(timeout=10)


@pytest.fixture
def queue() -> Iterator[DeviceQueue]:
    out = DeviceQueue()
    yield out
    out.stop()


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def encoder(queue: DeviceQueue, log: list[str]) -> Encoder:
    out = Encoder(log)
    queue.watch(out)
    return out


def note(log: list[str], text: str) -> Callable[[], None]:
    return lambda: log.append(text)


def test_urgent_pieces_are_done_between_the_blocks_of_an_encoder_and_others_after_it(queue, encoder, log):
    ahead = queue.submit(lambda: encoder("ahead"), AHEAD)
    assert encoder.begun.wait(10)
    waiting = [queue.submit(note(log, text), priority) for text, priority in
               (("ahead too", AHEAD), ("encode", ENCODE), ("decode", DECODE))]  # fmt: skip
    for _ in range(3):
        encoder.go_on.release()
    for future in (ahead, *waiting):
        future.result(10)
    assert log == ["ahead 0", "decode", "encode", "ahead 1", "ahead 2", "ahead too"]


def test_what_runs_can_be_hastened(queue, encoder, log):
    ahead = queue.submit(lambda: encoder("ahead"), AHEAD)
    assert encoder.begun.wait(10)
    encode = queue.submit(note(log, "encode"), ENCODE)
    queue.hasten(ahead, ENCODE)
    for _ in range(3):
        encoder.go_on.release()
    encode.result(10)
    assert log == ["ahead 0", "ahead 1", "ahead 2", "encode"]


def test_what_waits_can_be_hastened(queue, encoder, log):
    first = queue.submit(lambda: encoder("first"), DECODE)
    assert encoder.begun.wait(10)
    encode, ahead = queue.submit(note(log, "encode"), ENCODE), queue.submit(note(log, "ahead"), AHEAD)
    queue.hasten(ahead, DECODE)
    for _ in range(3):
        encoder.go_on.release()
    for future in (first, encode, ahead):
        future.result(10)
    assert log == ["first 0", "first 1", "first 2", "ahead", "encode"]


def test_a_piece_that_fails_between_blocks_fails_alone(queue, encoder, log):
    ahead = queue.submit(lambda: encoder("ahead"), AHEAD)
    assert encoder.begun.wait(10)
    failing = queue.submit(lambda: 1 / 0)
    for _ in range(3):
        encoder.go_on.release()
    ahead.result(10)
    with pytest.raises(ZeroDivisionError):
        failing.result(10)


def test_an_encoder_that_others_call_runs_on_its_own(queue, encoder, log):
    for _ in range(3):
        encoder.go_on.release()
    encoder("here")
    assert log == ["here 0", "here 1", "here 2"]


def test_a_stopped_queue_lets_go_of_encoders_and_cancels_what_waits(log):
    queue = DeviceQueue()
    encoder = Encoder(log)
    queue.watch(encoder)
    running = queue.submit(lambda: encoder("last"))
    assert encoder.begun.wait(10)
    waiting = queue.submit(note(log, "never"), AHEAD)
    stopping = threading.Thread(target=queue.stop)
    stopping.start()
    for _ in range(3):
        encoder.go_on.release()
    stopping.join(10)
    assert running.done()
    assert waiting.cancelled()
    assert log == ["last 0", "last 1", "last 2"]
    assert not any(block._forward_pre_hooks for block in encoder.blocks)


def test_two_slabs_are_half_encoded_at_most(queue, encoder, log):
    pieces = [queue.submit(lambda: encoder("ahead"), AHEAD)]
    assert encoder.begun.wait(10)
    pieces.append(queue.submit(lambda: encoder("whole"), ENCODE))
    encoder.begun.clear()
    encoder.go_on.release()
    assert encoder.begun.wait(10)
    pieces.append(queue.submit(lambda: encoder("nearest"), NEAREST))
    pieces.append(queue.submit(note(log, "decode"), DECODE))
    for _ in range(8):
        encoder.go_on.release()
    for piece in pieces:
        piece.result(10)
    nearest = [f"nearest {number}" for number in range(3)]
    assert log == ["ahead 0", "whole 0", "decode", "whole 1", "whole 2", *nearest, "ahead 1", "ahead 2"]
