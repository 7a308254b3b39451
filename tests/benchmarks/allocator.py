"""A training step on the CPU with and without ``keep_freed_memory``, interleaved in one run.

    python tests/benchmarks/allocator.py

Prints the median of paired ratios time(kept) / time(given back), for LiteMedSAM's adapters on images and on volumes.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from medsa_nets import build_medsa
from medsa_nets.runtime import keep_freed_memory

SHAPES = {2: (4, 3, 256, 256), 3: (2, 1, 80, 112, 16)}


def seconds(network: torch.nn.Module, image: torch.Tensor, keep: bool) -> float:
    """Wall-clock time of a step with two prompts, after one step that is not measured."""
    if not keep_freed_memory(keep):
        raise SystemExit("The C library of this machine has no mallopt; there is nothing to compare.")
    for _ in range(2):
        start = time.perf_counter()
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embedding = network.encode_image(image)
            dims = image.dim() - 2
            click = {"point_coords": torch.full((len(image), 1, 1, dims), 5.0)}
            click["point_labels"] = torch.ones(len(image), 1, 1)
            loss = network.decode(embedding).float().square().mean()
            loss = loss + network.decode(embedding, **click).float().square().mean()
        loss.backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print("| step | kept, s | given back, s | ratio |\n| --- | --- | --- | --- |")
    for dims, shape in SHAPES.items():
        torch.manual_seed(0)
        network = build_medsa("lite_medsam", spatial_dims=dims).train()
        image = torch.rand(shape)
        pairs = [(seconds(network, image, True), seconds(network, image, False)) for _ in range(options.repeats)]
        kept, given = (statistics.median(times) for times in zip(*pairs))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"| {dims}D, {' x '.join(map(str, shape))} | {kept:.2f} | {given:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
