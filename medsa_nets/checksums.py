"""SHA-256 of files, of tensors and of state dictionaries."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensor_sha256(*tensors: Tensor) -> str:
    """SHA-256 of tensors' shapes, types and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values: the same for the same weights, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}\n".encode())
        digest.update(_bytes(state[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview | bytes:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return values.numpy().data if values.numel() else b""
