"""Seconds that the published client waits for a session server's answers: first click, later click, undo.

    python tests/benchmarks/server.py BUNDLE IMAGE X Y Z [--overlay FILE] [--shape 512,512,300] [--wait SECONDS]

Starts the server in a process of its own, opens the image (NIfTI, or a photograph), clicks on a voxel, beside it, and
takes both back. Beside the seconds that the client waited stand those that the server's process computed meanwhile, on
all cores together: on a machine that does nothing else, the wait is about a half of them with two cores. With --shape,
the volume is repeated to that size, in the same space. With --wait, that many seconds pass before the first click; with
--precomputed FOLDER, the server finds embeddings there.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import psutil
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession
from PIL import Image

PORT = 15279


def read(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """An image as clients send it."""
    if path.name.endswith((".nii", ".nii.gz")):
        scan = nibabel.load(path)
        return np.asarray(scan.dataobj)[None], {"affine": scan.affine}
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 1, 0)[..., None], {}


def enlarge(image: np.ndarray, affine: np.ndarray, shape: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A volume (1, X, Y, Z) with more voxels in the same space: the nearest of those that there were."""
    sizes = image.shape[1:]
    places = [np.arange(wanted) * n // wanted for wanted, n in zip(shape, sizes)]
    scale = np.array([n / wanted for wanted, n in zip(shape, sizes)])
    return image[np.ix_([0], *places)], affine @ np.diag([*scale, 1.0])


def processor() -> str:
    """Its name, and how busy the machine is."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return f"{name or platform.processor()}, {os.cpu_count()} processors, load {', '.join(f'{v:.1f}' for v in load)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("image", type=Path)
    parser.add_argument("position", type=int, nargs=3)
    parser.add_argument("--overlay", default="")
    parser.add_argument("--shape", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--precomputed", default="")
    parser.add_argument("--wait", type=float, default=0.0)
    options = parser.parse_args()
    command = [sys.executable, "-m", "medsa_nets", "serve", options.bundle, "--port", str(PORT)]
    command += ["--overlay", options.overlay] if options.overlay else []
    command += ["--precomputed", options.precomputed] if options.precomputed else []
    print(processor())
    server = subprocess.Popen(command)
    try:
        while True:
            try:
                session = nnInteractiveRemoteInferenceSession(f"http://127.0.0.1:{PORT}", read_timeout=300.0)
                break
            except httpx.ConnectError:
                if server.poll() is not None:
                    raise SystemExit("the server did not start") from None
                time.sleep(0.2)
        image, properties = read(options.image)
        if options.shape:
            image, properties["affine"] = enlarge(image, properties["affine"], options.shape)
        place = np.array(options.position)
        process = psutil.Process(server.pid)
        time.sleep(5.0)  # what the server does once
        beside = np.minimum(place + 2, np.array(image.shape[1:]) - 1)

        def measure(name: str, act: Any) -> None:
            before, start = process.cpu_times(), time.perf_counter()
            act()
            taken, after = time.perf_counter() - start, process.cpu_times()
            computed = after.user + after.system - before.user - before.system
            voxels = 0 if session.target_buffer is None else int(session.target_buffer.sum())
            print(f"{name:<12} {taken:8.3f} s   computed {computed:6.2f} s   {voxels} voxels", flush=True)

        measure("set_image", lambda: session.set_image(image, properties))
        session.set_target_buffer(np.zeros(image.shape[1:], np.uint8))
        time.sleep(options.wait)
        measure("first click", lambda: session.add_point_interaction(place.tolist(), True))
        measure("later click", lambda: session.add_point_interaction(beside.tolist(), True))
        measure("undo", session.undo)
        measure("later click", lambda: session.add_point_interaction(beside.tolist(), False))
        measure("undo", session.undo)
        session.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
