"""A running MONAI Label server, and the requests that viewers send to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests
from PIL import Image

# MONAI Label puts the folder that holds its environment before all others: the caller's paths go before that again.
# It imports torchvision, which does not import beside a CPU build of torch unless these operators are known.
STAND_IN = """
import os
import sys

sys.path[:0] = [path for path in os.environ.get("MEDSA_CALLER_PATH", "").split(os.pathsep) if path]
for lacking in os.environ.get("MEDSA_TEST_LACKS", "").split():  # a third of the time of MONAI's import
    sys.modules.setdefault(lacking, None)
try:
    import torch
    library = torch.library.Library("torchvision", "DEF")  # which lives as long as this name
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float threshold) -> Tensor")
except Exception:
    pass
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(process: subprocess.Popen) -> None:
    """Kill a process that leads a session, and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond a size in bytes."""
    import resource  # POSIX alone

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error when writing, not the end of the process


def add_bundle(python: Path, app: Path, bundle: Path, *overlays: str) -> None:
    """Set up the app as README has it."""
    extra = [part for overlay in overlays for part in ("--overlay", overlay)]
    command = [str(python), "-m", "medsa_nets.label", str(app), "--bundle", str(bundle), *extra]
    subprocess.run(command, check=True, timeout=300)


class Server:
    """A server as a user starts it, and its log.

    Args:
        python: Python of the environment that holds MONAI Label.
        folder: holds ``app``; log and cache go here.
        studies: folder of images, or address of a DICOMweb server.
        models: names of the models, comma-separated.
        conf: more settings of the app.
        largest_file: no file that the server or its trainings write may grow beyond this many bytes, as on a full disk.
    """

    def __init__(
        self, python: Path, folder: Path, studies: str, models: str, largest_file: int | None = None, **conf: str
    ) -> None:
        self.folder = folder
        self.app = folder / "app"
        (folder / "stand_in").mkdir(exist_ok=True)
        (folder / "stand_in" / "sitecustomize.py").write_text(STAND_IN)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = open(folder / f"server_{self.port}.log", "wb")  # noqa: SIM115 closed by stop()
        command = [str(python.parent / "monailabel"), "start_server", "--app", str(self.app), "--studies", studies,
                   "--host", "127.0.0.1", "--port", str(self.port), "--conf", "models", models,
                   "--conf", "zoo_source", "local", "--conf", "sam2", "false",
                   *(part for name, value in conf.items() for part in ("--conf", name, value))]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(folder / "stand_in"), "CUDA_VISIBLE_DEVICES": "",
                       "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
                       "MEDSA_CALLER_PATH": os.environ.get("PYTHONPATH", ""),
                       "MONAI_LABEL_DATASTORE_CACHE_PATH": str(folder / "cache")}  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env=environment, cwd=folder, start_new_session=True,
            preexec_fn=None if largest_file is None else lambda: limit_files(largest_file),
        )  # fmt: skip
        self.wait()

    def wait(self, seconds: float = 180) -> None:
        """Wait until the server answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.tail()
            try:
                self.info = requests.get(f"{self.url}/info/", timeout=60).json()
                return
            except requests.ConnectionError:
                time.sleep(0.5)
        raise AssertionError(f"the server did not start: {self.tail()}")

    def tail(self) -> str:
        """The end of the log."""
        return Path(self.log.name).read_text(errors="replace")[-4000:]

    def lines(self, *parts: str) -> int:
        """Number of the log's lines that hold all of these parts."""
        log = Path(self.log.name).read_text(errors="replace")
        return sum(all(part in line for part in parts) for line in log.splitlines())

    def infer(
        self, model: str, image: str, output: str = "image", drawn: Path | None = None, **params: Any
    ) -> requests.Response:
        """A request as the viewers send it: parameters as JSON in a form field, a label map of scribbles as a file."""
        files = {} if drawn is None else {"label": (drawn.name, drawn.read_bytes())}
        return requests.post(f"{self.url}/infer/{model}", params={"image": image, "output": output}, files=files,
                             data={"params": json.dumps({"device": "cpu", **params})}, timeout=600)  # fmt: skip

    def picture(self, model: str, image: str, **params: Any) -> np.ndarray:
        """The mask of a photograph (rows, columns)."""
        reply = self.infer(model, image, result_extension=".png", result_dtype="uint8", **params)
        assert reply.status_code == 200, self.tail()
        return np.asarray(Image.open(BytesIO(reply.content)))

    def mask(self, model: str, image: str, **params: Any) -> nib.Nifti1Image:
        """The mask that a request is answered with."""
        reply = self.infer(model, image, result_extension=".nii.gz", result_dtype="uint8", **params)
        assert reply.status_code == 200, self.tail()
        path = self.folder / f"reply_{time.monotonic_ns()}.nii.gz"
        path.write_bytes(reply.content)
        loaded = nib.load(path)
        values = np.asarray(loaded.dataobj).astype(np.uint8)
        path.unlink()
        return nib.Nifti1Image(values, loaded.affine)

    def save_label(self, image: str, path: Path) -> requests.Response:
        """Save a label, as viewers do."""
        with open(path, "rb") as file:
            return requests.put(f"{self.url}/datastore/label", params={"image": image}, files={"label": file},
                                data={"params": json.dumps({"label_info": []})}, timeout=60)  # fmt: skip

    def start_training(self, model: str, **params: Any) -> requests.Response:
        """Ask for a training."""
        return requests.post(f"{self.url}/train/{model}", json={"device": "cpu", **params}, timeout=60)

    def training_status(self) -> dict:
        """The newest training's state."""
        return requests.get(f"{self.url}/train/", timeout=60).json()

    def train(self, model: str, seconds: float = 900, **params: Any) -> str:
        """Train and wait; the final status."""
        reply = self.start_training(model, **params)
        assert reply.status_code == 200, reply.text
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status = self.training_status()["status"]
            if status not in ("SUBMITTED", "RUNNING"):
                return status
            time.sleep(1.0)
        return "timeout"

    def stop(self) -> None:
        """Kill the server."""
        stop(self.process)
        self.log.close()
