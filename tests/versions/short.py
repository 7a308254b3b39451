"""The main job in a minute, in whatever versions are installed: ``python -m pytest tests/versions/short.py``.

The adapters of the repository are loaded, each bundle trains a step, a photograph and a volume are segmented, and a
click is answered. ``run.py`` runs this file in an environment for each cell of ``cells.cfg``; ``make test`` does not
collect it, for all of it is part of longer tests there. It needs pytest and what the package itself needs.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.bundle import ConfigParser, run
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medsa_nets import build_medsa
from medsa_nets.data.phantoms import FOLDERS, write_phantoms
from medsa_nets.prompts import Prompts, prompts_of

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
PHOTOGRAPHS, VOLUMES = BUNDLES / "medsa_isic", BUNDLES / "medsa_btcv"
# of each adapter: file, dimensions, classes
ADAPTERS = [("medsa_isic/models/model.pt", {"click_feedback": True}),
            ("medsa_isic/models/kvasir.pt", {"click_feedback": True}),
            ("medsa_btcv/models/model.pt", {"spatial_dims": 3, "num_classes": 13, "classes_per_pass": 13,
                                            "click_feedback": True}),
            ("medsa_btcv/models/hippocampus.pt", {"spatial_dims": 3, "num_classes": 2})]  # fmt: skip
AFFINE = np.array([[-3.0, 0, 0, 70], [0, -3.0, 0, 70], [0, 0, 3.0, -30], [0, 0, 0, 1]])


def options(bundle: Path) -> dict:
    return {"bundle_root": str(bundle), "meta_file": str(bundle / "configs" / "metadata.json"), "num_workers": 0,
            "amp": False}  # fmt: skip


def configs(bundle: Path, *names: str) -> list[str]:
    return [str(bundle / "configs" / f"{name}.yaml") for name in names]


def abdomen() -> np.ndarray:
    """A volume in HU: a body with a bright organ."""
    place = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (48, 44, 12)], indexing="ij"))
    values = np.where((place[:2] ** 2).sum(0) < 0.8, 20, -1000)
    organ = (((place - np.array([0.35, 0.1, 0.0])[:, None, None, None]) / [[[[0.3]]], [[[0.3]]], [[[0.7]]]]) ** 2).sum(
        0
    )
    values[organ < 1] = 140
    return (values + np.random.default_rng(0).normal(0, 10, values.shape)).astype(np.int16)


def write_series(folder: Path, values: np.ndarray) -> Path:
    """The volume as a CT series on the grid ``AFFINE``."""
    folder.mkdir(parents=True)
    series = generate_uid()
    whole = {"enforce_file_format": True} if int(pydicom.__version__.split(".")[0]) > 2 else {
        "write_like_original": False}  # fmt: skip
    for z in range(values.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality = series, "1.2.3", "CT"
        data.Columns, data.Rows = values.shape[:2]
        data.PixelSpacing, data.SliceThickness = [3.0, 3.0], 3.0
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [-70.0, -70.0, -30.0 + 3.0 * z]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        data.PixelData = np.ascontiguousarray(values[:, :, z].T).tobytes()
        data.save_as(folder / f"{(z * 7) % 12:02d}.dcm", **whole)
    return folder


@pytest.mark.parametrize(("file", "settings"), ADAPTERS)
def test_the_adapters_of_the_repository_load(file: str, settings: dict) -> None:
    adapter = torch.load(BUNDLES / file, weights_only=True)
    network = build_medsa("lite_medsam", **settings)
    network.load_state_dict(adapter)
    torch.testing.assert_close(network.state_dict()["class_embeddings"], adapter["class_embeddings"])


def test_photographs_train_a_step(tmp_path: Path) -> None:
    phantoms = write_phantoms(tmp_path / "data", training=2, validation=1, size=64)
    run("training", config_file=configs(PHOTOGRAPHS, "train"), dataset_dir=str(phantoms), image_size=64, batch_size=2,
        max_epochs=1, samples_interval=1, ckpt_dir=str(tmp_path / "models"), output_dir=str(tmp_path / "out"),
        **options(PHOTOGRAPHS))  # fmt: skip
    moved = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    fresh = build_medsa("lite_medsam").state_dict()
    assert any(not torch.equal(moved[name], value) for name, value in fresh.items() if name in moved)
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 1
    assert "val_mean_dice" in (tmp_path / "out" / "training.log").read_text(encoding="utf-8")


def test_volumes_train_a_step(tmp_path: Path) -> None:
    values = abdomen()
    for folder, array in (("imagesTr", values), ("labelsTr", (values > 100).astype(np.uint8))):
        (tmp_path / folder).mkdir()
        for i in range(2):
            nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / folder / f"case{i}.nii.gz")
    cases = [{"image": f"imagesTr/case{i}.nii.gz", "label": f"labelsTr/case{i}.nii.gz"} for i in range(2)]
    lists = {"training": cases[:1], "validation": cases[1:]}
    (tmp_path / "list.json").write_text(json.dumps(lists), encoding="utf-8")
    run("training", config_file=configs(VOLUMES, "train"), dataset_dir=str(tmp_path), classes=["organ"],
        datalist=str(tmp_path / "list.json"), pixdim=[3.0, 3.0, 3.0], roi_size=[32, 32, 4], patches_per_volume=1,
        slab_depth=4, max_epochs=1, val_interval=1, samples_interval=0, ckpt_dir=str(tmp_path / "models"),
        output_dir=str(tmp_path / "out"), **options(VOLUMES))  # fmt: skip
    assert (tmp_path / "models" / "model.pt").is_file()
    assert "val_mean_dice" in (tmp_path / "out" / "training.log").read_text(encoding="utf-8")


def test_a_photograph_is_segmented(tmp_path: Path) -> None:
    phantoms = write_phantoms(tmp_path / "data", training=1, validation=0, size=128)
    images, masks = (phantoms / folder for folder in FOLDERS["training"])
    run("inferring", config_file=configs(PHOTOGRAPHS, "inference"), dataset_dir=str(images),
        output_dir=str(tmp_path / "out"), **options(PHOTOGRAPHS))  # fmt: skip
    (written,) = (tmp_path / "out").rglob("*.png")
    (truth,) = masks.iterdir()
    mask, label = (np.asarray(Image.open(path)) > 0 for path in (written, truth))
    assert mask.shape == label.shape
    assert 2 * (mask & label).sum() / (mask.sum() + label.sum()) > 0.7


def test_a_volume_gives_the_same_mask_from_dicom_and_from_nifti(tmp_path: Path) -> None:
    values = abdomen()
    write_series(tmp_path / "in" / "series", values)
    nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / "in" / "file.nii.gz")
    run("inferring", config_file=configs(VOLUMES, "inference"), dataset_dir=str(tmp_path / "in"),
        output_dir=str(tmp_path / "out"), **options(VOLUMES))  # fmt: skip
    masks = [nib.load(tmp_path / "out" / f"{name}_segmentation.nii.gz") for name in ("series", "file")]
    np.testing.assert_allclose(masks[0].affine, masks[1].affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(masks[0].dataobj), np.asarray(masks[1].dataobj))
    assert masks[0].shape == values.shape
    assert np.asarray(masks[0].dataobj).any()


def test_a_click_is_answered_in_the_grid_of_its_file(tmp_path: Path) -> None:
    """As an annotation server does it: parse once; for a request, transforms and ``inferer(image, network)``."""
    path = tmp_path / "study.nii.gz"
    nib.save(nib.Nifti1Image(abdomen(), AFFINE), path)
    parser = ConfigParser(ConfigParser.load_config_files(configs(VOLUMES, "inference", "server")))
    parser.update(options(VOLUMES))
    network = parser.get_parsed_content("network").eval()
    network.load_state_dict(torch.load(VOLUMES / "models" / "model.pt", weights_only=True))

    def answer(**clicks: list[list[int]]) -> tuple[torch.Tensor, Prompts]:
        data = parser.get_parsed_content("preprocessing")({"image": str(path), "image_path": str(path), **clicks})
        prompts = prompts_of(data["image"])
        with torch.no_grad():
            data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], network)[0]
        for transform in parser.get_parsed_content("postprocessing").transforms:
            if type(transform).__name__ != "SaveImaged":
                data = transform(data)
        return torch.as_tensor(data["pred"]), prompts

    click = [32, 24, 6]
    automatic, _ = answer()
    clicked, prompts = answer(liver=[click])
    assert prompts.points.tolist() == [[[47 - click[0], 43 - click[1], click[2]]]]  # RAS, the file is LPS
    assert prompts.classes.tolist() == [liver := parser.get_parsed_content("classes").index("liver")]
    assert automatic.shape == clicked.shape == (1, 48, 44, 12)
    changed = clicked != automatic
    assert changed.any()
    assert set(torch.cat([clicked[changed], automatic[changed]]).tolist()) >= {liver + 1}
    assert ((clicked[changed] == liver + 1) | (automatic[changed] == liver + 1)).all()
