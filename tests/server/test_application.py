"""The published client against a server, and both against a session in this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.interaction.session import InteractiveSession

from .scenes import SPACING, make_photograph, make_volume, random_action, write_photograph, write_volume

remote = pytest.importorskip("nnInteractive.inference.remote")


class Both:
    """A client of a server and a session in this process, which are told the same.

    Args:
        client: the published one.
        segmenter: the server's bundle.
        image: (C, X, Y, Z).
        path: its file.
        class_name: of what is segmented.
    """

    def __init__(
        self, client: Any, segmenter: NetworkSegmenter, image: np.ndarray, path: Path, class_name: str
    ) -> None:
        self.client, self.class_name = client, class_name
        self.shape = image.shape[1:]
        self.flat = not segmenter.volumes
        self.session = InteractiveSession(segmenter, start="nothing")
        self.session.open(str(path))
        client.set_image(image, {"spacing": np.array(SPACING), "class": class_name})
        client.set_target_buffer(np.zeros(self.shape, np.uint8))
        self.history: list[str] = []
        self.largest = 0  # voxels of a mask

    def _file(self, positions: Any) -> np.ndarray:
        found = np.asarray(positions, dtype=np.float64).reshape(-1, 3)
        return found[:, :2] if self.flat else found

    def do(self, action: dict[str, Any]) -> None:
        client, session, kind, label = self.client, self.session, action["kind"], action["label"]
        include = bool(label)
        self.history.append(kind)
        if kind == "undo":
            done = client.undo()
            assert done == bool(session.prompts(self.class_name))
            if done:
                session.undo(self.class_name)
        elif kind == "reset":
            client.reset_interactions()
            session.reset(self.class_name)
        elif kind == "point":
            client.add_point_interaction(action["position"], include)
            session.point(self._file(action["position"])[0], label, self.class_name)
        elif kind == "scribble":
            client.add_scribble_interaction(action["drawn"], include)
            session.scribble(self._file(np.argwhere(action["drawn"])), label, self.class_name)
        elif kind == "box":
            client.add_bbox_interaction(action["box"].tolist(), True)
            first, last = self._file([action["box"][:, 0], action["box"][:, 1] - 1])
            session.box(first, last, self.class_name)
        elif kind == "lasso":
            box, axis = action["box"], action["axis"]
            crop = action["drawn"][tuple(slice(a, b) for a, b in box)]
            client.add_lasso_interaction(crop, include, interaction_bbox=box.tolist())
            a, b = (k for k in range(3) if k != axis)
            (a0, b0), (a1, b1) = box[[a, b], 0], box[[a, b], 1] - 1
            corners = np.zeros((4, 3))
            corners[:, axis] = box[axis, 0]
            corners[:, a], corners[:, b] = (a0, a0, a1, a1), (b0, b1, b1, b0)
            session.lasso(self._file(corners), label, self.class_name)
        elif kind == "mask":
            client.add_initial_seg_interaction(action["drawn"])
            session.start_from(action["drawn"][..., 0] if self.flat else action["drawn"], self.class_name)
        self.compare()

    def compare(self) -> None:
        mask = self.session.mask(self.class_name)
        self.largest = max(self.largest, int(mask.sum()))
        shown = self.client.target_buffer
        np.testing.assert_array_equal(shown[..., 0] if self.flat else shown, mask, err_msg=str(self.history[-10:]))


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


def interact(scene: Any, serve: Callable[..., Any], connect: Callable[..., Any], count: int) -> set[str]:
    """Two users at once, of which each does ``count`` things on images of their own."""
    segmenter, make, class_name = scene
    address, _ = serve(segmenter)

    def use(number: int) -> set[str]:
        random = np.random.default_rng(number)
        seen = set()
        client = connect(address)
        for start in range(0, count, 50):
            image, path = make(100 * number + start)
            both = Both(client, segmenter, image, path, class_name)
            for _ in range(min(50, count - start)):
                both.do(random_action(random, image.shape[1:]))
                seen.add(both.history[-1])
            assert both.largest > 200
        return seen

    with ThreadPoolExecutor(2) as pool:
        return set.union(*pool.map(use, (1, 2)))


def test_two_users_see_what_a_session_in_this_process_shows(
    scene: Any, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    assert len(interact(scene, serve, connect, 40)) == 7


@pytest.mark.slow
def test_a_thousand_interactions(scene: Any, serve: Callable[..., Any], connect: Callable[..., Any]) -> None:
    assert len(interact(scene, serve, connect, 1000)) == 7
