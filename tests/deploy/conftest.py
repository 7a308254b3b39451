"""The application as an imaging engineer runs it, in an environment of its own (``make test-deploy``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from ..forks import Forks
from .series import with_identifiers, write_ct

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
CT = BUNDLES / "medsa_btcv"


@dataclass
class Run:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str


class Command:
    """``python -m medsa_nets.deploy`` in the environment that holds MONAI Deploy."""

    def __init__(self, python: Path) -> None:
        self.python = python
        self.forks = Forks(python)

    def __call__(self, *arguments: str | Path, **environment: str) -> Run:
        return self.module("medsa_nets.deploy", *arguments, **environment)

    def module(self, name: str, *arguments: str | Path, cwd: Path | None = None, **environment: str) -> Run:
        """``python -m`` of any module."""
        done = self.forks.run(
            ["-m", name, *map(str, arguments)], cwd, timeout=900, CUDA_VISIBLE_DEVICES="", **environment
        )
        return Run(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def deploy_python() -> Path:
    """Python of the environment that holds MONAI Deploy."""
    path = Path(os.environ.get("MEDSA_DEPLOY_PYTHON", ""))
    if not path.is_file():
        pytest.skip("MEDSA_DEPLOY_PYTHON names no Python with MONAI Deploy; run make test-deploy")
    return path.absolute()


@pytest.fixture(scope="session")
def deploy(deploy_python: Path) -> Iterator[Command]:
    command = Command(deploy_python)
    yield command
    command.forks.close()


@pytest.fixture(scope="session")
def real_ct(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``ct`` of 20 real slices, compressed by JPEG 2000."""
    return with_identifiers(shared_data / "ct" / "ct_b_dicom", tmp_path_factory.mktemp("real") / "ct")


@pytest.fixture(scope="session")
def oblique_ct(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``oblique``: a part of a real CT, its pixels made 1.5 x 3 mm, its directions turned in space."""
    image = nib.load(shared_data / "ct" / "ct_a.nii.gz")
    values = np.repeat(np.asarray(image.dataobj)[:120, :96, 60:72], 2, axis=0)  # columns of 1.5 mm, rows of 3 mm
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", [8, -5, 11], degrees=True).as_matrix()
    affine = turn @ image.affine @ np.diag([0.5, 1, 1, 1])
    return write_ct(tmp_path_factory.mktemp("written") / "oblique", values, affine)
