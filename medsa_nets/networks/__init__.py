"""Networks: encoders, prompt encoder, mask decoder, and the model that joins them."""

from medsa_nets.networks.efficient_sam import EfficientSAMPromptEncoder, efficient_sam_decoder
from medsa_nets.networks.efficient_vit import EfficientViTEncoder
from medsa_nets.networks.hiera import HieraEncoder
from medsa_nets.networks.image_encoder import ImageEncoderViT
from medsa_nets.networks.mask_decoder import MaskDecoder, SAM2MaskDecoder
from medsa_nets.networks.medsa import MedSA
from medsa_nets.networks.plain_vit import PlainViTEncoder
from medsa_nets.networks.prompt_encoder import PromptEncoder
from medsa_nets.networks.tiny_vit import TinyViTEncoder
from medsa_nets.networks.transformer import TwoWayTransformer
from medsa_nets.networks.volume_medsa import VolumeMedSA

__all__ = [
    "EfficientSAMPromptEncoder",
    "EfficientViTEncoder",
    "HieraEncoder",
    "ImageEncoderViT",
    "MaskDecoder",
    "MedSA",
    "PlainViTEncoder",
    "PromptEncoder",
    "SAM2MaskDecoder",
    "TinyViTEncoder",
    "TwoWayTransformer",
    "VolumeMedSA",
    "efficient_sam_decoder",
]
