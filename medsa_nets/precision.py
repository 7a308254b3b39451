"""The precision to compute in: half of it where that is faster on the processor at hand, else single precision."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from monai.utils import str2bool
from torch import Tensor

from medsa_nets.errors import SettingError
from medsa_nets.layers.fast.choices import own_time
from medsa_nets.measurements import measured

logger = logging.getLogger(__name__)
FASTER = 1.05  # times as fast as float32 that bfloat16 has to be: it rounds
HOPELESS = 3.0  # times as slow as float32 from which measuring longer changes nothing
REPETITIONS = 3


@dataclass(frozen=True)
class Precision:
    """What networks compute in, where that is safe.

    Args:
        dtype: of autocast; none computes in float32.
        scale: whether gradients need a scaler, as those of float16 do: small ones would vanish.
        reason: why it was chosen, for the log.
    """

    dtype: torch.dtype | None = None
    scale: bool = False
    reason: str = ""

    @property
    def name(self) -> str:
        """Name of the type, as ``bfloat16``."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    def autocast(self, device: torch.device | str) -> torch.autocast:
        """The context in which a network computes in this precision on a device."""
        dtype = self.dtype or torch.bfloat16  # not used where it is not enabled
        return torch.autocast(torch.device(device).type, dtype=dtype, enabled=self.dtype is not None)


SINGLE = Precision(reason="amp is false")
Amp: TypeAlias = bool | str | Precision

_chosen: dict[tuple[Amp, str], Precision] = {}
_lock = threading.RLock()


def read_amp(amp: Amp) -> Amp:
    """The setting ``amp`` as a configuration or a command line gives it.

    Args:
        amp: ``auto``, or true or false, as such or as text; or a precision, which is taken as it is.

    Returns:
        ``auto``, true, false, or the precision.

    Raises:
        SettingError: when it is something else.
    """
    if isinstance(amp, (bool, Precision)):
        return amp
    text = str(amp).strip().lower()
    if text == "auto":
        return text
    try:
        return str2bool(text)
    except ValueError as error:
        raise SettingError(f"amp must be auto, true or false, got {amp!r} (--amp auto).") from error


def choose_amp(amp: Amp, device: torch.device | str) -> Precision:
    """Choose the precision for a device, once for the process, and log it with the reason.

    ``auto`` takes what is fastest: on a GPU bfloat16, or float16 with a scaler of gradients where the GPU has no
    bfloat16; on a CPU bfloat16 where :func:`measure_bfloat16` finds it faster than float32; elsewhere float32. ``true``
    is the same on a GPU and bfloat16 elsewhere, with a warning where it is slow.

    Args:
        amp: see :func:`read_amp`.
        device: where the network computes.

    Raises:
        SettingError: when ``amp`` is something else.
    """
    amp, device = read_amp(amp), torch.device(device)
    if isinstance(amp, Precision):
        return amp
    if amp is False:
        return SINGLE
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    key = (amp, f"{device.type} {index}")
    with _lock:
        if key not in _chosen:
            choose = {"cuda": _for_gpu, "cpu": _for_cpu}.get(device.type, _for_others)
            _chosen[key] = choose(amp, device)
            logger.info("precision: %s (%s)", _chosen[key].name, _chosen[key].reason)
        return _chosen[key]


def autocast(amp: Amp, device: torch.device | str) -> torch.autocast:
    """The context in which a network computes as ``amp`` asks for on a device, see :func:`choose_amp`."""
    return choose_amp(amp, device).autocast(device)


def forget() -> None:
    """Choose anew from now on."""
    with _lock:
        _chosen.clear()


def agree(precision: Precision) -> Precision:
    """A precision that all processes of a distributed run share: theirs where it is the same, else float32.

    Their gradients are summed before they are unscaled, so that one process can't scale them alone.

    Args:
        precision: this process's choice.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return precision
    names: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, f"{precision.name} {precision.scale}")
    if len(set(names)) == 1:
        return precision
    logger.warning("precision: float32, for the processes chose differently; one value of --amp for all avoids that")
    return Precision(reason="the processes chose differently")


def _for_gpu(amp: Amp, device: torch.device) -> Precision:
    name = torch.cuda.get_device_name(device)
    # before compute capability 8.0 bfloat16 is emulated; PyTorch calls it supported all the same
    if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8:
        return Precision(torch.bfloat16, reason=f"{name} has it")
    return Precision(torch.float16, scale=True, reason=f"{name} has no bfloat16")


def _for_others(amp: Amp, device: torch.device) -> Precision:
    if amp is True:
        return Precision(torch.bfloat16, reason="amp is true")
    return Precision(reason=f"nothing faster is known for a device of type {device.type}")


def _for_cpu(amp: Amp, device: torch.device) -> Precision:
    times = measured("bfloat16 against float32, part of an encoder", measure_bfloat16)
    kind = min(("forward", "training"), key=lambda kind: gain(times, kind))
    single, half = times[f"float32 {kind}"], times[f"bfloat16 {kind}"]
    if gain(times, kind) >= FASTER:
        return Precision(torch.bfloat16, reason=f"{single / half:.1f} times as fast as float32 on this processor")
    if amp is True:
        logger.warning(
            "amp is true, but bfloat16 is no faster on this processor: a part of an encoder takes %.1f ms in bfloat16, "
            "%.1f ms in float32. Pass --amp auto or --amp false.",
            1e3 * half,
            1e3 * single,
        )
        return Precision(torch.bfloat16, reason="amp is true")
    return Precision(reason=f"bfloat16 takes {half / single:.1f} times as long on this processor")


def gain(times: dict[str, float], kind: str) -> float:
    """How many times as fast as float32 bfloat16 is, from :func:`measure_bfloat16`; infinite where it says nothing.

    Args:
        times: of both precisions.
        kind: ``forward`` or ``training``.
    """
    return times[f"float32 {kind}"] / times[f"bfloat16 {kind}"] if f"bfloat16 {kind}" in times else float("inf")


def measure_bfloat16() -> dict[str, float]:
    """Time a part of an encoder in float32 and bfloat16 on this processor, in a fraction of a second.

    One core computes, and its own time counts: other work on the machine, and threads that wait for each other, would
    say more about the machine's load than about its processor.

    Returns:
        Seconds, the least of a few repetitions: ``float32 forward``, ``bfloat16 forward`` (no gradients), and, unless
        bfloat16 is hopeless there, ``float32 training``, ``bfloat16 training`` (forward and backward pass).
    """
    threads = torch.get_num_threads()
    with torch.inference_mode(False):
        part = _EncoderPart(torch.Generator().manual_seed(0))  # a training's own random numbers stay as they are
        torch.set_num_threads(1)
        try:
            times = _compare("forward", part.forward)
            return times if gain(times, "forward") < 1 / HOPELESS else {**times, **_compare("training", part.train)}
        finally:
            torch.set_num_threads(threads)


class _EncoderPart:
    """What an encoder spends its time on: TinyViT's inverted bottleneck, and the convolution of SAM's neck."""

    def __init__(self, generator: torch.Generator) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5

        self.image = random(1, 64, 64, 64).contiguous(memory_format=torch.channels_last)
        self.widen, self.narrow = random(256, 64), random(64, 256)
        self.depthwise = random(256, 1, 3, 3)
        self.features = random(1, 256, 16, 16).contiguous(memory_format=torch.channels_last)
        self.neck = random(256, 256, 3, 3)

    def __call__(self, image: Tensor, features: Tensor) -> Tensor:
        x = F.gelu(F.linear(image.permute(0, 2, 3, 1), self.widen).permute(0, 3, 1, 2))
        x = F.gelu(F.conv2d(x, self.depthwise, padding=1, groups=256))
        x = F.linear(x.permute(0, 2, 3, 1), self.narrow)
        return x.float().sum() + F.conv2d(features, self.neck, padding=1).float().sum()

    def forward(self) -> None:
        with torch.no_grad():
            self(self.image, self.features)

    def train(self) -> None:
        with torch.enable_grad():
            inputs = [self.image.clone().requires_grad_(), self.features.clone().requires_grad_()]
            torch.autograd.grad(self(*inputs), inputs)


def _compare(kind: str, run: Callable[[], None]) -> dict[str, float]:
    """Times of both precisions in turn; the first round prepares kernels, and tells what is hopeless."""
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for repetition in range(1 + REPETITIONS):
        for dtype in best:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
                start = own_time()
                run()
                seconds = own_time() - start
            best[dtype] = min(best[dtype], seconds) if repetition else seconds
        if repetition and best[torch.bfloat16] > HOPELESS * best[torch.float32]:
            break
    return {f"{str(dtype).removeprefix('torch.')} {kind}": seconds for dtype, seconds in best.items()}
