"""The bundle medsa_btcv through its own commands, on generated volumes and, where they are, on real ones."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from monai.bundle import ConfigParser, ckpt_export, onnx_export, run, verify_net_in_out
from monai.transforms import SaveImaged
from PIL import Image
from scipy.spatial.transform import Rotation

from medsa_nets import WeightsError, build_medsa
from medsa_nets.bundles import Bundle
from medsa_nets.data import read_volume
from medsa_nets.demo import read_metrics
from medsa_nets.errors import DataError, find_cause
from medsa_nets.networks.identity import decode_identity
from medsa_nets.prompts import prompts_of
from medsa_nets.training import save_atomically
from medsa_nets.weights import find_base_file, get_base

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_btcv"
CONFIGS = BUNDLE / "configs"
TRAIN, EVALUATE, INFERENCE, HIPPOCAMPUS = (
    str(CONFIGS / f"{n}.yaml") for n in ("train", "evaluate", "inference", "hippocampus")
)
META = str(CONFIGS / "metadata.json")
COMMON = {"bundle_root": str(BUNDLE), "meta_file": META, "num_workers": 0, "amp": False, "base": "small"}
# a base of narrow layers, small volumes of three classes: these runs test wiring, not accuracy
CLASSES = ["spleen", "right kidney", "left kidney"]
SMALL = {"classes": CLASSES, "pixdim": [2.0, 2.0, 3.0], "slab_depth": 4, "class_chunk": 0, "classes_per_pass": 1}
TRAINING = {"roi_size": [32, 32, 4], "patches_per_volume": 1, "warmup_steps": 1, "samples_interval": 0}


def oblique(spacing: list[float]) -> np.ndarray:
    """An affine of turned axes."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [12, -8, 170], degrees=True).as_matrix() * spacing
    affine[:3, 3] = [5.0, -9.0, 30.0]
    return affine


SIDES = {
    "RAS": np.diag([2.0, 1.5, 3.0, 1.0]),
    "LPS": np.diag([-2.0, -1.5, 3.0, 1.0]),
    "LAS": np.diag([-2.0, 1.5, 3.0, 1.0]),
    "oblique": oblique([2.0, 1.5, 3.0]),
}

Command = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.usefixtures("small_base")

try:
    find_base_file(get_base("lite_medsam"))
except WeightsError as error:
    pytest.skip(f"LiteMedSAM's weights are not installed: {error}", allow_module_level=True)


def body(seed: int, shape: tuple[int, int, int] = (24, 28, 9)) -> tuple[np.ndarray, np.ndarray]:
    """Intensities like HU and a label: a body with three ellipsoids, each of an intensity of its own."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    for value, place in enumerate([(0.3, 0.3), (0.7, 0.35), (0.5, 0.75)], start=1):
        centre = np.array([*place, 0.5]) * shape + rng.uniform(-1, 1, 3)
        radius = np.array([0.17, 0.17, 0.4]) * shape
        label[(((grid - centre[:, None, None, None]) / radius[:, None, None, None]) ** 2).sum(0) < 1] = value
    image = np.array([0, 200, -120, 90])[label] + rng.normal(0, 15, shape)
    return image.astype(np.float32), label


def data_set(root: Path, training: int = 2, validation: int = 2, affine: np.ndarray = SIDES["RAS"]) -> Path:
    """The BTCV layout, with ``dataset_0.json``."""
    entries = []
    for i in range(training + validation):
        for folder, prefix, array in zip(("imagesTr", "labelsTr"), ("img", "label"), body(i)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), root / folder / f"{prefix}{i:04d}.nii.gz")
        entries.append({"image": f"imagesTr/img{i:04d}.nii.gz", "label": f"labelsTr/label{i:04d}.nii.gz"})
    lists = {"training": entries[:training], "validation": entries[training:]}
    (root / "dataset_0.json").write_text(json.dumps(lists))
    return root


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_set(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="module")
def adapted(small_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of three classes whose values are random, so that masks are not empty."""
    folder = tmp_path_factory.mktemp("adapted")
    torch.save(random_adapter(3).state_dict(), folder / "model.pt")
    return folder


def random_adapter(num_classes: int, **settings: int) -> torch.nn.Module:
    network = build_medsa("small", spatial_dims=3, num_classes=num_classes, **settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        network.class_embeddings += torch.randn(network.class_embeddings.shape, generator=generator)
    return network


def strong_adapter() -> torch.nn.Module:
    """An adapter that segments something everywhere, whatever it is."""
    torch.manual_seed(1)
    network = build_medsa("small", spatial_dims=3, num_classes=3).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return network


def test_metadata_fits_the_schema_and_names_the_organs_in_order() -> None:
    schema = json.loads((Path(__file__).parent / "meta_schema.json").read_text())
    metadata = json.loads(Path(META).read_text())
    assert list(Draft202012Validator(schema).iter_errors(metadata)) == []
    assert metadata["version"] in metadata["changelog"]
    names = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    for config in (TRAIN, INFERENCE):
        classes = Bundle.open(BUNDLE, config=Path(config).name).classes
        assert names == {str(i): name for i, name in enumerate(["background", *classes])}
    assert len(names) == 14


@pytest.mark.parametrize("config", [TRAIN, INFERENCE])
def test_network_takes_and_gives_what_the_metadata_say(config: str) -> None:
    verify_net_in_out(
        net_id="network_def", meta_file=META, config_file=config, device="cpu", bundle_root=str(BUNDLE), p=1, n=2
    )


def test_training_has_the_keys_that_tools_look_for() -> None:
    parser = ConfigParser(ConfigParser.load_config_file(TRAIN))
    keys = (
        "bundle_root device dataset_dir output_dir network_def inferer train#trainer train#trainer#max_epochs network "
        "train#dataset train#dataset#data train#handlers validate#evaluator validate#handlers validate#dataset "
        "validate#dataset#data val_interval run training initialize"
    )
    assert [name for name in keys.split() if name not in parser] == []


def test_inference_and_training_see_volumes_alike() -> None:
    train, inference = (ConfigParser.load_config_file(c) for c in (TRAIN, INFERENCE))
    for key in (
        "classes",
        "pixdim",
        "grid_transform",
        "intensity_transform",
        "slab_depth",
        "slab_overlap",
        "base",
        "classes_per_pass",
    ):
        assert train[key] == inference[key]
    for files, name in (([TRAIN], "training"), ([TRAIN, EVALUATE], "evaluating"), ([INFERENCE], "inferring")):
        config = ConfigParser.load_config_files(files)
        assert config["run"] == config[name]


@pytest.mark.parametrize(("overlay", "lines"), [("vit_b", 10), ("hippocampus", 14)])
def test_overlays_are_a_few_lines_that_build(overlay: str, lines: int) -> None:
    path = CONFIGS / f"{overlay}.yaml"
    assert 0 < len(ConfigParser.load_config_file(path)) <= lines
    for config in (TRAIN, INFERENCE):
        parser = ConfigParser(ConfigParser.load_config_files([config, str(path)]))
        parser["bundle_root"] = str(BUNDLE)
        parser["network_def"]["pretrained"] = False
        parser["image_size"] = 64
        network = parser.get_parsed_content("network_def")
        classes = len(parser.get_parsed_content("classes"))
        with torch.no_grad():
            assert network(torch.rand(1, 1, 64, 64, 2)).shape == (1, classes, 64, 64, 2)


def test_torchscript_export_holds_base_and_adapter(tmp_path: Path) -> None:
    network = random_adapter(13, class_chunk=4, classes_per_pass=13)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    file = tmp_path / "model.ts"
    ckpt_export(net_id="network_def", filepath=str(file), ckpt_file=str(tmp_path / "model.pt"), meta_file=META,
                config_file=INFERENCE, base="small", bundle_root=str(BUNDLE))  # fmt: skip
    scripted = torch.jit.load(file)
    image = torch.rand(1, 1, 48, 64, 5)
    click, label = torch.tensor([[[[30.0, 20.0, 2.0]]]]), torch.ones(1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(scripted(image), network(image), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scripted(image, click, label), network(image, click, label), atol=1e-4, rtol=1e-4)


def test_onnx_export_equals_eager(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = random_adapter(2)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    file, image = tmp_path / "model.onnx", torch.rand(1, 1, 48, 64, 3)
    onnx_export(net_id="network_def", filepath=str(file), ckpt_file=str(tmp_path / "model.pt"), meta_file=META,
                config_file=[INFERENCE, HIPPOCAMPUS], base="small", bundle_root=str(BUNDLE),
                input_shape=list(image.shape))  # fmt: skip
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(out, network(image).numpy(), atol=1e-4, rtol=1e-4)


def test_training_lowers_the_loss_and_draws_samples_in_three_planes(volumes: Path, tmp_path: Path) -> None:
    options = {**COMMON, **SMALL, **TRAINING, "cache": "disk", "samples_interval": 5, "val_interval": 5}
    run("training", config_file=TRAIN, dataset_dir=str(volumes), ckpt_dir=str(tmp_path / "models"),
        output_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), max_epochs=10, learning_rate=0.003,
        prompt="point", **options)  # fmt: skip
    assert {p.name for p in (tmp_path / "models").iterdir()} == {"model.pt", "model_last.pt"}
    pictures = sorted((tmp_path / "out" / "samples").glob("epoch_0005_img*.png"))
    assert len(pictures) == 2
    width, height = Image.open(pictures[0]).size
    assert width > 1.5 * height  # three planes beside each other
    log = (tmp_path / "out" / "training.log").read_text()
    losses = [float(line.rsplit("train_loss:", 1)[1].split()[0]) for line in log.splitlines() if "train_loss:" in line]
    assert len(losses) == 10
    assert sum(losses[-3:]) < sum(losses[:3])
    assert any((tmp_path / "cache").iterdir())


def test_the_decoder_alone_trains_on_slabs_that_are_encoded_once(volumes: Path, tmp_path: Path) -> None:
    options = {**COMMON, **SMALL, **TRAINING, "dataset_dir": str(volumes), "learning_rate": 0.005, "val_limit": 1,
               "embedding_dir": str(tmp_path / "embeddings"), "output_dir": str(tmp_path / "out")}  # fmt: skip
    files = [TRAIN, str(CONFIGS / "decoder.yaml")]
    run("training", config_file=files, max_epochs=12, val_interval=100, ckpt_dir=str(tmp_path / "first"), **options)
    log = (tmp_path / "out" / "training.log").read_text()
    losses = [float(line.rsplit("train_loss:", 1)[1].split()[0]) for line in log.splitlines() if "train_loss:" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "embeddings").iterdir()}
    assert len(kept) == 2 * 3  # two volumes of 9 slices, in slabs of 4
    run("training", config_file=files, max_epochs=3, val_interval=100, ckpt_dir=str(tmp_path / "second"), **options)
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "embeddings").iterdir()} == kept


def test_sessions_of_clicks_train_on_slabs_that_are_encoded_once(volumes: Path, tmp_path: Path) -> None:
    options = {**COMMON, **SMALL, **TRAINING, "dataset_dir": str(volumes), "learning_rate": 0.005, "val_limit": 1,
               "embedding_dir": str(tmp_path / "embeddings"), "output_dir": str(tmp_path / "out")}  # fmt: skip
    files = [TRAIN, *(str(CONFIGS / f"{name}.yaml") for name in ("decoder", "clicks"))]
    run("training", config_file=files, max_epochs=8, val_interval=100, ckpt_dir=str(tmp_path / "models"),
        session_answers=2, **options)  # fmt: skip
    log = (tmp_path / "out" / "training.log").read_text()
    losses = [float(line.rsplit("train_loss:", 1)[1].split()[0]) for line in log.splitlines() if "train_loss:" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    adapter = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert adapter["click_feedback.to_logits.4.weight"].abs().sum() > 0


def test_slices_train_all_classes_in_one_pass_and_inference_and_slabs_go_on_with_it(
    volumes: Path, tmp_path: Path
) -> None:
    options = {**COMMON, **SMALL, **TRAINING, "dataset_dir": str(volumes), "val_limit": 1}
    slices = {"config_file": [TRAIN, str(CONFIGS / "slices.yaml")], "roi_size": [32, 32, 1], "learning_rate": 0.005,
              "classes_per_pass": 3}  # fmt: skip
    first = {"ckpt_dir": str(tmp_path / "first"), "output_dir": str(tmp_path / "first")}
    run("training", **{**options, **slices, **first}, batch_size=2, max_epochs=10, val_interval=10)
    log = (tmp_path / "first" / "training.log").read_text()
    losses = [float(line.rsplit("train_loss:", 1)[1].split()[0]) for line in log.splitlines() if "train_loss:" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    adapter = torch.load(tmp_path / "first" / "model.pt", weights_only=True)
    assert decode_identity(adapter["identity"])["adapter"]["classes_per_pass"] == 3
    assert all((value == 0).all() for name, value in adapter.items() if ".depth." in name and ".up." in name)
    seen = {**COMMON, **SMALL, "classes_per_pass": 3, "checkpoint": str(tmp_path / "first" / "model.pt")}
    places = {"dataset_dir": str(volumes / "imagesTr"), "output_dir": str(tmp_path / "masks")}
    run("inferring", config_file=INFERENCE, **places, **seen)
    assert len(list((tmp_path / "masks").glob("*.nii.gz"))) == 4
    second = {"ckpt_dir": str(tmp_path / "second"), "output_dir": str(tmp_path / "second")}
    going_on = {"start_from": str(tmp_path / "first" / "model.pt"), "classes_per_pass": 3}
    run("training", config_file=TRAIN, max_epochs=1, val_interval=1, **{**options, **going_on, **second})
    adapter = torch.load(tmp_path / "second" / "model_last.pt", weights_only=True)
    assert any((value != 0).any() for name, value in adapter.items() if ".depth." in name and ".up." in name)


def test_slabs_and_single_slices_train_together_and_the_average_is_saved(volumes: Path, tmp_path: Path) -> None:
    """A volume of one slice is shown as it is, one of more slices as a slab; the adapter's weights are averages."""
    root = data_set(tmp_path / "data", 1, 1)
    for folder, prefix in (("imagesTr", "img"), ("labelsTr", "label")):
        whole = nib.load(root / folder / f"{prefix}0000.nii.gz")
        nib.save(whole.slicer[:, :, 4:5], root / folder / f"{prefix}0000_slice.nii.gz")
    entries = [{"image": f"imagesTr/img{name}.nii.gz", "label": f"labelsTr/label{name}.nii.gz"}
               for name in ("0000", "0000_slice", "0001")]  # fmt: skip
    (root / "list.json").write_text(json.dumps({"training": entries[:2], "validation": entries[2:]}))
    options = {**COMMON, **SMALL, **TRAINING, "dataset_dir": str(root), "datalist": str(root / "list.json"),
               "roi_size": [32, 32, 8], "classes_per_pass": 3, "max_epochs": 1}  # fmt: skip
    files = [TRAIN, str(CONFIGS / "slabs.yaml")]
    parser = ConfigParser(ConfigParser.load_config_files(files))
    parser.update(options)
    shapes = [tuple(item[0]["image"].shape) for item in parser.get_parsed_content("train#dataset")]
    assert shapes == [(1, 32, 32, 8), (1, 32, 32, 1)]
    averaged, last = tmp_path / "averaged", tmp_path / "last"
    for folder, decay in ((averaged, 0.9), (last, 0)):
        run("training", config_file=files, ema_decay=decay, ckpt_dir=str(folder), output_dir=str(folder), **options)
    first, second = (torch.load(folder / "model.pt", weights_only=True) for folder in (averaged, last))
    assert any((value != 0).any() for name, value in first.items() if ".depth." in name and ".up." in name)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_two_processes_train_together(volumes: Path, tmp_path: Path, cli: Command) -> None:
    result = cli("run", "training", processes=2, config_file=f"['{TRAIN}','{CONFIGS / 'multi_gpu_train.yaml'}']",
                 dataset_dir=volumes, ckpt_dir=tmp_path, output_dir=tmp_path, max_epochs=1, val_interval=1,
                 **COMMON, **SMALL, **TRAINING)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert {p.name for p in tmp_path.glob("*.pt")} == {"model.pt", "model_last.pt"}


def test_two_processes_measure_what_one_does(adapted: Path, tmp_path: Path, cli: Command) -> None:
    volumes = data_set(tmp_path / "data", 1, 3)  # an odd number: one process has more to do
    common = {**COMMON, **SMALL, "prompt": "point", "dataset_dir": volumes, "ckpt_dir": adapted}
    overlay = CONFIGS / "multi_gpu_evaluate.yaml"
    result = cli("run", "evaluating", processes=2, config_file=f"['{TRAIN}','{EVALUATE}','{overlay}']",
                 output_dir=tmp_path / "two", **common)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    run("evaluating", config_file=[TRAIN, EVALUATE], output_dir=str(tmp_path / "one"),
        **{**common, "dataset_dir": str(volumes), "ckpt_dir": str(adapted)})  # fmt: skip
    assert read_metrics(tmp_path / "two") == pytest.approx(read_metrics(tmp_path / "one"), rel=1e-4, nan_ok=True)
    names = []
    for folder in ("one", "two"):
        with open(tmp_path / folder / "val_mean_dice_raw.csv", newline="") as file:
            names.append(sorted(Path(row[0]).name for row in list(csv.reader(file))[1:]))
    assert names[0] == names[1] == ["img0001.nii.gz", "img0002.nii.gz", "img0003.nii.gz"]


@pytest.mark.parametrize(
    ("prompt", "kinds"),
    [
        ("none", set()),
        *((points, {"points", "classes"}) for points in ("point", "point_per_slice", "points3")),
        *((box, {"boxes", "classes"}) for box in ("box50", "box75", "box")),
    ],
)
def test_every_protocol_gives_its_prompts_to_the_validation(volumes: Path, prompt: str, kinds: set[str]) -> None:
    parser = ConfigParser(ConfigParser.load_config_files([TRAIN, EVALUATE]))
    parser.update({**COMMON, **SMALL, "dataset_dir": str(volumes), "prompt": prompt})
    item = parser.get_parsed_content("validate#dataset")[0]
    assert prompts_of(item["image"]).kinds == kinds


def test_an_evaluation_gives_metrics_by_class_and_case(volumes: Path, adapted: Path, tmp_path: Path) -> None:
    run("evaluating", config_file=[TRAIN, EVALUATE], dataset_dir=str(volumes), prompt="point_per_slice", overlays=1,
        ckpt_dir=str(adapted), output_dir=str(tmp_path), **COMMON, **SMALL)  # fmt: skip
    assert set(read_metrics(tmp_path)) == {"val_mean_dice", "val_hd95", "val_nsd", "val_voxels_elsewhere"}
    for name in ("val_mean_dice", "val_hd95", "val_nsd"):
        with open(tmp_path / f"{name}_raw.csv", newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0][:5] == ["filename", "class0", "class1", "class2", "mean"]
        assert rows[0][5:] in ([], ["mean"])  # MONAI 1.5 writes the mean twice
        assert [Path(row[0]).name for row in rows[1:]] == ["img0002.nii.gz", "img0003.nii.gz"]
    assert len(list((tmp_path / "overlays").glob("img*_overlay.png"))) == 1


def test_a_label_stored_in_other_directions_than_its_image_is_measured_alike(adapted: Path, tmp_path: Path) -> None:
    alike = data_set(tmp_path / "alike", 1, 1)
    turned = data_set(tmp_path / "turned", 1, 1)
    path = turned / "labelsTr" / "label0001.nii.gz"
    nib.save(nib.load(path).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]])), path)
    for folder in (alike, turned):
        run("evaluating", config_file=[TRAIN, EVALUATE], dataset_dir=str(folder), prompt="box", ckpt_dir=str(adapted),
            output_dir=str(folder), **COMMON, **SMALL)  # fmt: skip
    assert read_metrics(turned) == read_metrics(alike)


@pytest.mark.parametrize("side", SIDES)
def test_masks_lie_on_the_grid_of_their_source(adapted: Path, tmp_path: Path, side: str) -> None:
    source = data_set(tmp_path / "data", 1, 0, SIDES[side]) / "imagesTr"
    run("inferring", config_file=INFERENCE, dataset_dir=str(source), ckpt_dir=str(adapted),
        output_dir=str(tmp_path / "out"), **COMMON, **SMALL)  # fmt: skip
    image, mask = nib.load(source / "img0000.nii.gz"), nib.load(tmp_path / "out" / "img0000_segmentation.nii.gz")
    assert mask.shape == image.shape
    np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
    assert mask.get_data_dtype() == np.uint8
    assert set(np.unique(mask.dataobj)) <= {0, 1, 2, 3}


@pytest.mark.parametrize("side", SIDES)
def test_a_prompt_of_the_file_reaches_the_voxel_that_it_names(tmp_path: Path, side: str) -> None:
    data = data_set(tmp_path / "data", 1, 0, SIDES[side])
    label = np.asarray(nib.load(data / "labelsTr" / "label0000.nii.gz").dataobj)
    click = np.argwhere(label == 2)[7].tolist()
    (tmp_path / "p.json").write_text(json.dumps({"img0000.nii.gz": {"right kidney": {"points": [click]}}}))
    parser = ConfigParser(ConfigParser.load_config_file(INFERENCE))
    parser.update({**COMMON, **SMALL, "dataset_dir": str(data / "imagesTr"), "prompts": str(tmp_path / "p.json")})
    item = parser.get_parsed_content("dataset")[0]
    prompts = prompts_of(item["image"])
    assert prompts.classes.tolist() == [1]
    place = prompts.points[0, 0]
    world = np.asarray(item["image"].affine) @ [*place.tolist(), 1.0]
    np.testing.assert_allclose(world, SIDES[side] @ [*click, 1.0], atol=1e-3)


def test_prompted_inference_answers_for_the_named_classes_only(adapted: Path, tmp_path: Path) -> None:
    source = data_set(tmp_path / "data", 1, 0) / "imagesTr"
    box = [2, 2, 1, 12, 14, 7]
    (tmp_path / "p.json").write_text(json.dumps({"img0000.nii.gz": {"left kidney": {"box": box}}}))
    run("inferring", config_file=INFERENCE, dataset_dir=str(source), ckpt_dir=str(adapted), save_overlays="true",
        output_dir=str(tmp_path / "out"), prompts=str(tmp_path / "p.json"), **COMMON, **SMALL)  # fmt: skip
    mask = np.asarray(nib.load(tmp_path / "out" / "img0000_segmentation.nii.gz").dataobj)
    assert set(np.unique(mask)) <= {0, 3}
    assert (tmp_path / "out" / "img0000_overlay.png").is_file()


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_other_formats_come_out_in_the_same_place(adapted: Path, tmp_path: Path, suffix: str) -> None:
    source = data_set(tmp_path / "data", 1, 0, SIDES["oblique"]) / "imagesTr"
    options = {"config_file": INFERENCE, "dataset_dir": str(source), "ckpt_dir": str(adapted), **COMMON, **SMALL}
    run("inferring", output_dir=str(tmp_path / "nifti"), **options)
    run("inferring", output_dir=str(tmp_path / "other"), output_ext=suffix, **options)
    (other,) = (tmp_path / "other").iterdir()
    ours = itk.imread(str(other))
    theirs = itk.imread(str(tmp_path / "nifti" / "img0000_segmentation.nii.gz"))
    np.testing.assert_array_equal(itk.array_view_from_image(ours), itk.array_view_from_image(theirs))
    np.testing.assert_allclose(list(ours.GetOrigin()), list(theirs.GetOrigin()), atol=1e-3)
    np.testing.assert_allclose(np.asarray(ours.GetDirection()), np.asarray(theirs.GetDirection()), atol=1e-4)


def test_a_dicom_folder_gives_the_mask_of_its_conversion(adapted: Path, tmp_path: Path, shared_data: Path) -> None:
    series = shared_data / "ct" / "ct_b_dicom"
    if not series.is_dir():
        pytest.skip(f"the real DICOM series is absent: no folder {series}")
    volume = read_volume(series)
    source = tmp_path / "in"
    source.mkdir()
    (source / "series").symlink_to(series)
    nib.save(nib.Nifti1Image(volume[0].numpy().astype(np.int16), np.asarray(volume.affine)), source / "file.nii.gz")
    coarse = {**SMALL, "pixdim": [8.0, 8.0, 12.0]}  # the whole path, in seconds
    run("inferring", config_file=INFERENCE, dataset_dir=str(source), ckpt_dir=str(adapted),
        output_dir=str(tmp_path / "out"), **COMMON, **coarse)  # fmt: skip
    masks = [nib.load(tmp_path / "out" / f"{name}_segmentation.nii.gz") for name in ("series", "file")]
    assert masks[0].shape == (512, 512, 20)
    np.testing.assert_array_equal(np.asarray(masks[0].dataobj), np.asarray(masks[1].dataobj))
    np.testing.assert_allclose(masks[0].affine, masks[1].affine, atol=1e-4)


def test_classes_that_are_not_annotated_do_not_train(volumes: Path, tmp_path: Path) -> None:
    lists = json.loads((volumes / "dataset_0.json").read_text())
    for entry in lists["training"]:
        entry["annotated"] = ["spleen"]
    (tmp_path / "partial.json").write_text(json.dumps(lists))
    run("training", config_file=TRAIN, dataset_dir=str(volumes), datalist=str(tmp_path / "partial.json"),
        ckpt_dir=str(tmp_path), output_dir=str(tmp_path), max_epochs=1, prompt_none=1.0, prompt_points=0.0,
        prompt_boxes=0.0, prompt_correction=0.0, weight_decay=0.0, val_interval=100,
        **COMMON, **SMALL, **TRAINING)  # fmt: skip
    fresh = build_medsa("small", spatial_dims=3, num_classes=3).state_dict()["class_embeddings"]
    trained = torch.load(tmp_path / "model_last.pt", weights_only=True)["class_embeddings"]
    moved = (trained - fresh).abs().amax(dim=1)
    assert moved[0] > 0
    assert moved[1:].tolist() == [0.0, 0.0]


def test_bad_input_ends_with_one_clear_line(tmp_path: Path, cli: Command) -> None:
    data = data_set(tmp_path / "data", 2, 1)
    label = np.full((24, 28, 9), 9, np.uint8)
    nib.save(nib.Nifti1Image(label, SIDES["RAS"]), data / "labelsTr" / "label0001.nii.gz")
    options = {"config_file": TRAIN, "ckpt_dir": tmp_path / "m", "output_dir": tmp_path / "o", "max_epochs": 1,
               **COMMON, **SMALL, **TRAINING}  # fmt: skip
    result = cli("run", "training", dataset_dir=data, **options)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {data / 'labelsTr' / 'label0001.nii.gz'}: the label holds 9; expected 0")
    result = cli("run", "training", dataset_dir=tmp_path / "nowhere", **options)
    assert "there is no such folder" in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"lung": {"points": [[1, 1, 1]]}}, "found lung; expected classes out of spleen"),
        ({"spleen": {"points": [[1, 1, 99]]}}, "lies outside the image, which is 24 x 28 x 9"),
        ({"spleen": {"lasso": {"points": [[1, 1, 1], [5, 1, 2], [5, 5, 3]]}}}, "its corners lie in no slice"),
        ({"spleen": {}}, "found nothing"),
    ],
)
def test_prompts_that_make_no_sense_are_named(adapted: Path, tmp_path: Path, prompts: dict, message: str) -> None:
    source = data_set(tmp_path / "data", 1, 0) / "imagesTr"
    (tmp_path / "p.json").write_text(json.dumps({"img0000.nii.gz": prompts}))
    with pytest.raises(RuntimeError) as caught:
        run("inferring", config_file=INFERENCE, dataset_dir=str(source), ckpt_dir=str(adapted),
            output_dir=str(tmp_path / "out"), prompts=str(tmp_path / "p.json"), **COMMON, **SMALL)  # fmt: skip
    cause = find_cause(caught.value)
    assert isinstance(cause, DataError)
    assert message in str(cause)
    assert "img0000.nii.gz" in str(cause)
    assert not (tmp_path / "out").exists()


def test_what_a_file_of_prompts_marks_is_in_the_masks(adapted: Path, tmp_path: Path) -> None:
    source = data_set(tmp_path / "data", 1, 0) / "imagesTr"
    start = np.zeros((24, 28, 9), np.uint8)
    start[14:20, 16:24, 3:7] = 1
    nib.save(nib.Nifti1Image(start, nib.load(source / "img0000.nii.gz").affine), tmp_path / "third.nii.gz")
    prompts = {
        "spleen": {"points": [[4, 5, 4], [9, 9, 4]], "labels": [1, 0],
                   "scribbles": [{"points": [[2, 20, 2], [9, 20, 2]], "label": 1}]},
        "right kidney": {"box": [2, 2, 1, 12, 12, 7]},
        "left kidney": {"mask": "third.nii.gz",
                        "lasso": {"points": [[15, 0, 4], [23, 0, 4], [23, 27, 4], [15, 27, 4]]}},
    }  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps({"img0000.nii.gz": prompts}))
    run("inferring", config_file=INFERENCE, dataset_dir=str(source), ckpt_dir=str(adapted),
        output_dir=str(tmp_path / "out"), prompts=str(tmp_path / "p.json"), **COMMON, **SMALL)  # fmt: skip
    (path,) = (tmp_path / "out").glob("*segmentation.nii.gz")
    label = np.asarray(nib.load(path).dataobj)
    spleen, kidney, third = (CLASSES.index(name) + 1 for name in prompts)
    assert label[4, 5, 4] == spleen
    assert label[9, 9, 4] != spleen
    assert (label[2:10, 20, 2] == spleen).all()
    there = np.argwhere(label == kidney)
    assert len(there) == 0 or (there.min(0) >= [2, 2, 1]).all()
    assert len(there) == 0 or (there.max(0) <= [12, 12, 7]).all()
    assert not (label[:15, :, 4] == third).any()  # outside of the lasso
    assert (label[16:18, 18:22, 4] == third).all()  # of the mask to start from
    assert set(np.unique(label)) <= {0, spleen, kidney, third}


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_a_volume_of_one_slice_is_segmented(adapted: Path, tmp_path: Path, suffix: str) -> None:
    source, affine = tmp_path / "data", oblique([2.0, 2.0, 3.0])
    source.mkdir()
    voxels = np.random.default_rng(0).normal(0, 100, (24, 28, 1)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, affine), source / "slice.nii.gz")
    run("inferring", config_file=INFERENCE, dataset_dir=str(source), ckpt_dir=str(adapted),
        output_dir=str(tmp_path / "out"), output_ext=suffix, **COMMON, **SMALL)  # fmt: skip
    path = tmp_path / "out" / f"slice_segmentation{suffix}"
    assert suffix == ".nrrd" or nib.load(path).shape == (24, 28, 1)
    label = read_volume(path)
    assert label.shape == (1, 24, 28, 1)
    np.testing.assert_allclose(label.affine.numpy(), affine, atol=1e-4)


def test_an_unknown_output_format_is_refused(adapted: Path, volumes: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        run("inferring", config_file=INFERENCE, dataset_dir=str(volumes / "imagesTr"), ckpt_dir=str(adapted),
            output_dir=str(tmp_path), output_ext=".png", **COMMON, **SMALL)  # fmt: skip
    assert "output_ext must be .nii.gz, .nii, .nrrd or .mha; got '.png'" in str(find_cause(caught.value))


def test_the_adapter_of_the_hippocampus_segments_volumes_it_has_not_seen(shared_data: Path, tmp_path: Path) -> None:
    volumes = shared_data / "msd_hippocampus"
    if not volumes.is_dir():
        pytest.skip(f"the real volumes are absent: no folder {volumes}")
    for prompt in ("none", "point"):
        run("evaluating", config_file=[TRAIN, HIPPOCAMPUS, EVALUATE], dataset_dir=str(volumes), prompt=prompt,
            val_limit=1, output_dir=str(tmp_path / prompt), **{**COMMON, "base": "lite_medsam"})  # fmt: skip
        assert read_metrics(tmp_path / prompt)["val_mean_dice"] > 0.75


def test_training_goes_on_from_the_adapter_with_the_cases_that_a_server_hands_over(tmp_path: Path) -> None:
    """The overrides of MONAI Label: lists in memory, none to validate, its own loader in front of the handlers."""
    bundle = tmp_path / "medsa_btcv"
    shutil.copytree(BUNDLE, bundle, ignore=shutil.ignore_patterns("*.pt"))
    data = data_set(tmp_path / "data", 2, 0)
    cases = [{"image": str(data / "imagesTr" / f"img000{i}.nii.gz"),
              "label": str(data / "labelsTr" / f"label000{i}.nii.gz")} for i in range(2)]  # fmt: skip
    network = build_medsa("small", spatial_dims=3, num_classes=13, classes_per_pass=13)
    torch.nn.init.constant_(network.class_embeddings, 0.25)
    model = bundle / "models" / "model.pt"
    save_atomically(network.state_dict(), model)
    train = ConfigParser.load_config_file(str(bundle / "configs" / "train.yaml"))
    handlers = train["train"]["handlers"]
    assert not [handler for handler in handlers if handler["_target_"] == "CheckpointLoader"]
    loader = {"_target_": "CheckpointLoader", "load_path": str(model), "load_dict": {"model": "$@network"},
              "strict": False}  # fmt: skip
    overrides = {"bundle_root": str(bundle), "train#trainer#max_epochs": 1, "train#dataset#data": cases,
                 "device": "cpu", "train#handlers": [loader, *handlers], "validate#dataset#data": []}  # fmt: skip
    run("run", config_file=str(bundle / "configs" / "train.yaml"), meta_file=str(bundle / "configs" / "metadata.json"),
        base="small", roi_size=[32, 32, 4], learning_rate=1e-6, num_workers=0, **overrides)  # fmt: skip
    assert {p.name for p in model.parent.iterdir()} == {"model.pt", "model_last.pt"}
    trained = torch.load(model, weights_only=True)
    torch.testing.assert_close(trained["class_embeddings"], torch.full((13, 256), 0.25), atol=1e-4, rtol=0)
    assert not torch.equal(trained["class_embeddings"], torch.full((13, 256), 0.25))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pixdim": [1.5, 1.5, 1.5]}, r"grid pixdim \[3.0, 3.0, 3.0\] \(here \[1.5, 1.5, 1.5\]\)"),
        ({"intensity_transform#a_max": 250.0}, r"intensity a_max 275.0 \(here 250.0\)"),
        ({"classes": [f"organ {i}" for i in range(13)]}, r'classes \["spleen", .*\(here \["organ 0"'),
        ({"pixdim": [1.5, 1.5, 1.5], "same_task": "false"}, None),
        ({}, None),
    ],
)
def test_an_adapter_is_refused_on_another_grid_window_or_for_other_classes(
    settings: dict, message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    parser = ConfigParser()
    parser.read_config(INFERENCE)
    parser.update({"bundle_root": str(BUNDLE), **settings})
    network = parser.get_parsed_content("network_def")
    state = torch.load(BUNDLE / "models" / "model.pt", weights_only=True)
    if message is None:
        network.load_state_dict(state)
        assert ("here [1.5, 1.5, 1.5]" in caplog.text) == bool(settings)
        return
    with pytest.raises(WeightsError, match=message):
        network.load_state_dict(state)


class Server:
    """What MONAI Label does with a bundle: parse once; for a request, transforms and ``inferer(image, network)``."""

    def __init__(self, use_click: bool, checkpoint: Path) -> None:
        self.config = ConfigParser()
        self.config.read_config([INFERENCE, str(CONFIGS / "server.yaml")])
        self.config.config.update({"bundle_root": str(BUNDLE), "base": "small", **SMALL, "use_click": use_click})
        self.network = self.config.get_parsed_content("network_def").eval()
        self.network.load_state_dict(torch.load(checkpoint, weights_only=True), strict=False)

    def infer(self, image: Path, **request: object) -> dict:
        data = {**request, "image": str(image)}
        for transform in self.config.get_parsed_content("preprocessing").transforms:
            data = transform(data)
        with torch.no_grad():
            data["pred"] = self.config.get_parsed_content("inferer")(data["image"][None].to("cpu"), self.network)[0]
        for transform in self.config.get_parsed_content("postprocessing").transforms:
            if not isinstance(transform, SaveImaged):
                data = transform(data)
        return data


@pytest.mark.parametrize("side", SIDES)
def test_clicks_of_an_annotation_server_change_the_organs_that_they_name(tmp_path: Path, side: str) -> None:
    source = data_set(tmp_path / "data", 1, 0, SIDES[side]) / "imagesTr" / "img0000.nii.gz"
    save_atomically(strong_adapter().state_dict(), tmp_path / "model.pt")
    automatic = Server(False, tmp_path / "model.pt").infer(source, spleen=[[5, 6, 4]])
    server = Server(True, tmp_path / "model.pt")
    without = server.infer(source, spleen=[], label="spleen", background=[])
    assert torch.equal(without["pred"].as_tensor(), automatic["pred"].as_tensor())  # no click, or a task without clicks
    cache = server.config.get_parsed_content("inferer").cache
    hits = cache.hits
    clicked = server.infer(source, **{"left kidney": [[7, 9, 3]]}, label="left kidney")
    assert cache.hits > hits
    assert clicked["pred"].shape == (1, *nib.load(source).shape)
    np.testing.assert_allclose(clicked["pred"].affine, nib.load(source).affine, atol=1e-4)
    others = (clicked["pred"] != automatic["pred"]) & (clicked["pred"] != 3) & (automatic["pred"] != 3)
    assert not others.any()
    assert not torch.equal(clicked["pred"].as_tensor(), automatic["pred"].as_tensor())
    wrong = server.infer(source, **{"left kidney": [[700, 9, 3]]})
    assert "left kidney: the click [700, 9, 3] lies outside" in wrong["result"]["messages"][0]
    assert torch.equal(wrong["pred"].as_tensor(), automatic["pred"].as_tensor())


def test_the_recipe_trains_stage_after_stage_and_goes_on_where_it_was(
    cli: Command, volumes: Path, tmp_path: Path
) -> None:
    own = {"classes": CLASSES, "pixdim": [2.0, 2.0, 3.0], "base": "small", "warmup_steps": 1, "samples_interval": 0,
           "class_chunk": 0, "max_epochs": 1, "val_interval": 1, "classes_per_pass": 3,
           "samples_per_epoch": 2}  # fmt: skip
    stages = [
        {"name": "slices", "configs": ["train.yaml", "slices.yaml"], "settings": {**own, "roi_size": [32, 32, 1]}},
        {"name": "slabs", "configs": ["train.yaml", "slabs.yaml"], "settings": {**own, "roi_size": [32, 32, 4]}},
        {"name": "clicks", "configs": ["train.yaml", "decoder.yaml", "clicks.yaml"],
         "settings": {**own, "slab_depth": 4, "session_answers": 2, "embedding_dir": str(tmp_path / "embeddings")}},
    ]  # fmt: skip
    settings = {"bundle_root": BUNDLE, "config_file": CONFIGS / "recipe.yaml", "dataset_dir": volumes, "amp": False,
                "ckpt_dir": tmp_path / "models", "output_dir": tmp_path / "out", "stages": stages}  # fmt: skip
    first = cli("run", "training", **settings)
    assert first.returncode == 0, first.stderr[-2000:]
    made = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    parts = {
        name: torch.load(tmp_path / "models" / "stages" / name / "adapter.pt", weights_only=True)
        for name in ("slices", "slabs", "clicks")
    }
    assert all(torch.equal(made[key], value) for key, value in parts["clicks"].items())
    encoder = [key for key in made if key.startswith("image_encoder.")]  # the last stage trains the decoder alone
    assert encoder
    assert all(torch.equal(parts["slabs"][key], parts["clicks"][key]) for key in encoder)
    assert any(not torch.equal(parts["slabs"][key], parts["clicks"][key]) for key in made)
    assert any(not torch.equal(parts["slices"][key], parts["slabs"][key]) for key in encoder)
    with (tmp_path / "out" / "stages.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert [row["stage"] for row in rows] == ["slices", "slabs", "clicks"]
    assert all(0.0 <= float(row["after"]) <= 1.0 for row in rows)

    # Once more: nothing is done again. Then with another setting of the last stage: that one is, alone.
    kept = {name: (tmp_path / "models" / "stages" / name / "adapter.pt").stat().st_mtime_ns for name in parts}
    (tmp_path / "models" / "model.pt").unlink()
    again = cli("run", "training", **settings)
    assert again.returncode == 0, again.stderr[-2000:]
    assert {n: (tmp_path / "models" / "stages" / n / "adapter.pt").stat().st_mtime_ns for n in parts} == kept
    assert (tmp_path / "models" / "model.pt").is_file()
    stages[2]["settings"]["session_answers"] = 3
    assert cli("run", "training", **settings).returncode == 0
    changed = {n: (tmp_path / "models" / "stages" / n / "adapter.pt").stat().st_mtime_ns for n in parts}
    assert (changed["slices"], changed["slabs"]) == (kept["slices"], kept["slabs"])
    assert changed["clicks"] > kept["clicks"]


def test_a_recipe_names_the_stage_that_lacks_a_file(cli: Command, volumes: Path, tmp_path: Path) -> None:
    stages = [{"name": "slices", "configs": ["train.yaml", "slab.yaml"]}]
    result = cli("run", "training", bundle_root=BUNDLE, config_file=CONFIGS / "recipe.yaml", dataset_dir=volumes,
                 ckpt_dir=tmp_path / "models", output_dir=tmp_path / "out", stages=stages)  # fmt: skip
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "stage slices" in last
    assert "slab.yaml" in last
    assert not (tmp_path / "models").exists()
