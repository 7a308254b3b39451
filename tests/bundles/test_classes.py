"""Several classes in a picture, through the bundle medsa_isic's own commands, on generated pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import run
from PIL import Image

from medsa_nets.bundles import Bundle, copy_bundle
from medsa_nets.deploy.settings import read_settings
from medsa_nets.errors import DataError, find_cause
from medsa_nets.interaction.session import InteractiveSession
from medsa_nets.networks.identity import decode_identity, decode_task

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "medsa_isic"
CONFIGS = {path.stem: str(path) for path in (BUNDLE / "configs").glob("*.yaml")}
COMMON = {"bundle_root": str(BUNDLE), "meta_file": str(BUNDLE / "configs" / "metadata.json"), "num_workers": 0,
          "amp": False, "base": "small", "image_size": 64}  # fmt: skip
TRAIN, EVALUATE, INFERENCE = [CONFIGS["train"]], [CONFIGS["train"], CONFIGS["evaluate"]], [CONFIGS["inference"]]
CLASSES = {"wbc": ("cytoplasm", "nucleus"), "refuge": ("disc", "cup")}
# values of a map outside, in the outer part and in the inner part of what each picture shows
VALUES = {"wbc": (0, 128, 255), "refuge": (255, 128, 0)}
pytestmark = pytest.mark.usefixtures("small_base")


def write_pictures(root: Path, task: str, count: int = 6) -> Path:
    """Pictures of a disc in a disc, with maps of three values, in folders ``images`` and ``masks``."""
    random = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        y, x = np.mgrid[:72, :80]
        distance = np.hypot(y - random.integers(30, 42), x - random.integers(30, 50))
        part = (distance < 26).astype(int) + (distance < 12)
        colours = np.array([[30, 30, 40], [150, 60, 60], [220, 200, 80]])
        noisy = colours[part] + random.normal(0, 8, (72, 80, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / "images" / f"p{i}.png")
        Image.fromarray(np.array(VALUES[task], dtype=np.uint8)[part]).save(root / "masks" / f"p{i}.png")
    return root


@pytest.fixture(scope="module", params=["wbc", "refuge"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small_base: str):
    """A task, its pictures, and the folder with what a short training of it left."""
    task, out = request.param, tmp_path_factory.mktemp(request.param)
    data = write_pictures(out / "data", task)
    run("training", config_file=TRAIN, task=task, dataset_dir=str(data), ckpt_dir=str(out), output_dir=str(out),
        batch_size=2, warmup_steps=1, samples_interval=4, max_epochs=8, learning_rate=0.005,
        validation_fraction=0.3, **COMMON)  # fmt: skip
    return task, data, out


def test_a_training_of_two_classes_lowers_the_loss_and_says_what_its_adapter_is(trained) -> None:
    task, _, out = trained
    log = (out / "training.log").read_text()
    losses = [float(line.rsplit("train_loss:", 1)[1].split()[0]) for line in log.splitlines() if "train_loss:" in line]
    assert losses[-1] < losses[0]
    assert len(list((out / "samples").glob("epoch_0004_*.png"))) >= 1
    state = torch.load(out / f"{task}.pt", weights_only=True)
    settings = decode_identity(state["identity"])["adapter"]
    assert (settings["num_classes"], settings["classes_per_pass"]) == (2, 2)
    facts = decode_task(state["task"])
    assert facts["overlap"] == (task == "refuge")
    assert facts["classes"] == list(CLASSES[task])
    assert state["class_embeddings"].shape[0] == 2


def test_sessions_of_clicks_and_the_decoder_alone_train_on_several_classes(trained, tmp_path: Path) -> None:
    task, data, out = trained
    run("training", config_file=[*TRAIN, CONFIGS["decoder"], CONFIGS["clicks"]], task=task, dataset_dir=str(data),
        start_from=str(out / f"{task}.pt"), embedding_dir=str(tmp_path / "embeddings"), ckpt_dir=str(tmp_path),
        output_dir=str(tmp_path), batch_size=2, session_answers=3, samples_interval=0, max_epochs=1,
        validation_fraction=0.3, **COMMON)  # fmt: skip
    before, after = (torch.load(folder / f"{task}.pt", weights_only=True) for folder in (out, tmp_path))
    assert before.keys() == after.keys()
    assert not torch.equal(before["class_embeddings"], after["class_embeddings"])


@pytest.mark.parametrize("prompt", ["none", "point", "box"])
def test_evaluation_gives_figures_of_each_class(trained, tmp_path: Path, prompt: str) -> None:
    task, data, out = trained
    run("evaluating", config_file=EVALUATE, task=task, dataset_dir=str(data), ckpt_dir=str(out), prompt=prompt,
        output_dir=str(tmp_path), validation_fraction=0.3, overlays=1, **COMMON)  # fmt: skip
    with open(tmp_path / "val_mean_dice_raw.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["filename", "class0", "class1", "mean"]
    assert all(0.0 <= float(value) <= 1.0 for row in rows[1:] for value in row[1:])
    with open(tmp_path / "metrics.csv", newline="") as file:
        means = {name: float(value) for name, value in csv.reader(file)}
    for k, name in enumerate(CLASSES[task]):
        expected = np.mean([float(row[1 + k]) for row in rows[1:]])
        assert means[f"val_mean_dice_{name}"] == pytest.approx(expected, abs=1e-4)
        assert f"val_hd95_{name}" in means
    assert len(list((tmp_path / "overlays").iterdir())) == 1


def test_sessions_of_clicks_are_evaluated_for_each_class(trained, tmp_path: Path) -> None:
    task, data, out = trained
    run("evaluating", config_file=EVALUATE, task=task, dataset_dir=str(data), ckpt_dir=str(out), prompt="session",
        session_clicks=2, output_dir=str(tmp_path), validation_fraction=0.3, val_limit=1, **COMMON)  # fmt: skip
    with open(tmp_path / "sessions.csv", newline="") as file:
        text = file.read()
    classes = CLASSES[task]
    assert all(name in text for name in classes)


def test_inference_writes_a_map_or_a_mask_for_each_class_and_obeys_prompts_of_a_class(trained, tmp_path: Path) -> None:
    task, data, out = trained
    first, second = CLASSES[task]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"p0.png": {first: {"points": [[3, 5]]}, second: {"points": [[40, 36], [70, 9]],
                                                                                    "labels": [1, 0]}}}))  # fmt: skip
    run("inferring", config_file=INFERENCE, task=task, dataset_dir=str(data / "images"), ckpt_dir=str(out),
        prompts=str(prompts), output_dir=str(tmp_path / "masks"), save_overlays=True, save_probabilities=True,
        **COMMON)  # fmt: skip
    names = {path.name for path in (tmp_path / "masks").iterdir()}
    assert {f"p{i}_{name}_probability.png" for i in range(6) for name in (first, second)} <= names
    assert "p1_overlay.png" in names

    def picture(name: str) -> np.ndarray:
        array = np.asarray(Image.open(tmp_path / "masks" / name))
        assert array.shape == (72, 80)
        return array

    if task == "wbc":
        found = picture("p0_segmentation.png")
        assert set(np.unique(found)) <= {0, 1, 2}
        assert (found[5, 3], found[36, 40]) == (1, 2)
        assert found[9, 70] != 2
        assert {f"p{i}_segmentation.png" for i in range(6)} <= names
    else:
        outer, inner = (picture(f"p0_{name}_segmentation.png") for name in (first, second))
        assert set(np.unique([outer, inner])) <= {0, 255}
        assert (outer[5, 3], inner[36, 40], inner[9, 70]) == (255, 255, 0)
        assert "p0_segmentation.png" not in names


def test_what_prompts_do_not_ask_for_is_absent_or_automatic(trained, tmp_path: Path) -> None:
    task, data, out = trained
    if task == "wbc":
        pytest.skip("overlapping masks show each class by itself")
    (tmp_path / "prompts.json").write_text(json.dumps({"p0.png": {"cup": {"points": [[40, 36]]}}}))
    found = {}
    for given, others in ((True, "absent"), (True, "automatic"), (False, "absent")):
        folder = tmp_path / f"{given}{others}"
        run("inferring", config_file=INFERENCE, task=task, dataset_dir=str(data / "images" / "p0.png"),
            ckpt_dir=str(out), prompts=str(tmp_path / "prompts.json") if given else None, others=others,
            output_dir=str(folder), **COMMON)  # fmt: skip
        found[given, others] = np.asarray(Image.open(folder / "p0_disc_segmentation.png"))
    assert not found[True, "absent"].any()
    assert found[False, "absent"].any()
    np.testing.assert_array_equal(found[True, "automatic"], found[False, "absent"])


def test_a_prompt_for_an_unknown_class_and_a_value_without_meaning_are_one_clear_error(trained, tmp_path: Path) -> None:
    task, data, out = trained
    (tmp_path / "prompts.json").write_text(json.dumps({"p0.png": {"liver": {"points": [[40, 36]]}}}))
    with pytest.raises(Exception) as caught:  # noqa: PT011  (monai wraps it)
        run("inferring", config_file=INFERENCE, task=task, dataset_dir=str(data / "images"), ckpt_dir=str(out),
            prompts=str(tmp_path / "prompts.json"), output_dir=str(tmp_path / "masks"), **COMMON)  # fmt: skip
    assert "found liver; expected classes out of" in str(find_cause(caught.value))
    with pytest.raises(Exception) as caught:  # noqa: PT011  (monai wraps it)
        run("training", config_file=TRAIN, task=task, dataset_dir=str(data), ckpt_dir=str(tmp_path),
            output_dir=str(tmp_path), class_values=[3, 4], class_background=[0], max_epochs=1, **COMMON)  # fmt: skip
    message = str(find_cause(caught.value))
    assert str(data / "masks" / "p") in message
    assert "holds 128, 255; expected background: 0; " in message
    assert f"{CLASSES[task][0]}: 3" in message
    assert "class_values, class_background" in message
    assert not (tmp_path / f"{task}.pt").exists()


def open_session(trained, picture: str = "p0.png") -> InteractiveSession:
    task, data, out = trained
    settings = {"task": task, "ckpt_dir": str(out), **{k: COMMON[k] for k in ("amp", "base", "image_size")}}
    session = InteractiveSession.from_bundle(BUNDLE, config=settings)
    session.open(str(data / "images" / picture))
    return session


def test_a_session_corrects_a_class_and_leaves_an_accepted_other_one_where_a_pixel_holds_one(trained) -> None:
    task, _, _ = trained
    first, second = CLASSES[task]
    session = open_session(trained)
    assert session.classes == [first, second]
    accepted = np.zeros((80, 72), dtype=bool)
    accepted[10:60, 12:50] = True
    session.start_from(accepted, first)
    session.accept(first)
    session.point((70, 66), 1, second)
    if task == "refuge":  # the cup lies in the disc
        session.point((30, 30), 1, second)
        assert session.mask(second)[30, 30]
        np.testing.assert_array_equal(session.mask(first), accepted)
    else:
        with pytest.raises(DataError, match="accepted as cytoplasm"):
            session.point((30, 30), 1, second)
        np.testing.assert_array_equal(session.mask(first), accepted)
        assert not (session.mask(second) & accepted).any()
        labels = session.label_map()
        assert set(np.unique(labels)) <= {0, 1, 2}
        assert (labels[30, 30], labels[70, 66]) == (1, 2)
    assert session.mask(second)[70, 66]


def test_a_copy_for_a_server_names_the_classes_and_answers_by_a_map(trained, tmp_path: Path) -> None:
    task, data, out = trained
    target = tmp_path / "server"
    copy_bundle(BUNDLE, target, [f"{task}.yaml"], {k: COMMON[k] for k in ("amp", "base", "image_size")}, server=True)
    opened = Bundle.open(target, settings={"checkpoint": str(out / f"{task}.pt")})
    pred = opened.metadata["network_data_format"]["outputs"]["pred"]
    assert pred["channel_def"] == {"0": "background", "1": CLASSES[task][0], "2": CLASSES[task][1]}
    parser = opened.parser()
    network = parser.get_parsed_content("network").eval()
    network.load_state_dict(torch.load(out / f"{task}.pt", weights_only=True))
    request = {"image": str(data / "images" / "p0.png"), CLASSES[task][1]: [[40, 36]], "label": CLASSES[task][1]}
    item = parser.get_parsed_content("preprocessing")(request)
    with torch.no_grad():
        item["pred"] = parser.get_parsed_content("inferer")(item["image"][None], network)[0]
    answer = parser.get_parsed_content("postprocessing")(item)["pred"]
    assert (tuple(answer.shape), answer.dtype) == ((80, 72), torch.uint8)
    assert set(torch.unique(answer).tolist()) <= {0, 1, 2}
    assert answer[40, 36] == 2


def test_deploy_takes_classes_that_exclude_each_other_and_refuses_others(trained, tmp_path: Path) -> None:
    task, _, _ = trained
    copy_bundle(BUNDLE, tmp_path / "copy", [f"{task}.yaml"])
    if task == "wbc":
        assert [one.label for one in read_settings(tmp_path / "copy").segments] == list(CLASSES[task])
    else:
        with pytest.raises(DataError, match=r"disc, cup.*overlap"):
            read_settings(tmp_path / "copy")
