"""The folder that MONAI Label serves. The server itself is tested with ``-m label``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from medsa_nets import WeightsError
from medsa_nets.bundles import Bundle, read_task
from medsa_nets.errors import DataError
from medsa_nets.label import add_app, add_bundle, main
from medsa_nets.weights import find_base_file, get_base

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"

try:
    find_base_file(get_base("lite_medsam"))
except WeightsError as error:
    pytest.skip(f"LiteMedSAM's weights are not installed: {error}", allow_module_level=True)


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    folder = tmp_path / "stock"
    (folder / "logs").mkdir(parents=True)
    (folder / "main.py").write_text("app")
    (folder / "lib").mkdir()
    (folder / "lib" / "a.py").write_text("1")
    return folder


def test_the_stock_app_is_copied_once_beside_what_adds_scribbles(stock: Path, tmp_path: Path) -> None:
    app = tmp_path / "app"
    add_app(app, stock)
    assert sorted(p.name for p in app.iterdir()) == ["bundle_app.py", "lib", "main.py"]
    assert (app / "bundle_app.py").read_text() == "app"
    assert "with_scribbles(bundle_app.MyApp)" in (app / "main.py").read_text()
    (app / "main.py").write_text("changed by its owner")
    add_app(app, stock)
    assert (app / "main.py").read_text() == "changed by its owner"


@pytest.mark.parametrize("text", ["app", "changed by its owner"])
def test_an_app_that_was_made_before_takes_scribbles_unless_its_owner_changed_it(
    stock: Path, tmp_path: Path, text: str
) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "main.py").write_text(text)
    add_app(app, stock)
    assert (app / "bundle_app.py").is_file() == (text == "app")
    assert (text in (app / "main.py").read_text().split("\n")) == (text != "app")


def test_a_bundle_with_a_trained_adapter_is_served_with_it(tmp_path: Path) -> None:
    model = add_bundle(tmp_path, BUNDLES / "medsa_isic")
    assert model == tmp_path / "model" / "medsa_isic_deepedit"
    assert (model / "models" / "model.pt").read_bytes() == (BUNDLES / "medsa_isic" / "models" / "model.pt").read_bytes()
    for names in (["inference.yaml", "server.yaml"], ["train.yaml"]):
        files = [str(BUNDLES / "medsa_isic" / "configs" / name) for name in names]
        there, here = (ConfigParser.load_config_files(f) for f in (files, str(model / "configs" / names[0])))
        facts, name = (here.pop("facts"), here.pop("checkpoint_filename"))
        assert here == {key: value for key, value in there.items() if key not in ("facts", "checkpoint_filename")}
        assert facts == read_task("isic", BUNDLES / "medsa_isic")
        assert name == "model.pt"


def test_a_bundle_without_adapter_starts_from_the_frozen_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ignored = shutil.ignore_patterns("*.pt")
    bundle = shutil.copytree(BUNDLES / "medsa_btcv", tmp_path / "untrained" / "medsa_btcv", ignore=ignored)
    model = add_bundle(tmp_path, bundle, name="abdomen")
    assert model.name == "abdomen_deepedit"
    assert "no trained adapter yet" in capsys.readouterr().out
    config = ConfigParser()
    config.read_config(str(model / "configs" / "inference.yaml"))
    network = config.get_parsed_content("network_def")
    network.load_state_dict(torch.load(model / "models" / "model.pt", weights_only=True))
    # what was trained since stays
    trained = network.state_dict()
    trained["class_embeddings"] = trained["class_embeddings"] + 1.0
    torch.save(trained, model / "models" / "model.pt")
    add_bundle(tmp_path, bundle, name="abdomen")
    kept = torch.load(model / "models" / "model.pt", weights_only=True)
    assert torch.equal(kept["class_embeddings"], trained["class_embeddings"])


def test_overlays_are_merged_with_their_classes_and_adapter(tmp_path: Path) -> None:
    model = add_bundle(tmp_path, BUNDLES / "medsa_btcv", overlays=["hippocampus.yaml"])
    assert model.name == "medsa_btcv_hippocampus_deepedit"
    pred = json.loads((model / "configs" / "metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
    assert pred["channel_def"] == {"0": "background", "1": "anterior", "2": "posterior"}
    assert pred["num_channels"] == 2
    config = ConfigParser()
    config.read_config(str(model / "configs" / "inference.yaml"))
    config["bundle_root"] = str(model)
    assert config.get_parsed_content("checkpoint") == str(model / "models" / "model.pt")
    assert config.get_parsed_content("click_refinement") == str(model / "models" / "model.clicks.pt")
    network = config.get_parsed_content("network_def")
    network.load_state_dict(torch.load(model / "models" / "model.pt", weights_only=True))
    training = Bundle.open(model, config="train.yaml")
    assert training.value("classes") == ["anterior", "posterior"]
    assert training.config["checkpoint_filename"] == "model.pt"


def test_wrong_bundles_and_overlays_are_named(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no configs/metadata\.json"):
        add_bundle(tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"brain\.yaml: there is no such file; expected one of .*hippocampus\.yaml"):
        add_bundle(tmp_path, BUNDLES / "medsa_btcv", overlays=["brain.yaml"])


def test_the_command_prints_how_to_start(stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    app = tmp_path / "app"
    add_app(app, stock)
    assert main([str(app), "--bundle", str(BUNDLES / "medsa_isic"), "--studies", "/data/images"]) == 0
    printed = capsys.readouterr().out
    assert f"monailabel start_server --app {app} --studies /data/images" in printed
    assert "--conf models medsa_isic_deepedit" in printed
    assert main([str(app), "--bundle", str(tmp_path / "nowhere")]) == 1
    assert "error: bundle" in capsys.readouterr().err


def test_without_monai_label_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    assert main([str(tmp_path / "app"), "--bundle", str(BUNDLES / "medsa_isic")]) == 1
    assert "pip install 'medsa[label]'" in capsys.readouterr().err
