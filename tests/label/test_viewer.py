"""The loop as a radiologist sees it: a study in a PACS, OHIF in a browser, automatic masks, a click, a saved label."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import requests
from PIL import Image
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from .conftest import BUNDLES
from .pacs import Orthanc, browser, missing
from .server import Server, add_bundle

pytestmark = pytest.mark.label
MODEL = "medsa_btcv_deepedit"
# colours of OHIF's list of organs
LIVER, SPLEEN = (221, 130, 101), (157, 108, 162)
# what a page that is still being drawn answers with, and one whose message lies over what shall be pressed
NOT_YET = (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)


class Viewer:
    """OHIF, as the server hands it out, on one study."""

    def __init__(self, server: Server, study: str, artefacts: Path) -> None:
        self.artefacts = artefacts
        self.driver = browser()
        # the panel asks for the server on port 8000 unless a cookie says otherwise
        self.driver.get(f"{server.url}/info/")
        self.driver.add_cookie({"name": "MONAILABEL_SERVER_URL", "value": f"{server.url}/", "path": "/"})
        self.driver.get(f"{server.url}/ohif/monai-label?StudyInstanceUIDs={study}")
        self.until(lambda driver: driver.find_elements(By.ID, "monailabelServerURL"))
        self.until(lambda _: self.brightness() > 30, 120)  # the slice is drawn
        self.press("//button[contains(., 'Confirm and Hide')]")
        self.press("//*[contains(@class, 'settingsTable')]//*[contains(@class, 'actionButton')]")
        self.find("//label[contains(., 'Auto-Segmentation')]")

    def until(self, condition: Callable[[Any], Any], seconds: float = 60) -> Any:
        return WebDriverWait(self.driver, seconds, ignored_exceptions=NOT_YET).until(condition)

    def find(self, path: str) -> WebElement:
        return self.until(lambda driver: driver.find_element(By.XPATH, path))

    def press(self, path: str) -> None:
        """Press what stands at a path, once none of the viewer's passing messages lies over it."""

        def pressed(driver: WebDriver) -> bool:
            element = driver.find_element(By.XPATH, path)
            driver.execute_script("arguments[0].scrollIntoView({block: 'nearest'})", element)
            element.click()
            return True

        self.until(pressed)

    def pixels(self) -> np.ndarray:
        """What the axial view shows: (rows, columns, RGB)."""
        canvas = self.driver.find_elements(By.TAG_NAME, "canvas")[0]
        return np.asarray(Image.open(BytesIO(canvas.screenshot_as_png)).convert("RGB")).astype(int)

    def brightness(self) -> float:
        drawn = self.driver.find_elements(By.TAG_NAME, "canvas")
        return float(np.percentile(self.pixels().max(axis=2), 95)) if drawn else 0.0

    def tinted(self, colour: tuple[int, int, int]) -> np.ndarray:
        """Pixels of the axial view whose tint is that of a colour."""
        pixels = self.pixels()
        tint = pixels - pixels.mean(axis=2, keepdims=True)
        wanted = np.array(colour) - np.mean(colour)
        strength = np.linalg.norm(tint, axis=2)
        cosine = (tint @ wanted) / np.maximum(strength * np.linalg.norm(wanted), 1e-6)
        return (strength > 15) & (cosine > 0.97)

    def segment(self) -> None:
        self.press("//button[@title='Run Segmentation']")
        self.until(
            lambda d: d.find_elements(By.XPATH, "//*[contains(text(), 'Running Segmentation - Successful')]"), 300
        )

    def click(self, organ: str, row: int, column: int) -> None:
        """Choose an organ, click at a place of the axial view, and ask for its mask."""
        if not self.driver.find_element(By.XPATH, "//button[@title='Run PointPrompts']").is_displayed():
            self.press("//label[contains(., 'Point Prompts')]")
        self.press(f"//tr[contains(@class, 'clickable-row')][normalize-space(.)='{organ}']")
        canvas = self.driver.find_elements(By.TAG_NAME, "canvas")[0]
        right, down = column - canvas.size["width"] // 2, row - canvas.size["height"] // 2
        for _ in range(5):  # the tool takes a moment to become active
            ActionChains(self.driver).move_to_element_with_offset(canvas, right, down).pause(0.5).click().perform()
            time.sleep(1.0)
            if self.driver.find_elements(By.CSS_SELECTOR, "svg.svg-layer circle, svg.svg-layer path"):
                break
        self.press("//button[@title='Run PointPrompts']")
        self.until(lambda d: d.find_elements(By.XPATH, "//*[contains(text(), 'Point Prompts - Successful')]"), 150)

    def shoot(self, name: str) -> None:
        self.driver.save_screenshot(str(self.artefacts / f"{name}.png"))


@pytest.fixture(scope="module")
def orthanc(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    if missing():
        pytest.skip(f"not installed: {missing()} (Debian: orthanc orthanc-dicomweb chromium chromium-driver)")
    series = shared_data / "ct" / "ct_b_dicom"
    if not series.is_dir():
        pytest.skip(f"{series} is not there: set MEDSA_TEST_DATA")
    running = Orthanc(tmp_path_factory.mktemp("pacs") / "orthanc", sorted(series.iterdir()))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def ct_server(label_python: Path, orthanc: Orthanc, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ct_server")
    add_bundle(label_python, folder / "app", BUNDLES / "medsa_btcv")
    running = Server(label_python, folder, orthanc.dicom_web, MODEL)
    yield running
    running.stop()


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    """Where pictures stay: the folder that MEDSA_ARTEFACTS names, or a temporary one."""
    folder = Path(os.environ.get("MEDSA_ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_study_is_segmented_and_corrected_by_a_click_in_the_viewer(
    ct_server: Server, orthanc: Orthanc, artefacts: Path
) -> None:
    viewer = Viewer(ct_server, orthanc.study, artefacts)
    try:
        viewer.shoot("study")
        assert not viewer.tinted(LIVER).any()
        viewer.segment()
        viewer.until(lambda _: viewer.tinted(LIVER).sum() > 1000)
        viewer.shoot("automatic")
        liver, spleen = viewer.tinted(LIVER), viewer.tinted(SPLEEN)
        assert spleen.sum() > 300
        # the liver lies on the patient's right, which the view shows on the left
        assert np.median(np.nonzero(liver)[1]) < np.median(np.nonzero(spleen)[1])
        row, column = (int(np.median(v)) for v in np.nonzero(spleen))
        viewer.click("spleen", row, column)
        viewer.until(lambda _: viewer.tinted(SPLEEN)[row - 3 : row + 4, column - 3 : column + 4].any())
        viewer.shoot("click")
        # the liver was not clicked: it stays, but for voxels that the spleen took
        assert (viewer.tinted(LIVER) & liver).sum() > 0.95 * liver.sum()
    finally:
        viewer.shoot("end")
        viewer.driver.quit()


def test_a_saved_label_reaches_the_pacs_as_a_dicom_segmentation(
    ct_server: Server, orthanc: Orthanc, label_python: Path, tmp_path: Path
) -> None:
    if shutil.which("itkimage2segimage", path=str(label_python.parent)) is None:
        pytest.skip("dcmqi is not installed in MONAI Label's environment")
    mask = ct_server.mask(f"{MODEL}_seg", orthanc.series)
    nib.save(mask, tmp_path / "label.nii.gz")
    assert not orthanc.segmentations()
    reply = ct_server.save_label(orthanc.series, tmp_path / "label.nii.gz")
    assert reply.status_code == 200, reply.text
    (stored,) = orthanc.segmentations()
    segmentation = pydicom.dcmread(BytesIO(requests.get(f"{orthanc.url}/instances/{stored}/file", timeout=60).content))
    assert segmentation.SOPClassUID == pydicom.uid.SegmentationStorage
    assert segmentation.ReferencedSeriesSequence[0].SeriesInstanceUID == orthanc.series
    assert (segmentation.Rows, segmentation.Columns) == mask.shape[1::-1]
    numbers = {int(segment.SegmentNumber) for segment in segmentation.SegmentSequence}
    assert len(numbers) == len(np.unique(np.asarray(mask.dataobj))) - 1
