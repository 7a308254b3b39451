from __future__ import annotations

import os
from pathlib import Path

import pytest

from medsa_nets import converted


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def writer(size: int):
    return lambda folder: (folder / "model").write_bytes(bytes(size))


def test_a_model_is_whole_or_absent():
    folder = converted.folder_of(("weights", 1))
    assert folder != converted.folder_of(("weights", 2))

    def fails(part: Path) -> None:
        (part / "model").write_bytes(b"half")
        raise RuntimeError("disk full")

    assert not converted.keep(folder, fails)
    assert not converted.is_kept(folder)
    assert not list(converted.models_dir().iterdir())
    assert converted.keep(folder, writer(10))
    assert (folder / "model").stat().st_size == 10


def test_what_a_killed_process_left_is_replaced():
    folder = converted.folder_of(("weights",))
    folder.mkdir(parents=True)
    (folder / "model").write_bytes(b"half")
    assert not converted.is_kept(folder)
    assert converted.keep(folder, writer(10))
    assert (folder / "model").stat().st_size == 10


def test_the_model_of_a_faster_process_stays():
    folder = converted.folder_of(("weights",))
    assert converted.keep(folder, writer(10))
    assert converted.keep(folder, writer(20))
    assert (folder / "model").stat().st_size == 10
    assert list(converted.models_dir().iterdir()) == [folder]


def test_those_not_used_for_longest_make_room(monkeypatch):
    monkeypatch.setattr(converted, "MAX_BYTES", 2500)
    old, used, new = (converted.folder_of((name,)) for name in ("old", "used", "new"))
    for age, folder in ((3, used), (2, old)):
        converted.keep(folder, writer(1000))
        os.utime(folder / converted.WHOLE, (1e9 - age, 1e9 - age))
    converted.use(used)
    converted.keep(new, writer(1000))
    assert [converted.is_kept(folder) for folder in (old, used, new)] == [False, True, True]


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, own_cache):
    (own_cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache / "file"))
    folder = converted.folder_of(("weights",))
    assert not converted.keep(folder, writer(1))
    assert not converted.is_kept(folder)


def test_a_damaged_model_is_removed():
    folder = converted.folder_of(("weights",))
    converted.keep(folder, writer(10))
    assert converted.is_intact(folder)
    (folder / "model").write_bytes(bytes(9) + b"1")
    assert not converted.is_intact(folder)
    assert not folder.exists()
    assert not converted.is_intact(folder)
