"""Inference back ends: what computes the image encoder, the expensive part of a network, once it is trained."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medsa_nets.errors import BackendError, describe
from medsa_nets.networks import MedSA
from medsa_nets.weights import base_fingerprint

logger = logging.getLogger(__name__)

# Name of a back end and the packages that it needs beyond torch.
BACKENDS: dict[str, tuple[str, ...]] = {
    "eager": (),
    "compile": (),
    "torchscript": (),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
}
MAX_SHAPES = 4  # each holds a copy of the encoder's weights

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
            ``openvino`` (on a CPU).

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
    encoder = getattr(network, "image_encoder", None)
    if encoder is None:  # a network of the user's own, in a configuration
        if backend == "eager":
            return network
        raise BackendError(
            f"A {type(network).__name__} has no image encoder that the back end {backend!r} could compute; take "
            "--backend eager, which leaves it as it is."
        )
    encoder.__dict__.pop("forward", None)
    if backend != "eager":
        encoder.forward = _Runner(encoder, backend)
    return network


def backend_of(network: nn.Module) -> str:
    """Name of the back end that :func:`use_backend` chose for a network, ``eager`` where it was not called."""
    runner = getattr(network, "image_encoder", network).__dict__.get("forward")
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
        network.image_encoder.compile()
    return network


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
    """Stands for an encoder's ``forward``: converts it for each input shape and calls what that gave."""

    def __init__(self, encoder: nn.Module, backend: str) -> None:
        self.encoder = encoder
        self.backend = backend
        self._converted: OrderedDict[tuple[Any, ...], Encode] = OrderedDict()
        self._versions: tuple[tuple[int, int], ...] = ()
        self._weights = ""
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "backend": self.backend}  # a copy converts its own weights

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, image: Tensor, depth: int = 1) -> Tensor:
        """Encode normalised slices, as the encoder does."""
        exporting = torch.jit.is_tracing() or torch.compiler.is_compiling()
        if exporting or any(module.training for module in self.encoder.modules()):  # dropout too: it is sampled
            return type(self.encoder).forward(self.encoder, image, depth)
        if self.backend in ("onnxruntime", "openvino") and image.device.type != "cpu":
            raise BackendError(
                f"The back end {self.backend!r} computes on the CPU; the image is on {image.device}. Move the network "
                "to the CPU (--device cpu), or take another back end there (--backend eager or compile)."
            )
        with torch.no_grad():
            return self._encode(image, depth)(image)

    def _encode(self, image: Tensor, depth: int) -> Encode:
        amp = torch.is_autocast_enabled(image.device.type)
        key = (tuple(image.shape), depth, image.dtype, image.device, amp)
        with self._lock:
            # what writes into a tensor counts its version up, what moves it changes its address
            versions = tuple((t._version, t.data_ptr()) for t in self._tensors().values())
            if versions != self._versions:
                weights = base_fingerprint(self._tensors())
                if weights != self._weights:  # a server loads the same adapter more than once
                    self._converted.clear()
                self._versions, self._weights = versions, weights
            if key not in self._converted:
                while len(self._converted) >= MAX_SHAPES:
                    self._converted.popitem(last=False)
                self._converted[key] = self._convert(image, depth, amp)
            self._converted.move_to_end(key)
            return self._converted[key]

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.encoder.named_parameters()), **dict(self.encoder.named_buffers())}

    def _convert(self, image: Tensor, depth: int, amp: bool) -> Encode:
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():  # tracers warn of sizes that become constants, as they should
                warnings.simplefilter("ignore")
                encode = _CONVERTERS[self.backend](_Slices(self.encoder, depth).eval(), image, amp)
        except Exception as error:  # exporters and compilers raise errors of their own
            raise BackendError(
                f"The back end {self.backend!r} can't convert the image encoder for an input of {tuple(image.shape)} "
                f"({describe(error)}). Take another back end (--backend eager)."
            ) from error
        seconds = time.perf_counter() - start
        logger.info("converted the image encoder for %s, %s, in %.1f s", self.backend, tuple(image.shape), seconds)
        return encode


class _Slices(nn.Module):
    """An encoder as it computes without a back end, for slices of one depth."""

    def __init__(self, encoder: nn.Module, depth: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.depth = depth

    def forward(self, image: Tensor) -> Tensor:
        return type(self.encoder).forward(self.encoder, image, self.depth)


def _compile(encoder: nn.Module, image: Tensor, amp: bool) -> Encode:
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


def _openvino(encoder: nn.Module, image: Tensor, amp: bool) -> Encode:
    core = _import_openvino().Core()
    with _onnx_file(encoder, image) as file:
        compiled = core.compile_model(
            core.read_model(file),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "bf16" if amp else "f32",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
                # OpenVINO 2026.4's generated attention (its snippets) is wrong for windows of 8 x 8 tokens and a padded
                # key, on AMD EPYC with AVX-512: 2 % off in a corner of the embedding. Its libraries' is right.
                "SNIPPETS_MODE": "DISABLE",
            },
        )

    def encode(x: Tensor) -> Tensor:
        request = compiled.create_infer_request()  # a thread's own
        return torch.from_numpy(request.infer([x.float().contiguous().numpy()])[0].copy())

    return encode


def _import_openvino() -> Any:
    """OpenVINO without its telemetry, which would write to the home folder and send statistics of use."""
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
    "openvino": _openvino,
}
