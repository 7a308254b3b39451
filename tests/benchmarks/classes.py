"""Automatic masks of 13 classes: one pass of the decoder for all, against one pass for each; interleaved in one run.

    python tests/benchmarks/classes.py --rounds 5

Decodes a slab of 16 slices of 256 x 256 pixels on LiteMedSAM, in inference, with random embeddings; prints the least
time of each way, their ratio, and the processor and precision.
"""

from __future__ import annotations

import argparse
import time

import torch

from medsa_nets import build_medsa
from medsa_nets.measurements import machine
from medsa_nets.precision import choose_amp

CLASSES, SIZE, DEPTH = 13, 256, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--amp", default="auto", help="auto, true or false")
    options = parser.parse_args()
    torch.manual_seed(0)
    ways = {
        count: build_medsa("lite_medsam", pretrained=False, spatial_dims=3, num_classes=CLASSES, class_chunk=1,
                           classes_per_pass=count).eval()
        for count in (CLASSES, 1)
    }  # fmt: skip
    embedding = torch.randn(1, 256, SIZE // 4, SIZE // 4, DEPTH)
    precision = choose_amp(options.amp, "cpu")
    seconds = dict.fromkeys(ways, float("inf"))
    with torch.inference_mode(), precision.autocast("cpu"):
        for round_ in range(options.rounds + 1):  # the first one prepares
            for count, network in ways.items():
                start = time.perf_counter()
                network.decode(embedding)
                if round_:
                    seconds[count] = min(seconds[count], time.perf_counter() - start)
    one, each = seconds[CLASSES], seconds[1]
    print(f"{machine()}; {precision.name}")
    print(f"one pass {one:.2f} s, {CLASSES} passes {each:.2f} s, ratio {each / one:.1f}")


if __name__ == "__main__":
    main()
