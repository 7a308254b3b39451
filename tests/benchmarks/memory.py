"""Peak memory of a training step and of inference on volumes, per base, slab depth and checkpointing.

    python tests/benchmarks/memory.py

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
import time
from pathlib import Path

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
    from medsa_nets.engines import keep_freed_memory, trainable_parameters
    from medsa_nets.inferers import SlabInferer
    from medsa_nets.losses import AnnotatedDiceCELoss

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", help="measure this row (JSON) in this process")
    parser.add_argument("--base", help="measure this base only")
    options = parser.parse_args()
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
