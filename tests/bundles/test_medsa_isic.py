"""The bundle medsa_isic through its own commands, on phantoms and, where they are, on real images."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from monai.bundle import ConfigParser, ckpt_export, onnx_export, run, verify_net_in_out
from PIL import Image

from medsa_nets import WeightsError, build_medsa
from medsa_nets.data.phantoms import phantom, write_phantoms
from medsa_nets.demo import read_metrics
from medsa_nets.errors import find_cause
from medsa_nets.interaction.refinement import Refinement
from medsa_nets.networks.identity import decode_task
from medsa_nets.prompts import prompts_of
from medsa_nets.training import TrainingCheckpoint, save_atomically
from medsa_nets.weights import find_base_file, get_base

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_isic"
TRAIN, EVALUATE, INFERENCE = (str(BUNDLE / "configs" / f"{n}.yaml") for n in ("train", "evaluate", "inference"))
META = str(BUNDLE / "configs" / "metadata.json")
COMMON = {"bundle_root": str(BUNDLE), "meta_file": META, "num_workers": 0, "amp": False}
# a base of narrow layers, small pictures: these runs test wiring, not accuracy
SMALL = {"base": "small", "image_size": 64, "batch_size": 2, "warmup_steps": 1, "samples_interval": 0}

Command = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.usefixtures("small_base")

try:
    find_base_file(get_base("lite_medsam"))
except WeightsError as error:
    pytest.skip(f"LiteMedSAM's weights are not installed: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), training=4, validation=2, size=96)


@pytest.fixture(scope="module")
def adapter() -> torch.nn.Module:
    network = build_medsa("lite_medsam", click_feedback=True).eval()
    network.load_state_dict(torch.load(BUNDLE / "models" / "model.pt", weights_only=True))
    return network


def test_metadata_fits_the_schema_of_the_bundle_specification() -> None:
    schema = json.loads((Path(__file__).parent / "meta_schema.json").read_text())
    metadata = json.loads(Path(META).read_text())
    assert list(Draft202012Validator(schema).iter_errors(metadata)) == []
    del metadata["network_data_format"]["inputs"]["image"]["num_channels"]
    assert list(Draft202012Validator(schema).iter_errors(metadata)), "the schema must notice a missing field"
    assert metadata["version"] in metadata["changelog"]


@pytest.mark.parametrize("config", [TRAIN, INFERENCE])
def test_network_takes_and_gives_what_the_metadata_say(config: str) -> None:
    verify_net_in_out(net_id="network_def", meta_file=META, config_file=config, device="cpu", bundle_root=str(BUNDLE))


@pytest.mark.parametrize(
    "key",
    [
        "bundle_root device dataset_dir output_dir network_def inferer train#trainer train#trainer#max_epochs",
        "train#dataset#data train#handlers validate#evaluator validate#handlers validate#dataset#data val_interval",
        "network train#dataset validate#dataset run training initialize",
    ],
)
def test_training_has_the_keys_that_tools_look_for(key: str) -> None:
    parser = ConfigParser(ConfigParser.load_config_file(TRAIN))
    assert all(name in parser for name in key.split())


def test_named_and_plain_run_are_the_same() -> None:
    for files, name in (([TRAIN], "training"), ([TRAIN, EVALUATE], "evaluating"), ([INFERENCE], "inferring")):
        config = ConfigParser.load_config_files(files)
        assert config["run"] == config[name]


@pytest.mark.parametrize("overlay", ["vit_b", "mobile_sam", "medsam", "kvasir"])
def test_overlays_are_a_few_lines_that_build(overlay: str) -> None:
    path = BUNDLE / "configs" / f"{overlay}.yaml"
    settings = ConfigParser.load_config_file(path)
    assert 0 < len(settings) <= 8
    parser = ConfigParser(ConfigParser.load_config_files([TRAIN, str(path)]))
    parser["bundle_root"] = str(BUNDLE)
    parser["network_def"]["pretrained"] = False
    parser["image_size"] = 64
    network = parser.get_parsed_content("network_def")
    assert network(torch.rand(1, 3, 64, 64)).shape == (1, 1, 64, 64)


@pytest.fixture
def exported(small_base: str, tmp_path: Path, perturb_adapters) -> torch.nn.Module:
    """A network whose adapter lies in ``model.pt``."""
    network = perturb_adapters(build_medsa(small_base)).eval()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    return network


def test_torchscript_export_holds_base_and_adapter(tmp_path: Path, exported: torch.nn.Module) -> None:
    file = tmp_path / "model.ts"
    ckpt_export(net_id="network_def", filepath=str(file), ckpt_file=str(tmp_path / "model.pt"), meta_file=META,
                config_file=INFERENCE, base="small", bundle_root=str(BUNDLE))  # fmt: skip
    scripted = torch.jit.load(file)
    image = torch.rand(1, 3, 256, 256)
    point, label = torch.tensor([[[[100.0, 140.0]]]]), torch.ones(1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(scripted(image), exported(image), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scripted(image, point, label), exported(image, point, label), atol=1e-4, rtol=1e-4)


def test_onnx_export_equals_eager(tmp_path: Path, exported: torch.nn.Module) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "model.onnx"
    onnx_export(net_id="network_def", filepath=str(file), ckpt_file=str(tmp_path / "model.pt"), meta_file=META,
                config_file=INFERENCE, base="small", bundle_root=str(BUNDLE))  # fmt: skip
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    image = torch.rand(1, 3, 256, 256)
    (out,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(out, exported(image).numpy(), atol=1e-4, rtol=1e-4)


def test_training_from_another_folder_lowers_the_loss_and_writes_whole_files(
    phantoms: Path, tmp_path: Path, cli: Command
) -> None:
    result = cli("run", "training", config_file=TRAIN, dataset_dir=phantoms, ckpt_dir=tmp_path / "models",
                 output_dir=tmp_path / "out", max_epochs=4, learning_rate=0.002, cwd=tmp_path,
                 **{**COMMON, **SMALL, "samples_interval": 2})  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert {p.name for p in (tmp_path / "models").iterdir()} == {"model.pt", "model_last.pt"}
    assert len(list((tmp_path / "out" / "samples").glob("epoch_000[24]_PHANTOM_*.png"))) == 4
    log = (tmp_path / "out" / "training.log").read_text()
    losses = [float(line.rsplit("train_loss:", 1)[1].split()[0]) for line in log.splitlines() if "train_loss:" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "val_mean_dice" in log
    assert not (BUNDLE / "eval").exists() or not list((BUNDLE / "eval").glob("training.log"))


def test_the_decoder_alone_trains_on_embeddings_that_are_computed_once(phantoms: Path, tmp_path: Path) -> None:
    overlay = str(BUNDLE / "configs" / "decoder.yaml")
    options = {**COMMON, **SMALL, "dataset_dir": str(phantoms), "learning_rate": 0.005, "output_dir": str(tmp_path),
               "ckpt_dir": str(tmp_path / "models"), "embedding_dir": str(tmp_path / "embeddings")}  # fmt: skip
    run("training", config_file=[TRAIN, overlay], max_epochs=4, **options)
    log = (tmp_path / "training.log").read_text()
    losses = [float(line.rsplit("train_loss:", 1)[1].split()[0]) for line in log.splitlines() if "train_loss:" in line]
    assert losses[-1] < losses[0]
    kept = sorted((tmp_path / "embeddings").iterdir())
    folders = [phantoms / f"ISIC-2017_{split}_Data" for split in ("Training", "Validation")]
    images = sum(len(list(folder.glob("PHANTOM_*[0-9].*"))) for folder in folders)
    assert len(kept) == images
    times = [file.stat().st_mtime_ns for file in kept]
    run("training", config_file=[TRAIN, overlay], max_epochs=2, **{**options, "ckpt_dir": str(tmp_path / "again")})
    assert [file.stat().st_mtime_ns for file in sorted((tmp_path / "embeddings").iterdir())] == times
    run("evaluating", config_file=[TRAIN, EVALUATE], **options)  # the adapter has the usual form


def test_sessions_of_clicks_train_on_kept_embeddings_and_inference_answers_them(phantoms: Path, tmp_path: Path) -> None:
    overlays = [str(BUNDLE / "configs" / f"{name}.yaml") for name in ("decoder", "clicks")]
    options = {**COMMON, **SMALL, "dataset_dir": str(phantoms), "learning_rate": 0.005, "output_dir": str(tmp_path),
               "ckpt_dir": str(tmp_path / "models"), "embedding_dir": str(tmp_path / "embeddings")}  # fmt: skip
    run("training", config_file=[TRAIN, *overlays], max_epochs=5, start_from="", session_answers=3, **options)
    log = (tmp_path / "training.log").read_text()
    losses = [float(line.rsplit("train_loss:", 1)[1].split()[0]) for line in log.splitlines() if "train_loss:" in line]
    assert losses[-1] < losses[0]
    adapter = torch.load(tmp_path / "models" / "model_last.pt", weights_only=True)
    assert adapter["click_feedback.to_embedding.6.weight"].abs().sum() > 0
    run("evaluating", config_file=[TRAIN, EVALUATE], prompt="points3", **options)


@pytest.mark.parametrize("kind", ["voxels", "crops"])
def test_what_clicks_mean_is_learned_beside_the_adapter(phantoms: Path, tmp_path: Path, kind: str) -> None:
    options = {**COMMON, **SMALL, "dataset_dir": str(phantoms), "output_dir": str(tmp_path),
               "ckpt_dir": str(tmp_path / "models")}  # fmt: skip
    run("training", config_file=TRAIN, max_epochs=1, start_from="", **options)
    files = [TRAIN, EVALUATE, str(BUNDLE / "configs" / "refine.yaml")]
    run("refining", config_file=files, refine_kind=kind, refine_rounds=1, refine_clicks=2, refine_epochs=1,
        refine_steps=2, refine_batch=2, refine_reach=8, refine_certainty=0.25, **options)  # fmt: skip
    found = Refinement.load(tmp_path / "models" / "model.clicks.pt")
    assert (found.kind, found.dims, found.reach, found.certainty, found.asks) == (kind, 2, 8.0, 0.25, True)
    assert (tmp_path / "refinement.png").is_file()


def test_killed_training_resumes_to_the_same_weights(phantoms: Path, tmp_path: Path, cli: Command) -> None:
    def options_of(folder: Path) -> dict[str, object]:
        return {**COMMON, **SMALL, "config_file": TRAIN, "dataset_dir": str(phantoms), "ckpt_dir": str(folder),
                "output_dir": str(folder), "max_epochs": 4, "val_interval": 2}  # fmt: skip

    def arguments(folder: Path) -> list[str]:
        options = options_of(folder)
        return [sys.executable, "-m", "monai.bundle", "run", "training"] + [
            text for name, value in options.items() for text in (f"--{name}", str(value))
        ]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("training", **options_of(whole))
    process = subprocess.Popen(arguments(cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = cut / "training_state.pt"
    deadline = time.monotonic() + 300
    while not state.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.random())  # some moment of a later epoch, a save among them
    process.send_signal(signal.SIGKILL)
    process.wait()
    (cut / f".{process.pid}.{state.name}").write_bytes(b"a save that was cut")
    for file in cut.glob("[!.]*.pt"):
        torch.load(file, weights_only=True)  # whatever is there is whole
    resumed = cli("run", "training", **options_of(cut))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    if process.returncode == -signal.SIGKILL and not (cut / "model_last.pt").is_file():
        assert "Resuming from" in resumed.stdout + resumed.stderr
    assert {p.name for p in cut.glob("*.pt")} == {"model.pt", "model_last.pt"}  # and what was cut is gone
    expected, found = (torch.load(f / "model_last.pt", weights_only=True) for f in (whole, cut))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)


def test_a_killed_training_is_not_resumed_with_another_learning_rate(
    phantoms: Path, tmp_path: Path, cli: Command
) -> None:
    options = {**COMMON, **SMALL, "config_file": TRAIN, "dataset_dir": str(phantoms), "ckpt_dir": str(tmp_path),
               "output_dir": str(tmp_path), "max_epochs": 2}  # fmt: skip
    state = tmp_path / "training_state.pt"
    parser = ConfigParser(ConfigParser.load_config_file(TRAIN))
    parser.update(options)
    settings = parser.get_parsed_content("resume_settings")
    assert {"learning_rate", "batch_size", "adapter_ratio", "image_size"} <= set(settings)
    before = TrainingCheckpoint(
        save_dir=str(tmp_path), network=torch.nn.Identity(), optimizer=None, settings={**settings, "learning_rate": 0.5}
    ).settings
    save_atomically({"epoch": 1, "iteration": 2, "settings": before}, state)
    result = cli("run", "training", **options)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {state}: the unfinished run that would go on had other settings: ")
    assert "had other settings: learning_rate 0.5 (now 0.001). Restore" in last
    assert "--resume false" in last


def test_evaluation_agrees_with_the_official_scorer(phantoms: Path, tmp_path: Path) -> None:
    pytest.importorskip("isic_challenge_scoring")
    from isic_challenge_scoring.segmentation import SegmentationScore

    validation = phantoms / "ISIC-2017_Validation_Data"
    truth = tmp_path / "truth"  # the scorer wants names of the challenge
    truth.mkdir()
    for mask in (phantoms / "ISIC-2017_Validation_Part1_GroundTruth").iterdir():
        shutil.copy(mask, truth / mask.name.replace("PHANTOM", "ISIC"))
    run("evaluating", config_file=[TRAIN, EVALUATE], dataset_dir=str(phantoms), prompt="none",
        output_dir=str(tmp_path / "metrics"), **COMMON)  # fmt: skip
    run("inferring", config_file=INFERENCE, dataset_dir=str(validation), output_dir=str(tmp_path / "masks"), **COMMON)
    for mask in (tmp_path / "masks").iterdir():
        mask.rename(mask.with_name(mask.name.replace("PHANTOM", "ISIC")))
    score = SegmentationScore.from_dir(truth, tmp_path / "masks")
    official = score.macro_average
    ours = read_metrics(tmp_path / "metrics")
    assert ours["val_mean_dice"] == pytest.approx(official["dice"], abs=1e-5)
    assert ours["val_mean_iou"] == pytest.approx(official["jaccard"], abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "kinds"),
    [
        ("none", set()),
        ("point", {"points"}),
        ("points3", {"points"}),
        *((box, {"boxes"}) for box in ("box50", "box75", "box")),
    ],
)
def test_every_protocol_gives_its_prompts_to_the_validation(phantoms: Path, prompt: str, kinds: set[str]) -> None:
    parser = ConfigParser(ConfigParser.load_config_files([TRAIN, EVALUATE]))
    parser.update({**COMMON, "dataset_dir": str(phantoms), "prompt": prompt, "image_size": 64})
    item = parser.get_parsed_content("validate#dataset")[0]
    assert prompts_of(item["image"]).kinds == kinds


def test_an_evaluation_gives_all_metrics_and_raw_values(phantoms: Path, tmp_path: Path) -> None:
    run("evaluating", config_file=[TRAIN, EVALUATE], dataset_dir=str(phantoms), prompt="box50", image_size=64,
        same_task=False, overlays=1, output_dir=str(tmp_path), **COMMON)  # fmt: skip
    assert set(read_metrics(tmp_path)) == {"val_mean_dice", "val_mean_iou", "val_hd95"}
    assert len((tmp_path / "val_mean_dice_raw.csv").read_text().splitlines()) == 3  # a head and two images
    assert len(list((tmp_path / "overlays").glob("*_overlay.png"))) == 1


def test_inference_writes_masks_at_each_images_size_and_reads_prompts(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    picture, mask = phantom(3, 120)
    Image.fromarray(picture[:90]).save(photos / "wide.jpg")
    Image.fromarray(picture).convert("L").save(photos / "grey.png")
    Image.fromarray(picture).convert("RGBA").save(photos / "alpha.png")
    y, x = np.argwhere(mask > 0).mean(axis=0)
    (tmp_path / "prompts.json").write_text(json.dumps({"grey.png": {"points": [[float(x), float(y)]]}}))
    run("inferring", config_file=INFERENCE, dataset_dir=str(photos), output_dir=str(tmp_path / "out"),
        prompts=str(tmp_path / "prompts.json"), save_overlays=True, save_probabilities=True, **COMMON)  # fmt: skip
    for name, size in (("wide", (120, 90)), ("grey", (120, 120)), ("alpha", (120, 120))):
        for kind in ("segmentation", "overlay", "probability"):
            assert Image.open(tmp_path / "out" / f"{name}_{kind}.png").size == size
        assert set(np.unique(Image.open(tmp_path / "out" / f"{name}_segmentation.png"))) <= {0, 255}
    grey = np.asarray(Image.open(tmp_path / "out" / "grey_segmentation.png")) > 0
    assert grey[round(y), round(x)]
    target = mask > 0
    assert 2 * (grey & target).sum() / (grey.sum() + target.sum()) > 0.8


def two_lesions(seed_a: int, seed_b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two phantoms beside each other in one picture, with both masks."""
    (a, mask_a), (b, mask_b) = phantom(seed_a, 128), phantom(seed_b, 128)
    empty = np.zeros_like(mask_a)
    picture = np.concatenate([a, b], axis=1).repeat(2, axis=0)[:256]
    left = np.concatenate([mask_a, empty], axis=1).repeat(2, axis=0)[:256]
    right = np.concatenate([empty, mask_b], axis=1).repeat(2, axis=0)[:256]
    return picture, left > 0, right > 0


@pytest.mark.parametrize("seeds", [(11, 12), (13, 14), (15, 16)])
def test_trained_adapter_follows_the_prompt(adapter: torch.nn.Module, seeds: tuple[int, int]) -> None:
    picture, left, right = two_lesions(*seeds)
    image = torch.from_numpy(picture / 255.0).float().permute(2, 1, 0)[None]  # (1, 3, W, H), as the bundle reads
    image = (image - image.min()) / (image.max() - image.min())
    boxes = []
    for mask in (left, right):
        rows, columns = np.where(mask)
        boxes.append([columns.min(), rows.min(), columns.max(), rows.max()])
    with torch.no_grad():
        embedding = adapter.encode_image(image)
        answers = adapter.decode(embedding, boxes=torch.tensor(boxes, dtype=torch.float32)[None])[0] > 0
        clicks = torch.tensor([[[[(b[0] + b[2]) / 2, (b[1] + b[3]) / 2]] for b in boxes]], dtype=torch.float32)
        clicked = adapter.decode(embedding, point_coords=clicks, point_labels=torch.ones(1, 2, 1))[0]
    for answer, own, other in ((answers[0], left, right), (answers[1], right, left)):
        found = answer.numpy().T
        assert (found & own).sum() > 0.6 * own.sum()
        assert (found & other).sum() < 0.2 * other.sum()
    # a moved click moves the mask: each click's own lesion gains logit against the other click's answer
    gain = (clicked[0] - clicked[1]).numpy().T
    assert gain[left].mean() > gain[right].mean()


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda root: None, "no data set found"),
        (lambda root: (root / "images").mkdir() or (root / "masks").mkdir(), "is empty"),
    ],
)
def test_wrong_folder_ends_with_one_clear_line(tmp_path: Path, prepare, expected: str, cli: Command) -> None:
    prepare(tmp_path)
    result = cli("run", "training", config_file=TRAIN, dataset_dir=tmp_path, ckpt_dir=tmp_path / "m",
                 output_dir=tmp_path / "o", **COMMON)  # fmt: skip
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert str(tmp_path) in last
    assert expected in last
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("config", ["inference", "evaluate"])
def test_an_output_that_is_a_file_is_named_in_the_last_line_before_the_first_image(
    phantoms: Path, tmp_path: Path, cli: Command, config: str
) -> None:
    place = tmp_path / "out"
    place.write_text("notes")
    files = INFERENCE if config == "inference" else f"['{TRAIN}','{EVALUATE}']"
    data = phantoms / "ISIC-2017_Validation_Data" if config == "inference" else phantoms
    result = cli("run", config_file=files, dataset_dir=data, output_dir=place, **COMMON)
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: output {place}: it can't be written")
    assert "Evaluator: [1/" not in result.stderr
    assert place.read_text() == "notes"


def test_photographs_whose_masks_would_have_one_name_are_refused_and_files_without_suffix_are_not(
    tmp_path: Path, cli: Command
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed, name in enumerate(("a.jpg", "a.png")):
        Image.fromarray(phantom(seed, 64)[0]).save(photos / name)
    result = cli("run", "inferring", config_file=INFERENCE, dataset_dir=photos, output_dir=tmp_path / "out", **COMMON)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {photos / 'a.jpg'} and {photos / 'a.png'}: their results would have one name")
    assert not (tmp_path / "out").exists()


def test_damaged_image_is_named_in_the_last_line_and_can_be_skipped(tmp_path: Path, cli: Command) -> None:
    data = write_phantoms(tmp_path / "data", training=3, validation=1, size=64)
    victim = sorted((data / "ISIC-2017_Training_Data").iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:200])
    options = {"config_file": TRAIN, "dataset_dir": data, "ckpt_dir": tmp_path / "m", "output_dir": tmp_path / "o",
               "max_epochs": 1, **COMMON, **SMALL, "amp": "false", "resume": "false"}  # fmt: skip
    result = cli("run", "training", **options)
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: {victim}")
    skipped = cli("run", "training", **options, skip_unreadable="true")
    assert skipped.returncode == 0, skipped.stderr[-2000:]
    assert str(victim) in skipped.stdout + skipped.stderr


def test_adapter_of_another_form_is_refused(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        run("evaluating", config_file=[TRAIN, EVALUATE], dataset_dir=str(phantoms), hyper_prompting="weights",
            output_dir=str(tmp_path), **COMMON)  # fmt: skip
    cause = find_cause(caught.value)
    assert isinstance(cause, WeightsError)
    assert "hyper_prompting='additive' (here 'weights')" in str(cause)
    assert not (tmp_path / "metrics.csv").exists()


def test_an_adapter_of_another_image_size_is_refused_unless_it_is_asked_for(phantoms: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path), "image_size": 64, "val_limit": 1, **COMMON}
    with pytest.raises(RuntimeError) as caught:
        run("evaluating", config_file=[TRAIN, EVALUATE], **options)
    cause = find_cause(caught.value)
    assert isinstance(cause, WeightsError)
    assert "image_size [256, 256] (here [64, 64])" in str(cause)
    assert not (tmp_path / "metrics.csv").exists()
    run("evaluating", config_file=[TRAIN, EVALUATE], **options, same_task=False)
    assert (tmp_path / "metrics.csv").exists()


def test_a_run_that_was_interrupted_is_not_gone_on_with_at_another_image_size(phantoms: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": str(phantoms), "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path), **COMMON, **SMALL}
    torch.save({"network": build_medsa("small", img_size=96, click_feedback=True).state_dict(), "epoch": 1,
                "iteration": 2, "epoch_length": 1}, tmp_path / "training_state.pt")  # fmt: skip
    with pytest.raises(RuntimeError) as caught:
        run("training", config_file=TRAIN, train_limit=1, max_epochs=2, **options)
    assert re.search(r"training_state.pt: .*image_size \[96, 96\] \(here \[64, 64\]\).*--resume false",
                     str(find_cause(caught.value)))  # fmt: skip


def test_the_base_without_adaptation_is_measured_too(phantoms: Path, tmp_path: Path) -> None:
    run("evaluating", config_file=[TRAIN, EVALUATE], dataset_dir=str(phantoms), checkpoint="", prompt="none",
        output_dir=str(tmp_path), **COMMON)  # fmt: skip
    assert read_metrics(tmp_path)["val_mean_dice"] < 0.5


def test_training_starts_from_an_adapter_of_another_image_size_too(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = BUNDLE / "models" / "model.pt"
    still = {"start_from": str(model), "learning_rate": 0.0, "weight_decay": 0.0, "max_epochs": 1}
    run("training", config_file=TRAIN, dataset_dir=str(phantoms), ckpt_dir=str(tmp_path), output_dir=str(tmp_path),
        **{**COMMON, **SMALL, **still, "base": "lite_medsam"})  # fmt: skip
    expected, found = (torch.load(f, weights_only=True) for f in (model, tmp_path / "model_last.pt"))
    made_for, trained_for = (decode_task(state.pop("task")) for state in (expected, found))
    assert (made_for["image_size"], trained_for["image_size"]) == ([256, 256], [64, 64])  # taken, and said
    assert "image_size [256, 256] (here [64, 64])" in capsys.readouterr().out
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_a_training_of_one_step_is_not_spent_on_warming_up(phantoms: Path, tmp_path: Path) -> None:
    model = BUNDLE / "models" / "model.pt"
    run("training", config_file=TRAIN, dataset_dir=str(phantoms), ckpt_dir=str(tmp_path), output_dir=str(tmp_path),
        start_from=str(model), train_limit=1, **{"train#trainer#max_epochs": 1},  # as MONAI Label asks for epochs
        **COMMON, **{**SMALL, "base": "lite_medsam", "warmup_steps": 50})  # fmt: skip
    expected, found = (torch.load(f, weights_only=True) for f in (model, tmp_path / "model_last.pt"))
    assert any(not torch.equal(found[name], expected[name]) for name in expected if name != "task")


def test_one_image_trains_without_validation_and_a_picture_of_one_pixel_is_segmented(
    phantoms: Path, tmp_path: Path
) -> None:
    picture = sorted((phantoms / "ISIC-2017_Training_Data").glob("*[0-9].*"))[0]
    mask = next((phantoms / "ISIC-2017_Training_Part1_GroundTruth").glob(f"{picture.stem}*"))
    entry = {"image": str(picture), "label": str(mask)}
    (tmp_path / "one.json").write_text(json.dumps({"training": [entry]}))
    run("training", config_file=TRAIN, dataset_dir=str(phantoms), datalist=str(tmp_path / "one.json"), max_epochs=1,
        ckpt_dir=str(tmp_path / "models"), output_dir=str(tmp_path / "out"),
        **{**COMMON, **SMALL, "samples_interval": 1})  # fmt: skip
    assert {p.name for p in (tmp_path / "models").glob("*.pt")} == {"model.pt", "model_last.pt"}
    Image.new("RGB", (1, 1), (200, 20, 20)).save(tmp_path / "pixel.png")
    run("inferring", config_file=INFERENCE, dataset_dir=str(tmp_path / "pixel.png"), output_dir=str(tmp_path / "masks"),
        save_overlays=True, save_probabilities=True, **COMMON)  # fmt: skip
    for kind in ("segmentation", "overlay", "probability"):
        assert Image.open(tmp_path / "masks" / f"pixel_{kind}.png").size == (1, 1)


def test_mlflow_tracks_a_run(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package)
    monkeypatch.setenv("MEDSA_TEST_LACKS", "transformers")  # other processes lack mlflow
    options = {"config_file": TRAIN, "dataset_dir": phantoms, "ckpt_dir": tmp_path / "m", "output_dir": tmp_path / "o",
               "tracking": "mlflow", "max_epochs": 1, **COMMON, **SMALL}  # fmt: skip
    command = [sys.executable, "-m", "monai.bundle", "run", "training"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    with contextlib.closing(sqlite3.connect(tmp_path / "o" / "mlruns.db")) as database:
        recorded = {key for (key,) in database.execute("SELECT key FROM metrics")}
    assert {"train_loss", "val_mean_dice"} <= recorded
