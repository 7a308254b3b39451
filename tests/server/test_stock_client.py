"""The published client on a server, and a session in this process that is told the same: their masks are the same bits.

    pytest -m slow tests/server/test_stock_client.py

does so for a thousand interactions of each of two users, for volumes and photographs, answered at once and behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.interaction.session import InteractiveSession

from .scenes import SPACING, make_photograph, make_volume, random_action, send, write_photograph, write_volume

KINDS = {"point", "scribble", "box", "lasso", "mask", "undo", "reset", "buffer"}
PER_IMAGE = 50  # interactions


class Both:
    """A client of a server and a session in this process, which are told the same.

    Args:
        client: the published one.
        segmenter: the server's bundle.
        image: (C, X, Y, Z).
        path: its file.
        class_name: of what is segmented.
        behind: whether the server answers from a slab at first, and brings the rest later.
        random: draws what the client does beside the action itself.
    """

    def __init__(
        self,
        client: Any,
        segmenter: NetworkSegmenter,
        image: np.ndarray,
        path: Path,
        class_name: str,
        behind: bool,
        random: np.random.Generator,
    ) -> None:
        self.client, self.class_name, self.behind, self.random = client, class_name, behind, random
        self.shape = image.shape[1:]
        self.flat = not segmenter.volumes
        self.session = InteractiveSession(segmenter, start="nothing")
        self.session.open(str(path))
        client.set_image(image, {"spacing": np.array(SPACING), "class": class_name})
        client.set_target_buffer(np.zeros(self.shape, np.uint8))
        self.counts: list[int] = []  # prompts of each interaction
        self.finished: list[np.ndarray] = []
        self.given_up: np.ndarray | None = None
        self.waits = False  # whether something that was said waits for an answer
        self.history: list[str] = []
        self.done: Counter[str] = Counter()
        self.largest = 0  # voxels of a mask
        self.compared = 0

    def do(self, action: dict[str, Any]) -> None:
        """Do it twice, and compare."""
        kind = action["kind"]
        self.history.append(f"{kind} {action['label']}")
        self.done[kind] += 1
        if kind in ("undo", "reset", "buffer"):
            getattr(self, f"_{kind}")()
        else:
            self._say(kind, action)
        if not self.waits:
            self.compare()

    def _undo(self) -> None:
        assert self.client.undo() == bool(self.counts)
        for _ in range(self.counts.pop() if self.counts else 0):
            self.session.undo(self.class_name)

    def _reset(self) -> None:
        shown = self.client.target_buffer.copy()
        self.client.reset_interactions()
        if self.counts or shown.any():
            self.given_up = shown
        self._begin()

    def _buffer(self) -> None:
        """A new target buffer: the object that was shown is finished, also where it was given up just before."""
        shown = self.client.target_buffer.copy()
        self.client.set_target_buffer(np.zeros(self.shape, np.uint8))
        part = shown if self.counts or shown.any() else self.given_up
        if part is not None and part.any():
            self.finished.append(part.astype(bool))
        self.given_up = None
        self._begin()

    def _begin(self) -> None:
        self.session.reset(self.class_name)
        self.counts, self.waits = [], False

    def _say(self, kind: str, action: dict[str, Any]) -> None:
        include, mask = bool(action["label"]), action.get("drawn")
        taken = self.taken()
        where = {"point": lambda: tuple(action["position"]), "scribble": lambda: mask > 0}.get(kind)
        marked = where is not None and bool(taken[where()].any())
        runs = kind == "mask" or self.random.random() > 0.15
        if include and marked:  # a finished object stays as it is
            with pytest.raises(httpx.HTTPStatusError, match="409"):
                send(self.client, action, runs)
            return
        send(self.client, action, runs)
        said = list(self._tell(kind, action))
        self.counts.append(len(said))
        self.given_up = None
        self.waits = not runs
        if kind == "mask":
            self.finished = [own for own in self.finished if not _agree(own, mask > 0)]

    def _tell(self, kind: str, action: dict[str, Any]) -> Iterator[Any]:
        """The session's prompts, one after the other."""
        session, label, name = self.session, action["label"], self.class_name
        if kind == "point":
            yield session.point(self._file(action["position"])[0], label, name)
        elif kind == "scribble":
            yield session.scribble(self._file(np.argwhere(action["drawn"])), label, name)
        elif kind == "mask":
            yield session.start_from(action["drawn"][..., 0] if self.flat else action["drawn"], name)
        elif kind == "lasso":
            yield session.lasso(
                self._outline(action["box"], action["axis"], action["box"][action["axis"], 0]), label, name
            )
        elif label:
            first, last = self._file([action["box"][:, 0], action["box"][:, 1] - 1])
            yield session.box(first, last, name)
        else:  # what a box excludes, slice by slice
            box = action["box"]
            axis = 2 if self.flat else int(np.argmin(box[:, 1] - box[:, 0]))
            for z in range(*box[axis]):
                yield session.lasso(self._outline(box, axis, z), 0, name)

    def _outline(self, box: np.ndarray, axis: int, z: int) -> np.ndarray:
        """Corners of a box's section across an axis."""
        a, b = (k for k in range(3) if k != axis)
        (a0, b0), (a1, b1) = box[[a, b], 0], box[[a, b], 1] - 1
        corners = np.zeros((4, 3))
        corners[:, axis] = z
        corners[:, a], corners[:, b] = (a0, a0, a1, a1), (b0, b1, b1, b0)
        return self._file(corners)

    def _file(self, positions: Any) -> np.ndarray:
        found = np.asarray(positions, dtype=np.float64).reshape(-1, 3)
        return found[:, :2] if self.flat else found

    def taken(self) -> np.ndarray:
        """Voxels of finished objects."""
        out = np.zeros(self.shape, dtype=bool)
        for own in self.finished:
            out |= own
        return out

    def compare(self) -> None:
        """The client's mask is the session's, less what is finished; of answers behind, every third is waited for."""
        if self.behind:
            if self.random.random() > 0.35:
                return
            self.client._predict()
        mask = self.session.mask(self.class_name)
        mask = (mask[..., None] if self.flat else mask) & ~self.taken()
        self.largest = max(self.largest, int(mask.sum()))
        self.compared += 1
        np.testing.assert_array_equal(self.client.target_buffer, mask, err_msg=str(self.history[-10:]))


def _agree(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(2 * (one & other).sum() >= 0.5 * (one.sum() + other.sum()))


@pytest.fixture(params=["volumes", "photographs"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[NetworkSegmenter, Callable[..., Any], str]:
    """A bundle, what makes an image and its file from a seed, and a class."""
    segmenter = request.getfixturevalue(request.param)

    def make(seed: int) -> tuple[np.ndarray, Path]:
        if request.param == "volumes":
            volume = make_volume(seed)
            return volume, write_volume(volume, tmp_path / f"{seed}.nii.gz")
        photograph = make_photograph(seed)
        return photograph, write_photograph(photograph, tmp_path / f"{seed}.png")

    return segmenter, make, segmenter.classes[-1]


def interact(
    scene: Any, serve: Callable[..., Any], connect: Callable[..., Any], count: int, behind: bool
) -> Counter[str]:
    """Two users at once, of which each does ``count`` things on images of their own."""
    segmenter, make, class_name = scene
    address, _ = serve(segmenter, patience=0.0 if behind else 60.0)

    def use(number: int) -> Counter[str]:
        random = np.random.default_rng(number)
        done: Counter[str] = Counter()
        client = connect(address)
        for start in range(0, count, PER_IMAGE):
            image, path = make(100 * number + start)
            both = Both(client, segmenter, image, path, class_name, behind, random)
            wanted = min(PER_IMAGE, count - start)
            for _ in range(wanted):
                both.do(random_action(random, image.shape[1:]))
            assert both.largest > 100
            assert both.compared > wanted / 8
            done += both.done
        return done

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(use, (1, 2)), Counter())


@pytest.mark.parametrize("behind", [False, True], ids=["at once", "behind"])
def test_two_users_see_what_a_session_in_this_process_shows(
    scene: Any, serve: Callable[..., Any], connect: Callable[..., Any], behind: bool
) -> None:
    done = interact(scene, serve, connect, 30, behind)
    assert done.total() == 60
    assert set(done) == KINDS


@pytest.mark.slow
@pytest.mark.parametrize("behind", [False, True], ids=["at once", "behind"])
def test_a_thousand_interactions(
    scene: Any, serve: Callable[..., Any], connect: Callable[..., Any], behind: bool
) -> None:
    done = interact(scene, serve, connect, 1000, behind)
    assert done.total() == 2000
    assert min(done[kind] for kind in KINDS) > 50
