from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from medsa_nets.checksums import state_sha256
from medsa_nets.errors import WeightsError
from medsa_nets.weights import read_base_file


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
    assert state_sha256(state) == state_sha256(expected)


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
