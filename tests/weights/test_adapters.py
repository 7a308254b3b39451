from __future__ import annotations

import re

import pytest
import torch

from medsa_nets.build import build_medsa
from medsa_nets.errors import WeightsError
from medsa_nets.weights import check_adapter, describe_file


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


def test_a_missing_adapter_names_those_beside_it_and_their_overlays(tmp_path):
    models, configs = tmp_path / "models", tmp_path / "configs"
    models.mkdir()
    configs.mkdir()
    with pytest.raises(WeightsError, match=r"no such adapter\. Train one"):
        check_adapter(models / "model.pt")
    for name in ("ct_coarse.pt", "other.pt", "training_state.pt"):
        (models / name).touch()
    (configs / "ct_coarse.yaml").write_text("pixdim: [3, 3, 3]\ncheckpoint_filename: ct_coarse.pt\n")
    (configs / "train.yaml").write_text("checkpoint_filename: other.pt\n")
    with pytest.raises(WeightsError) as caught:
        check_adapter(models / "model.pt")
    assert "Beside it: ct_coarse.pt (lay configs/ct_coarse.yaml over), other.pt. Train one" in str(caught.value)


def test_an_adapter_file_says_what_it_belongs_to(tiny_base, tiny_file, tmp_path):
    task = {"classes": ["liver", "spleen"], "intensity": {"a_min": -175.0}}
    network = build_medsa("tiny", sam_checkpoint=str(tiny_file), adapter_dim=7, num_classes=2, task=task)
    for name, state in (("model.pt", network.state_dict()), ("wrapped.pt", {"model": network.state_dict()})):
        torch.save(state, tmp_path / name)
        said = describe_file(tmp_path / name)
        assert said.startswith(f"{tmp_path / name}: an adapter of the base tiny, ")
        for part in ("adapter_dim 7", "num_classes 2", "spatial_dims 2", "classes: liver, spleen", "a_min -175.0"):
            assert part in said
        assert re.search("base sha256: [0-9a-f]{64}\n", said)
    damaged = {**network.state_dict(), "identity": torch.zeros(512, dtype=torch.uint8)}
    torch.save(damaged, tmp_path / "damaged.pt")
    with pytest.raises(WeightsError, match="'identity' is damaged"):
        describe_file(tmp_path / "damaged.pt")
