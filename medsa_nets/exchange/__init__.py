"""Adapters in the forms that others read and write: folders with a model card, hubs, PEFT's files, and checkpoints of
the published Medical SAM Adapter code.
"""

from medsa_nets.exchange.folders import convert, from_pretrained, pull, push, read_folder, save_pretrained, write_folder
from medsa_nets.exchange.merge import write_merged
from medsa_nets.exchange.peft import read_peft, write_peft
from medsa_nets.exchange.published import read_published

__all__ = [
    "convert",
    "from_pretrained",
    "pull",
    "push",
    "read_folder",
    "read_peft",
    "read_published",
    "save_pretrained",
    "write_folder",
    "write_merged",
    "write_peft",
]
