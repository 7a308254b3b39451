"""A cache of image embeddings in memory, for the next click, and its keys."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from medsa_nets.backends import backend_of
from medsa_nets.checksums import tensor_sha256
from medsa_nets.embeddings import read_embeddings
from medsa_nets.machine import limit_threads
from medsa_nets.networks import MedSA
from medsa_nets.runtime import keep_freed_memory


def network_name(network: nn.Module) -> str:
    """Name of a network, the same whatever its adapter has learned: its identity and its back end."""
    return f"{tensor_sha256(network.get_buffer('identity'))[:16]} {backend_of(network)}"


def adapter_key(network: nn.Module) -> str:
    """Name of an adapter: the SHA-256 of its trained parameters and its identity.

    The same file has the same name in every process: a click feedback that is not trained has no effect, holds what was
    drawn at random where the file lacks it, and does not count.
    """
    state, feedback = network.state_dict(), getattr(network, "click_feedback", None)
    if feedback is not None and not feedback.trained:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("click_feedback.")}
    return tensor_sha256(*state.values())[:16]


class EmbeddingCache:
    """Image embeddings of the volumes that were used last. Several threads may share one.

    A volume is known by what the network sees: the values of the preprocessed tensor. Another file, window or spacing
    is another volume, and so is another adapter.

    Args:
        max_bytes: most memory for embeddings; the least recently used volumes leave first. A volume that needs more
            is not kept.
        device: where embeddings are kept; none keeps them where they were computed.

    Raises:
        ValueError: when ``max_bytes`` is negative.
    """

    def __init__(self, max_bytes: int = 2 * 1024**3, device: str | torch.device | None = None) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be 0 or more, got {max_bytes}.")
        self.max_bytes = max_bytes
        self.device = device
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[str, list[Tensor]] = OrderedDict()
        self._versions: dict[str, tuple[str, str]] = {}
        self._lock = threading.RLock()

    @property
    def bytes(self) -> int:
        """Memory that the kept embeddings take, in bytes."""
        with self._lock:
            return sum(self._size(slabs) for slabs in self._kept.values())

    @staticmethod
    def _size(slabs: list[Tensor]) -> int:
        return sum(slab.numel() * slab.element_size() for slab in slabs)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> list[Tensor] | None:
        """Embeddings of the slabs of a volume, or none."""
        with self._lock:
            slabs = self._kept.get(key)
            if slabs is None:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return slabs

    def put(self, key: str, slabs: list[Tensor], *, network: str = "", version: str = "") -> None:
        """Keep the embeddings of a volume's slabs.

        Args:
            key: name of the volume, as seen by this network.
            slabs: embeddings.
            network: name of the network; what other versions of it computed is forgotten.
            version: of its weights.
        """
        if self._size(slabs) > self.max_bytes:
            return
        with self._lock:
            for other in [k for k, (n, v) in self._versions.items() if n == network and v != version]:
                self._forget(other)
            self._kept[key] = slabs
            self._kept.move_to_end(key)
            if network:
                self._versions[key] = (network, version)
            while self.bytes > self.max_bytes:
                self._forget(next(iter(self._kept)))

    def _forget(self, key: str) -> None:
        self._kept.pop(key, None)
        self._versions.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self._versions.clear()


_shared: dict[int, EmbeddingCache] = {}
_shared_lock = threading.Lock()


def shared_cache(max_bytes: int) -> EmbeddingCache | None:
    """The cache of this size that all inferers of the process share; none for 0 bytes.

    A server holds an automatic and a clicking task for one bundle: what one of them has encoded, the other one needs.
    Its process also keeps the memory that it frees for the next request (:func:`medsa_nets.runtime.keep_freed_memory`),
    and computes with as many threads as it has processors (:func:`medsa_nets.machine.limit_threads`): a server does not
    run what a bundle lists under ``initialize``.
    """
    if not max_bytes:
        return None
    limit_threads()
    keep_freed_memory()
    with _shared_lock:
        if max_bytes not in _shared:
            _shared[max_bytes] = EmbeddingCache(max_bytes)
        return _shared[max_bytes]


def take_precomputed(network: MedSA, folder: str | Path | None) -> None:
    """Let a network take embeddings from a folder, unless it takes them from somewhere already."""
    if folder and network.kept_embeddings is None:
        read_embeddings(network, folder)
