"""A real PACS (Orthanc with its DICOMweb plugin) and a real browser (Chromium)."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import pydicom
import requests
from pydicom.uid import generate_uid
from selenium import webdriver

from .server import free_port, stop

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def missing() -> str:
    """What is not installed, for a test to skip with."""
    absent = [name for name in ("Orthanc", "chromium", "chromedriver") if shutil.which(name, path=_PATH) is None]
    if not PLUGIN.is_file():
        absent.append(str(PLUGIN))
    return ", ".join(absent)


_PATH = "/usr/sbin:/usr/bin:/usr/local/bin:/bin"


class Orthanc:
    """A PACS that holds the given files.

    Args:
        folder: its database goes here.
        files: DICOM files of one series.
    """

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        folder.mkdir()
        self.url = f"http://127.0.0.1:{free_port()}"
        self.dicom_web = f"{self.url}/dicom-web"
        configuration = {
            "StorageDirectory": str(folder / "db"),
            "IndexDirectory": str(folder / "db"),
            "HttpPort": int(self.url.rpartition(":")[2]),
            "DicomPort": free_port(),
            "AuthenticationEnabled": False,
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (folder / "orthanc.json").write_text(json.dumps(configuration))
        self.log = open(folder / "orthanc.log", "wb")  # noqa: SIM115 closed by stop()
        self.process = subprocess.Popen([shutil.which("Orthanc", path=_PATH) or "Orthanc", folder / "orthanc.json"],
                                        stdout=self.log, stderr=self.log, start_new_session=True)  # fmt: skip
        self._wait()
        self.study, self.series = generate_uid(), generate_uid()
        for path in files:
            self.store(path, folder / "part.dcm")

    def _wait(self) -> None:
        for _ in range(120):
            try:
                requests.get(f"{self.url}/system", timeout=10)
                return
            except requests.ConnectionError:
                time.sleep(0.5)
        raise AssertionError("Orthanc did not start")

    def store(self, path: Path, part: Path) -> None:
        """Store a file.

        The shared series lost its identifiers when it was made anonymous: it is given new ones. It is in JPEG 2000,
        which Orthanc hands out as it is, or not at all: MONAI Label's proxy drops the viewer's ``Accept``, and then
        plain pixels are asked for.
        """
        data = pydicom.dcmread(path)
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID = self.study, self.series
        data.PatientID = data.PatientName = "anonymous"
        data.decompress(generate_instance_uid=False)
        data.save_as(part)
        reply = requests.post(f"{self.url}/instances", data=part.read_bytes(), timeout=60)
        assert reply.status_code == 200, reply.text

    def segmentations(self) -> list[str]:
        """Orthanc's names of the stored DICOM segmentations."""
        query = {"Level": "Instance", "Query": {"Modality": "SEG"}}
        return list(requests.post(f"{self.url}/tools/find", json=query, timeout=60).json())

    def stop(self) -> None:
        """Kill the PACS."""
        stop(self.process)
        self.log.close()


def browser(width: int = 1600, height: int = 1000) -> webdriver.Chrome:
    """A headless Chromium that draws WebGL in software."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium", path=_PATH) or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}",
                     "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver", path=_PATH) or "chromedriver")
    return webdriver.Chrome(options=options, service=service)
