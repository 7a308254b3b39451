"""Bundles: the reader of their configurations, the facts of their tasks, and copies of them."""

from medsa_nets.bundles.bundle import Bundle, read
from medsa_nets.bundles.copies import ADAPTER, copy_bundle
from medsa_nets.bundles.tasks import Facts, read_task

__all__ = ["ADAPTER", "Bundle", "Facts", "copy_bundle", "read", "read_task"]
