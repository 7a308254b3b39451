"""The server's page, in a real browser; and what it is made of.

The pictures of the documents, by the bundles' own networks on real images (``MEDSA_TEST_DATA``), go to a folder:
MEDSA_ARTEFACTS=FOLDER python -m pytest -m slow tests/server/test_page.py
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import distance_transform_edt

from medsa_nets.errors import DataError
from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.server import page
from medsa_nets.server.arrays import pack_array, unpack_array
from medsa_nets.server.errors import RequestError

from .conftest import BUNDLES
from .scenes import make_photograph, make_volume, write_photograph, write_volume

PATH = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/lib/chromium"
ORGANS = {"liver": 5, "spleen": 1}  # TotalSegmentator's numbers
MAX_BYTES = 300_000  # of a picture


@pytest.fixture(scope="module")
def niivue() -> None:
    """NiiVue's file."""
    try:
        page.fetch_niivue()
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture
def browser(niivue: None, tmp_path: Path) -> Iterator[Any]:
    """A headless Chromium that draws WebGL in software, and saves to ``tmp_path``."""
    webdriver = pytest.importorskip("selenium.webdriver")
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name, path=PATH) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)} (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium", path=PATH) or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,800",
                     "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"):  # fmt: skip
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver", path=PATH) or "chromedriver")
    )
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


def wait(found: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What is found, as soon as there is something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        out = found()
        if out:
            return out
        time.sleep(0.1)
    raise AssertionError("it did not come")


def status(driver: Any) -> str:
    return driver.find_element("id", "status").text


def open_image(driver: Any, address: str, path: Path) -> None:
    driver.get(address)
    wait(lambda: driver.execute_script("return window.medsa && window.medsa.ready"))
    driver.find_element("id", "file").send_keys(str(path))
    wait(lambda: not status(driver).startswith(("Open", "Reading")))
    assert status(driver).startswith("Click on what"), status(driver)


def click(driver: Any, right: int, down: int) -> None:
    """Click on the view, from its middle, and wait for the answer."""
    from selenium.webdriver import ActionChains

    view = driver.find_element("id", "view")
    ActionChains(driver).move_to_element_with_offset(view, right, down).click().perform()
    wait(lambda: "voxels" in status(driver))


def run(driver: Any, code: str) -> Any:
    """Run JavaScript that gives a promise."""
    return driver.execute_async_script(f"const done = arguments[arguments.length - 1]; ({code}).then(done)")


def saved(driver: Any, folder: Path) -> nibabel.Nifti1Image:
    path = folder / "segmentation.nii"
    path.unlink(missing_ok=True)
    driver.find_element("id", "download").click()
    wait(lambda: path.is_file() and path.stat().st_size > 352)
    return nibabel.load(path)


def test_a_volume_is_segmented_in_the_browser_as_by_the_published_client(volumes, serve, connect, browser, tmp_path):
    address, _ = serve(volumes)
    path = write_volume(make_volume(), tmp_path / "volume.nii.gz")
    scan = nibabel.load(path)
    open_image(browser, address, path)
    assert [option.text for option in browser.find_elements("tag name", "option")] == [
        "by the first click", *volumes.classes, "foreground"
    ]  # fmt: skip
    click(browser, -150, -150)  # into one of the planes
    assert "voxels" in status(browser)
    run(browser, "act(async () => show(await post('undo')))")
    run(browser, "sendPoint([9, 11, 8], true)")
    run(browser, "sendScribble([[4, 6, 8], [8, 9, 10]], false)")
    client = connect(address)
    client.set_image(np.asarray(scan.dataobj)[None], {"affine": scan.affine})
    client.set_target_buffer(np.zeros(scan.shape, np.uint8))
    client.add_point_interaction([9, 11, 8], True)
    first = client.target_buffer.copy()
    drawn = np.zeros(scan.shape, np.uint8)
    for step in range(5):
        drawn[4 + step, 6 + int(np.floor(0.75 * step + 0.5)), 8 + int(np.floor(0.5 * step + 0.5))] = 1
    client.add_scribble_interaction(drawn, False)
    found = saved(browser, tmp_path)
    assert np.array_equal(np.asarray(found.dataobj), client.target_buffer)
    assert np.allclose(found.affine, scan.affine)
    browser.find_element("id", "undo").click()
    wait(lambda: f"{int(first.sum())} voxels" in status(browser))
    assert np.array_equal(np.asarray(saved(browser, tmp_path).dataobj), first)
    browser.find_element("id", "next").click()
    wait(lambda: status(browser).startswith("Object 2"))
    free = [int(n) for n in np.argwhere(first == 0)[-1]]
    run(browser, f"sendPoint({free}, true)")
    both = np.asarray(saved(browser, tmp_path).dataobj)
    assert np.array_equal(both == 1, first == 1)
    assert (both == 2).any()
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [entry for entry in severe if "favicon" not in entry["message"]]


def test_a_photograph_is_segmented_and_a_session_that_is_over_goes_on(photographs, serve, connect, browser, tmp_path):
    address, server = serve(photographs)
    image = make_photograph()
    open_image(browser, address, write_photograph(image, tmp_path / "photograph.png"))
    run(browser, "sendPoint([30, 20, 0], true)")
    client = connect(address)
    client.set_image(image, {})
    client.set_target_buffer(np.zeros(image.shape[1:], np.uint8))
    client.add_point_interaction([30, 20, 0], True)
    assert np.array_equal(np.asarray(saved(browser, tmp_path).dataobj), client.target_buffer)
    server.leases.clear()
    run(browser, "sendPoint([30, 20, 0], true)")
    assert "voxels" in status(browser)


@pytest.mark.parametrize("kind", ["int16", "float32", "uint8", "float64"])
def test_arrays_that_are_not_compressed_are_the_same_on_the_other_side(kind):
    array = (np.arange(24).reshape(1, 2, 3, 4) * 3).astype(kind)
    packed = pack_array(array, raw=True)
    assert np.array_equal(unpack_array(packed, array.nbytes), array)
    for damaged in (packed[:-1], packed[:-30], packed[: -array.nbytes] + packed[-array.nbytes - 1 :]):
        if damaged != packed:
            try:
                assert unpack_array(damaged, array.nbytes).shape == array.shape
            except RequestError as error:
                assert "array" in str(error)  # noqa: PT017
    with pytest.raises(RequestError, match="cut"):
        unpack_array(packed[:-1], array.nbytes)
    with pytest.raises(RequestError, match="takes"):
        unpack_array(packed, array.nbytes - 1)


def test_the_page_needs_no_key_and_gives_nothing_else(volumes, serve, niivue):
    address, _ = serve(volumes, api_key="secret")
    for name in ("", "page/annotate.js", "page/style.css", f"page/{page.NIIVUE_FILE}"):
        answer = httpx.get(f"{address}/{name}")
        assert answer.status_code == 200, name
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert httpx.get(f"{address}/capabilities").status_code == 401
    assert httpx.post(f"{address}/", content=b"").status_code == 401
    for name in ("page/__init__.py", "page/..%2fcommand.py", "page/%2e%2e/command.py", "page/"):
        assert httpx.get(f"{address}/{name}").status_code in (401, 404), name


def test_another_niivue_is_refused(tmp_path, monkeypatch, niivue):
    target = tmp_path / "niivue.js"
    shutil.copy(page.FOLDER / page.NIIVUE_FILE, target)
    assert page.fetch_niivue(target) == target  # what is there is not fetched again
    assert hashlib.sha256(target.read_bytes()).hexdigest() == page.NIIVUE_SHA256
    target.write_bytes(b"something else")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm is not installed"):
        page.fetch_niivue(target)


def test_a_page_without_niivue_says_what_to_do(volumes, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    answer = httpx.get(serve(volumes)[0])
    assert answer.status_code == 503
    assert "python -m medsa_nets.server.page" in answer.text


def test_a_class_of_the_next_object(volumes, serve, connect):
    address, _ = serve(volumes)
    client = connect(address)
    image = make_volume()
    client.set_image(image, {})
    http, shape = client._http, list(image.shape[1:])
    assert http.post("/set_target_buffer", json={"shape": shape, "class": "posterior"}).status_code == 200
    answer = http.post("/add_point_interaction", json={"coordinates": [9, 11, 8], "include_interaction": True})
    assert '"class": "posterior"' in answer.headers["X-Meta"]
    assert http.post("/set_target_buffer", json={"shape": shape, "class": "liver"}).status_code == 400


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    """Where pictures stay: the folder that MEDSA_ARTEFACTS names, or a temporary one."""
    folder = Path(os.environ.get("MEDSA_ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def deepest(mask: np.ndarray) -> list[int]:
    """The voxel of a mask that lies farthest from its border, and from that of the image."""
    depth = distance_transform_edt(np.pad(mask, 1))[(slice(1, -1),) * mask.ndim]
    return [int(n) for n in np.unravel_index(depth.argmax(), mask.shape)]


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2.0 * (one & other).sum() / max(1, one.sum() + other.sum()))


def click_on(driver: Any, voxel: list[int]) -> None:
    """Turn the planes to a voxel (X, Y, Z), click on it, and wait for the whole answer."""
    place = driver.execute_script(
        "const at = (row) => row[3] + arguments[0].reduce((sum, n, i) => sum + row[i] * n, 0);"
        "const place = viewer.mm2frac(state.affine.slice(0, 3).map(at)), canvas = element('view');"
        "viewer.scene.crosshairPos = place; viewer.drawScene();"
        "const [x, y] = viewer.frac2canvasPos(place), scale = canvas.width / canvas.clientWidth;"
        "return [x / scale - canvas.clientWidth / 2, y / scale - canvas.clientHeight / 2];",
        voxel,
    )
    click(driver, *(round(n) for n in place))
    driver.find_element("id", "whole").click()
    wait(lambda: "voxels" in status(driver) and "part" not in status(driver), 600.0)


def take_picture(driver: Any, path: Path, colours: int = 256) -> None:
    """What the browser shows, in so many colours."""
    Image.open(BytesIO(driver.get_screenshot_as_png())).convert("RGB").quantize(colours).save(path, optimize=True)
    assert path.stat().st_size < MAX_BYTES


@pytest.mark.slow
def test_organs_of_a_ct_are_clicked_for_a_picture(serve, browser, shared_data, tmp_path, artefacts):
    ct, labels = shared_data / "ct" / "ct_a.nii.gz", shared_data / "ct" / "ct_a_totalsegmentator.nii.gz"
    if not ct.is_file():
        pytest.skip(f"{ct} is not there: set MEDSA_TEST_DATA")
    truth = np.asarray(nibabel.load(labels).dataobj)
    address, _ = serve(NetworkSegmenter.from_bundle(BUNDLES / "medsa_btcv"), memory=2**30)
    open_image(browser, address, ct)
    for number, (organ, value) in enumerate(ORGANS.items(), 1):
        if number > 1:
            browser.find_element("id", "next").click()
            wait(lambda: status(browser).startswith("Object"))
        click_on(browser, deepest(truth == value))
        assert status(browser).startswith(organ)
    found = np.asarray(saved(browser, tmp_path).dataobj)
    for number, value in enumerate(ORGANS.values(), 1):
        assert dice(found == number, truth == value) > 0.85
    take_picture(browser, artefacts / "server_page.png")


@pytest.mark.slow
def test_a_lesion_is_clicked_for_a_picture(serve, browser, shared_data, tmp_path, artefacts):
    source = shared_data / "isic2017" / "full_resolution"
    path = source / "images" / "ISIC_0014608.jpg"
    if not path.is_file():
        pytest.skip(f"{path} is not there: set MEDSA_TEST_DATA")
    truth = np.asarray(Image.open(source / "masks" / f"{path.stem}_segmentation.png")) > 127  # rows, columns
    address, _ = serve(NetworkSegmenter.from_bundle(BUNDLES / "medsa_isic"))
    open_image(browser, address, path)
    click_on(browser, [*deepest(truth.T), 0])
    assert dice(np.asarray(saved(browser, tmp_path).dataobj)[..., 0] > 0, truth.T) > 0.85
    take_picture(browser, artefacts / "server_photograph.png", 128)
