"""Many clients at once on a session server that is killed and restarted meanwhile: what is lost, how long they wait.

    python tests/server/load.py BUNDLE IMAGES [--overlay FILE] [--clients 50] [--seconds 600] [--kills 2] [--seats 40]

Each client is the published one. It works on an image of the folder IMAGES (NIfTI volumes, or photographs; two clients
on each), under a session's name of its own: clicks, scribbles, boxes, lassos, masks, undo, reset and answers asked for
later, at random, with pauses. The server has fewer seats than there are clients: who finds none waits and asks again,
and who has one gives it up after a while and comes back to its session. Now and then the server is killed (SIGKILL) and
started again: a client is told that its lease is over, claims another one, and goes on.

Whenever a client has come back, before it leaves, and at the end, its mask is kept. After the run a session in this
process is told the same, and every mask has to be its mask, voxel by voxel. What was under way when a client lost its
server may have arrived or not; from then on one of the two has to hold.

With --output PREFIX, PREFIX.md, PREFIX.json and PREFIX.png are written: waits by percentile, beside processor and
precision, and memory and waits over time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
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
from PIL import Image

from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.precision import choose_amp

if __package__:
    from .scenes import random_action, send, tell
else:
    from scenes import random_action, send, tell

GONE = (httpx.TransportError, SessionExpiredError, ServerAtCapacityError)
LATER = 0.15  # share of prompts that are answered by a request of their own
STARTS_WITHIN = 600.0  # seconds: a busy machine takes long to import
LAST = 600.0  # seconds at the end in which all have to come to their last mask


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
        log: file for what it writes.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [sys.executable, "-m", "medsa_nets", "serve", *arguments, "--port", str(self.port)]
        self.command += ["--log_level", "warning"]
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.begin = time.monotonic()
        self.memory: list[tuple[float, int]] = []  # seconds since the beginning, bytes
        self.kills: list[float] = []
        self.process = self._start()

    def _start(self) -> psutil.Popen:
        with self.log.open("ab") as log:
            process = psutil.Popen(self.command, stdout=log, stderr=log)
        end = time.monotonic() + STARTS_WITHIN
        while not _listens(self.address):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise RuntimeError(f"the server did not start:\n{self.log.read_text(encoding='utf-8')[-4000:]}")
            time.sleep(0.1)
        return process

    def kill(self) -> None:
        """Kill it, and start another one."""
        self.kills.append(time.monotonic() - self.begin)
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def look(self) -> None:
        """Note how much memory it holds."""
        self.memory.append((time.monotonic() - self.begin, self.process.memory_info().rss))

    @property
    def largest(self) -> int:
        """Most bytes that it held."""
        return max(size for _, size in self.memory)

    def complaints(self) -> list[str]:
        """Lines of its log that tell of something unexpected."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if "Traceback" in line or " ERROR " in line or "Error" in line]

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except psutil.TimeoutExpired:
            self.process.kill()


@dataclass
class Event:
    """Something that a client did, or a mask that it had then.

    Attributes:
        action: what was done (:func:`~scenes.random_action`), or none.
        sure: whether it arrived for certain.
        mask: the complete mask at this point, packed, or none.
    """

    action: dict[str, Any] | None = None
    sure: bool = True
    mask: np.ndarray | None = None


@dataclass
class User:
    """One who works on an image until told to stop.

    Attributes:
        address: of the server.
        number: of the user.
        image: (C, X, Y, Z).
        properties: of it, for ``set_image``.
        pause: most seconds between two actions.
        turn: seconds after which a seat is given up for others; none keeps it.
        begin: of the run, on the monotonic clock.
        waits: when, for what, and how long an answer was waited for, in seconds.
        events: what was done, and the masks that were seen, in their order.
        counts: of what happened beside answers.
        failure: what should not have happened.
    """

    address: str
    number: int
    image: np.ndarray
    properties: dict[str, Any]
    pause: float
    turn: float | None
    begin: float
    waits: list[tuple[float, str, float]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    failure: str = ""
    _owes: bool = False  # whether it is to be seen what became of the last thing that was done
    _complete: bool = True

    def work(self, stop: threading.Event) -> None:
        """Do something until told to stop, and look at the mask at the end."""
        try:
            self._random = np.random.default_rng(self.number)
            while not stop.is_set() or self._owes:
                client = self._sit_down(stop)
                if client is None:
                    return
                try:
                    self._take_a_turn(client, stop)
                except GONE as error:
                    self._lose(client, error)
                finally:
                    client.close()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    def _sit_down(self, stop: threading.Event) -> Any:
        """A client with the image; none where there is no seat until the end, and nothing to be seen any more."""
        start = time.monotonic()
        while not stop.is_set() or self._owes:
            if time.monotonic() - start > STARTS_WITHIN + LAST:
                raise RuntimeError("no seat became free")
            if not _listens(self.address):  # a client costs more than a look
                time.sleep(1.0)
                continue
            client = None
            try:
                client = nnInteractiveRemoteInferenceSession(self.address)
                client._http.event_hooks["response"] = [self._note]
                self._timed("seat", start)
                begin = time.monotonic()
                client.set_image(self.image, self.properties)
                client.set_target_buffer(np.zeros(self.image.shape[1:], np.uint8))
                self._timed("image", begin)
                self._see(client, "mask back" if self.events else "")
                return client
            except GONE as error:
                self.counts["no seat" if client is None and isinstance(error, ServerAtCapacityError) else "tries"] += 1
                if client is not None:
                    client.close()
                time.sleep(self._random.uniform(0.5, 1.5))
        return None

    def _take_a_turn(self, client: Any, stop: threading.Event) -> None:
        end = None if self.turn is None else time.monotonic() + self.turn
        while (end is None or time.monotonic() < end) and not stop.wait(self._random.uniform(0.0, self.pause)):
            action = random_action(self._random, self.image.shape[1:])
            if action["kind"] != "buffer":
                self._do(client, action)
        self._see(client, "whole mask")

    def _do(self, client: Any, action: dict[str, Any]) -> None:
        event = Event(action, sure=False)
        self.events.append(event)
        self._owes = True
        kind, start = action["kind"], time.monotonic()
        runs = self._random.random() > LATER
        send(client, action, runs)
        event.sure, self._owes = True, False
        if runs or kind in ("undo", "reset", "mask"):
            self._timed(kind, start)
        else:
            start = time.monotonic()
            client._predict()
            self._timed("predict", start)
        self.counts["answers"] += 1

    def _see(self, client: Any, name: str) -> None:
        """Keep the whole mask."""
        start, self._complete = time.monotonic(), False
        while not self._complete:
            client._predict()
        if name:
            self._timed(name, start)
        self.events.append(Event(mask=np.packbits(client.target_buffer > 0)))
        self.counts["masks"] += 1
        self._owes = False

    def _note(self, response: httpx.Response) -> None:
        meta = json.loads(response.headers.get("x-meta") or "{}")
        self._complete = bool(meta.get("complete", True))

    def _lose(self, client: Any, error: Exception) -> None:
        """The server is gone, or says that the lease is: after a restart, it has to."""
        self.counts[type(error).__name__] += 1
        self._owes = True
        if isinstance(error, SessionExpiredError):
            self.counts["lease over"] += 1
        elif not isinstance(error, (ServerAtCapacityError, httpx.TimeoutException)):
            end = time.monotonic() + STARTS_WITHIN
            while time.monotonic() < end:
                if not _listens(self.address):
                    time.sleep(1.0)
                    continue
                try:
                    client.heartbeat()
                except SessionExpiredError:
                    self.counts["lease over"] += 1
                    return
                except httpx.TransportError:
                    time.sleep(0.3)
                else:
                    raise RuntimeError("a lease of the killed server is still valid")
            raise RuntimeError("the server did not come back")

    def _timed(self, kind: str, start: float) -> None:
        self.waits.append((start - self.begin, kind, time.monotonic() - start))


def replay(segmenter: NetworkSegmenter, path: Path, class_name: str, user: User) -> str:
    """Tell a session in this process what a client said; what is not as the client saw it, or nothing."""
    session = InteractiveSession(segmenter, start="nothing")
    session.open(str(path))
    possible: list[tuple[InteractiveSession, list[int]]] = [(session, [])]
    shape = user.image.shape[1:]
    for number, event in enumerate(user.events):
        if event.action is not None:
            before = [] if event.sure else [(one.fork(), list(counts)) for one, counts in possible]
            for one, counts in possible:
                tell(one, counts, event.action, class_name)
            possible += before
            continue
        assert event.mask is not None
        seen = np.unpackbits(event.mask, count=int(np.prod(shape))).reshape(shape).astype(bool)
        masks = [one.mask(class_name).reshape(shape) for one, _ in possible]
        if not any(np.array_equal(seen, mask) for mask in masks):
            kinds = [own.action["kind"] if own.action else "mask" for own in user.events[max(0, number - 6) : number]]
            away = [int((seen != mask).sum()) for mask in masks]
            return f"mask {number} of {len(user.events)} differs in {away} of {int(seen.sum())} voxels after {kinds}"
        possible = [own for own, mask in zip(possible, masks) if np.array_equal(seen, mask)]
    return ""


def run(
    arguments: Sequence[str],
    images: Sequence[tuple[np.ndarray, dict[str, Any]]],
    *,
    seconds: float = math.inf,
    answers: float = math.inf,
    kills: int,
    pause: float,
    seats: int,
    turn: float | None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[User], ServerProcess, list[str]]:
    """Let users work; the server is killed at equal intervals.

    Args:
        arguments: of the server.
        images: of each user, with properties.
        seconds: after which they stop.
        answers: after which, of all users together, they stop.
        kills: of the server.
        pause: most seconds between two actions of a user.
        seats: users that the server takes at once.
        turn: seconds after which a user gives its seat up; none keeps it.
        say: is told how far it is, now and then.

    Returns:
        The users, the server, and what its log complains of.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ["--max_sessions", str(seats)]
        for name in ("sessions", "embeddings"):
            options += [f"--{name}", str(Path(folder) / name)]
        server = ServerProcess([*arguments, *options], Path(folder) / "log")
        try:
            users = [
                User(server.address, k, image, {**properties, "session": f"user {k}"}, pause, turn, server.begin)
                for k, (image, properties) in enumerate(images)
            ]
            stop = threading.Event()
            threads = [threading.Thread(target=user.work, args=(stop,), daemon=True) for user in users]
            for thread in threads:
                thread.start()
            begin, told, ended, share = time.monotonic(), 0.0, math.inf, 0.0
            while any(thread.is_alive() for thread in threads) and time.monotonic() < ended + LAST:
                time.sleep(0.25)
                server.look()
                now, count = time.monotonic() - begin, sum(user.counts["answers"] for user in users)
                share = max(now / seconds, count / answers)
                if len(server.kills) < kills and share > (len(server.kills) + 1) / (kills + 1):
                    server.kill()
                if share >= 1.0 and not stop.is_set():
                    stop.set()
                    ended = time.monotonic()
                if now > told + 30.0:
                    told = now
                    say(f"{now:.0f} s: {count} answers, {server.memory[-1][1] >> 20} MiB")
            for user, thread in zip(users, threads):
                if thread.is_alive():
                    user.failure = user.failure or "it did not come to its end"
        finally:
            server.stop()
        return users, server, server.complaints()


def read_image(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """A file's image as clients send it, and its properties."""
    if path.name.endswith((".nii", ".nii.gz")):
        scan = nibabel.load(path)
        return np.asarray(scan.dataobj)[None], {"affine": scan.affine}
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 1, 0)[..., None], {}


def summarize(waits: Sequence[tuple[float, str, float]]) -> dict[str, dict[str, float]]:
    """Count, median, 95th percentile and maximum of the waits in seconds, of all answers and by kind."""
    kinds = sorted({kind for _, kind, _ in waits})
    beside = ("seat", "image", "mask back", "whole mask")  # no answers to something that was said
    chosen = {"all answers": [kind for kind in kinds if kind not in beside], **{kind: [kind] for kind in kinds}}
    out = {}
    for name, own in chosen.items():
        values = np.array([seconds for _, kind, seconds in waits if kind in own])
        if len(values):
            median, high = np.quantile(values, [0.5, 0.95])
            out[name] = {"count": len(values), "median": median, "p95": high, "max": float(values.max())}
    return out


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    used = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {used} processor(s) for server and clients together"


def write_report(prefix: str, facts: dict[str, Any], users: Sequence[User], server: ServerProcess) -> None:
    """Write what was measured as a table, as JSON, and as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [facts["summary"], "", "| waited for | count | median s | 95 % s | longest s |", "| --- " * 5 + "|"]
    for name, own in facts["waits"].items():
        lines.append(f"| {name} | {own['count']} | {own['median']:.3f} | {own['p95']:.3f} | {own['max']:.3f} |")
    Path(f"{prefix}.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    Path(f"{prefix}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    seconds, sizes = np.array(server.memory).T
    above.plot(seconds, sizes / 2**20, lw=1)
    above.set(ylabel="server's memory, MiB", ylim=(0, None))
    said = {kind for _, kind, _ in (wait for user in users for wait in user.waits)} - {"seat", "image"}
    for name, kinds, colour in (
        ("answers", said - {"mask back", "whole mask"}, "C0"),
        ("mask back", {"mask back"}, "C1"),
    ):
        own = np.array([(a, c) for user in users for a, kind, c in user.waits if kind in kinds]).reshape(-1, 2)
        below.plot(own[:, 0], own[:, 1], ".", ms=2, color=colour, label=name)
    below.set(xlabel="seconds", ylabel="waited, s", yscale="log")
    below.legend(loc="upper right", fontsize=8)
    for axes in (above, below):
        for kill in server.kills:
            axes.axvline(kill, color="C3", lw=0.8, ls="--")
    figure.savefig(f"{prefix}.png", dpi=80)


def main() -> int:
    """Command line; 1 where something was lost or went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("images", type=Path, help="folder of NIfTI volumes or photographs")
    parser.add_argument("--overlay", default="")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seats", type=int, default=40, help="clients that the server takes at once")
    parser.add_argument("--turn", type=float, default=60.0, help="seconds after which a client gives its seat up")
    parser.add_argument("--pause", type=float, default=8.0, help="most seconds between two actions of a client")
    parser.add_argument("--amp", default="auto", help="precision: auto, true or false")
    parser.add_argument("--output", default="", help="beginning of the names of what is written")
    options = parser.parse_args()
    overlays = [options.overlay] if options.overlay else []
    amp = choose_amp(options.amp, "cpu")
    chosen = str(amp.dtype is not None).lower()
    files = sorted(own for own in options.images.iterdir() if own.name.endswith((".nii.gz", ".nii", ".jpg", ".png")))
    paths = [files[number // 2 % len(files)] for number in range(options.clients)]
    segmenter = NetworkSegmenter.from_bundle(options.bundle, overlays, {"amp": chosen, "device": "cpu"})
    class_name = segmenter.classes[-1]
    images = [(image, {**properties, "class": class_name}) for image, properties in map(read_image, paths)]
    arguments = [options.bundle, "--amp", chosen, "--device", "cpu", *(["--overlay", *overlays] if overlays else [])]
    turn = options.turn if options.seats < options.clients else None
    users, server, complaints = run(
        arguments, images, seconds=options.seconds, kills=options.kills, pause=options.pause, seats=options.seats,
        turn=turn, say=print_at_once,
    )  # fmt: skip
    counts = sum((user.counts for user in users), Counter[str]())
    print_at_once("telling the same to sessions in this process")
    wrong = [f"client {user.number}: {user.failure}" for user in users if user.failure]
    for user, path in zip(users, paths):
        found = replay(segmenter, path, class_name, user)
        wrong += [f"client {user.number}: {found}"] if found else []
    summary = (
        f"{_processor()}; {amp.name}. {options.clients} clients, {options.seats} seats, "
        f"{options.seconds:.0f} s, {len(server.kills)} kills; {counts['answers']} answers, "
        f"{counts['masks']} masks compared; "
        f"{counts['lease over']} leases found over after a kill, {counts['no seat']} times no seat; "
        f"the server held {server.largest >> 20} MiB at most."
    )
    waits = summarize([wait for user in users for wait in user.waits])
    facts = {
        "summary": summary, "waits": waits, "counts": counts, "kills": server.kills, "wrong": wrong,
        "log": complaints, "largest": server.largest,
        "memory": [(round(a, 1), size >> 20) for a, size in server.memory[::20]],
    }  # fmt: skip
    print_at_once(summary)
    for name, own in waits.items():
        print_at_once(
            f"{name:<12} {own['count']:6d}  median {own['median']:.3f} s, 95 % {own['p95']:.3f} s, "
            f"longest {own['max']:.3f} s"
        )
    print_at_once(f"{dict(counts)}")
    if options.output:
        write_report(options.output, facts, users, server)
    for line in (*wrong, *(f"log: {line}" for line in complaints)):
        print_at_once(line)
    print_at_once("nothing was lost" if not wrong else f"{len(wrong)} things went wrong")
    return int(bool(wrong or complaints))


def print_at_once(text: str) -> None:
    """Print, also into a pipe, without waiting."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
