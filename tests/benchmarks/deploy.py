"""Studies per minute and peak memory of the MONAI Deploy application: eager, TorchScript, OpenVINO.

    python tests/benchmarks/deploy.py --scans /path/to/ct --deploy_python .venv-deploy/bin/python --output_dir results

Each run is a process of its own that segments copies of ``ct_b`` (20 slices of 512 x 512) as users start it, with the
bundle medsa_btcv; the kinds take turns. Times hold reading, segmentation, DICOM objects and report, and what a
process spends before its first study is told apart by runs of one study. Dice compares the masks of each kind with
those of ``eager``. Writes deploy.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import highdicom
import numpy as np
import pydicom
from pydicom.uid import generate_uid

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_btcv"
KINDS = {"eager": [], "TorchScript": [], "OpenVINO": ["--backend", "openvino"]}


def copy_study(source: Path, target: Path) -> None:
    """Copy a series that lost its identifiers, with new ones."""
    target.mkdir(parents=True)
    uids = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    for file in source.iterdir():
        data = pydicom.dcmread(file)
        for name, uid in uids.items():
            setattr(data, name, uid)
        data.SOPClassUID, data.SOPInstanceUID = data.file_meta.MediaStorageSOPClassUID, generate_uid()
        data.PatientID = data.PatientName = "anonymous^"
        data.save_as(target / file.name)


def run(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak memory in GB of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{said.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def masks(output: Path) -> dict[str, np.ndarray]:
    """Label maps by the series that they belong to."""
    out = {}
    for folder in output.iterdir():
        segmentation = highdicom.seg.segread(folder / "segmentation.dcm")
        uids = [i for _, _, i in segmentation.get_source_image_uids()]
        out[folder.name] = segmentation.get_pixels_by_source_instance(
            sorted(uids), combine_segments=True, assert_missing_frames_are_empty=True
        )
    return out


def mean_dice(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Mean Dice over series and the segments that either holds."""
    scores = []
    for name, one in a.items():
        for value in set(np.unique(one)) | set(np.unique(b[name])) - {0}:
            if value:
                x, y = one == value, b[name] == value
                scores.append(2 * (x & y).sum() / (x.sum() + y.sum()))
    return float(np.mean(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=Path, required=True, help="folder with ct_b_dicom")
    parser.add_argument("--deploy_python", type=Path, required=True, help="Python with MONAI Deploy and OpenVINO")
    parser.add_argument("--studies", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("deploy"))
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    base = [str(options.deploy_python.absolute()), "-m", "medsa_nets.deploy"]
    rows: dict[str, dict[str, list[float]]] = {k: {"one": [], "all": [], "memory": [], "dice": []} for k in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for i in range(options.studies):
            copy_study(options.scans / "ct_b_dicom", root / "all" / str(i))
        run([*base, "export", "-m", str(BUNDLE), "-o", str(root / "ct.ts")])
        for repeat in range(options.repeats):
            found: dict[str, dict[str, np.ndarray]] = {}
            for kind, extra in KINDS.items():
                model = ["-m", str(root / "ct.ts")] if kind == "TorchScript" else ["-m", str(BUNDLE)]
                row = rows[kind]
                for name, place in (("one", root / "all" / "0"), ("all", root / "all")):
                    output = root / f"{kind}_{name}_{repeat}"
                    seconds, memory = run([*base, "-i", str(place), "-o", str(output), *model, *extra])
                    row[name].append(seconds)
                row["memory"].append(memory)
                found[kind] = masks(output)
                row["dice"].append(mean_dice(found["eager"], found[kind]))
                print(repeat, kind, {key: round(values[-1], 3) for key, values in row.items()}, flush=True)
    count = options.studies
    heads = ["kind", "seconds, one study", "seconds for each further study", "studies per minute", "peak memory, GB",
             "Dice with eager"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for kind, row in rows.items():
        further = median((a - o) / (count - 1) for a, o in zip(row["all"], row["one"]))
        cells = [f"{median(row['one']):.1f}", f"{further:.1f}", f"{60 * count / median(row['all']):.1f}",
                 f"{median(row['memory']):.2f}", f"{median(row['dice']):.4f}"]  # fmt: skip
        lines.append("| " + " | ".join([kind, *cells]) + " |")
    for kind in list(KINDS)[1:]:
        ratios = [a / b for a, b in zip(rows["eager"]["all"], rows[kind]["all"])]
        lines.append(f"\n{kind}: {median(ratios):.2f} times the studies per minute of eager (median of paired ratios).")
    (options.output_dir / "deploy.json").write_text(json.dumps(rows, indent=1))
    (options.output_dir / "deploy.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
