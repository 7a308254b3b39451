"""Fused attention against the explicit form of ``medsa_nets.layers.attend``, in training, per window of TinyViT.

python tests/benchmarks/attention.py [--maps]

Prints, for each window, the median over paired runs of time(fused) / time(explicit), forward and backward in bfloat16.
With --maps, for ViT-B's windows and whole maps, the times of the two ways to compute the bias of rows and columns in
inference (``medsa_nets.layers.attend_map``), as time(further columns of the product) / time(laid down first).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from medsa_nets.layers import attend, common

# windows, heads, tokens of TinyViT's attention stages for two images of 256 x 256 (LiteMedSAM); head width 32
WINDOWS = {
    "stage 1, 7 x 7": (2 * 361, 4, 49),
    "stage 2, 14 x 14": (2 * 25, 5, 196),
    "stage 3, 7 x 7": (2 * 100, 10, 49),
}
# images or windows, rows and columns of ViT-B's maps: a window, and whole maps at 256, 512 and 1024; 12 heads of 64
MAPS = {"25 windows of 14 x 14": (25, 14), "16 x 16": (1, 16), "32 x 32": (1, 32), "64 x 64": (1, 64)}


def seconds(function, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[float, float]:
    """Forward and backward time of one call."""
    start = time.perf_counter()
    out = function(q, k, v, bias)
    middle = time.perf_counter()
    out.float().sum().backward()
    return middle - start, time.perf_counter() - middle


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@torch.inference_mode()
def compare_maps(repeats: int) -> None:
    """Print a table of the two ways to compute the bias of a map's rows and columns."""
    print("| map | float32 | bfloat16 |\n| --- | --- | --- |")
    for name, (images, side) in MAPS.items():
        medians = []
        for dtype in (torch.float32, torch.bfloat16):
            common.LARGE_MAP = 1  # the rule in bfloat16 is what is measured here
            q, k, v = (torch.randn(images, side**2, 12, 64, dtype=dtype).transpose(1, 2) for _ in range(3))
            rows, columns = (torch.randn(images, 12, side**2, side, dtype=dtype) for _ in range(2))
            ratios = []
            for _ in range(repeats + 1):
                times = [time.perf_counter()]
                for function in (common._attend_by_columns, common.attend_map):
                    function(q, k, v, rows, columns, None, 0.125)
                    times.append(time.perf_counter())
                ratios.append((times[1] - times[0]) / (times[2] - times[1]))
            medians.append(statistics.median(ratios[1:]))
        print(f"| {name} | {medians[0]:.2f} | {medians[1]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--maps", action="store_true", help="measure the bias of rows and columns instead")
    options = parser.parse_args()
    if options.maps:
        compare_maps(options.repeats)
        return
    torch.manual_seed(0)
    print("| window | forward, fused / explicit | backward, fused / explicit |\n| --- | --- | --- |")
    for name, (windows, heads, tokens) in WINDOWS.items():
        q, k, v = (
            torch.randn(windows, tokens, heads, 32, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for _ in range(3)
        )
        bias = torch.randn(1, heads, tokens, tokens, dtype=torch.bfloat16)
        ratios = []
        for _ in range(options.repeats + 1):
            a, b = seconds(fused, q, k, v, bias), seconds(attend, q, k, v, bias)
            ratios.append((a[0] / b[0], a[1] / b[1]))
        forward, backward = (statistics.median(r) for r in zip(*ratios[1:]))
        print(f"| {name} | {forward:.2f} | {backward:.2f} |")


if __name__ == "__main__":
    main()
