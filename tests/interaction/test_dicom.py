"""DICOM segmentations that hold the session that made them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medsa_nets.errors import DataError
from medsa_nets.interaction.dicom import attach_log, find_log
from medsa_nets.interaction.record import describe_session, read_log
from medsa_nets.interaction.session import InteractiveSession

from ..deploy.series import write_ct

pytest.importorskip("highdicom")


@pytest.fixture
def session(stand_in: Callable[..., Any], tmp_path: Path) -> InteractiveSession:
    """A session on a series of the stand-in's grid."""
    segmenter = stand_in(True)
    grid = segmenter.open("image_4")
    values = np.random.default_rng(0).integers(-900, 900, (9, 7, 5)).astype(np.int16)
    write_ct(tmp_path / "series_4", values, np.asarray(grid.meta["original_affine"]))
    out = InteractiveSession(segmenter)
    out.open(tmp_path / "series_4")
    out.point([4, 3, 2], 1, "liver")
    out.scribble([[1, 1, 1], [1, 2, 1]], 0, "liver")
    out.start_from(np.indices(out.file_shape)[0] < 4, "aorta")
    return out


def validate(file: Path) -> None:
    """Fail where ``dciodvfy`` reports an error."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed (Debian: dicom3tools)")
    done = subprocess.run(["dciodvfy", file], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert "Segmentation" in said
    assert not [line for line in said.splitlines() if line.startswith(("Error", "Abort"))], said


def test_a_segmentation_gives_its_session_again(session: InteractiveSession, stand_in: Any, tmp_path: Path) -> None:
    import highdicom as hd

    session.segmenter.codes = {"liver": {"code": "10200004", "meaning": "Liver"}}  # type: ignore[attr-defined]
    path, log = session.save(tmp_path / "mask.dcm")
    assert path == log == tmp_path / "mask.dcm"
    other = InteractiveSession(stand_in(True))
    other.replay(path, tmp_path / "series_4")
    found = hd.seg.segread(path)
    series = sorted((pydicom.dcmread(file) for file in (tmp_path / "series_4").iterdir()),
                    key=lambda one: one.InstanceNumber)  # fmt: skip
    frames = found.get_pixels_by_source_instance(
        [one.SOPInstanceUID for one in series], assert_missing_frames_are_empty=True
    )
    for index, name in enumerate(session.classes):
        np.testing.assert_array_equal(frames[..., index].transpose(2, 1, 0) > 0, session.mask(name))
        np.testing.assert_array_equal(other.mask(name), session.mask(name))
    described = [found.get_segment_description(number) for number in (1, 2)]
    assert [(one.segment_label, one.segmented_property_type.meaning) for one in described] == [
        ("liver", "Liver"), ("spleen", "Tissue"),
    ]  # fmt: skip


def test_a_segmentation_with_a_session_is_valid_dicom(session: InteractiveSession, tmp_path: Path) -> None:
    path, _ = session.save(tmp_path / "mask.dcm", "liver")
    validate(path)


def test_a_segmentation_of_another_program_takes_a_session_and_keeps_what_it_held(
    session: InteractiveSession, tmp_path: Path
) -> None:
    path, _ = session.save(tmp_path / "mask.dcm")
    foreign = pydicom.dcmread(path)
    foreign.remove_private_tags()  # as of a writer that knows nothing of sessions
    foreign.save_as(path)
    with pytest.raises(DataError, match=r"mask\.dcm: this DICOM object holds no session"):
        read_log(path)
    attach_log(path, describe_session(session))
    assert len(read_log(path)["prompts"]) == 3
    session.undo()
    attach_log(path, describe_session(session))
    assert len(read_log(path)["prompts"]) == 2
    attached = pydicom.dcmread(path)
    attached.remove_private_tags()
    assert attached == foreign
    implicit = pydicom.dcmread(path)
    implicit.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    implicit.save_as(tmp_path / "implicit.dcm", implicit_vr=True, little_endian=True)
    assert find_log(tmp_path / "implicit.dcm") == find_log(path)


def test_what_can_hold_or_be_no_session_is_named(session: InteractiveSession, stand_in: Any, tmp_path: Path) -> None:
    slice_ = next((tmp_path / "series_4").iterdir())
    with pytest.raises(DataError, match="it is no DICOM segmentation"):
        attach_log(slice_, describe_session(session))
    with pytest.raises(DataError, match=r"holds no session\. Expected a segmentation"):
        session.replay(slice_, tmp_path / "series_4")
    for volumes, name in ((True, "image_3.bin"), (False, "image_3.png")):
        other = InteractiveSession(stand_in(volumes))
        (tmp_path / name).write_bytes(b"no series")
        other.open(tmp_path / name)
        with pytest.raises(DataError, match=r"belongs to a DICOM series, and .*image_3"):
            other.save(tmp_path / "out.dcm")
    assert not (tmp_path / "out.dcm").exists()
