"""Data sets as they are published: a task of a few lines reads each, on a small tree of the same shape."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import itk
import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export
from monai.transforms import Compose
from PIL import Image

from medsa_nets.bundles import Bundle, copy_bundle
from medsa_nets.data import PhotographReader, load_datalist, read_volume
from medsa_nets.demo import read_metrics
from medsa_nets.errors import DataError, WeightsError
from medsa_nets.interaction.segmenters import NetworkSegmenter
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.metrics import RaterAgreement, RaterDice
from medsa_nets.transforms import ChooseRaterd, check_prompt_keys

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
BUNDLE = BUNDLES / "medsa_isic"  # where commands run


def picture(path: Path, number: int, mask: bool = False, size: tuple[int, int] = (40, 30)) -> None:
    """A photograph, or the mask of a square of 8 x 8 pixels, written as ``path`` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(number).integers(0, 200, (size[1], size[0], 3), dtype=np.uint8)
    if mask:
        values = np.zeros((size[1], size[0]), np.uint8)
        values[10:18, 4 + number : 12 + number] = 255
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    Image.fromarray(values).save(plain)
    if plain != path:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()


def ddti(root: Path) -> None:
    for split, count in (("Training", 6), ("Test", 2)):
        for i in range(count):
            picture(root / split / "images" / f"{i}_1.PNG", i)
            picture(root / split / "masks" / f"{i}_1.PNG", i, mask=True)


def stare(root: Path) -> None:
    for i in range(10):
        picture(root / "images" / f"im{i:04d}.ppm{'.gz' if i % 2 else ''}", i)
        if i < 8:
            picture(root / "masks" / f"im{i:04d}.ah.ppm{'.gz' if i % 2 else ''}", i, mask=True)


def pendal(root: Path) -> None:
    for i in range(8):
        picture(root / "Images" / f"{i}.bmp", i)
        for folder in ("Segmentation1", "Segmentation2"):
            picture(root / folder / f"{i}.bmp", i, mask=True)


def lidc_crop(number: int) -> dict[str, Any]:
    """A crop as the pickle has it; raters mark a square, a row more each, and the last one nothing."""
    masks = [np.zeros((64, 64), np.uint8) for _ in range(4)]
    for rater in range(3):
        masks[rater][20 : 30 + rater, 4 + number : 14 + number] = 1
    image = np.random.default_rng(number).random((64, 64))
    return {"image": image, "masks": masks, "series_uid": f"1.2.{number // 2}"}


def lidc(root: Path) -> None:
    root.mkdir(exist_ok=True)
    for part in range(2):
        crops = {f"nodule {i}": lidc_crop(i) for i in range(6 * part, 6 * part + 6)}
        content = pickle.dumps(crops, protocol=(2, 5)[part])
        if part == 0:  # as numpy 1 wrote it
            content = content.replace(b"numpy._core", b"numpy.core")
        (root / f"data_{part}.pickle").write_bytes(content)


# task: what makes a tree of its shape, entries of training, validation and testing, what a wrong folder is told
PHOTOGRAPHS: dict[str, tuple[Callable[[Path], None], tuple[int, int, int], str]] = {
    "ddti": (ddti, (5, 1, 2), "Training/images/{case}.* with Training/masks/{case}.* (training)"),
    "stare": (stare, (5, 1, 2), "images/{case}.ppm or images/{case}.ppm.gz with masks/{case}.ah.ppm or"),
    "lidc": (lidc, (8, 2, 2), "*.pickle of crops, which are unpacked once, or images/{group}/{case}.png with"),
    "pendal": (pendal, (5, 1, 2), "Images/{case}.* with Segmentation1/{case}.*"),
}


def label_map(number: int, classes: int) -> np.ndarray:
    """Labels of a volume (20, 18, 12): a block of each class, above each other."""
    values = np.zeros((20, 18, 12), np.uint8)
    for k in range(classes):
        values[4 + number : 12 + number, 4:12, 1 + 3 * k : 4 + 3 * k] = 1 + k
    return values


def volume(path: Path, number: int, classes: int = 0) -> None:
    """A volume of noise, or its labels where there are classes, in the form that ``path`` says."""
    values = label_map(number, classes) if classes else np.random.default_rng(number).normal(size=(20, 18, 12))
    values = values.astype(np.uint8 if classes else np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":  # stored from head to feet, front to back, right to left, as toothfairy.yaml says
        np.save(path, np.transpose(values[::-1, ::-1, :], (2, 1, 0)))
    elif path.suffix == ".nrrd":
        image = itk.image_from_array(np.ascontiguousarray(np.transpose(values[::-1, ::-1], (2, 1, 0))))  # LPS
        itk.imwrite(image, str(path), compression=True)
    else:
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


def atlas(root: Path) -> None:
    listed = []
    for i in range(6):
        volume(root / "train" / "imagesTr" / f"im{i}.nii.gz", i)
        volume(root / "train" / "labelsTr" / f"lb{i}.nii.gz", i, 2)
        listed.append({"image": f"./imagesTr/im{i}.nii.gz", "label": f"./labelsTr/lb{i}.nii.gz"})
    names = {"0": "background", "1": "liver", "2": "tumor"}
    (root / "train" / "dataset.json").write_text(json.dumps({"labels": names, "training": listed}))


def kits(root: Path) -> None:
    for i in range(7):
        case = root / "kits21" / "data" / f"case_{i:05d}"
        volume(case / "imaging.nii.gz", i)
        for kind in ("AND", "OR", "MAJ") if i < 6 else ():
            volume(case / f"aggregated_{kind}_seg.nii.gz", i, 3)


def lnq(root: Path) -> None:
    for i in range(6):
        name = f"lnq2023-train-case-{i:04d}"
        volume(root / "train" / f"{name}-ct.nrrd", i)
        volume(root / "train" / f"{name}-seg.nrrd", i, 1)
        picture(root / "train" / f"{name}-ct.png", i)


def segrap(root: Path) -> None:
    for i in range(6):
        for channel, name in enumerate(("image", "image_contrast")):
            volume(root / "SegRap2023_Training_Set_120cases" / f"segrap_{i:04d}" / f"{name}.nii.gz", i + 100 * channel)
        labels = root / "SegRap2023_Training_Set_120cases_OneHot_Labels"
        for task, classes in (("Task001", 3), ("Task002", 2)):
            volume(labels / task / f"segrap_{i:04d}.nii.gz", i, classes)


def brats(root: Path) -> None:
    for i in range(6):
        case = f"BraTS2021_{i:05d}"
        for channel, name in enumerate(("t1", "t1ce", "t2", "flair")):
            volume(root / "Data" / case / f"{case}_{name}.nii.gz", i + 100 * channel)
        labels = label_map(i, 3)
        labels[labels == 3] = 4
        nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), root / "Data" / case / f"{case}_seg.nii.gz")


def brain_tumour(root: Path) -> None:
    listed = []
    for i in range(6):
        channels = [np.random.default_rng(i + 100 * c).normal(size=(20, 18, 12)) for c in range(4)]
        (root / "imagesTr").mkdir(parents=True, exist_ok=True)
        stacked = nibabel.Nifti1Image(np.stack(channels, -1).astype(np.float32), np.eye(4))
        nibabel.save(stacked, root / "imagesTr" / f"BRATS_{i:03d}.nii.gz")
        volume(root / "labelsTr" / f"BRATS_{i:03d}.nii.gz", i, 3)
        listed.append({kind[:5]: f"./{kind}sTr/BRATS_{i:03d}.nii.gz" for kind in ("image", "label")})
    names = ["background", "edema", "non-enhancing tumor", "enhancing tumour"]
    labels = {str(i): name for i, name in enumerate(names)}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "training": listed}))


def toothfairy(root: Path) -> None:
    for i in range(6):
        volume(root / "Dataset" / f"P{i}" / "data.npy", i)
        volume(root / "Dataset" / f"P{i}" / "gt_sparse.npy", i, 1)


# further: classes, channels
VOLUMES: dict[str, tuple[Callable[[Path], None], tuple[int, int], int, int, str]] = {
    "atlas": (atlas, (5, 1), 2, 1, "Expected train/dataset.json or dataset.json"),
    "kits": (kits, (5, 1), 3, 1, "kits21/data/{case}/imaging.nii.gz or data/{case}/imaging.nii.gz"),
    "lnq": (lnq, (5, 1), 1, 1, "train/{case}-ct.nrrd or {case}-ct.nrrd with train/{case}-seg.nrrd"),
    "segrap": (
        segrap,
        (5, 1),
        2,
        1,
        "SegRap2023_Training_Set_120cases/{case}/image.nii.gz with SegRap2023_Train",
    ),
    "brats": (brats, (5, 1), 3, 4, "Data/{case}/{case}_flair.nii.gz or"),
    "brain_tumour": (brain_tumour, (5, 1), 3, 4, "dataset.json; imagesTr/ with labelsTr/"),
    "segrap_phases": (segrap, (5, 1), 2, 2, "SegRap2023_Training_Set_120cases/{case}/image_contrast.nii.gz with"),
    "toothfairy": (
        toothfairy,
        (5, 1),
        1,
        1,
        "Dataset/{case}/data.npy or {case}/data.npy with Dataset/{case}/gt_",
    ),
}
TASKS = [("medsa_isic", name) for name in PHOTOGRAPHS] + [("medsa_btcv", name) for name in VOLUMES]
EXPECTED = {**{name: own[-1] for name, own in PHOTOGRAPHS.items()}, **{name: own[-1] for name, own in VOLUMES.items()}}


def open_task(bundle: str, task: str, root: Path, split: str = "training") -> Bundle:
    overlays = [] if split == "training" else ["evaluate.yaml"]
    settings = {"task": task, "dataset_dir": str(root), **({} if split == "training" else {"split": split})}
    return Bundle.open(BUNDLES / bundle, overlays, settings=settings, config="train.yaml")


def entries(bundle: str, task: str, root: Path, split: str) -> list[dict[str, Any]]:
    key = {"medsa_isic": "{}#dataset#data", "medsa_btcv": "{}#data"}[bundle]
    found = open_task(bundle, task, root, split).value(key.format("train" if split == "training" else "validate"))
    return list(found)


@pytest.mark.parametrize("task", PHOTOGRAPHS)
def test_a_data_set_is_read_as_it_comes(task: str, tmp_path: Path) -> None:
    bundle = "medsa_isic"
    make, counts, _ = PHOTOGRAPHS[task]
    make(tmp_path)
    found = {split: entries(bundle, task, tmp_path, split) for split in ("training", "validation", "testing")}
    assert tuple(map(len, found.values())) == counts
    images = [str(item["image"]) for items in found.values() for item in items]
    assert len(set(images)) == len(images)
    item = open_task(bundle, task, tmp_path).value("train#dataset")[0]
    assert torch.isfinite(item["image"]).all()
    assert item["image"].shape[1:] == item["label"].shape[1:]
    assert set(torch.unique(torch.as_tensor(item["label"])).tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("task", PHOTOGRAPHS)
def test_a_mask_lies_where_it_was_drawn(task: str, tmp_path: Path) -> None:
    PHOTOGRAPHS[task][0](tmp_path)
    evaluated = open_task("medsa_isic", task, tmp_path, "testing").value("validate#dataset")
    for i, entry in enumerate(evaluated.data):
        number = int(re.findall(r"\d+", Path(entry["image"]).stem)[0])
        if task == "lidc":
            crop = np.stack(lidc_crop(number)["masks"])
            assert torch.as_tensor(evaluated[i]["label"])[0].numpy().T.tolist() in crop.tolist()
            continue
        expected = torch.zeros(40, 30)
        expected[4 + number : 12 + number, 10:18] = 1
        assert torch.equal(torch.as_tensor(evaluated[i]["label"])[0], expected)


@pytest.mark.parametrize(("bundle", "task"), TASKS)
def test_a_wrong_folder_is_told_what_was_expected(bundle: str, task: str, tmp_path: Path) -> None:
    picture(tmp_path / "photos" / "a.png", 1)
    with pytest.raises(DataError) as caught:
        entries(bundle, task, tmp_path, "training")
    message = str(caught.value)
    assert EXPECTED[task] in message
    assert "Found photos/." in message
    assert "--datalist" in message


@pytest.mark.parametrize(("bundle", "task"), TASKS)
def test_a_task_is_a_few_lines_and_names_where_its_layout_is_from(bundle: str, task: str) -> None:
    path = BUNDLES / bundle / "configs" / "tasks" / f"{task}.yaml"
    assert len(ConfigParser.load_config_file(path)) <= 14
    assert "0add836" in path.read_text().split("like:")[0]


@pytest.mark.parametrize("task", VOLUMES)
def test_volumes_are_read_as_they_come(task: str, tmp_path: Path) -> None:
    make, counts, classes, channels, _ = VOLUMES[task]
    make(tmp_path)
    found = {split: entries("medsa_btcv", task, tmp_path, split) for split in ("training", "validation")}
    assert tuple(map(len, found.values())) == counts
    bundle = open_task("medsa_btcv", task, tmp_path)
    assert len(bundle.classes) == classes
    assert found["training"][0]["annotated"].all()
    read = Compose(bundle.value("load_transforms"))
    for entry in found["training"]:
        item = read(dict(entry))
        number = next(n for n in range(6) if (label_map(n, classes) == item["label"][0].numpy()).all())
        # the image that belongs to the label, in the same directions
        drawn = [np.random.default_rng(number + 100 * c).normal(size=(20, 18, 12)) for c in range(channels)]
        assert item["image"].numpy() == pytest.approx(np.stack(drawn), abs=1e-6)
        assert item["image"].pixdim.tolist() == pytest.approx([0.3] * 3 if task == "toothfairy" else [1.0] * 3)
    settings = {"task": task, "dataset_dir": str(tmp_path), "cache": "none", "roi_size": [16, 16, 4]}
    item = Bundle.open(BUNDLES / "medsa_btcv", settings=settings, config="train.yaml").value("train#dataset")[0][0]
    assert (item["image"].shape, item["label"].shape) == ((channels, 16, 16, 4), (1, 16, 16, 4))
    assert float(item["image"].min()) < float(item["image"].max())
    assert bundle.value("network_def#in_channels") == channels


def test_cases_of_one_file_name_get_masks_of_their_own(
    small_base: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    for i in range(2):
        volume(tmp_path / "data" / "kits21" / "data" / f"case_{i:05d}" / "imaging.nii.gz", i)
    root = BUNDLES / "medsa_btcv"
    options = {
        "bundle_root": str(root), "config_file": str(root / "configs" / "inference.yaml"), "task": "kits",
        "dataset_dir": tmp_path / "data", "output_dir": tmp_path / "out", "checkpoint": "", "base": small_base,
        "pixdim": "[1,1,1]", "amp": False,
    }  # fmt: skip
    done = cli("run", "inferring", **options)
    assert done.returncode == 0, done.stderr[-2000:]
    names = [f"case_0000{i}_imaging_segmentation.nii.gz" for i in range(2)]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == names


def test_volumes_of_four_channels_train_and_are_segmented_and_exported(
    small_base: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    brats(tmp_path / "data")
    root = BUNDLES / "medsa_btcv"
    options = {
        "bundle_root": str(root), "task": "brats", "dataset_dir": tmp_path / "data", "ckpt_dir": tmp_path / "models",
        "base": small_base, "output_dir": tmp_path / "out", "amp": False, "pixdim": "[1,1,1]", "num_workers": 0,
    }  # fmt: skip
    more = {"max_epochs": 1, "samples_per_epoch": 2, "roi_size": "[16,16,4]", "warmup_steps": 1, "val_interval": 1}
    train, inference = (str(root / "configs" / f"{name}.yaml") for name in ("train", "inference"))
    done = cli("run", "training", config_file=train, samples_interval=1, **options, **more)
    assert done.returncode == 0, done.stderr[-2000:]
    state = torch.load(tmp_path / "models" / "brats.pt", weights_only=True)
    assert state["channel_projection.weight"].shape == (3, 4, 1, 1)
    assert not torch.equal(state["channel_projection.weight"], torch.full((3, 4, 1, 1), 0.25)), "it trains"
    done = cli("run", "inferring", config_file=inference, **{**options, "save_overlays": True})
    assert done.returncode == 0, done.stderr[-2000:]
    written = nibabel.load(tmp_path / "out" / "BraTS2021_00000_t1_segmentation.nii.gz")
    assert written.shape == (20, 18, 12)
    settings = {"task": "brats", "base": small_base, "ckpt_dir": str(tmp_path / "models"), "pixdim": [1, 1, 1]}
    with pytest.raises(WeightsError, match=r"in_channels=4 \(here 1\)"):
        NetworkSegmenter.from_bundle(root, settings={**settings, "in_channels": 1, "amp": False})
    session = InteractiveSession(NetworkSegmenter.from_bundle(root, settings={**settings, "amp": False}))
    session.open(entries("medsa_btcv", "brats", tmp_path / "data", "training")[0]["image"])
    session.point([8, 8, 5], 1, 0)
    assert session.mask(0)[8, 8, 5]
    file = tmp_path / "brats.ts"
    ckpt_export(net_id="network_def", filepath=str(file), ckpt_file=str(tmp_path / "models" / "brats.pt"),
                meta_file=str(root / "configs" / "metadata.json"), config_file=inference, task="brats",
                base=small_base, bundle_root=str(root), pixdim=[1, 1, 1])  # fmt: skip
    network = session.segmenter.network.eval()
    image = torch.rand(1, 4, 64, 64, 3)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(file)(image), network(image), atol=1e-4, rtol=1e-4)


def test_a_copy_for_a_server_says_how_many_channels_an_image_has(tmp_path: Path) -> None:
    root = shutil.copytree(BUNDLES / "medsa_btcv", tmp_path / "b", ignore=shutil.ignore_patterns("*.pt", "docs"))
    (root / "docs").mkdir()
    (root / "configs" / "own.yaml").write_text("task: brats\n")
    copy_bundle(root, tmp_path / "copy", ["own.yaml"])
    image = Bundle.open(tmp_path / "copy").metadata["network_data_format"]["inputs"]["image"]
    assert image["num_channels"] == len(image["channel_def"]) == 4


@pytest.mark.parametrize(
    ("channels", "files", "message"),
    [
        (3, ["a", "b"], "has 2 files .* expected 3"),
        (2, ["a", "shifted"], r"shifted\.nii\.gz: its grid is .*that of a\.nii\.gz, another channel"),
        (2, "four", r"four\.nii\.gz: it has 4 channel\(s\); expected 2 \(in_channels\)"),
        (2, "a", r"a\.nii\.gz: it has 1 channel\(s\); expected 2"),
        (1, "four", r"its shape is \(20, 18, 12, 4\); expected one volume of three dimensions"),
    ],
)
def test_another_number_of_channels_is_refused(channels: int, files: Any, message: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        volume(tmp_path / f"{name}.nii.gz", 0)
    moved = np.eye(4)
    moved[0, 3] = 5.0
    nibabel.save(nibabel.Nifti1Image(np.zeros((20, 18, 12), np.float32), moved), tmp_path / "shifted.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.zeros((20, 18, 12, 4), np.float32), np.eye(4)), tmp_path / "four.nii.gz")
    paths = [tmp_path / f"{name}.nii.gz" for name in ([files] if isinstance(files, str) else files)]
    with pytest.raises(DataError, match=message):
        read_volume(paths[0] if isinstance(files, str) else paths, channels=channels)


def test_colours_are_channels_of_a_volume(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (12, 10, 6, 3), dtype=np.uint8)
    packed = np.zeros((12, 10, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for i, name in enumerate("RGB"):
        packed[name] = values[..., i]
    nibabel.save(nibabel.Nifti1Image(packed, np.eye(4)), tmp_path / "rgb.nii.gz")
    image = itk.image_from_array(np.ascontiguousarray(values.transpose(2, 1, 0, 3)), is_vector=True)
    for name in ("rgb.nrrd", "rgb.mha"):
        itk.imwrite(image, str(tmp_path / name))
    for name in ("rgb.nii.gz", "rgb.nrrd", "rgb.mha"):
        assert read_volume(tmp_path / name, channels=3).numpy().tolist() == values.transpose(3, 0, 1, 2).tolist(), name


def test_prompts_for_a_name_of_several_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps({"imaging.nii.gz": {"kidney": {"points": [[1, 2, 3]]}}}))
    data = [{"image": f"/data/case_{i}/imaging.nii.gz"} for i in range(2)]
    with pytest.raises(DataError, match=r"'imaging\.nii\.gz' is the name of several images"):
        check_prompt_keys(str(tmp_path / "prompts.json"), data)
    check_prompt_keys(str(tmp_path / "prompts.json"), data[:1])


def test_an_array_needs_its_geometry(tmp_path: Path) -> None:
    volume(tmp_path / "a.npy", 0)
    with pytest.raises(DataError, match=r"a\.npy: an array states neither spacing nor directions\. Set arrays"):
        read_volume(tmp_path / "a.npy")
    for arrays in ({"spacing": [1, 1], "axes": "SPL"}, {"spacing": [1, 1, 1], "axes": "SPS"}, {"spacing": [1, 1, 0]}):
        with pytest.raises(DataError, match=r"arrays: .*expected {spacing"):
            read_volume(tmp_path / "a.npy", arrays=arrays)
    arrays = {"spacing": [3, 2, 1], "axes": "SPL"}
    found = read_volume(tmp_path / "a.npy", arrays=arrays)
    assert found.affine.tolist() == [[0, 0, -1, 0], [0, -2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]]
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-100])
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for name in ("cut.npy", "object.npy"):
        with pytest.raises(DataError, match=rf"{name}: not readable as a volume"):
            read_volume(tmp_path / name, arrays=arrays)


@pytest.mark.parametrize(("raters", "count", "rows"), [("each", 4, [10, 11, 12, 0]), ("majority", 1, [11])])
def test_masks_of_several_raters_become_one(raters: str, count: int, rows: list[int], tmp_path: Path) -> None:
    lidc(tmp_path)
    settings = {"task": "lidc", "dataset_dir": str(tmp_path), "raters": raters, "split": "testing"}
    data = Bundle.open(BUNDLES / "medsa_isic", ["evaluate.yaml"], settings=settings, config="train.yaml").value(
        "validate#dataset"
    )
    assert len(data) == 2 * count
    # half of four is enough: two raters marked row 11, one row 12
    assert [float(data[i]["label"].sum()) for i in range(count)] == [10.0 * row for row in rows]
    assert data[0]["raters"].shape == (4, 64, 64)


def test_a_random_rater_is_another_one_in_another_epoch(tmp_path: Path) -> None:
    lidc(tmp_path)
    data = open_task("medsa_isic", "lidc", tmp_path).value("train#dataset")
    label = ChooseRaterd("label", raters="random").set_random_state(0)
    masks = torch.stack([torch.full((4, 4), float(i)) for i in range(4)])
    drawn = [float(label({"label": masks})["label"][0, 0, 0]) for _ in range(40)]
    assert set(drawn) == {0.0, 1.0, 2.0, 3.0}
    seen = set()
    for epoch in range(1, 9):
        data.set_epoch(epoch)
        seen.add(float(torch.as_tensor(data[0]["label"]).sum()) > 0)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda crop: crop.pop("masks"), "is no crop: expected a dictionary with image, masks, series_uid"),
        (lambda crop: crop.update(image=crop["image"] * 300), "values from 0 to 1"),
        (lambda crop: crop["masks"].append(np.full((64, 64), 7)), "mask 5 is no"),
    ],
)
def test_a_pickle_of_something_else_is_refused_and_leaves_nothing(
    damage: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    crops = {"a": lidc_crop(0), "b": lidc_crop(1)}
    damage(crops["b"])
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(crops))
    with pytest.raises(DataError, match=rf"x\.pickle: 'b'.*{message}"):
        entries("medsa_isic", "lidc", tmp_path, "training")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pickle"]


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (exec, (f"open({str(tmp_path / 'harm')!r}, 'w')",))

    (tmp_path / "x.pickle").write_bytes(pickle.dumps({"a": Harm()}))
    with pytest.raises(DataError, match=r"x\.pickle: refused, it names builtins\.exec"):
        entries("medsa_isic", "lidc", tmp_path, "training")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pickle"]
    (tmp_path / "x.pickle").write_bytes(b"no pickle")
    with pytest.raises(DataError, match="not readable as a pickle of arrays"):
        entries("medsa_isic", "lidc", tmp_path, "training")


def test_pickles_are_unpacked_once_and_anew_where_they_change(tmp_path: Path) -> None:
    lidc(tmp_path)
    before = entries("medsa_isic", "lidc", tmp_path, "training")
    folder = next(tmp_path.glob("unpacked-*"))
    made = folder.stat().st_mtime_ns
    assert entries("medsa_isic", "lidc", tmp_path, "training") == before
    assert folder.stat().st_mtime_ns == made
    (tmp_path / "data_1.pickle").unlink()
    assert len(entries("medsa_isic", "lidc", tmp_path, "training")) < len(before)


def test_raters_and_masks_have_to_fit(tmp_path: Path) -> None:
    pendal(tmp_path)
    settings = {"task": "pendal", "dataset_dir": str(tmp_path), "raters": "majority"}
    with pytest.raises(DataError, match="it has one mask; with raters"):
        Bundle.open(BUNDLES / "medsa_isic", settings=settings, config="train.yaml").value("train#dataset#data")
    with pytest.raises(DataError, match="raters must be one of each, majority, random; got 'most'"):
        ChooseRaterd("label", raters="most")
    with pytest.raises(DataError, match=r"2 mask\(s\) of one image, and raters is None"):
        ChooseRaterd("label")({"label": torch.zeros(2, 4, 4)})
    with pytest.raises(DataError, match="raters is 'majority', but there are 2 classes"):
        ChooseRaterd("label", raters="majority", classes=2)
    several = {"label": torch.zeros(2, 4, 4)}
    assert ChooseRaterd("label", classes=2)(several)["label"] is several["label"]


def test_a_list_may_name_masks_of_several_raters(tmp_path: Path) -> None:
    for i in range(2):
        picture(tmp_path / f"{i}.png", i)
        for rater in range(2):
            picture(tmp_path / f"{i}_{rater}.png", i + rater, mask=True)
    listed = [{"image": f"{i}.png", "label": [f"{i}_0.png", f"{i}_1.png"]} for i in range(2)]
    (tmp_path / "list.json").write_text(json.dumps({"training": listed}))
    items = load_datalist("training", tmp_path, tmp_path / "list.json", raters="each", validation_fraction=0.0)
    assert [(Path(item["image"]).name, item["rater"]) for item in items] == [
        ("0.png", 0), ("0.png", 1), ("1.png", 0), ("1.png", 1),
    ]  # fmt: skip
    with pytest.raises(DataError, match="has 2 files as its label"):
        load_datalist("training", tmp_path, tmp_path / "list.json")
    picture(tmp_path / "1_1.png", 0, mask=True, size=(20, 20))
    assert len(load_datalist("training", tmp_path, tmp_path / "list.json", raters="each", validation_fraction=0.0)) == 4
    reader = PhotographReader(mode="L")
    with pytest.raises(DataError, match=r"1_1\.png: it is 20 x 20 pixels, .*1_0\.png is 40 x 30"):
        reader.get_data(reader.read([tmp_path / name for name in listed[1]["label"]]))


def dice(one: np.ndarray, other: np.ndarray) -> float:
    total = int(one.sum() + other.sum())
    return 2.0 * int((one & other).sum()) / total if total else 1.0


def test_agreement_of_raters_is_the_mean_dice_of_their_pairs() -> None:
    masks = [np.stack(lidc_crop(i)["masks"]).astype(bool) for i in range(2)]
    masks[1][2] = False
    tensors = [torch.from_numpy(own).float() for own in masks]
    expected = [np.mean([dice(a, b) for a, b in itertools.combinations(own, 2)]) for own in masks]
    metric = RaterAgreement()
    assert metric(tensors, tensors)[:, 0].tolist() == pytest.approx(expected)
    assert float(metric.aggregate()) == pytest.approx(np.mean(expected))
    drawn = torch.zeros(1, 64, 64)
    drawn[:, 20:25, 4:14] = 1
    expected = [np.mean([dice(drawn[0].numpy().astype(bool), rater) for rater in own]) for own in masks]
    assert RaterDice()([drawn, drawn], tensors)[:, 0].tolist() == pytest.approx(expected)


def test_an_evaluation_says_how_raters_agree_beside_the_dice_of_the_adapter(
    small_base: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    lidc(tmp_path / "data")
    root = BUNDLES / "medsa_isic"
    options = {
        "bundle_root": str(root), "task": "lidc", "dataset_dir": tmp_path / "data", "ckpt_dir": tmp_path / "models",
        "base": small_base, "image_size": 64, "num_workers": 0, "amp": False, "output_dir": tmp_path / "out",
    }  # fmt: skip
    more = {"max_epochs": 1, "samples_per_epoch": 4, "batch_size": 2, "warmup_steps": 1, "samples_interval": 0}
    train, evaluate = (str(root / "configs" / f"{name}.yaml") for name in ("train", "evaluate"))
    done = cli("run", "training", config_file=train, **options, **more)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "models" / "lidc.pt").is_file()
    done = cli("run", "evaluating", config_file=f"['{train}','{evaluate}']", split="testing", **options)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = read_metrics(tmp_path / "out")
    tested = entries("medsa_isic", "lidc", tmp_path / "data", "testing")
    masks = [np.stack(lidc_crop(int(Path(e["image"]).stem.split("_")[-1]))["masks"]).astype(bool) for e in tested]
    pairs = [np.mean([dice(a, b) for a, b in itertools.combinations(own, 2)]) for own in masks]
    assert metrics["val_rater_agreement"] == pytest.approx(np.mean(pairs), abs=1e-3)
    assert 0.0 <= metrics["val_rater_dice"] <= 1.0
    assert {"val_mean_dice", "val_mean_iou"} <= set(metrics)


def test_a_packed_picture_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medsa_nets.data import photographs

    stare(tmp_path)
    monkeypatch.setattr(photographs, "_MOST_UNPACKED", 1000)
    with pytest.raises(DataError, match=r"im0001\.ppm\.gz: it holds more than"):
        photographs.read_photograph(tmp_path / "images" / "im0001.ppm.gz")
    (tmp_path / "cut.ppm.gz").write_bytes((tmp_path / "images" / "im0001.ppm.gz").read_bytes()[:-200])
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"cut\.ppm\.gz: not readable as an image"):
        photographs.read_photograph(tmp_path / "cut.ppm.gz")
