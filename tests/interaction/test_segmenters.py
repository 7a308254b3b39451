"""Bundles behind sessions: the network's own automatic masks, and its answers to prompts on the file's grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import decollate_batch
from PIL import Image

from medsa_nets.errors import DataError, WeightsError
from medsa_nets.interaction.__main__ import main
from medsa_nets.interaction.session import InteractiveSession

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
KINDS = {"medsa_isic": [], "medsa_btcv": ["hippocampus.yaml"]}


def write_image(kind: str, folder: Path) -> Path:
    random = np.random.default_rng(0)
    if kind == "medsa_isic":
        path = folder / "mole.png"
        noise = np.kron(random.integers(0, 255, (9, 12, 3)), np.ones((10, 10, 1))).astype(np.uint8)
        Image.fromarray(noise).save(path)
        return path
    path = folder / "head.nii.gz"
    values = np.kron(random.integers(0, 500, (5, 6, 4)), np.ones((4, 4, 2))).astype(np.int16)
    affine = np.array([[0, 1.1, 0, 5], [-0.9, 0, 0, 3], [0, 0, 1.5, -4], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


@pytest.fixture(params=list(KINDS))
def bundle(request: pytest.FixtureRequest, small_base: str, tmp_path: Path) -> dict[str, Any]:
    """A bundle with a network of random weights, an adapter of it, and an image."""
    kind = request.param
    root = BUNDLES / kind
    config = {"base": small_base, "checkpoint": str(tmp_path / "adapter.pt"), "amp": False, "image_size": 64}
    if kind == "medsa_btcv":
        config.pop("image_size")
    parser = ConfigParser()
    parser.read_config([str(root / "configs" / name) for name in ("inference.yaml", *KINDS[kind])])
    parser.update({**config, "bundle_root": str(root), "output_dir": str(tmp_path)})
    network = parser.get_parsed_content("network")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        network.class_embeddings.copy_(torch.randn(network.class_embeddings.shape, generator=generator))
    torch.save(network.state_dict(), tmp_path / "adapter.pt")
    return {"kind": kind, "root": root, "config": config, "image": write_image(kind, tmp_path), "parser": parser}


def open_session(bundle: dict[str, Any], **options: Any) -> InteractiveSession:
    session = InteractiveSession.from_bundle(bundle["root"], KINDS[bundle["kind"]], config=bundle["config"], **options)
    session.open(str(bundle["image"]))
    return session


def test_the_masks_of_a_fresh_session_are_those_that_the_bundle_saves(bundle: dict[str, Any]) -> None:
    session, parser = open_session(bundle), bundle["parser"]
    data = parser.get_parsed_content("preprocessing")({"image": str(bundle["image"])})
    network, inferer = parser.get_parsed_content("network"), parser.get_parsed_content("inferer")
    network.load_state_dict(torch.load(bundle["config"]["checkpoint"], weights_only=True))
    with torch.no_grad():
        pred = inferer(data["image"][None].as_tensor(), network.eval())
    data["pred"] = decollate_batch(pred)[0]
    saved = parser.get_parsed_content("postprocessing")(data)["pred"][0].numpy()
    assert session.segmenter.volumes == (bundle["kind"] == "medsa_btcv")
    for index in range(len(session.classes)):
        expected = saved == index + 1
        found = session.mask(index)
        assert found.shape == expected.shape
        assert (found != expected).mean() < 1e-3
    assert 0 < saved.astype(bool).mean() < 1


@pytest.mark.parametrize("start", ["automatic", "nothing"])
def test_clicks_in_the_files_grid_are_obeyed_there(bundle: dict[str, Any], start: str) -> None:
    session = open_session(bundle, start=start)
    random = np.random.default_rng(1)
    said = {}
    for _ in range(6):
        voxel = tuple(int(random.integers(n)) for n in session.file_shape)
        said[voxel] = int(random.integers(2))
        mask = session.point(voxel, said[voxel], 0)
        assert all(mask[place] == bool(label) for place, label in said.items())


def test_a_second_session_on_an_image_encodes_nothing(bundle: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_session(bundle)
    other = InteractiveSession(first.segmenter)

    def fail(*_: object) -> None:
        raise AssertionError("the image was encoded again")

    monkeypatch.setattr(first.segmenter.network, "encode_image", fail)
    other.open(str(bundle["image"]))
    other.point([3] * len(other.file_shape), 1, 0)
    other.undo()
    assert np.array_equal(other.mask(0), first.mask(0))


def test_a_saved_session_is_replayed_from_the_command_line(
    bundle: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(bundle)
    session.point([4] * len(session.file_shape), 1, 0)
    session.point([9] + [5] * (len(session.file_shape) - 1), 0, 0)
    suffix = ".png" if bundle["kind"] == "medsa_isic" else ".nii.gz"
    mask, log = session.save(tmp_path / f"mask{suffix}")
    made = InteractiveSession.from_bundle
    monkeypatch.setattr(
        InteractiveSession, "from_bundle",
        lambda root, overlays, config: made(root, overlays, config={**bundle["config"], **config}),
    )  # fmt: skip
    arguments = ["replay", str(log), str(bundle["image"]), "--bundle", str(bundle["root"])]
    arguments += [part for name in KINDS[bundle["kind"]] for part in ("--overlay", name)]
    assert main([*arguments, "--output", str(tmp_path / f"again{suffix}")]) == 0
    again = tmp_path / f"again{suffix}"
    if suffix == ".png":
        assert np.array_equal(np.asarray(Image.open(mask)), np.asarray(Image.open(again)))
    else:
        assert np.array_equal(np.asarray(nibabel.load(mask).dataobj), np.asarray(nibabel.load(again).dataobj))
    log.write_text(log.read_text()[:50])
    assert main([*arguments, "--output", str(tmp_path / f"third{suffix}")]) == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / f"third{suffix}").exists()


def test_another_adapter_is_named_by_replay(bundle: dict[str, Any], tmp_path: Path) -> None:
    session = open_session(bundle)
    session.point([4] * len(session.file_shape), 1, 0)
    _, log = session.save(tmp_path / ("m.png" if bundle["kind"] == "medsa_isic" else "m.nii.gz"))
    with torch.no_grad():
        session.segmenter.network.class_embeddings.add_(1.0)
    with pytest.raises(DataError, match="another network: adapter_sha256"):
        session.replay(log, str(bundle["image"]))


def test_an_absent_bundle_overlay_or_adapter_is_named(bundle: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"inference\.yaml: there is no such file"):
        InteractiveSession.from_bundle(tmp_path)
    with pytest.raises(DataError, match=r"kidney\.yaml: there is no such file"):
        InteractiveSession.from_bundle(bundle["root"], ["kidney.yaml"])
    with pytest.raises(WeightsError, match="there is no such adapter"):
        InteractiveSession.from_bundle(
            bundle["root"], KINDS[bundle["kind"]], config={**bundle["config"], "checkpoint": str(tmp_path / "no.pt")}
        )
