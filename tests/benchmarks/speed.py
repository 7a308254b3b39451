"""How fast MedSA trains, segments and answers clicks, beside what else users could take; interleaved in one run.

    python tests/benchmarks/speed.py --output speed

Each section calls its contenders in turn, round after round, and reports the median over rounds of
time(other) / time(MedSA), wall-clock time on ``--threads`` threads. MedSA computes its adapters, which the others do
not have. ``plain`` is MedSA's own network as it is usually written (``tests/plain.py``: padded windows, softmax written
out, depth attended to apart). Weights are random, the same ones in segment-anything, transformers and MedSA, whose
outputs must agree. Peak memory comes from a process of its own. Writes OUTPUT.md, OUTPUT.json and OUTPUT.png; sections
that OUTPUT.json holds already are kept, unless ``--only`` names them.

How far apart two contenders can be depends on the machine: the first section measures what its libraries give for one
large product of matrices, and beside each contender stand its operations (products and convolutions, counted by PyTorch
as they are computed, padding included) and which share of that rate it reaches; for MedSA also where its time goes.
``--device cuda`` measures on a GPU.

    python tests/benchmarks/speed.py --output speed --isa native,avx512,avx2

measures on other kinds of processor, as far as this one can be held back to them (``pairs.py``): short runs of the
sections in ``REDUCED`` in a process for each kind, without OpenVINO; bfloat16 on the processor as it is alone. It adds
a table of ratios, a column for each kind, to OUTPUT.md and OUTPUT.json, and measures nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SwinUNETR, UNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medsa_nets import build_medsa, use_backend
from medsa_nets.embeddings import train_decoder_alone
from medsa_nets.inferers import EmbeddingCache, SlabInferer
from medsa_nets.layers.fast import linear
from medsa_nets.losses import AnnotatedDiceCELoss
from medsa_nets.prompts import Prompts
from medsa_nets.runtime import keep_freed_memory
from medsa_nets.training import trainable_parameters
from medsa_nets.weights import from_hugging_face

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from backends import own_code  # noqa: E402
from conftest import _stand_in_torchvision  # noqa: E402
from pairs import ENVIRONMENTS, limited  # noqa: E402
from plain import plain_form  # noqa: E402

OURS, OURS_BF16 = "MedSA", "MedSA, bfloat16"
# section, contender, whom it is compared with, the goal
GOALS = [
    ("encoder 256", "segment-anything", OURS, 2.0),
    ("encoder 1024", "segment-anything", OURS, 1.7),
    ("encoder 256", "segment-anything, bfloat16", OURS_BF16, 1.5),
    ("encoder 1024", "segment-anything, bfloat16", OURS_BF16, 1.5),
    ("training 2D", "plain", OURS, 1.8),
    ("training 2D", "plain", OURS_BF16, 3.5),
    ("space-depth block", "plain", OURS, 1.8),
    ("LiteMedSAM encoder 256", "MedSA", "MedSA by OpenVINO", 3.5),
    ("click", "first click", "later click", 10.0),
]
Calls = dict[str, Callable[[], object]]
BLAS, ONEDNN, BF16 = "float32", "float32, oneDNN's linear", "bfloat16"
# PyTorch's operators, by what they are for
PARTS = {
    "linear maps": ("mkldnn::_linear_pointwise", "aten::addmm", "aten::mm", "aten::linear"),
    "batches of products (attention)": ("aten::bmm", "aten::baddbmm_", "aten::baddbmm"),
    "convolutions": ("aten::mkldnn_convolution", "aten::convolution_backward", "aten::_slow_conv2d_forward",
                     "aten::cudnn_convolution"),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data"),
    "copies and changes of type": ("aten::copy_", "aten::cat", "aten::clone"),
    "sums": ("aten::add", "aten::add_", "aten::sum", "aten::mul", "aten::mul_"),
}  # fmt: skip
UNCOUNTED = ("MedSA by OpenVINO",)  # not computed by PyTorch
DEVICE = torch.device("cpu")
EMBEDDINGS = tempfile.TemporaryDirectory()


def amp(call: Callable[[], object]) -> Callable[[], object]:
    """The call in bfloat16 where that is safe."""

    def run() -> object:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return call()

    return run


def inference(call: Callable[[], object]) -> Callable[[], object]:
    return torch.inference_mode()(call)


def in_plain_form(network: nn.Module, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with plain_form(network):
            return call()

    return run


def encoders(size: int) -> Calls:
    """ViT-B's image encoder on one image, by three packages, on the same weights."""
    import transformers

    config = transformers.SamVisionConfig(image_size=size)
    theirs = transformers.SamVisionModel._from_config(config, attn_implementation="sdpa").eval()
    for name, parameter in theirs.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            nn.init.normal_(parameter, std=0.1)
    state = {n.removeprefix("image_encoder."): t for n, t in from_hugging_face(theirs.state_dict()).items()}
    with _stand_in_torchvision():
        from segment_anything.modeling.image_encoder import ImageEncoderViT
    published = ImageEncoderViT(img_size=size, embed_dim=768, depth=12, num_heads=12, out_chans=256, qkv_bias=True,
                                use_rel_pos=True, rel_pos_zero_init=True, window_size=14,
                                global_attn_indexes=(2, 5, 8, 11),
                                norm_layer=lambda n: nn.LayerNorm(n, eps=1e-6)).eval()  # fmt: skip
    published.load_state_dict(state)
    network = build_medsa("vit_b", pretrained=False, img_size=size).eval()
    for encoder in (theirs, published, network):
        encoder.to(DEVICE)
    missing = network.image_encoder.load_state_dict(state, strict=False).missing_keys
    assert all("adapter" in name for name in missing), missing
    image = torch.rand(1, 3, size, size, device=DEVICE)
    calls = {
        OURS: inference(lambda: network.image_encoder(image)),
        "segment-anything": inference(lambda: published(image)),
        "transformers": inference(lambda: theirs(image)[0]),
    }
    answers = {name: call() for name, call in calls.items()}
    for name, answer in answers.items():
        difference = float((answer - answers[OURS]).abs().max() / answers[OURS].abs().max())
        assert difference < 1e-3, f"{name} gives another embedding: {difference}"
    return {**calls, **{f"{name}, bfloat16": amp(call) for name, call in calls.items()}}


def lite_medsam() -> Calls:
    """LiteMedSAM's image encoder on one image of 256 x 256."""
    network, by_openvino = build_medsa("lite_medsam").eval().to(DEVICE), build_medsa("lite_medsam").eval()
    image = torch.rand(1, 3, 256, 256, device=DEVICE)
    own = own_code().to(DEVICE)
    calls = {
        OURS: inference(lambda: network.encode_image(image)),
        OURS_BF16: amp(inference(lambda: network.encode_image(image))),
        "LiteMedSAM's own code": inference(lambda: own(image)),
    }
    if importlib.util.find_spec("openvino") and DEVICE.type == "cpu":
        use_backend(by_openvino, "openvino")
        calls["MedSA by OpenVINO"] = inference(lambda: by_openvino.encode_image(image))
        calls["MedSA by OpenVINO, bfloat16"] = amp(calls["MedSA by OpenVINO"])
    return calls


def step(network: nn.Module, image: Tensor, label: Tensor) -> Callable[[], object]:
    """One step of training: forward, Dice and cross-entropy, backward, AdamW."""
    network.train().to(DEVICE)
    image, label = image.to(DEVICE), label.to(DEVICE)
    optimizer = torch.optim.AdamW(trainable_parameters(network), lr=1e-4, fused=DEVICE.type == "cuda")
    loss = AnnotatedDiceCELoss()

    def run() -> object:
        optimizer.zero_grad()
        value = loss(network(image).float(), label)
        with torch.autocast(DEVICE.type, enabled=False):
            value.backward()
            optimizer.step()
        return value.item()

    return run


def training_2d() -> Calls:
    """A step of training on one image of 256 x 256, one class; for the decoder alone, its embedding read from disk."""
    image, label = torch.rand(1, 3, 256, 256), torch.rand(1, 1, 256, 256) > 0.7
    vit, lite = (build_medsa(base, pretrained=False, img_size=256) for base in ("vit_b", "lite_medsam"))
    unet = UNet(2, 3, 1, channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2), num_res_units=2)
    swin = SwinUNETR(in_channels=3, out_channels=1, feature_size=24, spatial_dims=2)
    calls = {OURS: step(vit, image, label)}
    calls["plain"] = in_plain_form(vit, calls[OURS])
    calls["MedSA on LiteMedSAM"] = step(lite, image, label)
    calls["plain on LiteMedSAM"] = in_plain_form(lite, calls["MedSA on LiteMedSAM"])
    alone = train_decoder_alone(build_medsa("lite_medsam", pretrained=False, img_size=256), EMBEDDINGS.name)
    calls["MedSA on LiteMedSAM, decoder alone"] = step(alone, image, label)
    calls |= {"UNet": step(unet, image, label), "SwinUNETR": step(swin, image, label)}
    return {**calls, **{f"{name}, bfloat16": amp(call) for name, call in calls.items()}}


def training_3d() -> Calls:
    """A step of training on a volume of 128 x 128 x 32 voxels, 13 classes, in bfloat16."""
    image, label = torch.rand(1, 1, 128, 128, 32), torch.rand(1, 13, 128, 128, 32) > 0.9
    lite = build_medsa("lite_medsam", pretrained=False, spatial_dims=3, num_classes=13)
    unet = UNet(3, 1, 13, channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2), num_res_units=2)
    swin = SwinUNETR(in_channels=1, out_channels=13, feature_size=24, spatial_dims=3)
    call = step(lite, image, label)
    calls = {"MedSA on LiteMedSAM": call, "plain on LiteMedSAM": in_plain_form(lite, call),
             "UNet": step(unet, image, label), "SwinUNETR": step(swin, image, label)}  # fmt: skip
    return {f"{name}, bfloat16": amp(call) for name, call in calls.items()}


def space_depth_block() -> Calls:
    """Forward and backward pass of one space-depth block of ViT-B with windows, 16 slices of 256 x 256."""
    network = build_medsa("vit_b", pretrained=False, img_size=256, spatial_dims=3)
    block = network.image_encoder.blocks[0].train().to(DEVICE)
    tokens = torch.randn(16, 16, 16, 768, requires_grad=True, device=DEVICE)

    def run() -> object:
        tokens.grad = None
        block.zero_grad()
        out = block(tokens, 16).float().square().mean()
        with torch.autocast(DEVICE.type, enabled=False):
            out.backward()
        return tokens.grad

    calls = {OURS: run, "plain": in_plain_form(block, run)}
    return {**calls, **{f"{name}, bfloat16": amp(call) for name, call in calls.items()}}


def volume() -> Calls:
    """Thirteen classes in a CT of 128 x 112 x 32 voxels, automatically."""
    scan = torch.rand(1, 1, 128, 112, 32)
    lite = build_medsa("lite_medsam", pretrained=False, spatial_dims=3, num_classes=13).eval()
    unet = UNet(3, 1, 13, channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2), num_res_units=2).eval()
    swin = SwinUNETR(in_channels=1, out_channels=13, feature_size=48, spatial_dims=3).eval()
    window = SlidingWindowInferer((96, 96, 32), overlap=0.25, mode="gaussian")
    scan = scan.to(DEVICE)
    for network in (lite, unet, swin):
        network.to(DEVICE)

    def medsa(amp: bool) -> Callable[[], object]:
        return lambda: SlabInferer(slab_depth=8, amp=amp)(scan, lite)  # the inferer sets the precision itself

    others: Calls = {"UNet": lambda: window(scan, unet), "SwinUNETR": lambda: window(scan, swin)}
    calls: Calls = {}
    for suffix, half in (("", False), (", bfloat16", True)):
        calls[f"MedSA on LiteMedSAM{suffix}"] = medsa(half)
        calls[f"plain on LiteMedSAM{suffix}"] = in_plain_form(lite, medsa(half))
        calls |= {f"{name}{suffix}": amp(call) if half else call for name, call in others.items()}
    return {name: inference(call) for name, call in calls.items()}


def click() -> Calls:
    """A click on one organ in a CT of 128 x 112 x 64 voxels: the first encodes the slabs, a later one decodes alone."""
    network = build_medsa("lite_medsam", pretrained=False, spatial_dims=3, num_classes=13).eval().to(DEVICE)
    scan = torch.rand(1, 1, 128, 112, 64, device=DEVICE)
    places = torch.tensor([[[60.0, 50.0, 30.0]]])
    prompts = Prompts(points=places, labels=torch.ones(1, 1), classes=torch.tensor([5]))
    cache = EmbeddingCache()
    inferer = SlabInferer(slab_depth=8, amp=True, cache=cache, every_class=True, spread=True)

    def first() -> object:
        cache.clear()
        return inferer(scan, network, prompts=prompts)

    return {"first click": inference(first), "later click": inference(lambda: inferer(scan, network, prompts=prompts))}


SECTIONS: dict[str, Callable[[], Calls]] = {
    "encoder 256": lambda: encoders(256),
    "encoder 512": lambda: encoders(512),
    "encoder 1024": lambda: encoders(1024),
    "LiteMedSAM encoder 256": lite_medsam,
    "training 2D": training_2d,
    "training 3D": training_3d,
    "space-depth block": space_depth_block,
    "volume": volume,
    "click": click,
}


# what a run on several kinds of processor measures
REDUCED = ("encoder 256", "LiteMedSAM encoder 256", "training 2D", "space-depth block")
REDUCED_REPEATS = 3


def measure_reduced(isa: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of the contenders of ``REDUCED`` in this process, whose processor is held back to ``isa``."""
    found = {}
    for name in REDUCED:
        calls = {
            contender: call
            for contender, call in SECTIONS[name]().items()
            if "OpenVINO" not in contender and (isa == "native" or not contender.endswith("bfloat16"))
        }
        found[name] = measure(calls, REDUCED_REPEATS)
    return found


def measure_kinds(names: list[str], threads: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """:func:`measure_reduced` in a process for each kind of processor."""
    found = {}
    for isa in names:
        command = [sys.executable, str(HERE / "speed.py"), "--here", isa, "--threads", str(threads)]
        result = subprocess.run(command, env=limited(isa), stdout=subprocess.PIPE, text=True)
        result.check_returncode()
        found[isa] = json.loads(result.stdout.splitlines()[-1])
    return found


def kinds_table(kinds: dict[str, dict[str, dict[str, list[float]]]]) -> list[str]:
    """Rows of the table of ratios, a column for each kind of processor."""
    lines = ["", "**Kinds of processor.** Seconds of MedSA on this machine, held back by `ONEDNN_MAX_CPU_ISA` and "
             "`ATEN_CPU_CAPABILITY`; below them times of others, each as a multiple of what its row names:", "",
             f"| | {' | '.join(kinds)} |", "| --- " * (len(kinds) + 1) + "|"]  # fmt: skip
    for section in REDUCED:
        names = dict.fromkeys(name for found in kinds.values() for name in found.get(section, {}))
        for name in names:
            cells = []
            against = next(
                reference(name, found[section]) for found in kinds.values() if name in found.get(section, {})
            )
            title = name if against == name else f"{name} / {against}"
            for found in kinds.values():
                times = found.get(section, {})
                if name not in times:
                    cells.append("")
                elif reference(name, times) == name:
                    cells.append(f"{statistics.median(times[name]):.3f} s")
                else:
                    cells.append(f"{ratio(times, name, reference(name, times)):.2f}")
            lines.append(f"| {section}: {title} | {' | '.join(cells)} |")
    return lines


def peaks() -> dict[str, float]:
    """Operations a second in one product of 4096 x 768 and 768 x 3072, and bytes a second of a copy: best of ten."""
    a, b = torch.rand(4096, 768, device=DEVICE), torch.rand(3072, 768, device=DEVICE)
    half_a, half_b = a.bfloat16(), b.bfloat16()
    large = torch.rand(2**26, device=DEVICE)
    kept = torch.empty_like(large)
    calls: Calls = {BLAS: lambda: a @ b.t(), BF16: lambda: half_a @ half_b.t(), "copy": lambda: kept.copy_(large)}
    if DEVICE.type == "cpu" and linear._ONEDNN:
        calls[ONEDNN] = lambda: linear._onednn(a, b)
    work = 2 * a.shape[0] * a.shape[1] * b.shape[0]
    times = measure(calls, 10)
    return {n: (2 * large.numel() * 4 if n == "copy" else work) / min(t) for n, t in times.items()}


def operations(call: Callable[[], object]) -> int:
    """Multiplications and additions in the products and convolutions of a call, as far as PyTorch computes them."""

    def onednn(x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    linears = {torch.ops.mkldnn._linear_pointwise: onednn} if linear._ONEDNN else {}
    with FlopCounterMode(display=False, custom_mapping=linears) as counter:
        call()
    return counter.get_total_flops()


def count(calls: Calls) -> dict[str, int]:
    """:func:`operations` of each call; a call in bfloat16 has those of the same call in single precision."""
    counted: dict[str, int] = {}
    for name, call in calls.items():
        same = name.removesuffix(", bfloat16")
        if same not in UNCOUNTED:
            counted[name] = counted[same] if same in counted else operations(call)
    return counted


def profile(call: Callable[[], object]) -> dict[str, float]:
    """Share of the time of each of ``PARTS`` in a call."""
    with torch.profiler.profile(acc_events=True) as found:
        call()
    name = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    spent = {event.key: getattr(event, name) for event in found.key_averages()}
    whole = sum(spent.values())
    return {part: sum(spent.get(key, 0.0) for key in keys) / whole for part, keys in PARTS.items()}


def measure(calls: Calls, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], other: str, ours: str) -> float:
    return statistics.median(a / b for a, b in zip(times[other], times[ours]))


def reference(name: str, times: dict[str, list[float]]) -> str:
    """Whom a contender is compared with: the first one of its kind and type."""
    kind = ", bfloat16" if name.endswith("bfloat16") else ""
    on_lite = name.startswith("plain on") or "decoder alone" in name or f"MedSA{kind}" not in times
    base = " on LiteMedSAM" if on_lite else ""
    found = f"MedSA{base}{kind}"
    return found if found in times else next(iter(times))


def device_name() -> str:
    """The processor's or GPU's name, as far as it is told."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name(DEVICE)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known.get("flags", "").split()]
    model = f"{known['model name']} (model {known.get('model', '?')})" if "model name" in known else ""
    return " ".join([platform.machine(), model, *flags])


def peak_memory() -> dict[str, float]:
    """Bytes at the peak of a process that takes one step of training: ViT-B, 16 slices of 256 x 256."""
    found = {}
    for checkpointing in (True, False):
        row = json.dumps(("training", "vit_b", 256, 16, checkpointing))
        result = subprocess.run([sys.executable, str(HERE / "memory.py"), "--row", row], capture_output=True, text=True)
        result.check_returncode()
        name = f"checkpointing {'on' if checkpointing else 'off'}"
        found[name] = json.loads(result.stdout.splitlines()[-1])["peak"]
    return found


def write(report: dict[str, Any], output: Path) -> None:
    """Write tables and chart of what has been measured."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [f"`{report['command']}`", "", f"{report['machine']}; {report['threads']} threads; {versions}.", ""]
    bars = []
    lines += ["| what | time of others / time of MedSA | goal |", "| --- | --- | --- |"]
    for section, other, ours, goal in GOALS:
        times = report["sections"].get(section, {})
        if other in times and ours in times:
            value = ratio(times, other, ours)
            bars.append((f"{section}: {other} / {ours}", value, goal))
            lines.append(f"| {section}: {other} / {ours} | {value:.2f} | {goal:g} |")
    if report.get("kinds"):
        lines += kinds_table(report["kinds"])
    peak = report.get("peaks", {})
    lines += ["", "**The machine.** One product of 4096 x 768 and 768 x 3072, and a copy of 256 MiB:", "",
              "| | |", "| --- | --- |"]  # fmt: skip
    lines += [f"| {n} | {v / 1e9:.0f} {'GB/s' if n == 'copy' else 'GFLOP/s'} |" for n, v in peak.items()]
    for section, times in report["sections"].items():
        title = SECTIONS[section].__doc__ or f"ViT-B's image encoder on one image of {section.split()[-1]} pixels."
        lines += ["", f"**{section}.** {title}", "",
                  "| | seconds | times the seconds of | GFLOP | share of the peak |",
                  "| --- | --- | --- | --- | --- |"]  # fmt: skip
        for name in times:
            ours = reference(name, times)
            seconds = statistics.median(times[name])
            beside = "" if ours == name else f"{ratio(times, name, ours):.2f} x {ours}"
            work = report["operations"][section].get(name, 0)
            best = peak[BF16] if "bfloat16" in name else max(peak[BLAS], peak.get(ONEDNN, 0.0))
            share = f"{work / 1e9:.1f} | {work / seconds / best:.0%}" if work else "|"
            lines.append(f"| {name} | {seconds:.3f} | {beside} | {share} |")
        for name, shares in report["profiles"].get(section, {}).items():
            parts = sorted(((v, k) for k, v in shares.items() if v >= 0.01), reverse=True)
            told = ", ".join(f"{k} {v:.0%}" for v, k in parts)
            lines += ["", f"Where {name}'s time goes: {told}, the rest {1 - sum(v for v, _ in parts):.0%}."]
    if report.get("memory"):
        lines += ["", "**Peak memory** of a process that takes a step of training, ViT-B, 16 slices of 256 x 256, "
                  "bfloat16 (`tests/benchmarks/memory.py`):", "", "| | GB |", "| --- | --- |"]  # fmt: skip
        lines += [f"| {name} | {value / 1e9:.2f} |" for name, value in report["memory"].items()]
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    output.with_suffix(".json").write_text(json.dumps(report, indent=1))
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(bars) + 1), layout="constrained")
    names, values, goals = zip(*bars)
    axes.barh(names, values, color="#3b78b8")
    axes.plot(goals, names, "|", color="#c23b22", markersize=16, markeredgewidth=2, label="goal")
    for name, value in zip(names, values):
        axes.annotate(f" {value:.1f}", (value, name), va="center")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.5, 1.5 * max(*values, *goals))
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"], minor=False)
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("time of others / time of MedSA")
    axes.legend(loc="upper right")
    figure.savefig(output.with_suffix(".png"), dpi=110)
    plt.close(figure)


def main() -> None:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("speed"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, "memory"], help="sections to measure anew")
    parser.add_argument("--device", type=torch.device, default=DEVICE, help="cpu or cuda")
    parser.add_argument("--isa", help=f"kinds of processor to measure, comma-separated, of {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # the kind of this process, which prints JSON
    options = parser.parse_args()
    kinds = options.isa.split(",") if options.isa else []
    if unknown := set(kinds) - set(ENVIRONMENTS):
        parser.error(f"--isa: {', '.join(unknown)} is none of {', '.join(ENVIRONMENTS)}")
    DEVICE = options.device
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    if options.here:
        print(json.dumps(measure_reduced(options.here)))
        return
    state = options.output.with_suffix(".json")
    report = json.loads(state.read_text()) if state.is_file() else {"sections": {}, "operations": {}, "profiles": {}}
    packages = ("torch", "monai", "segment-anything", "transformers", "openvino")
    command = shlex.join(["python", *sys.argv])
    report |= {
        "command": f"{report['command']}; {command}" if (options.only or kinds) and "command" in report else command,
        "machine": f"{device_name()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "threads": options.threads,
        "versions": {name: version(name) for name in packages},
    }
    if kinds:
        report["kinds"] = measure_kinds(kinds, options.threads)
        write(report, options.output)
        print("\n".join(kinds_table(report["kinds"])))
        return
    for name, make in SECTIONS.items():
        if name in (options.only or []) or (options.only is None and name not in report["sections"]):
            calls = make()
            report["peaks"] = peaks()
            report["sections"][name] = measure(calls, options.repeats)
            report["operations"][name] = count(calls)
            report["profiles"][name] = {n: profile(calls[n]) for n in (OURS, OURS_BF16) if n in calls}
            write(report, options.output)
            print(name, {k: round(statistics.median(v), 3) for k, v in report["sections"][name].items()}, flush=True)
    memory = "memory" in (options.only or []) or (options.only is None and "memory" not in report)
    if memory and DEVICE.type == "cpu":
        report["memory"] = peak_memory()
    write(report, options.output)
    print(options.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
