"""Both bundles with every adaptation: networks build, and a training of medsa_isic leaves an adapter of its kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, run

from medsa_nets.adaptations import settings_of
from medsa_nets.data.phantoms import write_phantoms
from medsa_nets.networks.identity import decode_identity
from medsa_nets.weights import BASES

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
FORMS = [("lora", None), ("adalora", "adapted"), ("none", "whole")]
pytestmark = pytest.mark.usefixtures("small_base")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), training=4, validation=1, size=64)


@pytest.mark.parametrize("bundle", ["medsa_isic", "medsa_btcv"])
@pytest.mark.parametrize("config", ["train", "inference"])
@pytest.mark.parametrize(("adaptation", "decoder"), FORMS)
def test_both_bundles_build_it_by_name(bundle: str, config: str, adaptation: str, decoder: str | None) -> None:
    parser = ConfigParser(ConfigParser.load_config_file(BUNDLES / bundle / "configs" / f"{config}.yaml"))
    parser.update({"bundle_root": str(BUNDLES / bundle), "base": "small", "adaptation": adaptation,
                   "train_decoder": decoder, "lora_rank": 2})  # fmt: skip
    settings = settings_of(decode_identity(parser.get_parsed_content("network_def").identity)["adapter"])
    assert (settings["adaptation"], settings.get("train_decoder")) == (adaptation, decoder)
    assert settings.get("lora_rank", 2) == 2
    if config == "train":
        resumed = parser.get_parsed_content("resume_settings")
        assert {"adaptation", "train_decoder", "lora_rank", "lora_alpha", "lora_targets"} <= set(resumed)


@pytest.mark.parametrize(("adaptation", "decoder"), FORMS)
def test_a_training_leaves_an_adapter_of_its_kind(
    phantoms: Path, tmp_path: Path, adaptation: str, decoder: str | None
) -> None:
    root = BUNDLES / "medsa_isic"
    common = {"bundle_root": str(root), "meta_file": str(root / "configs" / "metadata.json"), "base": "small",
              "image_size": 64, "dataset_dir": str(phantoms), "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path),
              "num_workers": 0, "amp": False, "batch_size": 2, "warmup_steps": 1, "samples_interval": 0}  # fmt: skip
    config = str(root / "configs" / "train.yaml")
    run("training", config_file=config, max_epochs=2, adaptation=adaptation, train_decoder=decoder, **common)
    state = torch.load(tmp_path / "model_last.pt", weights_only=True)
    assert decode_identity(state["identity"])["adapter"]["adaptation"] == adaptation
    low_rank = [name for name in state if ".lora." in name]
    assert bool(low_rank) == (adaptation != "none")
    assert all(bool(state[name].any()) for name in low_rank if not name.endswith(".E"))
    if adaptation == "adalora":  # 6 at the start, 4 on average at the end
        values = torch.cat([state[name].flatten() for name in low_rank if name.endswith(".E")])
        assert int((values != 0).sum()) == len(values) * 4 // 6


@pytest.mark.parametrize("bundle", ["medsa_isic", "medsa_btcv"])
@pytest.mark.parametrize("base", [name for name in BASES if name != "small"])
def test_two_percent_of_any_base_train(bundle: str, base: str) -> None:
    configs = BUNDLES / bundle / "configs"
    parser = ConfigParser(ConfigParser.load_config_files([configs / "train.yaml", configs / "two_percent.yaml"]))
    parser.update({"bundle_root": str(BUNDLES / bundle), "base": base, "network_def#pretrained": False})
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def")
    total = sum(p.numel() for p in network.parameters())
    assert 0.01 < sum(p.numel() for p in network.parameters() if p.requires_grad) / total <= 0.02
