"""Every choice of a fast path against its alternatives, at the level of whole passes; interleaved in one run.

    python tests/benchmarks/pairs.py --isa native,avx512,avx2 --output pairs

Runs the encoder of each base, a space-depth slab and training steps as MedSA chooses (``chosen``), then with one thing
changed at a time: each choice that is measured on the machine (``medsa_nets.layers.fast.choices``) forced to each of
its ways, and what is fixed: sizes of pieces and groups, formats of images, kept weights, kept memory. Prints the ratio
time(chosen) / time(alternative) of each pair, the least time of all rounds on each side, and marks those above 1.05:
there the alternative is more than 5 % faster. Each environment is a process of its own that holds the processor back
by ``ONEDNN_MAX_CPU_ISA`` and ``ATEN_CPU_CAPABILITY``. On one thread process time counts, so that other work on the
machine does not. ViT-B is cut to a block with windows and one with global attention. Writes OUTPUT.md and OUTPUT.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from medsa_nets import build_medsa
from medsa_nets.layers import fast
from medsa_nets.layers.fast import attention, convolution, groups, linear
from medsa_nets.layers.fast.choices import CHOICES
from medsa_nets.runtime import keep_freed_memory
from medsa_nets.training import trainable_parameters

# what holds a processor back, by environment; for a mistake in a name see --isa's choices
ENVIRONMENTS = {
    "native": {},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
LIMIT = 1.05
Pass = Callable[[], object]


def limited(isa: str) -> dict[str, str]:
    """This process's environment, with the processor held back."""
    return {**os.environ, **ENVIRONMENTS[isa]}


def networks(isa: str) -> dict[str, Callable[[], tuple[Pass, bool]]]:
    """Passes by name; each is made when it is measured, and says whether it takes images of the encoder's format."""

    def encoder(base: str, shape: tuple[int, ...], depth: int = 1, **settings: Any) -> tuple[Pass, bool]:
        network = build_medsa(base, pretrained=False, **settings).eval().image_encoder
        if hasattr(network, "blocks"):
            network.blocks = nn.ModuleList([network.blocks[0], network.blocks[2]])  # windows, global
        images = [torch.rand(shape).contiguous(memory_format=f) for f in (torch.channels_last, torch.contiguous_format)]
        return torch.inference_mode()(lambda: network(images[FORMAT], depth)), True

    def training(base: str, shape: tuple[int, ...], **settings: Any) -> tuple[Pass, bool]:
        network = build_medsa(base, pretrained=False, **settings).train()
        if hasattr(network.image_encoder, "blocks"):
            blocks = network.image_encoder.blocks
            network.image_encoder.blocks = nn.ModuleList([blocks[0], blocks[2]])
        image, parameters = torch.rand(shape), trainable_parameters(network)

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            loss = network(image).float().square().mean()
            with torch.autocast("cpu", enabled=False):
                loss.backward()

        return step, False

    made: dict[str, Callable[[], tuple[Pass, bool]]] = {
        "LiteMedSAM encoder, 160 x 160": lambda: encoder("lite_medsam", (1, 3, 160, 160)),
        "LiteMedSAM encoder, 4 of 64 x 64": lambda: encoder("lite_medsam", (4, 3, 64, 64)),
        "LiteMedSAM slab, 48 x 48 x 8": lambda: encoder("lite_medsam", (8, 3, 48, 48), 8, spatial_dims=3),
        "ViT-B encoder, 256 x 256": lambda: encoder("vit_b", (1, 3, 256, 256), img_size=256),
        "ViT-B encoder, 512 x 512": lambda: encoder("vit_b", (1, 3, 512, 512), img_size=512),
        "LiteMedSAM training, 96 x 96": lambda: training("lite_medsam", (1, 3, 96, 96)),
        "ViT-B training, 256 x 256": lambda: training("vit_b", (1, 3, 256, 256), img_size=256),
        "LiteMedSAM training, 48 x 48 x 6": lambda: training(
            "lite_medsam", (1, 1, 48, 48, 6), spatial_dims=3, num_classes=3
        ),
    }
    return made


FORMAT = 0  # which of an encoder's images, of the two formats


@contextmanager
def format_of_images() -> Iterator[None]:
    with mock.patch.object(sys.modules[__name__], "FORMAT", 1):
        yield


@contextmanager
def no_kept_weights() -> Iterator[None]:
    def forget(module: nn.Module, name: str, sources: object, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        return compute()

    with ExitStack() as stack:
        for module in (fast, linear, convolution):
            stack.enter_context(mock.patch.object(module, "remember", forget))
        yield


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    keep_freed_memory(False)
    try:
        yield
    finally:
        keep_freed_memory()


def constant(module: Any, name: str, value: int) -> Callable[[], Any]:
    return lambda: mock.patch.object(module, name, value)


def alternatives(images: bool, bf16: bool, asked: set[tuple[str, str]]) -> dict[str, Callable[[], Any]]:
    """What to change, by name, as contexts; ``asked`` are the choices that the pass depends on, with their ways."""
    found: dict[str, Callable[[], Any]] = {}
    for name, way in sorted(asked):
        found[f"{name}: {way}"] = lambda name=name, way=way: CHOICES[name].force(way)
    found["oneDNN for smaller products too"] = constant(linear, "SMALL", 2**21)
    found["oneDNN for larger products only"] = constant(linear, "SMALL", 2**28)
    found["pieces a quarter as large"] = constant(attention, "CACHED_BYTES", 2**19)
    found["pieces four times as large"] = constant(attention, "CACHED_BYTES", 2**23)
    if images:
        found["images in groups an eighth as large"] = constant(groups, "HIDDEN_BYTES", 2**23)
        found["all images at once"] = constant(groups, "HIDDEN_BYTES", 2**40)
        found["images by channel"] = format_of_images
    if bf16:
        found["weights cast anew"] = no_kept_weights
    found["freed memory given back"] = freed_memory_given_back
    return found


def ways_of(names: set[str]) -> set[tuple[str, str]]:
    kinds = {"linear": "torch.float32", "attention": "torch.float32, inference, biased, 8 x 8",
             "attention over a map": "torch.float32, small"}  # fmt: skip
    return {(name, way) for name in names for way in CHOICES[name].examples(kinds[name])}


def race(call: Pass, others: dict[str, Callable[[], Any]], rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of the chosen pass, and of the same with one thing changed, taking turns."""
    clock = time.process_time if threads == 1 else time.perf_counter
    passes: dict[str, Callable[[], Any]] = {"chosen": ExitStack, **others}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for round_ in range(rounds + 1):
        order = list(passes) if round_ % 2 else list(passes)[::-1]
        for name in order:
            with passes[name]():
                if "memory" in name:
                    call()  # which allocates anew
                start = clock()
                call()
                if round_:
                    seconds[name].append(clock() - start)
    return seconds


def measure(options: argparse.Namespace, isa: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of each pass and alternative in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    found: dict[str, dict[str, list[float]]] = {}
    for name, make in networks(isa).items():
        if options.only and not any(part in name for part in options.only):
            continue
        for bf16 in (False, True):
            if bf16 and isa != "native":
                continue  # emulated there, which no setting takes
            call, images = make()

            def run(call: Pass = call, bf16: bool = bf16) -> object:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    return call()

            for choice in CHOICES.values():
                choice.answers.clear()
            run()
            asked = ways_of({n for n, choice in CHOICES.items() if choice.answers})
            answers = {n: {k: way for (k, _), way in c.answers.items()} for n, c in CHOICES.items() if c.answers}
            title = f"{name}, {'bfloat16' if bf16 else 'float32'}"
            print(isa, title, answers, file=sys.stderr, flush=True)
            found[title] = race(run, alternatives(images, bf16, asked), options.rounds, options.threads)
            del call, run
            gc.collect()
    return found


def table(isa: str, found: dict[str, dict[str, list[float]]]) -> list[str]:
    lines = [f"**{isa}**", "", "| pass | s | alternative | chosen / alternative | |", "| --- | --- | --- | --- | --- |"]
    for title, seconds in found.items():
        chosen = min(seconds["chosen"])
        for name, times in seconds.items():
            if name != "chosen":
                value = chosen / min(times)
                mark = "**slower**" if value > LIMIT else ""
                lines.append(f"| {title} | {chosen:.3f} | {name} | {value:.2f} | {mark} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default="native", help=f"comma-separated, of {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="parts of the names of passes to measure")
    parser.add_argument("--output", type=Path, default=Path("pairs"))
    parser.add_argument("--here", help=argparse.SUPPRESS)  # the environment of this process, which prints JSON
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options, options.here)))
        return
    names = options.isa.split(",")
    if unknown := set(names) - set(ENVIRONMENTS):
        parser.error(f"--isa: {', '.join(unknown)} is none of {', '.join(ENVIRONMENTS)}")
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "threads": options.threads, "isa": {}}
    lines = [f"`{report['command']}`", ""]
    for isa in names:
        command = [sys.executable, *sys.argv, "--here", isa]
        result = subprocess.run(command, env=limited(isa), stdout=subprocess.PIPE, text=True)
        result.check_returncode()
        report["isa"][isa] = json.loads(result.stdout.splitlines()[-1])
        lines += [*table(isa, report["isa"][isa]), ""]
        options.output.with_suffix(".md").write_text("\n".join(lines))
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=1))
    print("\n".join(lines))
    slow = sum("**slower**" in line for line in lines)
    print(f"{slow} of {sum('| ' in line for line in lines) - 2 * len(names)} pairs: an alternative is more than 5 % "
          "faster.")  # fmt: skip
    raise SystemExit(1 if slow else 0)


if __name__ == "__main__":
    main()
