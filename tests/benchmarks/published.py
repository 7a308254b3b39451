"""Logits of checkpoints of the published Medical SAM Adapter code, there and here.

    python tests/benchmarks/published.py CODE --image_size 256

CODE is a checkout of github.com/SuperMedIntel/Medical-SAM-Adapter at commit 0add836. Networks of the real sizes with
random weights are saved as that code saves them, imported, and asked for one click on one random photograph in single
precision; prints the largest logit and the largest difference.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import published_code
from conftest import randomise_weights
from networks.test_efficient_sam import as_published

from medsa_nets import build_medsa
from medsa_nets.exchange import read_published
from medsa_nets.measurements import machine
from medsa_nets.networks.identity import decode_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", type=Path)
    parser.add_argument("--image_size", type=int, default=256)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    size = options.image_size
    print(f"{machine()}; single precision, {size} x {size}")
    for net, base, mods in (
        ("sam", "vit_b", ("sam_adpt", "sam_lora")),
        ("mobile_sam", "mobile_sam", ("sam_adpt", "sam_lora", "sam_adalora")),
        ("efficient_sam", "efficient_sam_vitt", ("sam_adpt", "sam_lora", "sam_adalora")),
    ):
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "base.pth"
            bare = randomise_weights(build_medsa(base, pretrained=False, adaptation="none"))
            torch.save(as_published(bare) if net == "efficient_sam" else bare.base_state_dict(), weights)
            for mod in mods:
                theirs = published_code.build(options.code, net, mod, size)
                saved = published_code.as_trained(theirs, torch.load(weights, weights_only=True))
                torch.save(saved, Path(folder) / "best_dice_checkpoint.pth")
                ours, _ = read_published(Path(folder) / "best_dice_checkpoint.pth", base, sam_checkpoint=str(weights),
                                         image_size=size)  # fmt: skip
                photograph = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
                click = torch.tensor([[[0.6 * size, 0.3 * size]]])
                expected = published_code.segment(theirs, photograph, click, torch.ones(1, 1))
                with torch.no_grad():
                    white = decode_task(ours.task)["intensity"]["b_max"]
                    found = ours.eval()(
                        white * photograph, point_coords=click.flip(-1)[None], point_labels=torch.ones(1, 1, 1)
                    )
                difference = float((found - expected).abs().max())
                print(f"-net {net} -mod {mod}: largest logit {float(expected.abs().max()):.1f}, "
                      f"largest difference {difference:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
