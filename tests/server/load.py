"""Many clients at once on a session server that is killed and restarted meanwhile: what is lost, how large it gets.

    python tests/server/load.py BUNDLE [--overlay FILE] [--image NIFTI] [--clients 50] [--seconds 600] [--kills 2]

Each client is the published one, on an image of its own, and clicks, draws, and takes back at random, with pauses. It
counts what was answered; at the end it takes back as much as it can, which must be as much as it said. What was under
way when the server was killed counts either way.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import psutil
from nnInteractive.inference.remote import (
    ServerAtCapacityError,
    SessionExpiredError,
    nnInteractiveRemoteInferenceSession,
)

if __package__:
    from .scenes import make_volume, random_action
else:
    from scenes import make_volume, random_action

GONE = (httpx.TransportError, SessionExpiredError, ServerAtCapacityError)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition("/")[2].partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
    except OSError:
        return False
    return True


class ServerProcess:
    """A server in a process of its own, which can be killed and started again.

    Args:
        arguments: of ``python -m medsa_nets serve``.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [sys.executable, "-m", "medsa_nets", "serve", *arguments, "--port", str(self.port)]
        self.command += ["--log_level", "error"]
        self.address = f"http://127.0.0.1:{self.port}"
        self.largest = 0  # bytes that it held
        self.process = self._start()

    def _start(self) -> psutil.Popen:
        process = psutil.Popen(self.command)
        while not _listens(self.address):
            if process.poll() is not None:
                raise RuntimeError("the server did not start")
            time.sleep(0.1)
        return process

    def kill(self) -> None:
        """Kill it, and start another one."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def look(self) -> None:
        """Note how much memory it holds."""
        self.largest = max(self.largest, self.process.memory_info().rss)

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


@dataclass
class User:
    """One who works on an image until told to stop.

    Attributes:
        address: of the server.
        number: of the user.
        image: (1, X, Y, Z).
        affine: of it.
        pause: most seconds between two actions.
        waits: seconds for each answer.
        fewest, most: what was said and not taken back, where it is known exactly whether it arrived.
        returns: how often the server was gone.
        taken_back: how much of it there was at the end.
        failure: what should not have happened.
    """

    address: str
    number: int
    image: np.ndarray
    affine: np.ndarray
    pause: float
    waits: list[float] = field(default_factory=list)
    fewest: int = 0
    most: int = 0
    returns: int = 0
    taken_back: int = -1
    failure: str = ""

    def open(self) -> Any:
        """A client with the image; waits while there is no server."""
        end = time.monotonic() + 600.0
        while True:
            try:
                client = nnInteractiveRemoteInferenceSession(self.address, read_timeout=120.0)
                properties = {"affine": self.affine, "session": f"user {self.number}", "class": "foreground"}
                client.set_image(self.image, properties)
                client.set_target_buffer(np.zeros(self.image.shape[1:], np.uint8))
                return client
            except GONE:
                if time.monotonic() > end:
                    raise
                while not _listens(self.address) and time.monotonic() < end:  # a client costs more than a look
                    time.sleep(0.2)

    def work(self, stop: threading.Event) -> None:
        """Do something until told to stop, then take back all there is."""
        try:
            random = np.random.default_rng(self.number)
            client = self.open()
            while not stop.wait(random.uniform(0.0, self.pause)):
                action = random_action(random, self.image.shape[1:])
                if action["kind"] in ("reset", "buffer"):
                    continue
                start = time.perf_counter()
                try:
                    change = self._do(client, action)
                except GONE:  # it may have arrived
                    if action["kind"] == "undo":
                        self.fewest = max(0, self.fewest - 1)
                    else:
                        self.most += 1
                    self.returns += 1
                    client.close()
                    client = self.open()
                    continue
                self.waits.append(time.perf_counter() - start)
                self.fewest, self.most = max(0, self.fewest + change), max(0, self.most + change)
            count = 0
            while client.undo():
                count += 1
            self.taken_back = count
            client.close()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    @staticmethod
    def _do(client: Any, action: dict[str, Any]) -> int:
        """Do it; by how many the interactions became more."""
        kind, include = action["kind"], bool(action["label"])
        try:
            if kind == "undo":
                return -1 if client.undo() else 0
            if kind == "point":
                client.add_point_interaction(action["position"], include)
            elif kind == "box":
                client.add_bbox_interaction(action["box"].tolist(), include)
            elif kind == "mask":
                client.add_initial_seg_interaction(action["drawn"])
            else:
                getattr(client, f"add_{kind}_interaction")(action["drawn"], include)
        except httpx.HTTPStatusError as error:
            if error.response.status_code >= 500:
                raise
            return 0
        return 1

    @property
    def lost(self) -> bool:
        """Whether something that was answered is not there any more, or something else is."""
        return not self.fewest <= self.taken_back <= self.most


def run(
    arguments: Sequence[str], images: Sequence[tuple[np.ndarray, np.ndarray]], seconds: float, kills: int, pause: float
) -> tuple[list[User], ServerProcess]:
    """Let users work for some time; the server is killed at equal intervals."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--sessions", folder, "--max_sessions", str(2 * len(images)), "--liveness_timeout_seconds", "600"]
        server = ServerProcess([*arguments, *options])
        try:
            users = [User(server.address, k, image, affine, pause) for k, (image, affine) in enumerate(images)]
            stop = threading.Event()
            threads = [threading.Thread(target=user.work, args=(stop,), daemon=True) for user in users]
            for thread in threads:
                thread.start()
            begin = time.monotonic()
            kill_at = [begin + seconds * (k + 1) / (kills + 1) for k in range(kills)]
            while time.monotonic() < begin + seconds:
                time.sleep(0.25)
                server.look()
                if kill_at and time.monotonic() > kill_at[0]:
                    kill_at.pop(0)
                    server.kill()
            stop.set()
            for thread in threads:
                thread.join(900.0)
            server.look()
        finally:
            server.stop()
    return users, server


def main() -> int:
    """Command line; 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--overlay", default="")
    parser.add_argument("--image", type=Path, help="volume that all work on, each with other values")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--pause", type=float, default=4.0, help="most seconds between two actions of a client")
    options = parser.parse_args()
    images = []
    for number in range(options.clients):
        if options.image:
            scan = nibabel.load(options.image)
            images.append((np.asarray(scan.dataobj)[None] + number, scan.affine))
        else:
            images.append((make_volume(number, (96, 96, 48)), np.eye(4)))
    arguments = [options.bundle, *(["--overlay", options.overlay] if options.overlay else [])]
    users, server = run(arguments, images, options.seconds, options.kills, options.pause)
    waits = np.array([wait for user in users for wait in user.waits])
    print(f"{len(users)} clients, {options.seconds:.0f} s, {options.kills} kills: {len(waits)} answers")
    print(f"waits: median {np.median(waits):.3f} s, 95 % {np.quantile(waits, 0.95):.3f} s, longest {waits.max():.3f} s")
    print(
        f"clients that came back: {sum(user.returns for user in users)} times; server held {server.largest >> 20} MiB"
    )
    wrong = [user for user in users if user.lost or user.failure]
    for user in wrong:
        print(f"client {user.number}: said {user.fewest} to {user.most}, took back {user.taken_back}; {user.failure}")
    print("nothing was lost" if not wrong else f"{len(wrong)} clients lost something")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
