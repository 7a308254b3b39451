"""Files of PEFT: changes of low rank as ``adapter_model.safetensors`` and ``adapter_config.json``.

PEFT itself is not needed. What it changes is a linear layer as a whole; a fused layer's queries and values, each with a
product of its own here, become one product of twice the rank there, whose second factor is zero where they do not meet.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from medsa_nets.adaptations import PUBLISHED
from medsa_nets.build import build_medsa
from medsa_nets.data.atomic import make_folder, temporary_name
from medsa_nets.errors import WeightsError, describe
from medsa_nets.layers import LowRank, LowRankLinear
from medsa_nets.layers.lora import TARGETS
from medsa_nets.networks import MedSA
from medsa_nets.networks.identity import decode_identity
from medsa_nets.weights import from_hugging_face

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_PARTS = {"qkv": ("q", "k", "v"), "q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",)}
_MLP = re.compile(r"mlp\.(lin1|lin2|fc1|fc2)$")
# what LoraConfig may say that this reading does not know how to compute
_UNKNOWN = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "use_qalora": False}


def changes_of(network: MedSA) -> dict[str, LowRankLinear]:
    """The linear layers of a network that change by low rank, by name."""
    return {name: m for name, m in network.named_modules() if isinstance(m, LowRankLinear)}


def write_peft(network: MedSA, folder: str | Path) -> list[str]:
    """Write a network's changes of low rank as PEFT's files, which ``PeftModel.from_pretrained`` puts into the base.

    Args:
        network: with ``adaptation`` ``lora`` or ``adalora``; singular values are multiplied in.
        folder: where the two files go.

    Returns:
        Names of what trained beside them and that PEFT's files do not hold: class embeddings, click feedback, …

    Raises:
        WeightsError: when the network has no changes of low rank.
    """
    changes = changes_of(network)
    if not changes or decode_identity(network.identity)["adapter"].get("adaptation") in PUBLISHED:
        raise WeightsError("PEFT's files hold changes of low rank only (adaptation: lora or adalora); this has none.")
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, layer in changes.items():
        with torch.no_grad():
            down, up = layer.lora.down(), layer.lora.up()
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = down.detach().clone().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = up.detach().clone().contiguous()
        ranks[name], alphas[name] = down.shape[0], layer.lora.scale * down.shape[0]
    rank, alpha = max(ranks.values()), max(alphas.values())
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": decode_identity(network.identity)["base"],
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: one for name, one in ranks.items() if one != rank},
        "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha},
        "lora_dropout": 0.0,
        "target_modules": sorted(changes),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "task_type": None,
    }
    folder = make_folder(folder)
    with temporary_name(folder / WEIGHTS) as part:
        save_file(tensors, str(part), metadata={"format": "pt"})
    with temporary_name(folder / CONFIG) as part:
        part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sorted(network.trained_names - {f"{name}.lora.{p}" for name in changes for p in ("A", "B", "E")})


def read_peft(folder: str | Path, base: str, **settings: Any) -> MedSA:
    """Build a network on a base with the changes that PEFT trained, of SAM under either name of its layers.

    Args:
        folder: with ``adapter_model.safetensors`` and ``adapter_config.json`` of LoRA or AdaLoRA.
        base: name of the base.
        settings: further ones of :func:`~medsa_nets.build_medsa`.

    Returns:
        The network, with ``adaptation`` ``lora``; its ranks are those of the file, weights are multiplied in.

    Raises:
        WeightsError: when the files are missing or damaged, or change what can't be changed here.
    """
    folder = Path(folder)
    config, state = _read_config(folder / CONFIG), _read_state(folder / WEIGHTS)
    found = {name: _factors(name, parts, config) for name, parts in _by_layer(state, folder / WEIGHTS).items()}
    if not found:
        raise WeightsError(f"{folder / WEIGHTS}: changes no layer.")
    with torch.device("meta"):  # what could change, and how its parts lie
        layers = changes_of(build_medsa(base, pretrained=False, adaptation="lora", train_decoder="adapted",
                                        lora_targets=TARGETS))  # fmt: skip
    targets: set[str] = set()
    ranks = [1]
    for name, (down, up) in found.items():
        kinds = _kinds(name, folder / WEIGHTS)
        if name not in layers:
            raise WeightsError(f"{folder / WEIGHTS}: changes {name}, which the base {base!r} does not have.")
        split = _split(layers[name].lora, down, up, name, folder / WEIGHTS)
        targets |= {kind for kind, (_, one) in zip(kinds, split) if bool(one.any())} or set(kinds)
        ranks += [a.shape[0] for a, _ in split]
    in_decoder = any(name.startswith("mask_decoder.") for name in found)
    network = build_medsa(
        base,
        adaptation="lora",
        train_decoder="adapted" if in_decoder else None,
        lora_rank=max(ranks),
        lora_targets=[one for one in ("q", "k", "v", "mlp") if one in targets],
        **settings,
    )
    for name, layer in changes_of(network).items():
        with torch.no_grad():
            layer.lora.B.zero_()
            if name in found:
                _fill(layer.lora, _split(layer.lora, *found[name], name, folder / WEIGHTS))
    return network


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: not readable ({describe(error)}). Expected the settings that PEFT saves."
        ) from error
    kind = config.get("peft_type") if isinstance(config, Mapping) else None
    if kind not in ("LORA", "ADALORA"):
        raise WeightsError(f"{path}: peft_type is {kind!r}; LORA and ADALORA can be read.")
    for name, usual in _UNKNOWN.items():
        if config.get(name, usual) not in (usual, None, []):
            raise WeightsError(f"{path}: {name} is {config[name]!r}, which can't be read; expected {usual!r}.")
    return config


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(str(path))
    except Exception as error:  # safetensors raises errors of its own
        raise WeightsError(f"{path}: not readable as PEFT's weights ({describe(error)}).") from error
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
    return from_hugging_face(state) if any(name.startswith("vision_encoder.") for name in state) else state


def _by_layer(state: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(.+)\.lora_([ABE])(\.weight)?", name)
        if not found:
            raise WeightsError(f"{path}: holds {name}; expected changes of low rank (lora_A, lora_B) alone.")
        layers.setdefault(found[1], {})[found[2]] = tensor
    for name, parts in layers.items():
        if not {"A", "B"} <= set(parts):
            raise WeightsError(f"{path}: {name} lacks lora_A or lora_B.")
    return layers


def _factors(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Both factors of a layer's change, with everything multiplied in."""
    down, up = parts["A"].float(), parts["B"].float()

    def of(pattern: str, usual: Any) -> Any:
        """As PEFT looks a layer up: the first key that is its name, or the end of it."""
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return usual

    if config["peft_type"] == "ADALORA":  # PEFT divides by the rank that a layer began with
        rank = config.get("init_r", down.shape[0])
        alpha = config.get("lora_alpha") or rank
        return down * parts["E"].float().reshape(-1, 1) if "E" in parts else down, up * (alpha / (rank + 1e-5))
    alpha = of("alpha_pattern", config.get("lora_alpha") or config["r"])
    rank = of("rank_pattern", config["r"])
    return down, up * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _kinds(name: str, path: Path) -> tuple[str, ...]:
    """What a layer computes: queries, keys, values, one of them, or a part of an MLP."""
    if _MLP.search(name):
        return ("mlp",)
    kinds = _PARTS.get(name.rpartition(".")[2])
    if kinds is None:
        raise WeightsError(
            f"{path}: changes {name}. Changes of q, k, v (fused or not) and of the MLPs' linear layers can be read."
        )
    return kinds


def _split(change: LowRank, down: Tensor, up: Tensor, name: str, path: Path) -> list[tuple[Tensor, Tensor]]:
    """A layer's change as one of each of its parts: with its own ranks where parts share none, else with all."""
    of = change.place.shape[1]
    if (down.shape[1], up.shape[0]) != (change.A.shape[2], change.B.shape[1] * of):
        raise WeightsError(
            f"{path}: the change of {name} is one of {up.shape[0]} x {down.shape[1]} values, the base's layer has "
            f"{change.B.shape[1] * of} x {change.A.shape[2]}. It belongs to another base."
        )
    parts = rearrange(up, "(groups of n) rank -> of (groups n) rank", groups=change.groups, of=of)
    used = parts.any(1)  # (parts, ranks)
    if int(used.sum(0).max()) > 1:
        return [(down, part) for part in parts]
    return [(down[own], part[:, own]) for part, own in zip(parts, used)]


def _fill(change: LowRank, split: list[tuple[Tensor, Tensor]]) -> None:
    """Put a layer's change into a network's, whose rank may be larger."""
    change.A.zero_()
    for i, place in enumerate(change.place.argmax(1).tolist()):
        a, b = split[place]
        change.A[i, : a.shape[0]] = a
        change.B[i, :, : b.shape[1]] = b / change.scale
