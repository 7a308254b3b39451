"""A real MONAI Label server, started as a user would, in an environment of its own (``make test-label``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from scipy.spatial.transform import Rotation

from .server import Server, add_bundle

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
HIPPOCAMPUS, LESION = "medsa_btcv_hippocampus_deepedit", "medsa_isic_deepedit"


@pytest.fixture(scope="session")
def label_python() -> Path:
    """Python of the environment that holds MONAI Label."""
    path = Path(os.environ.get("MEDSA_LABEL_PYTHON", ""))
    if not path.is_file():
        pytest.skip("MEDSA_LABEL_PYTHON names no Python with MONAI Label; run make test-label")
    return path.absolute()


def write_study(source: Path, target: Path, side: str) -> None:
    """A real volume on another grid: ``anisotropic`` (slices of 3 mm), ``LAS`` (axis flipped), ``oblique`` (turned)."""
    image = nib.load(source)
    values, affine = np.asarray(image.dataobj), image.affine.copy()
    if side == "anisotropic":
        values, affine = values[:, :, ::3], affine @ np.diag([1, 1, 3, 1])
    elif side == "LAS":
        values = values[::-1]
        affine = affine @ np.array([[-1, 0, 0, len(values) - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], float)
    elif side == "oblique":
        turn = np.eye(4)
        turn[:3, :3] = Rotation.from_euler("xyz", [9, -7, 12], degrees=True).as_matrix()
        affine = turn @ affine
    nib.save(nib.Nifti1Image(np.ascontiguousarray(values), affine), target)


SIDES = ("RAS", "anisotropic", "LAS", "oblique")
UNSEEN = "unseen"


@pytest.fixture(scope="session")
def studies(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real MRI volumes, each on a grid of its own, with their labels in ``truth``."""
    root = tmp_path_factory.mktemp("label")
    volumes = shared_data / "msd_hippocampus"
    if not volumes.is_dir():
        pytest.skip(f"{volumes} is not there: set MEDSA_TEST_DATA")
    (root / "studies").mkdir()
    (root / "truth").mkdir()
    for side, source in zip(SIDES, sorted((volumes / "images").iterdir())):
        label = volumes / "labels" / source.name
        write_study(source, root / "studies" / f"{side}.nii.gz", side)
        write_study(label, root / "truth" / f"{side}.nii.gz", side)
    # nothing but the test of the embedding cache asks for this one; it is there before the server starts, for a file
    # that is added later becomes known at a moment of the datastore's own choosing
    nib.save(nib.load(root / "studies" / "RAS.nii.gz").slicer[:-1], root / "studies" / f"{UNSEEN}.nii.gz")
    return root


@pytest.fixture(scope="session")
def server(label_python: Path, studies: Path) -> Iterator[Server]:
    add_bundle(label_python, studies / "app", BUNDLES / "medsa_btcv", "hippocampus.yaml")
    # slabs of a quarter of the slices train in a quarter of the time and of the memory
    train = studies / "app" / "model" / HIPPOCAMPUS / "configs" / "train.yaml"
    settings = yaml.safe_load(train.read_text())
    assert settings["roi_size"] == [80, 112, 32]
    train.write_text(yaml.safe_dump({**settings, "roi_size": [80, 112, 8]}, sort_keys=False))
    running = Server(label_python, studies, str(studies / "studies"), HIPPOCAMPUS)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def photographs(label_python: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an app, photographs in ``studies``, and their masks in ``truth``."""
    source = shared_data / "isic2017" / "full_resolution"
    if not source.is_dir():
        pytest.skip(f"{source} is not there: set MEDSA_TEST_DATA")
    root = tmp_path_factory.mktemp("photographs")
    for folder in ("studies", "truth"):
        (root / folder).mkdir()
    for image in sorted((source / "images").iterdir())[:4]:
        shutil.copy(image, root / "studies" / image.name)
        shutil.copy(source / "masks" / f"{image.stem}_segmentation.png", root / "truth" / f"{image.stem}.png")
    add_bundle(label_python, root / "app", BUNDLES / "medsa_isic")
    return root
