"""Build adapted networks: a base, what adapts it, and the weights of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from medsa_nets.adaptations import PUBLISHED, install_prompts, plan_adaptation
from medsa_nets.checksums import state_sha256
from medsa_nets.errors import SettingError
from medsa_nets.layers import Adaptation, Bottlenecks, ClickFeedback
from medsa_nets.networks import ImageEncoderViT, MedSA, PlainViTEncoder, TinyViTEncoder, VolumeMedSA
from medsa_nets.weights.bases import BASES, SAM_MEAN, Base, get_base
from medsa_nets.weights.loading import load_base


def build_medsa(
    base: str = "lite_medsam",
    *,
    sam_checkpoint: str | None = None,
    pretrained: bool = True,
    spatial_dims: int = 2,
    img_size: int | tuple[int, int] | None = None,
    num_classes: int = 1,
    classes_per_pass: int = 1,
    click_feedback: bool = False,
    in_channels: int | None = None,
    adapter_ratio: float = 0.25,
    adapter_dim: int | None = None,
    scale: float = 0.5,
    hyper_prompting: str = "additive",
    train_norms: bool = False,
    checkpointing: bool = False,
    class_chunk: int = 0,
    dropout: float = 0.0,
    adaptation: str | Adaptation = "adapters",
    train_decoder: str | None = None,
    lora_rank: int = 4,
    lora_alpha: float | None = None,
    lora_targets: Iterable[str] = ("q", "v"),
    task: Mapping[str, Any] | None = None,
    same_task: bool = True,
) -> MedSA:
    """Build an adapted network on a base model: a :class:`MedSA` for images or a :class:`VolumeMedSA` for volumes.

    Args:
        base: name of the base, a key of :data:`~medsa_nets.weights.bases.BASES`.
        sam_checkpoint: file of the base's weights (segment-anything, MedSAM, MobileSAM, LiteMedSAM, EfficientSAM,
            EfficientViT-SAM, SAM 2, or Hugging Face ``SamModel`` as safetensors or bin), a folder that
            ``SamModel.save_pretrained`` has written, or a hub's ``OWNER/NAME`` or ``OWNER/NAME@REVISION``; none looks
            in the weights' folder and, for ``lite_medsam``, in the installed package that carries it.
        pretrained: whether the base's weights are loaded; false leaves them random (tests, parameter counts).
        spatial_dims: 2 for images, 3 for volumes.
        img_size: height and width that a ViT's position tables are made for; none takes the base's own. Bases of
            TinyViT, EfficientViT and SAM 2 take any size and ignore it.
        num_classes: number of classes of the automatic mode.
        classes_per_pass: classes that share a pass of the decoder in the automatic mode
            (:class:`~medsa_nets.networks.MedSA`); above 1 it is part of the adapter's identity.
        click_feedback: whether clicks and the mask before them reach the decoder as maps too
            (:class:`~medsa_nets.layers.ClickFeedback`); part of the adapter's identity. An adapter that was made
            without it is taken, and gives the masks that it gave.
        in_channels: channels of an image: sequences of MRI, phases of CT. None, 3 and, of volumes, 1 are what bases
            take as it is; any other number has a learned projection to three before the base
            (:class:`~medsa_nets.layers.ChannelProjection`), which is part of the adapter and of its identity.
        adapter_ratio: bottleneck width of every adapter as a share of its block's width.
        adapter_dim: bottleneck width of every adapter; takes precedence over ``adapter_ratio``.
        scale: weight of the adapters beside the MLPs.
        hyper_prompting: ``additive`` or ``weights``, the form of the decoder's hyper-prompting adapters.
        train_norms: whether layer norms train too.
        checkpointing: whether training computes activations twice, for less memory.
        class_chunk: prompt sets or classes that the decoder answers at a time; 0 answers all at once.
        dropout: probability with which an activation in an adapter's bottleneck is left out in training; active
            learning by epistemic uncertainty samples it too. It is no part of what an adapter file belongs to.
        adaptation: what adapts the base: ``adapters`` (the paper's, of ``adapter_ratio``, ``adapter_dim``, ``scale``
            and ``hyper_prompting``), ``lora``, ``adalora``, ``none``, one of
            :data:`~medsa_nets.adaptations.PUBLISHED` (images only), or a factory of adapters.
        train_decoder: ``adapted`` as the encoder is, ``frozen``, or ``whole``: its own parameters train. None takes
            ``adapted`` with adapters, and ``frozen`` with the others.
        lora_rank: rank of the changes of LoRA; of AdaLoRA, on average at the end of training.
        lora_alpha: their weight, times the rank; none takes the rank, a weight of 1.
        lora_targets: what they change: some of ``q``, ``k``, ``v`` and ``mlp``.
        task: what decides the meaning of a mask, as far as it is known: ``grid``, ``intensity``, ``classes``
            (:meth:`~medsa_nets.networks.identity.Adapted.set_task`); ``image_size`` is known where ``img_size`` is
            given, and with a ViT base. It stands in the adapter's file.
        same_task: whether an adapter that was made for another task is refused; false takes it and logs what differs.

    Returns:
        The network, base frozen, adapters at the identity.

    Raises:
        ValueError: when ``spatial_dims`` is neither 2 nor 3, ``in_channels`` is below 1, ``dropout`` is no probability,
            or ``task`` has another fact.
        SettingError: when ``adaptation`` is one of the published code, and does not go with the base or with volumes.
        WeightsError: when the weights are missing, damaged or of another network.
    """
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 (images) or 3 (volumes), got {spatial_dims}.")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}.")
    spec = get_base(base)
    if isinstance(adaptation, str) and adaptation in PUBLISHED:
        _check_published(adaptation, spec, spatial_dims)
    size = spec.img_size if img_size is None else img_size
    size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    plan = plan_adaptation(
        adaptation,
        train_decoder=train_decoder,
        bottlenecks=Bottlenecks(adapter_ratio, adapter_dim, scale, hyper_prompting, dropout),
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_targets=lora_targets,
        dropout=dropout,
    )
    encoder = spec.encoder(
        img_size=size, spatial_dims=spatial_dims, checkpointing=checkpointing, adaptation=plan.encoder
    )
    decoder = spec.mask_decoder(adaptation=plan.decoder)
    plan.encoder.install(encoder)
    plan.decoder.install(decoder)
    prompt_encoder = spec.prompt_encoder()
    if isinstance(adaptation, str):
        install_prompts(adaptation, prompt_encoder, size)
    parts: dict[str, Any] = {
        "image_encoder": encoder,
        "prompt_encoder": prompt_encoder,
        "mask_decoder": decoder,
        "num_classes": num_classes,
        "classes_per_pass": classes_per_pass,
        "click_feedback": ClickFeedback(spatial_dims=spatial_dims) if click_feedback else None,
        "in_channels": in_channels,
        "pixel_mean": spec.pixel_mean,
        "pixel_std": spec.pixel_std,
        "train_norms": train_norms,
        "class_chunk": class_chunk,
        "checkpointing": checkpointing,
    }
    network = VolumeMedSA(**parts) if spatial_dims == 3 else MedSA(**parts)
    network.freeze(train_norms, plan.whole_decoder)
    fingerprint = load_base(network, spec, sam_checkpoint) if pretrained else state_sha256({})
    network.set_identity(
        {
            "base": base,
            "sha256": fingerprint,
            "adapter": {
                **plan.describe,
                "num_classes": num_classes,
                "train_norms": train_norms,
                **({"spatial_dims": 3} if spatial_dims == 3 else {}),
                **({"classes_per_pass": classes_per_pass} if classes_per_pass > 1 else {}),
                **({"click_feedback": True} if click_feedback else {}),
                **({"in_channels": in_channels} if network.channel_projection is not None else {}),
            },
        }
    )
    known = list(size) if img_size is not None or hasattr(encoder, "img_size") else None
    network.set_task({"image_size": known, **(task or {})})
    network.same_task = same_task
    return network


def _check_published(adaptation: str, base: Base, spatial_dims: int) -> None:
    with torch.device("meta"):
        encoder = base.encoder(img_size=(base.img_size, base.img_size))
    kinds: dict[str, tuple[str, type[nn.Module]]] = {
        "": ("a ViT", ImageEncoderViT),
        "mobile": ("a TinyViT", TinyViTEncoder),
        "efficient": ("an EfficientSAM", PlainViTEncoder),
    }
    kind, made_for = kinds[adaptation.removeprefix("published_").rpartition("_")[0]]
    own_statistics = made_for is PlainViTEncoder or base.pixel_mean == SAM_MEAN
    if not isinstance(encoder, made_for) or not own_statistics:
        statistics = "" if made_for is PlainViTEncoder else " that reads SAM's pixel statistics"
        raise SettingError(f"adaptation {adaptation} goes with {kind} base{statistics}, not with {base.name!r}.")
    if spatial_dims != 2:
        raise SettingError(f"adaptation {adaptation} is for images; spatial_dims is {spatial_dims}, expected 2.")


def parameter_table(**settings: Any) -> list[dict[str, Any]]:
    """Parameters of each adapted base: rows with ``base``, ``total``, ``trainable``, ``encoder_adapters``, ``percent``.

    ``percent`` is the trainable share of the total. Nothing is allocated and no weights are needed.

    Args:
        settings: see :func:`build_medsa`: ``adaptation``, ``train_decoder``, ``adapter_ratio``, ``lora_rank``…
    """
    rows = []
    for name in BASES:
        with torch.device("meta"):
            network = build_medsa(name, pretrained=False, **settings)
        total = sum(p.numel() for p in network.parameters())
        trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
        encoder = sum(p.numel() for p in network.image_encoder.parameters() if p.requires_grad)
        rows.append(
            {
                "base": name,
                "total": total,
                "trainable": trainable,
                "encoder_adapters": encoder,
                "percent": 100.0 * trainable / total,
            }
        )
    return rows
