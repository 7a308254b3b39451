"""What a crop around the click would save of a first answer, and what it would cost in accuracy.

    python tests/benchmarks/crops.py BUNDLE IMAGE LABELS NAME=VALUE … [--sizes 96,64,48] [--rounds 1]

For each class NAME, labelled VALUE in LABELS, clicks on its deepest voxel, and answers from the slab around it: whole
in plane, as the server does, and cut to a square of so many voxels of the network's grid around the click. Prints the
least processor seconds (of all cores together) of several rounds to encode and to decode the slab, the mean Dice in the
slab, and how many masks touch the square's border, where a larger square would have to be encoded next.
"""

from __future__ import annotations

import argparse
import time

import nibabel
import numpy as np
import torch
from scipy import ndimage
from server import processor

from medsa_nets.inferers import slab_inferer
from medsa_nets.inferers.slabs import Slabs
from medsa_nets.interaction.grids import Grids
from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.prompts import Prompts


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2.0 * (one & other).sum() / max(1, one.sum() + other.sum()))


def square(voxel: np.ndarray, shape: tuple[int, ...], size: int) -> tuple[slice, slice]:
    """A square of ``size`` voxels around a voxel, within the plane; all of it for 0."""
    if not size:
        return slice(0, shape[0]), slice(0, shape[1])
    first = [int(min(max(v - size // 2, 0), max(n - size, 0))) for v, n in zip(voxel, shape)]
    return slice(first[0], first[0] + size), slice(first[1], first[1] + size)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("image")
    parser.add_argument("labels")
    parser.add_argument("classes", nargs="+")
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")], default=[96, 64, 48])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    segmenter = NetworkSegmenter.from_bundle(options.bundle)
    image, network = segmenter.open(options.image), segmenter.network
    grids, inferer = Grids(image), slab_inferer(segmenter.inferer)
    inferer.cache = None
    places = np.indices(grids.shape).reshape(3, -1).T @ grids.to_file[:3, :3].T + grids.to_file[:3, 3]
    nearest = np.clip(np.rint(places).astype(int), 0, np.array(grids.file_shape) - 1)
    labels = np.asarray(nibabel.load(options.labels).dataobj)[tuple(nearest.T)].reshape(grids.shape)
    print(processor(), f"precision {inferer.amp}, grid {' x '.join(map(str, grids.shape))}")
    print(
        "| square | encode | decode | Dice | touch its border | Dice of each |\n| --- | --- | --- | --- | --- | --- |"
    )
    for size in [0, *options.sizes]:
        seconds = np.full((options.rounds, len(options.classes), 2), np.inf)
        found, touching = [], 0
        for number, (name, value) in enumerate(entry.split("=") for entry in options.classes):
            truth = labels == int(value)
            depth = ndimage.distance_transform_edt(np.pad(truth, 1))[1:-1, 1:-1, 1:-1]
            voxel = np.array(np.unravel_index(int(depth.argmax()), truth.shape))
            count = min(inferer.slab_depth, truth.shape[2])
            start = min(inferer.starts(truth.shape[2]), key=lambda z: abs(z + (count - 1) / 2.0 - voxel[2]))
            place = (*square(voxel, truth.shape, size), slice(start, start + count))
            volume = image.as_tensor()[(slice(None), *place)][None].contiguous()
            point = torch.tensor([[[v - own.start for v, own in zip(voxel.tolist(), place)]]]).float()
            prompts = Prompts(points=point, labels=torch.ones(1, 1),
                              classes=torch.tensor([segmenter.classes.index(name)]))  # fmt: skip
            for turn in range(options.rounds):
                slabs = Slabs(inferer, volume, network, None)
                begin = time.process_time()
                slabs.new[0] = slabs._encode([0])
                between = time.process_time()
                logits = inferer.blend(slabs, [(0, inferer.decode(slabs, 0, prompts))])
                seconds[turn, number] = between - begin, time.process_time() - between
            mask = np.zeros((*truth.shape[:2], count), dtype=bool)
            mask[place[:2]] = (logits[0, 0] > 0).numpy()
            found.append(dice(mask, truth[..., place[2]]))
            own = mask[place[:2]]
            sides = [(own[0], place[0].start > 0), (own[-1], place[0].stop < truth.shape[0]),
                     (own[:, 0], place[1].start > 0), (own[:, -1], place[1].stop < truth.shape[1])]  # fmt: skip
            touching += any(bool(side.any()) and inside for side, inside in sides)
        encode, decode = seconds.min(0).mean(0)
        label = f"{size} x {size}" if size else "whole"
        print(f"| {label} | {encode:.2f} s | {decode:.2f} s | {np.mean(found):.3f} | {touching} of {len(found)} | "
              f"{', '.join(f'{value:.3f}' for value in found)} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
