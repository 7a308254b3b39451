"""Training with two processes against one, on the CPU: what gradient synchronisation and a second process cost.

    python tests/benchmarks/distributed.py --output distributed

Each process trains LiteMedSAM's adapters for images on ``--batch_size`` random images of 256 x 256 a step (automatic
mode, single precision, one thread), through ``DistributedDataParallel`` and gloo. Compared are two processes, which do
twice the work in a step, with one process alone; and with two processes that each train alone, side by side, without
synchronisation: what the machine gives two processes that share its memory and caches. All three are interleaved in
``--rounds`` rounds. Efficiency is time(one) / time(two); time without synchronisation over time with it tells what
communication costs. Wall-clock time: other work on the machine disturbs it. Writes OUTPUT.md and OUTPUT.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import socket
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from monai.losses import DiceCELoss
from torch.nn.parallel import DistributedDataParallel

from medsa_nets import build_medsa
from medsa_nets.runtime import keep_freed_memory
from medsa_nets.training import trainable_parameters


def work(rank: int, port: int, batch: int, steps: int, rounds: int, results: Any) -> None:
    """What each of two processes does: rounds of steps alone (the first process), side by side, and joined."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)
    network = build_medsa("lite_medsam").train()
    joined = DistributedDataParallel(network, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(trainable_parameters(network), lr=1e-4)
    loss_function = DiceCELoss(sigmoid=True)
    image = torch.rand(batch, 3, 256, 256)
    label = (torch.rand(batch, 1, 256, 256) > 0.5).float()

    def train(model: torch.nn.Module) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss_function(model(image), label).backward()
            optimizer.step()
        return (time.perf_counter() - start) / steps

    train(joined)
    for _ in range(rounds):
        times = {}
        torch.distributed.barrier()
        if rank == 0:
            times["one process"] = train(network)
        torch.distributed.barrier()
        times["two processes, each alone"] = train(network)
        torch.distributed.barrier()
        times["two processes, joined"] = train(joined)
        torch.distributed.barrier()
        if rank == 0:
            results.append(times)
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("distributed"))
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.list()
        mp.spawn(work, (port, options.batch_size, options.steps, options.rounds, results), nprocs=2)
        times = [dict(row) for row in results]
    one, alone, joined = ([row[name] for row in times] for name in times[0])
    ratios = {
        "efficiency of two joined processes": statistics.median(a / b for a, b in zip(one, joined)),
        "of these, the machine's own (without synchronisation)": statistics.median(a / b for a, b in zip(one, alone)),
        "and synchronisation's": statistics.median(a / b for a, b in zip(alone, joined)),
    }
    command = shlex.join(["python", *sys.argv])
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}, 1 thread a process"
    lines = [f"`{command}`", "", machine, "", "| step | seconds |", "| --- | --- |"]
    lines += [f"| {name} | {statistics.median(row[name] for row in times):.3f} |" for name in times[0]]
    lines += ["", "| ratio | median of paired ratios |", "| --- | --- |"]
    lines += [f"| {name} | {ratio:.3f} |" for name, ratio in ratios.items()]
    print("\n".join(lines))
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    report = {"command": command, "machine": machine, "times": times, "ratios": ratios}
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
