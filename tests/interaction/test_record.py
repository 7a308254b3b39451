"""Logs of sessions: the same mask again, and one clear error for what can't give it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from medsa_nets.errors import DataError
from medsa_nets.interaction.answers import AnswerSettings
from medsa_nets.interaction.session import InteractiveSession


def work(session: InteractiveSession) -> None:
    """One of every verb."""
    size = np.array(session.file_shape)
    session.start_from(np.indices(session.file_shape)[0] < 4, 0)
    session.point(size // 2, 1, 0)
    session.box(size // 4, size - 2, 0)
    session.scribble([[1] * len(size), [2] * len(size)], 0, 0)
    corners = np.array([[1, 1, 2], [6, 1, 2], [6, 5, 2], [1, 5, 2]])[:, : len(size)]
    session.lasso(corners, 1, 0)
    session.point([0] * len(size), 1, 0)
    session.undo()
    if len(session.classes) > 1:
        session.point(size - 1, 1, 1)
        session.accept(1)


@pytest.fixture(params=[False, True], ids=["image", "volume"])
def saved(request: pytest.FixtureRequest, stand_in: Callable[..., Any], tmp_path: Path) -> dict[str, Any]:
    session = InteractiveSession(stand_in(request.param), AnswerSettings(rule="monotone", reach=3.0))
    source = tmp_path / "image_4.bin"
    source.write_bytes(b"pixels")
    session.open(source)
    work(session)
    mask, log = session.save(tmp_path / ("mask.nii.gz" if request.param else "mask.png"))
    return {"session": session, "mask": mask, "log": log, "source": source, "volumes": request.param, "make": stand_in}


def test_a_log_gives_the_masks_again_bit_for_bit(saved: dict[str, Any]) -> None:
    other = InteractiveSession(saved["make"](saved["volumes"]))  # its own settings do not matter
    other.replay(saved["log"], saved["source"])
    for index in range(len(other.classes)):
        assert np.array_equal(other.mask(index), saved["session"].mask(index))
        one, two = other.logits(index), saved["session"].logits(index)
        assert one is not None
        assert (one == two).all()
    before = other.mask(0)
    other.undo(0)
    saved["session"].undo(0)
    assert np.array_equal(other.mask(0), saved["session"].mask(0))
    assert not np.array_equal(other.mask(0), before)


def test_the_mask_lies_on_the_grid_of_the_file(saved: dict[str, Any]) -> None:
    session = saved["session"]
    if saved["volumes"]:
        image = nibabel.load(saved["mask"])
        assert np.array_equal(np.asarray(image.dataobj), session.label_map())
        assert np.allclose(image.affine, session.image.meta["original_affine"])
    else:
        assert np.array_equal(np.asarray(Image.open(saved["mask"])).T == 255, session.mask())


def test_a_log_says_what_was_said_where_and_to_whom(saved: dict[str, Any]) -> None:
    log = json.loads(saved["log"].read_text())
    session = saved["session"]
    kinds = [prompt["kind"] for prompt in log["prompts"]]
    assert kinds == ["mask", "point", "box", "scribble", "lasso", *(["point", "accept"] if saved["volumes"] else [])]
    point = log["prompts"][1]
    voxel = np.array(session.file_shape) // 2
    assert point["voxels"] == [voxel.tolist()]
    if saved["volumes"]:
        affine = session.image.meta["original_affine"]
        assert np.allclose(point["world"][0], affine[:3, :3] @ voxel + affine[:3, 3])
    assert log["network"] == {"base": "stand-in", "base_sha256": "0" * 64, "adapter_sha256": "one",
                              "refinement_sha256": ""}  # fmt: skip
    assert log["image"]["name"] == "image_4.bin"
    assert log["settings"]["rule"] == "monotone"
    assert {"medsa", "torch", "monai", "python"} <= log["versions"].keys()


def change(path: Path, **changes: Any) -> None:
    log = json.loads(path.read_text())
    for name, value in changes.items():
        place, *keys = [log, *name.split("__")]
        for key in keys[:-1]:
            place = place[int(key) if key.isdigit() else key]
        place[int(keys[-1]) if keys[-1].isdigit() else keys[-1]] = value
    path.write_text(json.dumps(log))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network__adapter_sha256": "two"}, "another network: adapter_sha256 is two, here one"),
        ({"schema": 99}, "its schema is 99, this version reads 1"),
        ({"classes": ["lesion", "mole"]}, "damaged|its classes are lesion, mole"),
        ({"image__sha256": "f" * 64}, "another image"),
        ({"image__size": [3, 3]}, "damaged|lies outside"),
        ({"prompts__1__voxels": [[900, 0, 0]]}, "damaged|lies outside|expected positions"),
        ({"prompts__1__voxels": "here"}, "expected positions"),
        ({"prompts__1__kind": "wish"}, "the log is damaged"),
        ({"prompts__1__label": 7}, "the log is damaged"),
        ({"prompts__1__class": "heart"}, "the log is damaged"),
        ({"prompts__0__mask": "AAAA"}, "the log is damaged"),
        ({"prompts__0__mask": 5}, "the log is damaged"),
        ({"prompts__4__axis": 7}, "the log is damaged"),
        ({"prompts": None}, "the log is damaged"),
        ({"settings": {"rule": "free"}}, "the log is damaged"),
        ({"settings__rule": "strict"}, "the log is damaged"),
        ({"start": "later"}, "the log is damaged"),
    ],
)
def test_a_log_that_does_not_fit_is_one_error_and_leaves_the_session(
    saved: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    change(saved["log"], **changes)
    session = saved["session"]
    before, prompts = session.mask(0), len(session.prompts())
    with pytest.raises(DataError, match=said):
        session.replay(saved["log"], saved["source"])
    assert np.array_equal(session.mask(0), before)
    assert len(session.prompts()) == prompts


@pytest.mark.parametrize("cut", [0, 40, -30])
def test_a_log_that_is_cut_off_is_one_error(saved: dict[str, Any], cut: int) -> None:
    text = saved["log"].read_text()
    saved["log"].write_text(text[:cut])
    with pytest.raises(DataError, match="the log is damaged"):
        saved["session"].replay(saved["log"], saved["source"])


def test_an_absent_log_is_one_error(saved: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such log"):
        saved["session"].replay(tmp_path / "none.json", saved["source"])


def test_an_unknown_format_writes_nothing(saved: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.png|output_ext"):
        saved["session"].save(tmp_path / "new" / "mask.jpg")
    assert not (tmp_path / "new").exists()
