"""Fused attention against the explicit form of ``medsa_nets.layers.attend``, in training, per window of TinyViT.

python tests/benchmarks/attention.py

Prints, for each window, the median over paired runs of time(fused) / time(explicit), forward and backward in bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from medsa_nets.layers import attend

# windows, heads, tokens of TinyViT's attention stages for two images of 256 x 256 (LiteMedSAM); head width 32
WINDOWS = {
    "stage 1, 7 x 7": (2 * 361, 4, 49),
    "stage 2, 14 x 14": (2 * 25, 5, 196),
    "stage 3, 7 x 7": (2 * 100, 10, 49),
}


def seconds(function, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[float, float]:
    """Forward and backward time of one call."""
    start = time.perf_counter()
    out = function(q, k, v, bias)
    middle = time.perf_counter()
    out.float().sum().backward()
    return middle - start, time.perf_counter() - middle


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
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
