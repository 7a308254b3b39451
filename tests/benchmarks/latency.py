"""How long a viewer waits: clicks and automatic masks through a real MONAI Label server.

    python tests/benchmarks/latency.py --scans /path/to/ct --label_python .venv-label/bin/python

Serves ``ct_a.nii.gz`` by the bundle medsa_btcv, and asks as a viewer does: the first
click on the study, a second one at once, the same request again until its mask comes from all slabs (seconds since the
first request), later clicks on several organs (which decode the slabs of one organ), and an automatic pass over a copy
of the study that the server has not seen, followed by a click. Before, a study of eight slices lets the server load its
model. Prints seconds between request and reply, and the ratio to a later click.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "label"))
from server import Server, add_bundle

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_btcv"
MODEL = "medsa_btcv_deepedit"
PARTLY = "the answer shows the slab around the newest click"  # in the server's log
ORGANS = {"spleen": 1, "right kidney": 2, "liver": 5, "stomach": 6, "aorta": 52}  # TotalSegmentator's numbers


def click_in(label: np.ndarray, value: int) -> list[int]:
    """The deepest voxel of an organ."""
    depth = ndimage.distance_transform_edt(label == value)
    return [int(i) for i in np.unravel_index(int(depth.argmax()), depth.shape)]


def ask(server: Server, model: str, image: str, **params: object) -> float:
    """Seconds from the request to the whole reply."""
    start = time.perf_counter()
    reply = server.infer(model, image, result_extension=".nrrd", result_dtype="uint8", result_compress=False, **params)
    seconds = time.perf_counter() - start
    assert reply.status_code == 200, server.tail()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=Path, required=True, help="folder with ct_a.nii.gz")
    parser.add_argument("--label_python", type=Path, required=True, help="Python of MONAI Label's environment")
    options = parser.parse_args()
    scan = nib.load(options.scans / "ct_a.nii.gz")
    label = np.asarray(nib.load(options.scans / "ct_a_totalsegmentator.nii.gz").dataobj)
    clicks = {organ: click_in(label, value) for organ, value in ORGANS.items()}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "studies").mkdir()
        values = scan.get_fdata(dtype=np.float32)
        for name, array in (("first", values), ("second", values + 1.0), ("warm", values[:, :, :8])):
            nib.save(nib.Nifti1Image(array, scan.affine), root / "studies" / f"{name}.nii.gz")
        add_bundle(options.label_python.absolute(), root / "app", BUNDLE)
        server = Server(options.label_python.absolute(), root, str(root / "studies"), MODEL)
        try:
            ask(server, MODEL, "warm", liver=[[40, 50, 4]])
            ask(server, f"{MODEL}_seg", "warm")
            start, partly = time.perf_counter(), server.lines(PARTLY)
            first = ask(server, MODEL, "first", spleen=[clicks["spleen"]])
            both = {"spleen": [clicks["spleen"]], "liver": [clicks["liver"]]}
            second = ask(server, MODEL, "first", **both)
            while server.lines(PARTLY) > partly:
                partly = server.lines(PARTLY)
                time.sleep(1.0)
                ask(server, MODEL, "first", **both)
            whole = time.perf_counter() - start
            later = {organ: ask(server, MODEL, "first", **{organ: [place]}) for organ, place in clicks.items()}
            again = ask(server, f"{MODEL}_seg", "first")
            automatic = ask(server, f"{MODEL}_seg", "second")
            after = ask(server, MODEL, "second", spleen=[clicks["spleen"]])
        finally:
            server.stop()
    median = statistics.median(later.values())
    rows = [("automatic pass, new study", automatic), ("first click, new study", first),
            ("second click, at once", second), ("until the mask comes from all slabs", whole),
            ("first click after an automatic pass", after), ("automatic pass after a click", again),
            *((f"later click: {organ}", seconds) for organ, seconds in later.items()),
            ("later click, median", median)]  # fmt: skip
    print("| request | seconds | in later clicks |\n| --- | --- | --- |")
    for name, seconds in rows:
        print(f"| {name} | {seconds:.2f} | {seconds / median:.1f} |")


if __name__ == "__main__":
    main()
