"""The processes of a distributed run: how they join, which one writes, and what each attaches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from monai.handlers import CheckpointLoader, LrScheduleHandler, MetricsSaver, ValidationHandler
from torch import nn


def join_processes() -> None:
    """Join the other processes that ``torchrun`` started: NCCL where there are GPUs, else gloo.

    As ``torch.distributed.init_process_group``, but for ``torchrun --max-restarts``: workers that start again share
    the store of those before them, whose addresses they would find there and wait for. Each start has keys of its own.
    """
    store, rank, size = next(iter(torch.distributed.rendezvous("env://")))
    store = torch.distributed.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)


def writes_files() -> bool:
    """Whether this process is the one that writes: the only one, or the first of a distributed run."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def unwrap(network: Any) -> Any:
    """The network inside ``DistributedDataParallel`` and what else wraps it as ``module``, or itself."""
    while isinstance(inside := getattr(network, "module", None), nn.Module):
        network = inside
    return network


# of other libraries: what has to stay alike in all processes, or gathers from them
_EVERY_PROCESS = (CheckpointLoader, LrScheduleHandler, ValidationHandler, MetricsSaver)


def for_this_process(handlers: Sequence[Any]) -> list[Any]:
    """Of a bundle's handlers, those that this process of a distributed run attaches.

    A handler says by ``every_process`` whether all processes attach it: what schedules, validates, loads and stops has
    to be alike in them. One that says nothing prints, logs or writes, and is the first process's alone.
    """
    usual = [getattr(handler, "every_process", isinstance(handler, _EVERY_PROCESS)) for handler in handlers]
    return [handler for handler, every in zip(handlers, usual) if every or writes_files()]
