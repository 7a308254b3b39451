"""Copies of a bundle with overlays merged into them, as servers and applications want it: one folder, ``model.pt``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from medsa_nets.bundles.bundle import INFERENCE, METADATA, TRAINING, Bundle, overlay_paths
from medsa_nets.data.atomic import temporary_name
from medsa_nets.weights import check_adapter

ADAPTER = "models/model.pt"  # the only name that MONAI Label and MONAI Deploy load by themselves


def copy_bundle(
    root: Path,
    target: Path,
    overlays: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    *,
    server: bool = False,
) -> bool:
    """Copy a bundle's configurations, documents and adapter, with overlays merged into its configurations.

    The facts of its task stand in the configurations of the copy, so that each needs no other file.

    Args:
        root: folder of the bundle.
        target: folder of the copy. An adapter that is there stays as it is.
        overlays: files of the bundle's ``configs``, as ``hippocampus.yaml``.
        settings: keys of the configurations to set, as ``bundle_root``.
        server: whether its inference is that of a server (``server.yaml``).

    Returns:
        Whether the copy has an adapter.

    Raises:
        DataError: when there is no such bundle or overlay.
        WeightsError: when the adapter can't be read.
    """
    overlay_paths(root, overlays)
    adapter = target / ADAPTER
    adapter.parent.mkdir(parents=True, exist_ok=True)
    for folder in ("configs", "docs"):
        shutil.copytree(root / folder, target / folder, dirs_exist_ok=True)
    shutil.copy2(root / "LICENSE", target / "LICENSE")
    checkpoint = adapter.name
    for name in (TRAINING, INFERENCE):
        bundle = Bundle.open(root, overlays, config=name, server=server and name == INFERENCE)
        checkpoint = bundle.value("checkpoint_filename", checkpoint)
        merged = {**bundle.whole(), "bundle_root": ".", "checkpoint_filename": adapter.name, **(settings or {})}
        with temporary_name(target / "configs" / name) as part:
            ConfigParser.export_config_file(merged, str(part), fmt="yaml", sort_keys=False, width=10**6)
        if name == INFERENCE:
            _describe(target, bundle)
    trained = root / "models" / checkpoint
    if not adapter.is_file() and trained.is_file():
        with temporary_name(adapter) as part:
            shutil.copyfile(check_adapter(trained), part)
        for beside in sorted(trained.parent.glob(f"{trained.stem}.*{trained.suffix}")):  # as model.clicks.pt
            shutil.copyfile(beside, adapter.with_name(adapter.stem + beside.name.removeprefix(trained.stem)))
    return adapter.is_file()


def _describe(target: Path, bundle: Bundle) -> None:
    """Name classes and channels of a configuration in the copy's metadata, from which servers take their labels."""
    path = target / "configs" / METADATA
    metadata = json.loads(path.read_text(encoding="utf-8"))
    channels = int(bundle.value("in_channels", 1) or 1)
    if channels > 1:
        image = metadata["network_data_format"]["inputs"]["image"]
        image["num_channels"] = channels
        image["channel_def"] = {str(i): f"channel {i + 1}" for i in range(channels)}
    if "classes" in bundle.config:
        classes = ["background", *bundle.classes]
        pred = metadata["network_data_format"]["outputs"]["pred"]
        pred["channel_def"] = {str(i): name for i, name in enumerate(classes)}
        pred["num_channels"] = len(classes) - 1
    with temporary_name(path) as part:
        part.write_text(json.dumps(metadata, indent=4) + "\n", encoding="utf-8")
