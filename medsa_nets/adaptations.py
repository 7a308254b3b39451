"""The adaptations by name: what trains in a frozen base, in its encoder and in its decoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from medsa_nets.checksums import state_sha256
from medsa_nets.errors import SettingError
from medsa_nets.layers import (
    Adaptation,
    Bottlenecks,
    Frozen,
    LoRA,
    PublishedAdapters,
    PublishedDecoder,
    PublishedLoRA,
    merge_low_rank,
)
from medsa_nets.networks import EfficientSAMPromptEncoder, MedSA
from medsa_nets.networks.identity import decode_identity

ADAPTATIONS = ("adapters", "lora", "adalora", "none")
# of checkpoints of the published code (python -m medsa_nets weights import), by its -net sam, mobile_sam or
# efficient_sam; with -net sam, its -mod sam_adalora has no AdaLoRA
PUBLISHED = (
    "published_adapters", "published_lora",
    "published_mobile_adapters", "published_mobile_lora", "published_mobile_adalora",
    "published_efficient_adapters", "published_efficient_lora", "published_efficient_adalora",
)  # fmt: skip
DECODERS = ("adapted", "frozen", "whole")


@dataclass(frozen=True)
class Plan:
    """What trains where.

    Attributes:
        encoder: adapts the image encoder.
        decoder: adapts the mask decoder.
        whole_decoder: whether the decoder's own parameters train.
        describe: what an adapter file depends on; it stands in the file's identity.
    """

    encoder: Adaptation
    decoder: Adaptation
    whole_decoder: bool
    describe: Mapping[str, Any]


def plan_adaptation(
    adaptation: str | Adaptation = "adapters",
    *,
    train_decoder: str | None = None,
    bottlenecks: Bottlenecks | None = None,
    lora_rank: int = 4,
    lora_alpha: float | None = None,
    lora_targets: Iterable[str] = ("q", "v"),
    dropout: float = 0.0,
) -> Plan:
    """Say what trains, by the names that configurations use.

    Args:
        adaptation: ``adapters`` (the paper's), ``lora``, ``adalora``, ``none``, one of :data:`PUBLISHED`, or a factory
            of somebody else's. Of those published, only a rank can be chosen.
        train_decoder: ``adapted`` as the encoder is, ``frozen``, or ``whole``: its own parameters train, without
            adapters beside them. None takes ``adapted`` with adapters, and ``frozen`` with the others.
        bottlenecks: the paper's adapters, where they are asked for.
        lora_rank: rank of LoRA's changes; of AdaLoRA's, on average at the end of training.
        lora_alpha: their weight, times the rank; none takes the rank itself.
        lora_targets: what they change, of ``q``, ``k``, ``v`` and ``mlp``.
        dropout: probability with which an input of a change is left out in training.

    Raises:
        SettingError: when a name is unknown, or nothing could train.
    """
    if isinstance(adaptation, str) and adaptation not in ADAPTATIONS + PUBLISHED:
        raise SettingError(
            f"adaptation must be one of {', '.join(ADAPTATIONS)}, got {adaptation!r} (imported checkpoints have "
            f"{', '.join(PUBLISHED)})."
        )
    if train_decoder is not None and train_decoder not in DECODERS:
        raise SettingError(f"train_decoder must be one of {', '.join(DECODERS)}, or null, got {train_decoder!r}.")
    if isinstance(adaptation, str) and adaptation in PUBLISHED:
        if train_decoder not in (None, "whole"):
            raise SettingError(f"train_decoder must be whole, or null, with {adaptation}, got {train_decoder!r}.")
        return _plan_published(adaptation, lora_rank, dropout)
    encoder: Adaptation
    if not isinstance(adaptation, str):
        encoder = adaptation
    elif adaptation == "adapters":
        encoder = bottlenecks or Bottlenecks(dropout=dropout)
    elif adaptation == "none":
        encoder = Frozen()
    else:
        targets = (lora_targets,) if isinstance(lora_targets, str) else tuple(lora_targets)
        encoder = LoRA(
            rank=lora_rank, alpha=lora_alpha, targets=targets, singular=adaptation == "adalora", dropout=dropout
        )
    usual = "frozen" if isinstance(encoder, Frozen) else "adapted"
    chosen = train_decoder or usual
    if chosen == "adapted" and adaptation == "none":
        raise SettingError(
            "adaptation none has nothing to adapt the decoder with; train_decoder may be frozen or whole."
        )
    facts = dict(encoder.describe())
    if chosen != usual:
        facts["train_decoder"] = chosen
    return Plan(encoder, encoder if chosen == "adapted" else Frozen(), chosen == "whole", facts)


def _plan_published(adaptation: str, rank: int, dropout: float) -> Plan:
    net, mod = adaptation.removeprefix("published_").rpartition("_")[::2]
    encoder: Adaptation = PublishedAdapters(dropout=dropout, net=net)
    if mod != "adapters":
        alpha = 1.0 if mod == "lora" else None  # AdaLoRA's weight is in its singular values
        encoder = PublishedLoRA(
            rank=rank, alpha=alpha, targets=("q", "v", "mlp"), singular=mod == "adalora", dropout=dropout, net=net
        )
    return Plan(encoder, Frozen() if net == "mobile" else PublishedDecoder(), True, encoder.describe())


def install_prompts(adaptation: str, prompt_encoder: nn.Module, size: tuple[int, int]) -> None:
    """Let a prompt encoder see points as an adaptation's training did, in place.

    The published code gives EfficientSAM points in an image of 1024 x 1024, whatever the size that it is built for.
    """
    if adaptation in PUBLISHED and isinstance(prompt_encoder, EfficientSAMPromptEncoder):
        prompt_encoder.enlarged = 1024 / size[0]
        prompt_encoder.nowhere = -0.5 / size[0]


def settings_of(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of :func:`~medsa_nets.build_medsa` by what an adapter's identity says of it.

    Args:
        adapter: the entry ``adapter`` of an identity (:func:`~medsa_nets.networks.identity.decode_identity`).

    Raises:
        SettingError: when the adaptation is none that is known here.
    """
    settings = dict(adapter)
    if (name := settings.setdefault("adaptation", "adapters")) not in ADAPTATIONS + PUBLISHED:
        known = ", ".join(ADAPTATIONS + PUBLISHED)
        raise SettingError(f"The adapter's adaptation is {name!r}; known here are {known}.")
    renamed = {"rank": "lora_rank", "alpha": "lora_alpha", "targets": "lora_targets"}
    return {renamed.get(name, name): value for name, value in settings.items()}


def merge_adapter(network: MedSA) -> MedSA:
    """Add changes of low rank to the weights that they change: a network that gives the same masks without them.

    What else trained (class embeddings, depth branches, click feedback, the decoder) stays. The result's
    ``base_state_dict`` is a base of its own, that any code for that base reads.

    Args:
        network: the network; it is changed in place.

    Returns:
        ``network``, with an identity that names the merged base.

    Raises:
        SettingError: when it holds none: the paper's adapters are not linear and can't be merged; or when it is of the
            published code, whose decoder is another one than a base's.
    """
    identity = decode_identity(network.identity)
    name = identity["adapter"].get("adaptation", "adapters")
    if name in PUBLISHED or not merge_low_rank(network):
        raise SettingError(
            f"Only changes of low rank (adaptation: lora or adalora) can be merged into a base; this is {name!r}."
        )
    kept = {
        name: value
        for name, value in identity["adapter"].items()
        if name not in ("adaptation", "rank", "alpha", "targets")
    }
    whole = kept.get("train_decoder") == "whole"
    if not whole:
        kept.pop("train_decoder", None)
    network.freeze(bool(kept.get("train_norms")), whole)
    fingerprint = state_sha256(network.base_state_dict())
    network.set_identity({"base": identity["base"], "sha256": fingerprint, "adapter": {"adaptation": "none", **kept}})
    return network
