"""Inference back ends: libraries that compute the image encoder, the slow part of a network, once it is trained."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medsa_nets import converted
from medsa_nets.checksums import state_sha256
from medsa_nets.errors import BackendError, describe
from medsa_nets.layers.fast import Kept, is_exporting
from medsa_nets.measurements import cache_dir, machine, measured
from medsa_nets.networks import MedSA

logger = logging.getLogger(__name__)

COMPILED_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # folder of torch.compile's code
_compiled_folders: dict[str, str] = {}  # that this process has chosen, by machine

# Name of a back end and the packages that it needs beyond torch.
BACKENDS: dict[str, tuple[str, ...]] = {
    "eager": (),
    "auto": (),
    "compile": (),
    "torchscript": (),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
}
IR = "encoder.xml"  # of a kept model, in OpenVINO's intermediate representation
MAX_SHAPES = 4  # each holds a copy of the encoder's weights
CONVERSION_SECONDS = 70.0  # of OpenVINO for LiteMedSAM at 256 x 256 (docs/scaling.md), until this machine has its own
LOADING_SECONDS = 5.0  # of a kept model, with reserve
TRIAL = 0.1  # share of a run that may be spent on finding out whether OpenVINO is faster here
GAIN = 1.1  # how much faster eager has to end up, to be left: what is estimated is not exact

clock = time.perf_counter  # by which auto compares

Encode = Callable[[Tensor], Tensor]


def use_backend(network: MedSA, backend: str = "eager") -> MedSA:
    """Let a back end compute a network's image encoder; prompt encoder and mask decoder stay as they are.

    The encoder is converted when it is first called with an input shape, so that an adapter may be loaded after this
    call, and anew when its weights have changed. The network's parameters, ``state_dict``, identity and class stay as
    they are. In training mode, and while the network is exported, the encoder computes eagerly: no other back end gives
    gradients. Several threads may share the network.

    Under autocast, ``openvino`` computes in bfloat16, as ``eager``, ``compile`` and ``torchscript`` do; ``onnxruntime``
    always computes in single precision.

    Args:
        network: a :class:`~medsa_nets.networks.MedSA` or :class:`~medsa_nets.networks.VolumeMedSA`; it is changed in
            place, and a second call changes its back end.
        backend: ``eager``, ``compile`` (``torch.compile``), ``torchscript`` (traced and frozen), ``onnxruntime`` or
            ``openvino`` (on a CPU); or ``auto``: ``openvino`` where :func:`expect_images` has said that enough images
            follow for its conversion to pay, else ``eager``. A server and a Deploy application get one image at a time
            and don't say what follows: there it is ``eager``.

    Returns:
        ``network``.

    Raises:
        BackendError: when there is no such back end, a package that it needs is missing, or the network is another one
            (which ``eager`` leaves as it is); when the network is called: on tensors that are not in the CPU's memory
            (``onnxruntime``, ``openvino``), or where the encoder can't be converted.
    """
    if backend not in BACKENDS:
        raise BackendError(f"There is no back end {backend!r}; choose one of {', '.join(BACKENDS)} (--backend).")
    missing = [name for name in BACKENDS[backend] if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(
            f"The back end {backend!r} needs {', '.join(missing)}, which is not installed. Install it with: "
            f"pip install 'medsa[{backend}]', or take another back end (--backend eager)."
        )
    if not isinstance(network, MedSA):  # a network of the user's own, in a configuration
        if backend == "eager":
            return network
        raise BackendError(
            f"A {type(network).__name__} has no image encoder that the back end {backend!r} could compute; take "
            "--backend eager, which leaves it as it is."
        )
    network.encoder_backend = None
    if backend != "eager":
        chosen = _Chooser if backend == "auto" else _Runner
        network.encoder_backend = chosen(network.image_encoder, backend)
    return network


def expect_images(network: nn.Module, images: int) -> None:
    """Say how many images or volumes a run is going to segment; the back end ``auto`` chooses by it, others ignore it.

    Args:
        network: as :func:`use_backend` gave it.
        images: how many follow, the next one included.
    """
    chooser = _chooser_of(network)
    if chooser is not None:
        chooser.expect(images)


def expect_encodings(network: nn.Module, encodings: int) -> None:
    """Say how many calls of the encoder the image takes that is now begun; the slabs of a volume, for instance."""
    chooser = _chooser_of(network)
    if chooser is not None:
        chooser.per_image = encodings


def _chooser_of(network: nn.Module) -> _Chooser | None:
    runner = getattr(network, "encoder_backend", None)
    return runner if isinstance(runner, _Chooser) else None


def backend_of(network: nn.Module) -> str:
    """Name of the back end that :func:`use_backend` chose for a network, ``eager`` where it was not called."""
    runner = getattr(network, "encoder_backend", None)
    return runner.backend if isinstance(runner, _Runner) else "eager"


def compile_for_training(network: MedSA, enabled: bool = True) -> MedSA:
    """Let ``torch.compile`` make the image encoder's forward and backward pass, for each input shape at its first use.

    Parameters, ``state_dict`` and class stay as they are.

    Args:
        network: the network; it is changed in place.
        enabled: false leaves the network as it is.

    Returns:
        ``network``.
    """
    if enabled:
        keep_compiled_code_apart()
        network.image_encoder.compile()
    return network


def keep_compiled_code_apart() -> None:
    """Let ``torch.compile`` keep its code in a folder of this machine and of what holds its processor back.

    PyTorch takes kept code for another's of one user whatever the processor may do, and code that was made with AVX2
    alone (``ATEN_CPU_CAPABILITY``) then writes beyond its memory where weights are packed for more. A folder that the
    user has chosen (``TORCHINDUCTOR_CACHE_DIR``) stays.
    """
    named = os.environ.get(COMPILED_VARIABLE)
    usual = str(Path(tempfile.gettempdir()) / "torchinductor_")  # PyTorch sets the variable too, once it has compiled
    if named and not named.startswith(usual) and named not in _compiled_folders.values():
        return
    if machine() not in _compiled_folders:
        folder = cache_dir() / "compiled" / hashlib.sha256(machine().encode()).hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # a home that is absent or read-only
            folder = Path(tempfile.mkdtemp(prefix="medsa_compiled_"))
        _compiled_folders[machine()] = str(folder)
    os.environ[COMPILED_VARIABLE] = _compiled_folders[machine()]


def load_tensorrt(path: str | Path) -> nn.Module:
    """Load a network that ``monai.bundle trt_export`` has written, for the bundles' overlay ``inference_trt.yaml``.

    Args:
        path: TorchScript file with TensorRT engines.

    Raises:
        BackendError: when the package ``torch-tensorrt`` or the file is missing, or when it can't be loaded.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise BackendError(
            "TensorRT needs the package torch-tensorrt (and an NVIDIA GPU), which is not installed. Install it with: "
            "pip install torch-tensorrt, or leave configs/inference_trt.yaml out."
        )
    if not Path(path).is_file():
        raise BackendError(
            f"{path}: there is no such file. Write it with monai.bundle trt_export; the command stands at the "
            "top of configs/inference_trt.yaml."
        )
    importlib.import_module("torch_tensorrt")  # it registers what the file refers to
    try:
        return torch.jit.load(str(path)).eval()
    except Exception as error:  # TorchScript and TensorRT raise errors of their own
        raise BackendError(
            f"{path}: not loadable as TorchScript with TensorRT ({describe(error)}). Engines belong to one kind of GPU "
            "and one version of TensorRT: write it anew on this machine."
        ) from error


class _Runner:
    """An encoder, computed by a back end: it is converted once for each input shape."""

    def __init__(self, encoder: nn.Module, backend: str) -> None:
        self.encoder = encoder
        self.backend = backend
        self._converted: OrderedDict[tuple[Any, ...], Encode] = OrderedDict()
        self._fingerprint = Kept[str]()
        self._weights = ""
        self.seconds = 0.0  # of the last conversion
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "backend": self.backend}  # a copy converts its own weights

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, image: Tensor, depth: int = 1) -> Tensor:
        """Encode normalised slices, as the encoder does."""
        if is_exporting() or any(module.training for module in self.encoder.modules()):  # dropout too: it is sampled
            return self._eagerly(image, depth)
        if self.backend in ("onnxruntime", "openvino") and image.device.type != "cpu":
            raise BackendError(
                f"The back end {self.backend!r} computes on the CPU; the image is on {image.device}. Move the network "
                "to the CPU (--device cpu), or take another back end there (--backend eager or compile)."
            )
        with torch.no_grad():
            return self._encode(image, depth)(image)

    def _eagerly(self, image: Tensor, depth: int) -> Tensor:
        embedding: Tensor = self.encoder(image, depth)
        return embedding

    def _encode(self, image: Tensor, depth: int) -> Encode:
        amp = torch.is_autocast_enabled(image.device.type)
        key = (tuple(image.shape), depth, image.dtype, image.device, amp)
        with self._lock:
            weights = self._fingerprint.get(self._tensors().values(), lambda: state_sha256(self._tensors()))
            if weights != self._weights:  # a server loads the same adapter more than once
                self._converted.clear()
            self._weights = weights
            if key not in self._converted:
                while len(self._converted) >= MAX_SHAPES:
                    self._converted.popitem(last=False)
                self._converted[key] = self._convert(image, depth, amp)
            self._converted.move_to_end(key)
            return self._converted[key]

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.encoder.named_parameters()), **dict(self.encoder.named_buffers())}

    def _convert(self, image: Tensor, depth: int, amp: bool) -> Encode:
        start = clock()
        try:
            with warnings.catch_warnings():  # tracers warn of sizes that become constants, as they should
                warnings.simplefilter("ignore")
                slices = _Slices(self.encoder, depth).eval()
                if self.backend == "openvino":
                    encode = convert_by_openvino(slices, image, amp, self._folder(image, depth, amp))
                else:
                    encode = _CONVERTERS[self.backend](slices, image, amp)
        except Exception as error:  # exporters and compilers raise errors of their own
            raise BackendError(
                f"The back end {self.backend!r} can't convert the image encoder for an input of {tuple(image.shape)} "
                f"({describe(error)}). Take another back end (--backend eager)."
            ) from error
        self.seconds = seconds = clock() - start
        logger.info("converted the image encoder for %s, %s, in %.1f s", self.backend, tuple(image.shape), seconds)
        return encode

    def _folder(self, image: Tensor, depth: int, amp: bool) -> Path:
        """Where a converted encoder is kept: named after all that it depends on."""
        names = ("torch", "openvino", "onnx", "onnxscript")
        weights = self._weights or state_sha256(self._tensors())
        made = (type(self.encoder).__qualname__, tuple(image.shape), depth, amp, machine())
        return converted.folder_of((weights, *made, *(version(name) for name in names)))


class _Chooser(_Runner):
    """The back end ``auto``: OpenVINO where enough images follow to repay its conversion, else eager.

    It is decided for each input shape once, before its first embedding is given out, so that all masks of one image
    size come from one back end: a change in the midst of a run would depend on what else the machine does. Eager's time
    is measured on that image. How long a conversion takes and how much faster OpenVINO then is, is known from earlier
    runs on this machine; where it is not, OpenVINO is tried only if its conversion takes less than ``TRIAL`` of the
    run, and left again if it turns out to be slower.
    """

    def __init__(self, encoder: nn.Module, backend: str = "auto") -> None:
        super().__init__(encoder, backend)
        self._openvino = _Runner(encoder, "openvino")
        self.per_image = 1
        self._images = 0
        self._calls: dict[tuple[Any, ...], int] = {}
        self._chosen: dict[tuple[Any, ...], str] = {}
        self._deciding = threading.Lock()

    def expect(self, images: int) -> None:
        """Begin a run of so many images."""
        with self._deciding:
            self._images = images
            self._calls.clear()
            self._chosen.clear()
        missing = [name for name in BACKENDS["openvino"] if importlib.util.find_spec(name) is None]
        if missing:
            logger.info("auto: eager, since %s is not installed (pip install 'medsa[openvino]')", missing[0])
            self._images = 0

    def __call__(self, image: Tensor, depth: int = 1) -> Tensor:
        """Encode normalised slices, as the encoder does."""
        training = any(module.training for module in self.encoder.modules())
        if not self._images or is_exporting() or training or image.device.type != "cpu":
            return self._eagerly(image, depth)
        amp = torch.is_autocast_enabled("cpu")
        key = (tuple(image.shape), depth, amp)
        with self._deciding:
            if key not in self._chosen:
                self._chosen[key] = self._choose(image, depth, key)
            self._calls[key] = self._calls.get(key, 0) + 1
        return self._openvino(image, depth) if self._chosen[key] == "openvino" else self._eagerly(image, depth)

    def _left(self, key: tuple[Any, ...]) -> float:
        """Encodings of a shape that may follow: its share of those so far, of all that are left."""
        done = sum(self._calls.values())
        share = (self._calls.get(key, 0) + 1) / (done + 1)
        return max(1.0, share * (self._images * self.per_image - done))

    def _choose(self, image: Tensor, depth: int, key: tuple[Any, ...]) -> str:
        with torch.no_grad():
            eager = _seconds(lambda: self._eagerly(image, depth))
            left, shape = self._left(key), tuple(image.shape)
            parameters = sum(p.numel() for p in self.encoder.parameters())
            name = f"openvino, {type(self.encoder).__name__} of {parameters} parameters, {key}"
            known = _kept(name)
            known = {"conversion": CONVERSION_SECONDS} if known is None else known
            folder = self._openvino._folder(image, depth, key[2])
            was_kept = converted.is_kept(folder)
            cost = LOADING_SECONDS if was_kept else known["conversion"]
            if _pays(known.get("ratio"), eager, left, cost):  # the first one was not warm
                eager = min(eager, _seconds(lambda: self._eagerly(image, depth)))
            if not _pays(known.get("ratio"), eager, left, cost):
                logger.info("auto: eager for %s, %.2f s each, about %.0f left: OpenVINO takes %.0f s to prepare%s",
                            shape, eager, left, cost, _ratio_text(known.get("ratio")))  # fmt: skip
                return "eager"
            try:
                self._openvino(image, depth)
            except BackendError as error:
                logger.warning("auto: eager, since OpenVINO fails here: %s", describe(error))
                return "eager"
            eager = min(eager, _seconds(lambda: self._eagerly(image, depth)))
            ratio = eager / min(_seconds(lambda: self._openvino(image, depth)) for _ in range(2))
            if not was_kept:
                found = {"conversion": self._openvino.seconds, "ratio": ratio}
                measured(name, lambda: found)
        if ratio < 1.0:
            logger.info("auto: eager for %s: OpenVINO was tried and is slower here (%.2f times as fast)",
                        shape, ratio)  # fmt: skip
            return "eager"
        logger.info("auto: openvino for %s, about %.0f left: %.2f times as fast as eager, %.0f s to prepare. A "
                    "few pixels may differ from eager's; --backend eager takes that for all",
                    shape, left, ratio, self._openvino.seconds)  # fmt: skip
        return "openvino"


def _pays(ratio: float | None, eager: float, left: float, cost: float) -> bool:
    """Whether ``left`` encodings of ``eager`` seconds take longer than OpenVINO with its preparation of ``cost``."""
    if ratio is None:
        return cost < TRIAL * eager * left
    return GAIN * (cost + eager * left / ratio) < eager * left


def _ratio_text(ratio: float | None) -> str:
    return "" if ratio is None else f" and is {ratio:.2f} times as fast"


def _kept(name: str) -> dict[str, float] | None:
    """What an earlier run has measured, if one has."""

    def unknown() -> dict[str, float]:
        raise LookupError(name)

    try:
        return measured(name, unknown)
    except LookupError:
        return None


def _seconds(call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start


class _Slices(nn.Module):
    """An encoder as it computes without a back end, for slices of one depth."""

    def __init__(self, encoder: nn.Module, depth: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.depth = depth

    def forward(self, image: Tensor) -> Tensor:
        embedding: Tensor = self.encoder.forward(image, self.depth)  # not what torch.compile made of it for training
        return embedding


def _compile(encoder: nn.Module, image: Tensor, amp: bool) -> Encode:
    keep_compiled_code_apart()
    compiled = torch.compile(encoder, dynamic=False)
    compiled(image)  # compiles
    return compiled


def _torchscript(encoder: nn.Module, image: Tensor, amp: bool) -> Encode:
    device = image.device.type
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, dtype=dtype, enabled=amp, cache_enabled=False):  # a traced cache holds stale weights
        return torch.jit.freeze(torch.jit.trace(encoder, (image,), check_trace=False))


@contextmanager
def _onnx_file(encoder: nn.Module, image: Tensor) -> Iterator[str]:
    """The encoder as ONNX, its weights beside it, for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="medsa_") as folder, torch.autocast("cpu", enabled=False):
        file = str(Path(folder) / "encoder.onnx")
        example = torch.zeros(image.shape)
        torch.onnx.export(encoder, (example,), file, input_names=["image"], dynamo=True, verbose=False)
        yield file


def _onnxruntime(encoder: nn.Module, image: Tensor, amp: bool) -> Encode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with _onnx_file(encoder, image) as file:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.float().contiguous().numpy()})[0])


def convert_by_openvino(encoder: nn.Module, image: Tensor, amp: bool, folder: Path) -> Encode:
    """Let OpenVINO convert an encoder, or load what an earlier process has converted and kept.

    Args:
        encoder: takes normalised slices (B, 3, H, W).
        image: of the shape that it is converted for.
        amp: whether it computes in bfloat16, where OpenVINO can.
        folder: where the converted encoder is, or will be, kept.

    Returns:
        What computes embeddings of such images.
    """
    openvino = import_openvino()
    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if amp else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        # OpenVINO 2026.4's generated attention (its snippets) is wrong for windows of 8 x 8 tokens and a padded
        # key, on AMD EPYC with AVX-512: 2 % off in a corner of the embedding. Its libraries' is right.
        "SNIPPETS_MODE": "DISABLE",
    }
    compiled: Any = None
    if converted.is_kept(folder) and converted.is_intact(folder):
        converted.use(folder)
        compiled = _compile_openvino(core, folder / IR, {**settings, "CACHE_DIR": str(folder)})
    if compiled is None:
        with _onnx_file(encoder, image) as file:

            def write(part: Path) -> None:
                openvino.save_model(core.read_model(file), part / IR, compress_to_fp16=False)

            if converted.keep(folder, write):  # what it compiles to joins it there
                compiled = _compile_openvino(core, folder / IR, {**settings, "CACHE_DIR": str(folder)})
            else:
                compiled = _compile_openvino(core, file, settings)

    def encode(x: Tensor) -> Tensor:
        request = compiled.create_infer_request()  # a thread's own
        return torch.from_numpy(request.infer([x.float().contiguous().numpy()])[0].copy())

    return encode


def _compile_openvino(core: Any, file: str | Path, settings: dict[str, Any]) -> Any:
    """Compile a model; in single precision where OpenVINO has no bfloat16 for what this processor may use."""
    try:
        return core.compile_model(core.read_model(file), "CPU", settings)
    except RuntimeError as error:
        if settings["INFERENCE_PRECISION_HINT"] != "bf16":
            raise
        logger.warning("OpenVINO can't compile the encoder in bfloat16 here (%s): it takes float32", describe(error))
        return core.compile_model(core.read_model(file), "CPU", {**settings, "INFERENCE_PRECISION_HINT": "f32"})


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would write to the home folder and send statistics of use.

    Raises:
        ModuleNotFoundError: when it is not installed.
    """
    if "openvino" not in sys.modules:
        before = sys.modules.get("openvino_telemetry")
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # OpenVINO then takes its own stand-in
        try:
            return importlib.import_module("openvino")
        finally:
            del sys.modules["openvino_telemetry"]
            if before is not None:
                sys.modules["openvino_telemetry"] = before
    return sys.modules["openvino"]


_CONVERTERS: dict[str, Callable[[nn.Module, Tensor, bool], Encode]] = {
    "compile": _compile,
    "torchscript": _torchscript,
    "onnxruntime": _onnxruntime,
}
