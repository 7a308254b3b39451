from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose, LoadImaged, MapTransform, RandFlipd, RandGaussianNoised
from monai.utils import set_determinism
from PIL import Image

from medsa_nets.data import EpochSampler, PhotographReader, SeededDataset, repeat_volumes, stable_seed
from medsa_nets.data import make_dataset as make_cached_dataset
from medsa_nets.errors import DataError

SIZE = 7


class CopyTensord(MapTransform):
    """Keeps the stored tensors from being changed in place."""

    def __call__(self, data):
        return {key: value.clone() for key, value in data.items()}


def make_dataset(seed: int | None = 0) -> SeededDataset:
    data = [{"image": torch.arange(16.0).reshape(1, 4, 4) + 100 * i} for i in range(SIZE)]
    random = [RandFlipd("image", prob=0.5, spatial_axis=0), RandGaussianNoised("image", prob=0.7, std=5.0)]
    return SeededDataset(data, Compose([CopyTensord("image"), *random]), seed=seed)


def items(dataset: SeededDataset, order=range(SIZE)) -> dict[int, np.ndarray]:
    return {i: np.asarray(dataset[i]["image"]) for i in order}


def same(a: dict[int, np.ndarray], b: dict[int, np.ndarray]) -> bool:
    return all(np.array_equal(a[i], b[i]) for i in a)


def test_an_item_does_not_depend_on_what_was_loaded_before():
    forward, backward = items(make_dataset()), items(make_dataset(), reversed(range(SIZE)))
    assert same(forward, backward)
    dataset = make_dataset()
    items(dataset)
    assert same(forward, items(dataset))


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 3}])
def test_an_item_changes_with_seed_and_epoch(other):
    dataset = make_dataset(seed=other.get("seed", 0))
    dataset.set_epoch(other.get("epoch", 0))
    assert not any(np.array_equal(a, b) for a, b in zip(items(make_dataset()).values(), items(dataset).values()))


def test_items_draw_random_numbers_of_their_own():
    noise = [image - 100 * i for i, image in items(make_dataset()).items()]
    assert len({image.tobytes() for image in noise}) >= SIZE - 2  # the noise is applied to 70 % of them


def test_without_a_seed_the_one_of_set_determinism_counts():
    try:
        set_determinism(seed=11)
        assert same(items(make_dataset(None)), items(make_dataset(11)))
    finally:
        set_determinism(seed=None)


@pytest.mark.parametrize("epoch", [1, 2])
def test_items_do_not_depend_on_the_number_of_workers(epoch):
    found = []
    for workers in (0, 2):
        dataset = make_dataset()
        sampler = EpochSampler(dataset, seed=4)
        sampler.set_epoch(epoch)
        batches = DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=workers)
        found.append(torch.cat([batch["image"].as_tensor() for batch in batches]))
    assert found[0].shape == (SIZE, 1, 4, 4)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_the_file_through_a_data_loader(tmp_path, workers):
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "damaged.png").write_bytes(b"")
    data = [{"image": str(tmp_path / name)} for name in ("good.png", "damaged.png")]
    dataset = SeededDataset(data, Compose([LoadImaged("image", reader=PhotographReader(), ensure_channel_first=True)]))
    loader = DataLoader(dataset, batch_size=1, num_workers=workers)
    with pytest.raises(DataError, match=r"damaged\.png: not readable"):
        list(loader)


def test_an_error_of_another_kind_is_left_as_it_is():
    def fail(item):
        raise KeyError("unrelated")

    with pytest.raises(RuntimeError) as caught:
        SeededDataset([0], fail)[0]
    assert not isinstance(caught.value, DataError)


def test_a_stable_seed_depends_on_the_parts_alone():
    # sha256 of "(0, 'a')", first four bytes: what any machine and any version of Python gives
    import hashlib

    assert stable_seed(0, "a") == int(hashlib.sha256(b"(0, 'a')").hexdigest()[:8], 16)
    assert len({stable_seed(0, 1), stable_seed(1, 0), stable_seed(0, 0, 1), stable_seed("0", 1)}) == 4


class Counting(MapTransform):
    """Counts how often each item is read."""

    def __init__(self) -> None:
        super().__init__("image")
        self.read: Counter = Counter()

    def __call__(self, data):
        self.read[int(data["image"][0, 0, 0]) // 100] += 1
        return {key: value.clone() for key, value in data.items()}


@pytest.mark.parametrize(("room", "kept"), [(10**6, SIZE), (3 * 64, 3), (1, 1)])
def test_memory_keeps_what_fits_and_every_item_is_the_same(monkeypatch, caplog, room, kept):
    counting = Counting()
    data = [{"image": torch.arange(16.0).reshape(1, 4, 4) + 100 * i} for i in range(SIZE)]  # 64 bytes each
    random = RandGaussianNoised("image", prob=0.7, std=5.0)
    monkeypatch.setattr("medsa_nets.data.dataset.usable_memory", lambda: 4 * room)
    with caplog.at_level(logging.INFO):
        dataset = make_cached_dataset(data, Compose([counting, random]), cache="memory")
    assert (f"{kept} of {SIZE} items are kept" in caplog.text) == (kept < SIZE)
    counting.read.clear()
    found = items(dataset)
    assert sorted(counting.read) == list(range(kept, SIZE))
    assert same(found, items(SeededDataset(data, Compose([CopyTensord("image"), random]), seed=0)))


def epochs(count: int, **settings) -> list[list[int]]:
    sampler = EpochSampler(make_dataset(), **settings)
    found = []
    for epoch in range(1, count + 1):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler)
    return found


def test_an_epoch_of_full_length_is_a_permutation_and_the_next_another():
    first, second = epochs(2)
    assert sorted(first) == sorted(second) == list(range(SIZE))
    assert first != second


@pytest.mark.parametrize("num_samples", [1, 3, 7, 10, 14])
def test_epochs_of_any_length_show_every_item_equally_often(num_samples):
    shown = Counter(i for epoch in epochs(SIZE, num_samples=num_samples) for i in epoch)
    assert shown == dict.fromkeys(range(SIZE), num_samples)


def test_short_epochs_repeat_no_item_before_all_were_shown():
    shown = [i for epoch in epochs(3, num_samples=3) for i in epoch]
    assert sorted(shown[:SIZE]) == list(range(SIZE))


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("num_samples", [0, 6])
def test_replicas_share_an_epoch_without_overlap(replicas, num_samples):
    shards = [epochs(3, num_replicas=replicas, rank=rank, num_samples=num_samples) for rank in range(replicas)]
    total = -(-(num_samples or SIZE) // replicas) * replicas  # every process takes the same number
    whole = epochs(3, num_replicas=1, rank=0, num_samples=total)
    for epoch in range(3):
        interleaved = [i for step in zip(*(shard[epoch] for shard in shards)) for i in step]
        assert interleaved == whole[epoch]
        if total <= SIZE:
            assert len(set(interleaved)) == total or epoch > 0
        else:
            assert set(interleaved) == set(range(SIZE)) or epoch > 0


def test_the_order_depends_on_the_seed_alone():
    assert epochs(3, seed=2) == epochs(3, seed=2)
    assert epochs(3, seed=2) != epochs(3, seed=3)


def test_a_resumed_sampler_goes_on_where_it_stopped():
    resumed = EpochSampler(make_dataset(), num_samples=3)
    resumed.set_epoch(3)
    assert list(resumed) == epochs(3, num_samples=3)[2]


def test_the_sampler_tells_the_dataset_its_epoch():
    dataset = make_dataset()
    EpochSampler(dataset).set_epoch(5)
    assert dataset.epoch == 5


def test_volumes_are_named_more_often_than_single_slices(tmp_path: Path) -> None:
    entries = []
    for name, shape in (("volume.nii.gz", (4, 5, 6)), ("slice.nii.gz", (4, 5, 1)), ("volume.nrrd", (4, 5, 3))):
        if name.endswith(".nrrd"):
            itk.imwrite(itk.image_from_array(np.zeros(shape[::-1], np.float32)), str(tmp_path / name))
        else:
            nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), tmp_path / name)
        entries.append({"image": str(tmp_path / name)})
    folder = tmp_path / "series"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.dcm").touch()
    entries.append({"image": str(folder)})
    assert [e["image"] for e in repeat_volumes(entries, 3)] == [
        entries[i]["image"] for i in (0, 0, 0, 1, 2, 2, 2, 3, 3, 3)
    ]
    assert repeat_volumes(entries, 1) == entries
    with pytest.raises(ValueError, match="repeats must be 1 or more, got 0"):
        repeat_volumes(entries, 0)
    (tmp_path / "broken.nii.gz").write_bytes(b"no header")
    with pytest.raises(DataError, match=r"broken.nii.gz: its header can't be read"):
        repeat_volumes([{"image": str(tmp_path / "broken.nii.gz")}], 2)
