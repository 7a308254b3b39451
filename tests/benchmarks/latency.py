"""How long a viewer waits: clicks and automatic masks through a real MONAI Label server.

    python tests/benchmarks/latency.py --scans /path/to/ct --label_python .venv-label/bin/python

Serves ``ct_a.nii.gz`` by the bundle medsa_btcv, and asks as a viewer does: the first
click on the study, a second one at once, the same request again until its mask comes from all slabs (seconds since the
first request), later clicks on several organs (which decode the slabs of one organ), and an automatic pass over a copy
of the study that the server has not seen, followed by a click. Before, a study of eight slices lets the server load its
model. Prints seconds between request and reply, those that the server computed meanwhile on all cores together (what is
encoded for later requests among them), and the ratio of the wait to that of a later click.
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
import psutil
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "label"))
from server import Server, add_bundle


def processor() -> str:
    """Its name, and how busy the machine is."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name}, {psutil.cpu_count()} processors, load {', '.join(f'{v:.1f}' for v in psutil.getloadavg())}"


BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_btcv"
MODEL = "medsa_btcv_deepedit"
PARTLY = "the answer shows the slab around the newest click"  # in the server's log
ORGANS = {"spleen": 1, "right kidney": 2, "liver": 5, "stomach": 6, "aorta": 52}  # TotalSegmentator's numbers


def click_in(label: np.ndarray, value: int) -> list[int]:
    """The deepest voxel of an organ."""
    depth = ndimage.distance_transform_edt(label == value)
    return [int(i) for i in np.unravel_index(int(depth.argmax()), depth.shape)]


def computed(server: Server) -> float:
    """Processor seconds of the server and what it started."""
    leader = psutil.Process(server.process.pid)
    times = [process.cpu_times() for process in (leader, *leader.children(recursive=True))]
    return sum(own.user + own.system for own in times)


def ask(server: Server, model: str, image: str, **params: object) -> tuple[float, float]:
    """Seconds from the request to the whole reply, and those that were computed meanwhile."""
    before, start = computed(server), time.perf_counter()
    reply = server.infer(model, image, result_extension=".nrrd", result_dtype="uint8", result_compress=False, **params)
    seconds = time.perf_counter() - start
    assert reply.status_code == 200, f"{reply.text} {server.tail()}"
    return seconds, computed(server) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=Path, required=True, help="folder with ct_a.nii.gz")
    parser.add_argument("--label_python", type=Path, required=True, help="Python of MONAI Label's environment")
    parser.add_argument("--short", action="store_true", help="the first two clicks, and one later")
    options = parser.parse_args()
    scan = nib.load(options.scans / "ct_a.nii.gz")
    label = np.asarray(nib.load(options.scans / "ct_a_totalsegmentator.nii.gz").dataobj)
    clicks = {organ: click_in(label, value) for organ, value in ORGANS.items()}
    beside = [clicks["spleen"][0] + 2, *clicks["spleen"][1:]]
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
            rows = []
            start, before, partly = time.perf_counter(), computed(server), server.lines(PARTLY)
            rows.append(("first click, new study", ask(server, MODEL, "first", spleen=[clicks["spleen"]])))
            both = {"spleen": [clicks["spleen"]], "liver": [clicks["liver"]]}
            rows.append(("second click, at once", ask(server, MODEL, "first", **both)))
            while server.lines(PARTLY) > partly:
                partly = server.lines(PARTLY)
                time.sleep(1.0)
                ask(server, MODEL, "first", **both)
            whole = time.perf_counter() - start, computed(server) - before
            rows.append(("until the mask comes from all slabs", whole))
            later = {"spleen": ask(server, MODEL, "first", **{**both, "spleen": [clicks["spleen"], beside]})}
            if not options.short:
                later = {organ: ask(server, MODEL, "first", **{organ: [place]}) for organ, place in clicks.items()}
                rows.append(("automatic pass after a click", ask(server, f"{MODEL}_seg", "first")))
                rows.append(("automatic pass, new study", ask(server, f"{MODEL}_seg", "second")))
                after = ask(server, MODEL, "second", spleen=[clicks["spleen"]])
                rows.append(("first click after an automatic pass", after))
        finally:
            server.stop()
    median = statistics.median(waited for waited, _ in later.values())
    rows += [(f"later click: {organ}", own) for organ, own in later.items()]
    print(processor())
    print("| request | seconds | computed | in later clicks |\n| --- | --- | --- | --- |")
    for name, (waited, own) in rows:
        print(f"| {name} | {waited:.2f} | {own:.2f} | {waited / median:.1f} |")


if __name__ == "__main__":
    main()
