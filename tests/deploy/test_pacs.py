"""A real PACS: Orthanc receives a study, the application segments it, and its result is stored beside it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
import requests
from PIL import Image

from .conftest import CT, Command

pytestmark = pytest.mark.deploy
PATH = "/usr/sbin:/usr/bin:/usr/local/bin:/bin"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Pacs:
    """Orthanc with an empty database."""

    def __init__(self, folder: Path) -> None:
        self.dicom_port, http = free_port(), free_port()
        self.url = f"http://127.0.0.1:{http}"
        settings = {"StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "HttpPort": http,
                    "DicomPort": self.dicom_port, "DicomAet": "ORTHANC", "AuthenticationEnabled": False,
                    "DicomCheckCalledAet": False}  # fmt: skip
        (folder / "orthanc.json").write_text(json.dumps(settings))
        self.log = open(folder / "orthanc.log", "wb")  # noqa: SIM115 closed by stop()
        program = shutil.which("Orthanc", path=PATH)
        assert program is not None
        self.process = subprocess.Popen([program, folder / "orthanc.json"], stdout=self.log, stderr=self.log)
        for _ in range(120):
            try:
                self.get("system")
                return
            except requests.ConnectionError:
                time.sleep(0.5)
        raise AssertionError("Orthanc did not start")

    def get(self, path: str) -> requests.Response:
        reply = requests.get(f"{self.url}/{path}", timeout=60)
        reply.raise_for_status()
        return reply

    def send(self, *files: Path) -> None:
        """Store files as a modality does (C-STORE), in the transfer syntax that they have."""
        command = ["storescu", "--propose-j2k-lossless" if compressed(files[0]) else "--propose-uncompr",
                   "--required", "--call", "ORTHANC", "127.0.0.1", str(self.dicom_port), *map(str, files)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def fetch(self, series: str, folder: Path) -> Path:
        """Write the instances of a series to a folder."""
        folder.mkdir(parents=True)
        for instance in self.get(f"series/{series}").json()["Instances"]:
            (folder / f"{instance}.dcm").write_bytes(self.get(f"instances/{instance}/file").content)
        return folder

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def compressed(file: Path) -> bool:
    return bool(pydicom.dcmread(file, stop_before_pixels=True).file_meta.TransferSyntaxUID.is_compressed)


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    absent = [name for name in ("Orthanc", "storescu") if shutil.which(name, path=PATH) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)}: not installed (Debian: orthanc dcmtk)")
    (tmp_path / "pacs").mkdir()
    running = Pacs(tmp_path / "pacs")
    yield running
    running.stop()


def test_a_study_goes_from_the_pacs_and_its_segmentation_back(
    pacs: Pacs, deploy: Command, oblique_ct: Path, tmp_path: Path
) -> None:
    pacs.send(*sorted(oblique_ct.iterdir()))
    (study,) = pacs.get("studies").json()
    (source,) = pacs.get(f"studies/{study}").json()["Series"]
    folder = pacs.fetch(source, tmp_path / "in")
    for run in (1, 2):
        done = deploy("-i", folder, "-o", tmp_path / "out", "-m", CT)
        assert done.status == 0, done.err
        result = Path(done.out.split()[-1])
        pacs.send(*sorted(result.glob("*.dcm")))
        assert len(pacs.get("studies").json()) == 1, "the segmentation is not in its source's study"
        series = [pacs.get(f"series/{uid}").json() for uid in pacs.get(f"studies/{study}").json()["Series"]]
        kinds = sorted(one["MainDicomTags"]["Modality"] for one in series)
        assert kinds == sorted(["CT", *["SEG", "SR"] * run])
    segmentation = next(one for one in series if one["MainDicomTags"]["Modality"] == "SEG")
    (instance,) = segmentation["Instances"]
    tags = pacs.get(f"instances/{instance}/simplified-tags").json()
    assert any(part["SegmentLabel"] == "liver" for part in tags["SegmentSequence"])
    # the PACS's own preview shows the segments' frames
    frames = pacs.get(f"instances/{instance}/frames").json()
    shown = [Image.open(BytesIO(pacs.get(f"instances/{instance}/frames/{frame}/preview").content)) for frame in frames]
    header = pydicom.dcmread(next(folder.iterdir()), stop_before_pixels=True)
    assert all(picture.size == (header.Columns, header.Rows) for picture in shown)
    assert sum(int((np.asarray(picture) > 0).sum()) for picture in shown) > 500
