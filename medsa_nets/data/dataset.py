"""Dataset and sampler whose randomness depends on seed, epoch and item alone: a resumed run sees the same data."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, Dataset, PersistentDataset, set_rnd
from monai.transforms import Compose, RandomizableTrait, Transform
from monai.utils import get_seed
from torch.utils.data import Sampler

from medsa_nets.data.outputs import image_path
from medsa_nets.errors import DataError, find_cause
from medsa_nets.machine import usable_cpus, usable_memory

logger = logging.getLogger(__name__)
CACHE_THREADS = 2


class _Seeded(Dataset):
    """Seeds a dataset's random transforms by (seed, epoch, index), and gives errors that say what is wrong."""

    seed: int | None = None
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose random numbers are drawn."""
        self.epoch = epoch

    def _transform(self, index: int) -> Any:
        base = self.seed if self.seed is not None else (get_seed() or 0)
        set_rnd(self.transform, stable_seed(base, self.epoch, index))
        try:
            return super()._transform(index)
        except RuntimeError as error:
            # MONAI says which transform failed; the user needs to know which file, and why.
            cause = find_cause(error)
            if cause is None:
                raise
            raise cause from None


class SeededDataset(_Seeded):
    """MONAI's dataset with random transforms seeded by (seed, epoch, index), and errors that say what is wrong.

    The result does not depend on the number of workers, on what was loaded before, or on whether the run was resumed.

    Args:
        data: entries.
        transform: transforms.
        seed: seed; none takes the one that ``monai.utils.set_determinism`` set, or 0.
    """

    def __init__(self, data: Sequence[Any], transform: Callable | None = None, seed: int | None = None) -> None:
        super().__init__(data, transform)
        self.seed = seed


class SeededCacheDataset(_Seeded, CacheDataset):
    """MONAI's ``CacheDataset`` (what comes before the first random transform stays in memory), seeded likewise.

    Args:
        data: entries.
        transform: transforms.
        seed: see :class:`SeededDataset`.
        max_bytes: most memory for what is kept, where the first item is as large as the others; what does not fit is
            made anew each time. None keeps all.
        settings: see ``monai.data.CacheDataset``.
    """

    def __init__(
        self,
        data: Sequence[Any],
        transform: Compose,
        seed: int | None = None,
        max_bytes: int | None = None,
        **settings: Any,
    ) -> None:
        try:
            if max_bytes is not None and len(data) > 1:
                fitting = max(1, max_bytes // max(1, _kept_bytes(data[0], transform)))
                if fitting < len(data):
                    logger.info(
                        "%d of %d items are kept in memory (a quarter of what there is); the others are read anew each "
                        "time (cache: disk keeps all of them on disk)",
                        fitting,
                        len(data),
                    )
                settings["cache_num"] = min(fitting, len(data))
            CacheDataset.__init__(self, data, transform, **settings)
        except RuntimeError as error:
            cause = find_cause(error)
            if cause is None:
                raise
            raise cause from None
        self.seed = seed


def _kept_bytes(entry: Any, transform: Compose) -> int:
    """Bytes of an item as a cache keeps it: what comes before the first random transform."""
    random = transform.get_index_of_first(lambda t: isinstance(t, RandomizableTrait) or not isinstance(t, Transform))
    item = transform(dict(entry), end=random)
    return sum(value.nbytes for value in item.values() if isinstance(value, (torch.Tensor, np.ndarray)))


class SeededPersistentDataset(_Seeded, PersistentDataset):
    """MONAI's ``PersistentDataset`` (what comes before the first random transform stays on disk), seeded likewise.

    Args:
        data: entries.
        transform: transforms.
        cache_dir: folder of the cache.
        seed: see :class:`SeededDataset`.
        settings: see ``monai.data.PersistentDataset``.
    """

    def __init__(
        self,
        data: Sequence[Any],
        transform: Callable | None = None,
        cache_dir: str | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        PersistentDataset.__init__(self, data, transform, cache_dir, **settings)
        self.seed = seed


def make_dataset(
    data: Sequence[Any], transform: Compose, *, cache: str = "none", cache_dir: str | None = None, seed: int = 0
) -> Dataset:
    """A seeded dataset that keeps what comes before the first random transform in ``memory``, on ``disk``, or not.

    Memory keeps as many items as fit into a quarter of what the process may use
    (:func:`~medsa_nets.machine.usable_memory`), where the first one is as large as the others; the rest is made anew
    each time, and the log says how many are kept.

    Args:
        data: entries.
        transform: transforms.
        cache: ``memory``, ``disk`` or ``none``.
        cache_dir: folder of the cache on disk. Files in it are known by their entries; empty it after a change of
            the transforms.
        seed: seed of the random transforms.

    Raises:
        ValueError: when ``cache`` is something else.
    """
    if cache == "memory":
        # MONAI's own default is a thread for each processor of the host; each holds a few copies of a volume
        threads = min(CACHE_THREADS, usable_cpus())
        return SeededCacheDataset(data, transform, seed=seed, max_bytes=usable_memory() // 4, num_workers=threads)
    if cache == "disk":
        return SeededPersistentDataset(data, transform, cache_dir=cache_dir, seed=seed)
    if cache == "none":
        return SeededDataset(data, transform, seed=seed)
    raise ValueError(f"cache must be memory, disk or none, got {cache!r}.")


def repeat_volumes(data: Sequence[dict[str, Any]], repeats: int) -> list[dict[str, Any]]:
    """A training list that names each volume several times, and each single slice once.

    Where single annotated slices stand beside whole volumes, an epoch that shows each entry once hardly shows the
    volumes, which hold most of what there is to learn.

    Args:
        data: entries with a path under ``image``.
        repeats: how often an entry of several slices (or a folder of files) is named; 1 changes nothing.

    Raises:
        ValueError: when ``repeats`` is below 1.
        DataError: when an image's header can't be read.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}.")
    if repeats == 1:
        return list(data)
    return [entry for entry in data for _ in range(repeats if _slices(image_path(entry)) > 1 else 1)]


def _slices(path: str) -> int:
    """Slices of a volume, by the header of its file or the number of files in its folder."""
    if Path(path).is_dir():
        return sum(1 for file in Path(path).iterdir() if file.is_file())
    if path.lower().endswith(".npy"):
        return min(np.load(path, mmap_mode="r", allow_pickle=False).shape)
    import itk  # takes a second, and few need it

    reader = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if reader is None:
        raise DataError(
            f"{path}: its header can't be read. Expected NIfTI, NRRD, MetaImage or DICOM; replace the file."
        )
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"{path}: its header can't be read. Replace the file, or take it from the list.") from error
    return int(reader.GetDimensions(2)) if reader.GetNumberOfDimensions() > 2 else 1


def stable_seed(*parts: object) -> int:
    """A seed in [0, 2 ** 32) that depends on the parts alone, on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class EpochSampler(Sampler[int]):
    """An endless, seeded shuffle of the data, cut into epochs; each process of a distributed run takes its share.

    Epoch e holds items e * n to (e + 1) * n of the shuffle, so short epochs over a long list still show every item
    equally often, and a resumed run goes on where it stopped.

    Args:
        data_source: the dataset.
        num_samples: items in an epoch, over all processes; 0 takes the length of the dataset.
        seed: seed of the shuffle.
        num_replicas: number of processes; none asks ``torch.distributed``.
        rank: this process; none asks ``torch.distributed``.
    """

    def __init__(
        self,
        data_source: Dataset,
        *,
        num_samples: int = 0,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.data_source = data_source
        self.replicas = num_replicas or (torch.distributed.get_world_size() if distributed else 1)
        self.rank = rank if rank is not None else (torch.distributed.get_rank() if distributed else 0)
        total = num_samples or len(data_source)
        self.per_replica = -(-total // self.replicas)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 1, as Ignite counts), here and in the dataset."""
        self.epoch = epoch
        if hasattr(self.data_source, "set_epoch"):
            self.data_source.set_epoch(epoch)

    def __len__(self) -> int:
        return self.per_replica

    def __iter__(self) -> Iterator[int]:
        size = len(self.data_source)
        start = max(self.epoch - 1, 0) * self.per_replica * self.replicas
        round_, order = -1, []
        for position in range(start + self.rank, start + self.per_replica * self.replicas, self.replicas):
            if position // size != round_:
                round_ = position // size
                generator = torch.Generator().manual_seed(stable_seed(self.seed, round_))
                order = torch.randperm(size, generator=generator).tolist()
            yield order[position % size]
