"""Embeddings that were computed ahead of time: servers take them, and what is damaged is computed anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medsa_nets.bundles import ADAPTER, copy_bundle
from medsa_nets.errors import DataError, SettingError
from medsa_nets.inferers import VolumeInferer
from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.label import _write_fresh_adapter
from medsa_nets.precomputed import precompute, read_embeddings
from medsa_nets.server.command import serve as start_server
from medsa_nets.server.errors import RequestError

from .scenes import make_photograph, make_volume, write_photograph, write_volume

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"


@pytest.fixture(scope="module")
def bundle(small_base: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a bundle with random weights."""

    def make(kind: str) -> Path:
        target = tmp_path_factory.mktemp("bundle") / kind
        overlays, size = (["hippocampus.yaml"], {}) if kind == "medsa_btcv" else ([], {"image_size": 64})
        settings = {"base": small_base, "amp": False, "slab_depth": 6, "mirror_axes": [], **size}
        copy_bundle(BUNDLES / kind, target, overlays, settings)
        _write_fresh_adapter(target, target / ADAPTER)
        return target

    return make


@pytest.fixture(scope="module")
def volumes(bundle: Callable[[str], Path]) -> Path:
    return bundle("medsa_btcv")


def count_encodings(segmenter: NetworkSegmenter) -> list[int]:
    """The list grows by one with each pass through the encoder."""
    passes: list[int] = []
    segmenter.network.image_encoder.register_forward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("kind", ["medsa_btcv", "medsa_isic"])
def test_a_server_encodes_nothing_that_was_precomputed(bundle, serve, connect, tmp_path, kind, capsys):
    root, flat, properties = bundle(kind), kind == "medsa_isic", {}
    image = make_photograph() if flat else make_volume()
    (tmp_path / "studies").mkdir()
    if flat:
        write_photograph(image, tmp_path / "studies" / "a.png")
    else:
        write_volume(image, tmp_path / "studies" / "a.nii.gz")
        # what viewers know of a file is in single precision, as the file has it
        properties = {"spacing": np.float64(nibabel.load(tmp_path / "studies" / "a.nii.gz").header.get_zooms())}
    capsys.readouterr()
    precompute(str(root), str(tmp_path / "studies"), str(tmp_path / "kept"))
    precompute(str(root), str(tmp_path / "studies"), str(tmp_path / "kept"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert " 0 known" in lines[0]
    assert " 0 encoded" in lines[1]
    files = {file: file.read_bytes() for file in (tmp_path / "kept").iterdir()}
    masks = []
    for folder in (None, tmp_path / "kept"):
        segmenter = NetworkSegmenter.from_bundle(root)
        read_embeddings(segmenter.network, folder)
        passes = count_encodings(segmenter)
        client = connect(serve(segmenter)[0])
        client.set_image(image, properties)
        client.set_target_buffer(np.zeros(image.shape[1:], np.uint8))
        client.add_point_interaction([9, 11, 0 if flat else 8], True)
        masks.append(client.target_buffer.copy())
        assert bool(passes) == (folder is None)
        client.set_image(image[..., ::-1] if not flat else image[:, ::-1], properties)
        client.set_target_buffer(np.zeros(image.shape[1:], np.uint8))
        client.add_point_interaction([9, 11, 0 if flat else 8], True)
        assert passes
    assert np.array_equal(*masks)
    assert {file: file.read_bytes() for file in (tmp_path / "kept").iterdir()} == files  # a server only reads


def precomputed_mask(root: Path, study: Path, folder: Path) -> tuple[torch.Tensor, int]:
    """Automatic logits, and how often the encoder ran."""
    segmenter = NetworkSegmenter.from_bundle(root, (), {"precomputed": str(folder), "cache_bytes": 0})
    assert isinstance(segmenter.inferer, VolumeInferer)
    passes = count_encodings(segmenter)
    return segmenter.automatic(segmenter.open(str(study))), len(passes)


def test_damaged_embeddings_are_computed_anew(volumes, tmp_path, caplog):
    study = write_volume(make_volume(), tmp_path / "a.nii.gz")
    expected, all_slabs = precomputed_mask(volumes, study, tmp_path / "kept")
    precompute(str(volumes), str(study), str(tmp_path / "kept"))
    assert precomputed_mask(volumes, study, tmp_path / "kept")[1] == 0
    assert torch.equal(precomputed_mask(volumes, study, tmp_path / "kept")[0], expected)
    cut, changed, *_ = sorted((tmp_path / "kept").iterdir())
    cut.write_bytes(cut.read_bytes()[:-100])
    values = load_file(changed)["embedding"]
    values.view(-1)[5] += 1.0
    save_file({"embedding": values}, changed, {"sha256": "0" * 64})
    found, again = precomputed_mask(volumes, study, tmp_path / "kept")
    assert torch.equal(found, expected)
    assert again == 2 < all_slabs
    assert cut.name in caplog.text
    assert changed.name in caplog.text
    precompute(str(volumes), str(study), str(tmp_path / "kept"))
    assert precomputed_mask(volumes, study, tmp_path / "kept")[1] == 0


def test_another_encoder_has_other_embeddings(volumes, tmp_path):
    study = write_volume(make_volume(), tmp_path / "a.nii.gz")
    precompute(str(volumes), str(study), str(tmp_path / "kept"))
    other = shutil.copytree(volumes, tmp_path / "other")
    state = torch.load(other / ADAPTER, weights_only=True)
    name = next(name for name in state if name.startswith("image_encoder") and name.endswith("up.bias"))
    state[name] = state[name] + 0.5
    torch.save(state, other / ADAPTER)
    assert precomputed_mask(other, study, tmp_path / "kept")[1] > 0


def test_a_study_that_can_t_be_read_is_named_and_the_others_are_encoded(volumes, tmp_path, capsys):
    (tmp_path / "studies").mkdir()
    write_volume(make_volume(), tmp_path / "studies" / "b.nii.gz")
    (tmp_path / "studies" / "a.nii.gz").write_bytes(b"no volume")
    with pytest.raises(DataError, match=r"1 of 2 studies can't be read: .*a\.nii\.gz"):
        precompute(str(volumes), str(tmp_path / "studies"), str(tmp_path / "kept"))
    assert "b.nii.gz" in capsys.readouterr().out
    assert list((tmp_path / "kept").iterdir())


def test_a_server_is_not_started_on_a_folder_that_is_not_there(volumes, tmp_path):
    with pytest.raises((DataError, SettingError, RequestError), match="precompute"):
        start_server(str(volumes), precomputed=str(tmp_path / "missing"))


def test_volumes_on_another_grid_in_their_files_are_found_too(volumes, serve, connect, tmp_path):
    image = make_volume()
    affine = np.array([[-0.7, 0, 0, 5], [0, 0.9, 0, -3], [0, 0, 1.3, 2], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(image[0], affine), tmp_path / "a.nii.gz")
    precompute(str(volumes), str(tmp_path / "a.nii.gz"), str(tmp_path / "kept"))
    segmenter = NetworkSegmenter.from_bundle(volumes)
    read_embeddings(segmenter.network, tmp_path / "kept")
    passes = count_encodings(segmenter)
    client = connect(serve(segmenter)[0])
    scan = nibabel.load(tmp_path / "a.nii.gz")
    client.set_image(np.asarray(scan.dataobj)[None], {"affine": scan.affine})
    client.set_target_buffer(np.zeros(image.shape[1:], np.uint8))
    client.add_point_interaction([9, 11, 8], True)
    assert not passes
