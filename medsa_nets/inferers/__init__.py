"""Inferers of images and volumes; volume inferers can be nested, each changing what the inner one answers.

``SlabInferer`` cuts a volume into slabs and blends them, ``SpreadInferer`` answers prompts from their own slabs
outwards, ``MirrorInferer`` takes the mean with mirror images, ``MainComponentsInferer`` drops small parts of automatic
masks, and ``AllClassesInferer`` gives a channel for every class.
"""

from medsa_nets.checksums import tensor_sha256
from medsa_nets.inferers.cache import EmbeddingCache, adapter_key, network_name, shared_cache
from medsa_nets.inferers.classes import AllClassesInferer, MainComponentsInferer, volume_inferer
from medsa_nets.inferers.images import ClassesInferer, PromptInferer, answer_in_order, obey
from medsa_nets.inferers.mirror import MirrorInferer
from medsa_nets.inferers.slabs import SlabInferer, Slabs, VolumeInferer, rebuilt, slab_inferer
from medsa_nets.inferers.spread import SpreadInferer

__all__ = [
    "AllClassesInferer",
    "ClassesInferer",
    "EmbeddingCache",
    "MainComponentsInferer",
    "MirrorInferer",
    "PromptInferer",
    "SlabInferer",
    "Slabs",
    "SpreadInferer",
    "VolumeInferer",
    "adapter_key",
    "answer_in_order",
    "network_name",
    "obey",
    "rebuilt",
    "shared_cache",
    "slab_inferer",
    "tensor_sha256",
    "volume_inferer",
]
