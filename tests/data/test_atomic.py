from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medsa_nets.data.atomic import remove_leftovers, temporary_name
from medsa_nets.errors import MedSAError, OutputError
from medsa_nets.training import save_atomically


@pytest.fixture
def small_disk():
    """No file may grow beyond 64 KiB."""
    resource = pytest.importorskip("resource", reason="Windows has no limit for the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_does_not_fit_is_named_and_the_old_one_stays(tmp_path: Path, small_disk: None) -> None:
    path = save_atomically({"a": torch.zeros(4)}, tmp_path / "model.pt")
    old = path.read_bytes()
    with pytest.raises(OutputError, match=r"model\.pt: it can't be written \(File too large\)\. Make room in"):
        save_atomically({"a": torch.zeros(2**16)}, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError) as caught, temporary_name(tmp_path / "copy.pt"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/source.pt")
    assert not isinstance(caught.value, MedSAError)
    with pytest.raises(ValueError, match="unrelated"), temporary_name(tmp_path / "copy.pt"):
        raise ValueError("unrelated")
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model[1].pt"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".{ended.pid}.{path.name}"
    others = [path, tmp_path / f".{os.getpid()}.{path.name}", tmp_path / f".{ended.pid}.other.pt",
              tmp_path / f".notes.{path.name}", tmp_path / f"{ended.pid}.{path.name}"]  # fmt: skip
    for file in (left, *others):
        file.touch()
    remove_leftovers(path)
    assert set(tmp_path.iterdir()) == set(others)
