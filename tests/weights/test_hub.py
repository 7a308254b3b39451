"""Base weights as Hugging Face keeps them: a folder and a hub's repository give what the file gives."""

from __future__ import annotations

import json

import pytest
import torch

from medsa_nets import WeightsError, build_medsa
from medsa_nets.weights import describe_file
from medsa_nets.weights.hub import find_file

from ..exchange.test_folders import Hub, hub  # noqa: F401 - a fixture

SIZE = 64


@pytest.fixture(scope="module")
def sam_folder(randomise, tmp_path_factory):
    """A small SamModel as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 32, "mlp_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
              "global_attn_indexes": [1], "image_size": SIZE}  # fmt: skip
    settings = transformers.SamConfig(vision_config=vision, prompt_encoder_config={"image_size": SIZE})
    model = randomise(transformers.SamModel(settings))
    folder = tmp_path_factory.mktemp("hugging_face")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def served(sam_folder, hub, tmp_path, monkeypatch):  # noqa: F811
    """The model on a hub, whose client keeps what it gets in a folder of its own."""
    constants = pytest.importorskip("huggingface_hub.constants")
    for name, value in {"HF_ENDPOINT": hub, "no_proxy": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_HUB_CACHE", "HF_XET_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path / name), raising=False)
    for name in ("config.json", "model.safetensors"):
        Hub.files[name] = (sam_folder / name).read_bytes()
    return tmp_path / "HF_HUB_CACHE"


def build(source):
    return build_medsa("tiny", sam_checkpoint=str(source), img_size=SIZE).eval()


def assert_same(found, expected):
    found, expected = found.full_state_dict(), expected.full_state_dict()
    assert found.keys() == expected.keys()
    base = [name for name in found if name.startswith(("image_encoder.patch", "mask_decoder.iou", "prompt_encoder."))]
    assert base
    assert all(torch.equal(found[name], expected[name]) for name in [*base, "identity"])


def test_a_folder_is_what_its_file_is(tiny_base, sam_folder):
    assert_same(build(sam_folder), build(sam_folder / "model.safetensors"))
    assert find_file(sam_folder) == sam_folder / "model.safetensors"
    assert "fits" in describe_file(sam_folder)


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_a_repository_is_what_its_file_is(tiny_base, sam_folder, served, revision):
    assert_same(build(f"clinic/sam-small{revision}"), build(sam_folder / "model.safetensors"))
    assert any(f"/clinic/sam-small/revision/{revision[1:] or 'main'}" in path for path in Hub.seen)


def test_a_repository_without_safetensors_gives_its_other_file(tiny_base, sam_folder, served, tmp_path):
    from safetensors.torch import load_file

    torch.save(load_file(sam_folder / "model.safetensors"), tmp_path / "weights.bin")
    del Hub.files["model.safetensors"]
    Hub.files["pytorch_model.bin"] = (tmp_path / "weights.bin").read_bytes()
    assert_same(build("clinic/sam-small"), build(sam_folder))


def test_a_file_that_was_damaged_in_the_hub_s_cache_is_named(served):
    file = find_file("clinic/sam-small")
    assert file.is_relative_to(served)
    content = bytearray(file.read_bytes())
    content[-1] ^= 255
    file.resolve().chmod(0o644)
    file.resolve().write_bytes(bytes(content))
    with pytest.raises(WeightsError, match=r"model.safetensors: sha256 is .*, expected .*delete it"):
        find_file("clinic/sam-small")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, r"config.json: not readable .* Expected the folder of a SamModel"),
        ("{", r"config.json: not readable"),
        ({"model_type": "sam2"}, r"config.json: model_type is 'sam2', expected 'sam'"),
        ({"model_type": "sam"}, "holds neither model.safetensors nor pytorch_model.bin"),
    ],
)
def test_other_folders_are_refused(tmp_path, settings, message):
    if settings is not None:
        text = settings if isinstance(settings, str) else json.dumps(settings)
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(WeightsError, match=message):
        find_file(tmp_path)


def test_what_the_hub_has_not_is_one_clear_error(served):
    Hub.files.clear()
    with pytest.raises(WeightsError, match=r"clinic--sam-small.*config.json: not readable"):
        find_file("clinic/sam-small")


@pytest.mark.parametrize("name", ["weights/sam.pth", "sam_vit_b", "a/b/c", "../sam/base"])
def test_names_of_files_are_not_looked_up_on_a_hub(name, monkeypatch):
    monkeypatch.setattr("medsa_nets.weights.hub._download", lambda _: pytest.fail("looked up"))
    assert str(find_file(name)) == name
