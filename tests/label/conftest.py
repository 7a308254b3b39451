"""A real MONAI Label server, started as a user would, in an environment of its own (``make test-label``)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
from scipy.spatial.transform import Rotation

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
HIPPOCAMPUS, LESION = "medsa_btcv_hippocampus_deepedit", "medsa_isic_deepedit"
# MONAI Label imports torchvision, which does not import beside a CPU build of torch unless these operators are known.
STAND_IN = """
try:
    import torch
    library = torch.library.Library("torchvision", "DEF")  # which lives as long as this name
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float threshold) -> Tensor")
except Exception:
    pass
"""


class Server:
    """A running server and its log."""

    def __init__(self, python: Path, folder: Path, studies: str, models: str) -> None:
        self.folder = folder
        (folder / "stand_in").mkdir(exist_ok=True)
        (folder / "stand_in" / "sitecustomize.py").write_text(STAND_IN)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = open(folder / f"server_{self.port}.log", "wb")  # noqa: SIM115 closed by stop()
        command = [str(python.parent / "monailabel"), "start_server", "--app", str(folder / "app"),
                   "--studies", studies, "--host", "127.0.0.1", "--port", str(self.port), "--conf", "models", models,
                   "--conf", "zoo_source", "local", "--conf", "sam2", "false"]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(folder / "stand_in"), "CUDA_VISIBLE_DEVICES": "",
                       "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env=environment, cwd=folder, start_new_session=True
        )
        self.wait()

    def wait(self, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.tail()
            try:
                self.info = requests.get(f"{self.url}/info/", timeout=30).json()
                return
            except requests.ConnectionError:
                time.sleep(0.5)
        raise AssertionError(f"the server did not start: {self.tail()}")

    def tail(self) -> str:
        return Path(self.log.name).read_text(errors="replace")[-4000:]

    def infer(self, model: str, image: str, output: str = "image", **params: Any) -> requests.Response:
        """A request as the viewers send it: parameters as JSON in a form field."""
        return requests.post(f"{self.url}/infer/{model}", params={"image": image, "output": output},
                             data={"params": json.dumps({"device": "cpu", **params})}, timeout=600)  # fmt: skip

    def mask(self, model: str, image: str, **params: Any) -> nib.Nifti1Image:
        reply = self.infer(model, image, result_extension=".nii.gz", result_dtype="uint8", **params)
        assert reply.status_code == 200, self.tail()
        path = self.folder / "reply.nii.gz"
        path.write_bytes(reply.content)
        loaded = nib.load(path)
        return nib.Nifti1Image(np.asarray(loaded.dataobj).astype(np.uint8), loaded.affine)

    def train(self, model: str, seconds: float = 900, **params: Any) -> str:
        """Train and wait; the final status."""
        reply = requests.post(f"{self.url}/train/{model}", json={"device": "cpu", **params}, timeout=60)
        assert reply.status_code == 200, reply.text
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status = requests.get(f"{self.url}/train/", timeout=60).json()["status"]
            if status not in ("SUBMITTED", "RUNNING"):
                return status
            time.sleep(1.0)
        return "timeout"

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


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
    return root


@pytest.fixture(scope="session")
def server(label_python: Path, studies: Path) -> Iterator[Server]:
    for arguments in (["--bundle", BUNDLES / "medsa_btcv", "--overlay", "hippocampus.yaml"],
                      ["--bundle", BUNDLES / "medsa_isic"]):  # fmt: skip
        subprocess.run([str(label_python), "-m", "medsa_nets.label", str(studies / "app"), *map(str, arguments)],
                       check=True, timeout=300)  # fmt: skip
    running = Server(label_python, studies, str(studies / "studies"), f"{HIPPOCAMPUS},{LESION}")
    yield running
    running.stop()
