"""Peak memory of a training step and of inference on volumes, per base, slab depth and checkpointing.

    python tests/benchmarks/memory.py
    python tests/benchmarks/memory.py --laptop --limit 8     # the commands of a small computer, in 8 GiB each

With ``--laptop``, the demo, training of both bundles with their default settings (a few minutes; generated volumes as
large as those of BTCV), inference on a generated CT of 512 x 512 x 300 voxels, and clicks in it as a server answers
them. The peak is that of the command with all its processes; memory that they share counts once. ``--limit`` is the
largest size of each process's data (RLIMIT_DATA).

Each row is a process of its own on the CPU, with random weights; its peak resident memory is that of the whole process,
libraries included (about 0.5 GB). Training is one step on one slab in bfloat16 autocast with 13 classes asked for, four
at a time, and AdamW's state; inference is the automatic mode on a volume of 64 slices.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUNDLES = Path(__file__).parents[2] / "bundles"
ROWS = [
    ("training", base, 256, depth, checkpointing)
    for base, depths in (("lite_medsam", (4, 8, 16)), ("vit_b", (4, 8, 16)))
    for depth in depths
    for checkpointing in (True, False)
] + [("inference", base, 256, depth, False) for base in ("lite_medsam", "vit_b") for depth in (8, 16)]


def measure(stage: str, base: str, size: int, depth: int, checkpointing: bool) -> dict:
    """One row, in this process."""
    import torch

    from medsa_nets import build_medsa
    from medsa_nets.inferers import SlabInferer
    from medsa_nets.losses import AnnotatedDiceCELoss
    from medsa_nets.runtime import keep_freed_memory
    from medsa_nets.training import trainable_parameters

    torch.manual_seed(0)
    network = build_medsa(base, pretrained=False, spatial_dims=3, num_classes=13, img_size=size, class_chunk=4,
                          checkpointing=checkpointing)  # fmt: skip
    if stage == "training":
        keep_freed_memory()
        network.train()
        optimizer = torch.optim.AdamW(trainable_parameters(network))
        image, label = torch.rand(1, 1, size, size, depth), torch.rand(1, 13, size, size, depth) > 0.9
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(image)
        AnnotatedDiceCELoss()(logits.float(), label).backward()
        optimizer.step()
    else:
        network.eval()
        start = time.perf_counter()
        with torch.no_grad():
            SlabInferer(slab_depth=depth)(torch.rand(1, 1, size, size, 64), network)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak_bytes()}


def peak_bytes() -> int:
    """Peak of this process; what ``getrusage`` says begins with the peak of the process that started it."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # macOS, which has no /proc

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


CLICKS = """
import sys, torch
from monai.bundle import ConfigParser
parser = ConfigParser()
parser.read_config([sys.argv[1] + f"/configs/{name}.yaml" for name in ("inference", "server")])
parser.update({"bundle_root": sys.argv[1], "use_click": True})
parser["postprocessing#transforms"] = [t for t in parser["postprocessing#transforms"] if t["_target_"] != "SaveImaged"]
parser.get_parsed_content("initialize")
before, inferer, network, after = (
    parser.get_parsed_content(name) for name in ("preprocessing", "inferer", "network", "postprocessing")
)
network.eval()
for i in range(3):
    data = before({"image": sys.argv[2], "liver": [[256 + i, 256, 150]], "label": "liver"})
    with torch.no_grad():
        data["pred"] = inferer(data["image"][None], network)[0]
    after(data)
"""


def laptop(root: Path) -> dict[str, list[str]]:
    """Write the data below ``root``; the commands that are measured, by name."""
    import nibabel as nib
    import numpy as np

    from medsa_nets import build_medsa
    from medsa_nets.data.phantoms import write_phantoms
    from medsa_nets.training import save_atomically

    def scan(path: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
        x, y, z = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j, -1 : 1 : shape[2] * 1j]
        body, organ = x**2 + (1.3 * y) ** 2 + 0 * z < 0.6, x**2 + y**2 + z**2 < 0.1
        values = np.where(organ, 150, np.where(body, 40, -1000)).astype(np.int16)
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, np.diag([*spacing, 1.0])), path)
        if path.parent.name == "imagesTr":
            label = root / "btcv/labelsTr" / path.name
            label.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image((6 * organ).astype(np.uint8), np.diag([*spacing, 1.0])), label)

    scan(root / "ct/ct.nii.gz", (512, 512, 300), (0.8, 0.8, 1.5))
    first = root / "btcv/imagesTr/case_00.nii"
    scan(first, (512, 512, 140), (0.76, 0.76, 3.0))
    for i in range(1, 30):  # as many as BTCV has for training
        for folder in ("imagesTr", "labelsTr"):
            (root / "btcv" / folder / f"case_{i:02d}.nii").symlink_to(first.name)
    write_phantoms(root / "phantoms")
    adapter = root / "adapter.pt"
    save_atomically(build_medsa(spatial_dims=3, num_classes=13, classes_per_pass=13).state_dict(), adapter)
    isic, btcv = BUNDLES / "medsa_isic", BUNDLES / "medsa_btcv"

    def bundle(folder: Path, command: str, config: str, **settings: str) -> list[str]:
        settings = {"bundle_root": str(folder), "output_dir": str(root / folder.name), **settings}
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return [sys.executable, "-m", "monai.bundle", "run", command, "--config_file", str(folder / config), *words]

    train = {"max_epochs": "1", "val_interval": "1", "time_limit": "300"}
    return {
        "demo": [sys.executable, "-m", "medsa_nets.demo", "--bundle", str(isic), "--output_dir", str(root / "demo")],
        "training, medsa_isic": bundle(isic, "training", "configs/train.yaml", dataset_dir=str(root / "phantoms"),
                                       ckpt_dir=str(root / "isic"), **train),
        "training, medsa_btcv": bundle(btcv, "training", "configs/train.yaml", dataset_dir=str(root / "btcv"),
                                       ckpt_dir=str(root / "btcv_models"), val_limit="1", **train),
        "inference, CT of 512 x 512 x 300": bundle(btcv, "inferring", "configs/inference.yaml",
                                                   dataset_dir=str(root / "ct"), checkpoint=str(adapter)),
        "three clicks in that CT": [sys.executable, "-c", CLICKS, str(btcv), str(root / "ct/ct.nii.gz")],
    }  # fmt: skip


def tree_bytes(pid: int) -> int:
    """Memory of a process and of those that it has started, where shared memory counts once."""
    total = 0
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        total += 1024 * sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(tree_bytes(int(child)) for child in (task / "children").read_text(encoding="utf-8").split())
    except OSError:  # it has ended
        pass
    return total


def measure_laptop(limit: float, only: str) -> None:
    """Print the peak of each command."""

    def limited() -> None:
        if limit:
            import resource  # Windows has none

            resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 2**30),) * 2)

    print("| command | peak, GB | seconds | ended |\n" + "| --- " * 4 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for name, command in laptop(Path(folder)).items():
            if only not in name:
                continue
            start, peak = time.perf_counter(), 0
            with open(Path(folder) / "log", "w+", encoding="utf-8") as log:
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=limited)
                while process.poll() is None:
                    peak = max(peak, tree_bytes(process.pid))
                    time.sleep(0.1)
                log.seek(0)
                end = "well" if process.returncode == 0 else (log.read().splitlines() or [""])[-1]
            print(f"| {name} | {peak / 1e9:.2f} | {time.perf_counter() - start:.0f} | {end} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", help="measure this row (JSON) in this process")
    parser.add_argument("--base", help="measure this base only")
    parser.add_argument("--laptop", action="store_true", help="measure the commands of a small computer")
    parser.add_argument("--limit", type=float, default=0.0, help="with --laptop: GiB that a process may take; 0 is all")
    parser.add_argument("--only", default="", help="with --laptop: measure commands with this in their name only")
    options = parser.parse_args()
    if options.laptop:
        measure_laptop(options.limit, options.only)
        return
    if options.row:
        print(json.dumps(measure(*json.loads(options.row))))
        return
    print("| stage | base | size | slab depth | checkpointing | peak, GB | seconds |\n" + "| --- " * 7 + "|")
    for row in ROWS:
        command = [sys.executable, __file__, "--row", json.dumps(row)]
        if options.base not in (None, row[1]):
            continue
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == -signal.SIGKILL:
            cells = "more than there was | "
        else:
            result.check_returncode()
            measured = json.loads(result.stdout.splitlines()[-1])
            cells = f"{measured['peak'] / 1e9:.2f} | {measured['seconds']:.1f}"
        stage, base, size, depth, checkpointing = row
        state = ("on" if checkpointing else "off") if stage == "training" else ""
        print(f"| {stage} | {base} | {size} | {depth} | {state} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
