"""Every back end gives what eager computation gives: on real weights and real images, after every change of weights."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import logging
import os
import pickle
import shutil
import sys
import tempfile
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, run
from PIL import Image
from torch import nn

from medsa_nets import BackendError, backends, build_medsa, converted, inferers, measurements, use_backend
from medsa_nets.backends import (
    BACKENDS,
    COMPILED_VARIABLE,
    MAX_SHAPES,
    backend_of,
    expect_encodings,
    expect_images,
    keep_compiled_code_apart,
)
from medsa_nets.embeddings import train_decoder_alone
from medsa_nets.errors import find_cause
from medsa_nets.inferers import EmbeddingCache, PromptInferer, SlabInferer

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
HAS_COMPILER = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def needed(backend: str) -> pytest.ParameterSet:
    """The back end, skipped with a reason where it can't run."""
    missing = [name for name in BACKENDS[backend] if importlib.util.find_spec(name) is None]
    marks = [pytest.mark.skipif(bool(missing), reason=f"{backend} needs {', '.join(missing)}")]
    if backend == "compile":
        marks.append(pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler"))
    return pytest.param(backend, marks=marks)


OTHERS = [needed(backend) for backend in BACKENDS if backend not in ("eager", "auto")]
# Converting the whole of LiteMedSAM takes 5 to 60 s: each day the fastest, the others with -m slow.
SLOW = ("compile", "torchscript", "onnxruntime")


def slow(backends: list, names: tuple[str, ...]) -> list:
    return [p if p.values[0] not in names else pytest.param(*p.values, marks=[*p.marks, pytest.mark.slow])
            for p in backends]  # fmt: skip


REAL = slow(OTHERS, SLOW)


@pytest.fixture(scope="module")
def photographs(lite_medsam_file: Path) -> nn.Module:
    return adapted("medsa_isic/models/model.pt")


@pytest.fixture(scope="module")
def volumes(lite_medsam_file: Path) -> nn.Module:
    return adapted("medsa_btcv/models/model.pt", spatial_dims=3, num_classes=13, classes_per_pass=13)


def adapted(file: str, **settings: int) -> nn.Module:
    network = build_medsa("lite_medsam", click_feedback=True, **settings).eval()
    network.load_state_dict(torch.load(BUNDLES / file, weights_only=True))
    return network


@pytest.fixture
def tiny(tiny_base, randomise, perturb_adapters) -> nn.Module:
    """A small ViT for volumes; its slices see each other."""
    network = build_medsa("tiny", pretrained=False, img_size=32, spatial_dims=3, num_classes=2, adapter_dim=4)
    perturb_adapters(randomise(network))
    with torch.no_grad():
        for block in network.image_encoder.blocks:
            block.depth.bias.normal_()
    return network


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a > 0, b > 0
    return float(2 * (a & b).sum() / (a.sum() + b.sum()).clamp(min=1))


@torch.no_grad()
def answers(network: nn.Module, image: torch.Tensor, amp: bool = False) -> torch.Tensor:
    """Logits without prompts, as inference computes them."""
    inferer = SlabInferer(slab_depth=8, amp=amp) if image.dim() == 5 else PromptInferer(amp=amp)
    return inferer(image, network)


def real_photographs(root: Path, count: int) -> torch.Tensor:
    files = sorted((root / "isic2017" / "ISIC-2017_Training_Data").glob("*.jpg"))[:count]
    arrays = [np.asarray(Image.open(file).convert("RGB").resize((256, 256)), np.float32) for file in files]
    return torch.stack([torch.from_numpy((a - a.min()) / (a.max() - a.min())).permute(2, 1, 0) for a in arrays])


def real_slab(root: Path) -> torch.Tensor:
    scan = nib.load(root / "ct" / "ct_a.nii.gz")
    assert nib.aff2axcodes(scan.affine) == ("R", "A", "S")
    values = torch.from_numpy(scan.get_fdata(dtype=np.float32))[None, None, :, :, 60:68]
    return ((values + 125) / 400).clamp(0, 1)


@pytest.mark.parametrize("backend", REAL)
def test_masks_of_real_photographs_are_those_of_eager(photographs, shared_data, backend):
    network = copy.deepcopy(photographs)
    for image in real_photographs(shared_data, 3)[:, None]:
        expected = answers(photographs, image)
        found = answers(use_backend(network, backend), image)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        assert (expected > 0).any()
        assert dice(found, expected) >= 0.999


@pytest.mark.parametrize("backend", REAL)
def test_masks_of_a_real_volume_are_those_of_eager(volumes, shared_data, backend):
    image = real_slab(shared_data)
    expected = answers(volumes, image)
    found = answers(use_backend(copy.deepcopy(volumes), backend), image)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert (expected[0, 5] > 0).any(), "no liver"
    assert dice(found, expected) >= 0.999


@pytest.mark.parametrize("backend", OTHERS)
def test_every_backend_follows_the_weights(tiny, backend):
    image = torch.rand(1, 1, 32, 32, 3)
    other = use_backend(copy.deepcopy(tiny), backend)
    torch.testing.assert_close(answers(other, image), answers(tiny, image), atol=1e-4, rtol=1e-4)
    first = answers(tiny, image)
    changed = {name: t + 0.1 if t.is_floating_point() else t for name, t in tiny.state_dict().items()}
    for network in (tiny, other):
        network.load_state_dict(changed)
    assert not torch.allclose(answers(tiny, image), first, atol=1e-2)
    torch.testing.assert_close(answers(other, image), answers(tiny, image), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", slow(OTHERS, ("compile",)))
def test_bfloat16_is_close_and_stays_apart_from_single_precision(tiny, backend):
    image = torch.rand(1, 1, 32, 32, 2)
    network = use_backend(copy.deepcopy(tiny), backend)
    exact = answers(tiny, image)
    coarse = answers(network, image, amp=True)
    torch.testing.assert_close(answers(network, image), exact, atol=1e-4, rtol=1e-4)
    assert float((coarse - exact).abs().max()) < 0.15 * float(exact.abs().max())


@pytest.mark.parametrize("backend", ["eager", *OTHERS])
def test_names_values_and_identity_of_the_weights_stay(tiny, backend):
    before = tiny.full_state_dict()
    network = use_backend(tiny, backend)
    assert network is tiny
    assert backend_of(network) == backend
    after = network.full_state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    network.load_state_dict(network.state_dict())
    assert backend_of(use_backend(network)) == "eager"


def calls_of_eager(network: nn.Module) -> list[int]:
    """The list grows by one whenever the encoder's own code runs."""
    calls: list[int] = []
    network.image_encoder.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_training_computes_eagerly_and_has_gradients(tiny):
    network = use_backend(tiny, "torchscript")
    network.train()
    network.encode_image(torch.rand(1, 1, 32, 32, 2)).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in network.image_encoder.parameters())
    network.eval()
    assert not network.encode_image(torch.rand(1, 1, 32, 32, 2)).requires_grad


def test_a_shape_is_converted_once_and_few_are_kept(tiny, caplog):
    network = use_backend(tiny, "torchscript")
    with caplog.at_level(logging.INFO, "medsa_nets.backends"):
        for depth in [*range(1, MAX_SHAPES + 2), MAX_SHAPES + 1, 2, 1]:
            network.encode_image(torch.rand(1, 1, 32, 32, depth))
    assert len(caplog.messages) == MAX_SHAPES + 2, "one a shape, and the first shape, alone, anew"


def test_loading_the_same_adapter_again_converts_nothing(tiny, caplog):
    network = use_backend(tiny, "torchscript")
    with caplog.at_level(logging.INFO, "medsa_nets.backends"):
        for _ in range(2):
            network.load_state_dict({name: tensor.clone() for name, tensor in network.state_dict().items()})
            network.encode_image(torch.rand(1, 1, 32, 32, 1))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("backend", [needed(name) for name in ("torchscript", "onnxruntime", "openvino")])
def test_threads_of_a_server_share_a_network(tiny, backend):
    network = use_backend(copy.deepcopy(tiny), backend)
    images = [torch.rand(1, 1, 32, 32, 1 + i % 2) for i in range(16)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(network.encode_image, images))
        for image, embedding in zip(images, found):
            torch.testing.assert_close(embedding, tiny.encode_image(image), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_computes_with_its_own_weights(tiny, duplicate):
    image = torch.rand(1, 1, 32, 32, 2)
    network = use_backend(tiny, "torchscript")
    before = network.encode_image(image)
    other = duplicate(network)
    assert backend_of(other) == "torchscript"
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert not torch.allclose(other.encode_image(image), before, atol=1e-2)
    torch.testing.assert_close(network.encode_image(image), before)


@pytest.mark.parametrize("backend", ["eager", "auto", "torchscript"])
def test_torchscript_of_a_network_is_that_of_its_own_encoder(tiny, backend):
    image = torch.rand(1, 1, 32, 32, 2)
    with torch.no_grad():
        expected = tiny.eval()(image)
        network = use_backend(tiny, backend)
        for exported in (torch.jit.script(network), torch.jit.trace(network, (image,))):
            torch.testing.assert_close(exported(image), expected, atol=1e-4, rtol=1e-4)


def test_no_method_of_a_network_is_replaced(tiny, tmp_path):
    use_backend(train_decoder_alone(tiny, tmp_path), "torchscript").encode_image(torch.rand(1, 1, 32, 32, 2))
    for module in tiny.modules():
        assert not [name for name in vars(module) if inspect.isfunction(getattr(type(module), name, None))]


def test_a_cache_tells_backends_apart(tiny):
    cache, image = EmbeddingCache(), torch.rand(1, 1, 32, 32, 2)
    inferer = SlabInferer(slab_depth=2, cache=cache)
    with torch.no_grad():
        for backend in ("eager", "torchscript", "eager"):
            inferer(image, use_backend(tiny, backend))
    assert (cache.misses, cache.hits) == (2, 1)


@pytest.mark.parametrize("backend", [needed("onnxruntime"), needed("openvino")])
def test_tensors_elsewhere_are_refused(tiny, backend):
    network = use_backend(tiny.to("meta"), backend)
    with pytest.raises(BackendError, match=f"{backend}.*CPU.*on meta.*--backend eager"):
        network.encode_image(torch.rand(1, 1, 32, 32, 1, device="meta"))


def test_unknown_backends_are_named(tiny):
    with pytest.raises(BackendError, match=r"no back end 'tpu'; choose one of eager, .*openvino"):
        use_backend(tiny, "tpu")


def test_another_network_computes_as_it_is():
    network = nn.Conv2d(1, 1, 1)
    assert use_backend(network) is network
    with pytest.raises(
        BackendError, match=r"A Conv2d has no image encoder that the back end 'compile' .*--backend eager"
    ):
        use_backend(network, "compile")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_missing_package_names_its_extra(tiny, monkeypatch, backend):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == backend else find(name))
    with pytest.raises(BackendError, match=rf"needs {backend}, which is not installed.*medsa\[{backend}\]"):
        use_backend(tiny, backend)
    assert backend_of(tiny) == "eager"


def test_what_cannot_be_converted_is_said(tiny, monkeypatch):
    monkeypatch.setattr(torch.jit, "freeze", lambda _: 1 / 0)
    with pytest.raises(BackendError, match=r"torchscript.*\(2, 3, 32, 32\) \(ZeroDivisionError.*--backend eager"):
        use_backend(tiny, "torchscript").encode_image(torch.rand(1, 1, 32, 32, 2))


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_sends_no_statistics(tmp_path, forks):
    code = """
import sys
import types
from medsa_nets.backends import import_openvino

core = import_openvino().Core()
import openvino

assert core.available_devices
assert "openvino_telemetry" not in sys.modules
"""
    done = forks.run(["-c", code], HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "intel").exists(), "OpenVINO's telemetry keeps an identifier there"


@pytest.fixture
def own_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measurements.forget()
    yield tmp_path
    measurements.forget()


class FakeOpenVINO:
    """Stands for the conversion: gives a marked embedding, and a time of its own passes.

    Args:
        network: its encoder takes two seconds an image.
        speed: how many times as fast what is converted is.
        conversion: seconds that converting takes.
    """

    def __init__(self, monkeypatch, network: nn.Module, speed: float, conversion: float = 0.0) -> None:
        self.conversions = 0
        self.speed = speed
        self.conversion = conversion
        self.now = 0.0
        monkeypatch.setattr(backends, "convert_by_openvino", self.convert)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(backends, "version", lambda name: "1")
        monkeypatch.setattr(backends, "clock", lambda: self.now)
        network.image_encoder.patch_embed.register_forward_hook(
            lambda *_: self.wait(2.0)
        )  # a function, copied as it is

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def convert(self, encoder, image, amp, folder):
        self.conversions += 1
        self.wait(self.conversion)

        def encode(x: torch.Tensor) -> torch.Tensor:
            before = self.now
            embedding = encoder(x) + 1.0
            self.now = before + 2.0 / self.speed
            return embedding

        return encode


@pytest.mark.parametrize(
    ("images", "speed", "conversions", "chosen"),
    [
        (0, 3.0, 0, "eager"),  # nobody said that any follow
        (100, 3.0, 0, "eager"),  # a conversion of more than a tenth of the run is no trial
        (1000, 3.0, 1, "openvino"),
        (1000, 0.5, 1, "eager"),  # tried, and slower
    ],
)
def test_auto_tries_openvino_where_enough_images_follow(
    tiny, monkeypatch, own_cache, caplog, images, speed, conversions, chosen
):
    fake = FakeOpenVINO(monkeypatch, tiny, speed)
    image = torch.rand(1, 1, 32, 32, 2)
    with torch.no_grad(), caplog.at_level(logging.INFO, "medsa_nets"):
        eager = tiny.encode_image(image)
        network = use_backend(tiny, "auto")
        expect_images(network, images)
        embeddings = [network.encode_image(image) for _ in range(3)]
    assert fake.conversions == conversions
    for embedding in embeddings:  # the first one too: masks of one run come from one back end
        torch.testing.assert_close(embedding, eager + (chosen == "openvino"))
    assert not images or f"auto: {chosen} for (2, 3, 32, 32)" in caplog.text
    assert ("--backend eager" in caplog.text) == (chosen == "openvino")


@pytest.mark.parametrize(
    ("speed", "images", "chosen"), [(4.0, 100, "openvino"), (4.0, 25, "eager"), (1.05, 10_000, "eager")]
)
def test_auto_knows_from_an_earlier_run_what_openvino_gains(tiny, monkeypatch, own_cache, speed, images, chosen):
    fake, image = FakeOpenVINO(monkeypatch, tiny, speed, conversion=40.0), torch.rand(1, 1, 32, 32, 2)
    with torch.no_grad():
        eager = tiny.encode_image(image)
        first, second = (use_backend(copy.deepcopy(tiny), "auto") for _ in range(2))
        expect_images(first, 1000)
        first.encode_image(image)
        measurements.forget()  # as a new process
        expect_images(second, images)
        found = second.encode_image(image)
    torch.testing.assert_close(found, eager + (chosen == "openvino"))
    assert fake.conversions == (2 if chosen == "openvino" else 1)


def test_auto_is_not_led_to_a_trial_by_a_first_image_that_is_slow(tiny, monkeypatch, own_cache):
    fake = FakeOpenVINO(monkeypatch, tiny, 3.0)
    first = [100.0]  # seconds that only the first image takes, for all that has to be loaded
    tiny.image_encoder.patch_embed.register_forward_hook(lambda *_: fake.wait(first.pop() if first else 0.0))
    network = use_backend(tiny, "auto")
    expect_images(network, 100)
    with torch.no_grad():
        network.encode_image(torch.rand(1, 1, 32, 32, 2))
    assert not first
    assert fake.conversions == 0


def test_auto_counts_the_slabs_of_a_volume_and_the_share_of_a_shape(tiny, monkeypatch, own_cache):
    fake = FakeOpenVINO(monkeypatch, tiny, 3.0)
    network = use_backend(tiny, "auto")
    expect_images(network, 100)
    with torch.no_grad():
        expect_encodings(network, 10)
        network.encode_image(torch.rand(1, 1, 32, 32, 2))  # 1000 encodings
        assert fake.conversions == 1
        network.encode_image(torch.rand(1, 1, 32, 32, 3))  # half of them
        assert fake.conversions == 2
        for _ in range(20):
            network.encode_image(torch.rand(1, 1, 32, 32, 2))
        network.encode_image(torch.rand(1, 1, 32, 32, 4))  # a rare one
        assert fake.conversions == 2


def test_auto_says_that_openvino_is_missing(tiny, monkeypatch, own_cache, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with torch.no_grad(), caplog.at_level(logging.INFO, "medsa_nets"):
        network = use_backend(tiny, "auto")
        expect_images(network, 10_000)
        network.encode_image(torch.rand(1, 1, 32, 32, 2))
    assert "auto: eager, since openvino is not installed (pip install 'medsa[openvino]')" in caplog.text


def test_a_volume_tells_auto_how_many_slabs_it_has(tiny, monkeypatch):
    told = []
    monkeypatch.setattr(
        inferers.slabs, "expect_encodings", lambda network, encodings: told.append((network, encodings))
    )
    network = use_backend(tiny, "auto")
    with torch.no_grad():
        SlabInferer(slab_depth=2, overlap=0.0)(torch.rand(1, 1, 32, 32, 6), network)
    assert told == [(network, 3)]


@pytest.mark.parametrize("backend", [needed("openvino")])
def test_a_converted_encoder_is_kept_for_the_next_process(tiny, monkeypatch, own_cache, backend):
    image, exports = torch.rand(1, 1, 32, 32, 2), []
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: exports.append(1) or export(*args, **kwargs))
    with torch.no_grad():
        first = use_backend(copy.deepcopy(tiny), backend).encode_image(image)
        again = use_backend(copy.deepcopy(tiny), backend).encode_image(image)
        assert len(exports) == 1
        torch.testing.assert_close(again, first)
        for file in converted.models_dir().glob("*/*"):
            if file.name != converted.WHOLE:
                file.write_bytes(b"damaged")
        damaged = use_backend(copy.deepcopy(tiny), backend).encode_image(image)
        torch.testing.assert_close(damaged, first)
        tiny.image_encoder.neck[0].weight.mul_(2.0)
        use_backend(tiny, backend).encode_image(image)
    assert len(exports) == 3  # anew where the kept one is damaged, and for other weights


def test_compiled_code_of_another_processor_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(COMPILED_VARIABLE, "")
    folders = []
    for capability in ("default", "avx2"):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        keep_compiled_code_apart()
        folders.append(os.environ[COMPILED_VARIABLE])
        assert Path(folders[-1]).is_dir()
    assert folders[0] != folders[1]
    monkeypatch.setenv(COMPILED_VARIABLE, str(Path(tempfile.gettempdir()) / "torchinductor_somebody"))  # PyTorch's own
    keep_compiled_code_apart()
    assert os.environ[COMPILED_VARIABLE] == folders[1]
    monkeypatch.setenv(COMPILED_VARIABLE, str(tmp_path / "mine"))
    keep_compiled_code_apart()
    assert os.environ[COMPILED_VARIABLE] == str(tmp_path / "mine")


@pytest.mark.parametrize("backend", [needed("openvino")])
def test_a_bundle_takes_the_setting(photographs, shared_data, tmp_path, backend):
    bundle = BUNDLES / "medsa_isic"
    (tmp_path / "in").mkdir()
    photograph = min((shared_data / "isic2017" / "ISIC-2017_Training_Data").glob("*.jpg"))
    shutil.copy(photograph, tmp_path / "in")
    masks = []
    for name in ("eager", backend):
        run("inferring", config_file=str(bundle / "configs" / "inference.yaml"), bundle_root=str(bundle), backend=name,
            meta_file=str(bundle / "configs" / "metadata.json"), dataset_dir=str(tmp_path / "in"),
            output_dir=str(tmp_path / name), amp=False)  # fmt: skip
        masks.append(np.asarray(Image.open(next((tmp_path / name).glob("*.png")))))
    assert masks[0].any()
    assert (masks[0] != masks[1]).mean() < 1e-4


@pytest.mark.parametrize("name", ["medsa_isic", "medsa_btcv"])
def test_tensorrt_says_what_is_missing(monkeypatch, tmp_path, name):
    configs = [str(BUNDLES / name / "configs" / file) for file in ("inference.yaml", "inference_trt.yaml")]
    parser = ConfigParser(ConfigParser.load_config_files(configs))
    parser["bundle_root"] = str(tmp_path)
    if importlib.util.find_spec("torch_tensorrt") is None:
        with pytest.raises(RuntimeError) as caught:
            parser.get_parsed_content("network")
        assert "pip install torch-tensorrt" in str(find_cause(caught.value))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("network")
    assert f"{tmp_path}/models/model_trt.ts: there is no such file" in str(find_cause(caught.value))


def test_the_tensorrt_overlay_segments_with_the_exported_network(photographs, shared_data, tmp_path, monkeypatch):
    """TorchScript without engines stands in for the file that trt_export writes on a GPU."""
    (tmp_path / "models").mkdir()
    torch.jit.trace(photographs, torch.rand(1, 3, 256, 256), check_trace=False).save(tmp_path / "models/model_trt.ts")
    monkeypatch.setitem(sys.modules, "torch_tensorrt", types.ModuleType("torch_tensorrt"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: True if name == "torch_tensorrt" else find(name, *a)
    )
    bundle = BUNDLES / "medsa_isic"
    configs = [str(bundle / "configs" / file) for file in ("inference.yaml", "inference_trt.yaml")]
    photograph = min((shared_data / "isic2017" / "ISIC-2017_Training_Data").glob("*.jpg"))
    masks = []
    for root, files in ((bundle, configs[:1]), (tmp_path, configs)):
        out = tmp_path / f"masks{len(files)}"
        run("inferring", config_file=files, bundle_root=str(root), meta_file=str(bundle / "configs/metadata.json"),
            dataset_dir=str(photograph), output_dir=str(out), device="cpu", amp=False)  # fmt: skip
        masks.append(np.asarray(Image.open(next(out.glob("*.png")))))
    assert masks[0].any()
    assert (masks[0] != masks[1]).mean() < 1e-4
