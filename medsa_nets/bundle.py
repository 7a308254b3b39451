"""Copies of a bundle with overlays merged into them, as servers and applications want it: one folder, ``model.pt``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from medsa_nets.data.atomic import temporary_name
from medsa_nets.errors import DataError
from medsa_nets.weights import check_adapter

CONFIGS = ("inference.yaml", "train.yaml")
ADAPTER = "models/model.pt"  # the only name that MONAI Label and MONAI Deploy load by themselves


def copy_bundle(
    bundle: Path, target: Path, overlays: Sequence[str] = (), settings: Mapping[str, Any] | None = None
) -> bool:
    """Copy a bundle's configurations, documents and adapter, with overlays merged into its configurations.

    Args:
        bundle: folder of the bundle.
        target: folder of the copy. An adapter that is there stays as it is.
        overlays: files of the bundle's ``configs``, as ``hippocampus.yaml``.
        settings: keys of the configurations to set, as ``bundle_root``.

    Returns:
        Whether the copy has an adapter.

    Raises:
        DataError: when there is no such bundle or overlay.
        WeightsError: when the adapter can't be read.
    """
    if not (bundle / "configs" / "metadata.json").is_file():
        raise DataError(f"bundle {bundle}: there is no configs/metadata.json. Expected the folder of a MedSA bundle.")
    paths = [bundle / "configs" / overlay for overlay in overlays]
    for path in paths:
        if not path.is_file():
            there = ", ".join(sorted(p.name for p in (bundle / "configs").glob("*.yaml")))
            raise DataError(f"overlay {path}: there is no such file; expected one of {there}.")
    adapter = target / ADAPTER
    adapter.parent.mkdir(parents=True, exist_ok=True)
    for folder in ("configs", "docs"):
        shutil.copytree(bundle / folder, target / folder, dirs_exist_ok=True)
    shutil.copy2(bundle / "LICENSE", target / "LICENSE")
    checkpoint = adapter.name
    for config in CONFIGS:
        merged: dict[str, Any] = ConfigParser.load_config_files([str(bundle / "configs" / config), *map(str, paths)])
        checkpoint = merged.get("checkpoint_filename", checkpoint)
        merged |= {"checkpoint_filename": adapter.name, **(settings or {})}
        with temporary_name(target / "configs" / config) as part:
            ConfigParser.export_config_file(merged, str(part), fmt="yaml", sort_keys=False, width=10**6)
        if config == "inference.yaml":
            _describe(target, merged)
    trained = bundle / "models" / checkpoint
    if not adapter.is_file() and trained.is_file():
        with temporary_name(adapter) as part:
            shutil.copyfile(check_adapter(trained), part)
    return adapter.is_file()


def _describe(target: Path, config: dict[str, Any]) -> None:
    """Name the classes of a configuration in the copy's metadata, from which servers take their labels."""
    path = target / "configs" / "metadata.json"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    if "classes" in config:
        classes = ["background", *config["classes"]]
        pred = metadata["network_data_format"]["outputs"]["pred"]
        pred["channel_def"] = {str(i): name for i, name in enumerate(classes)}
        pred["num_channels"] = len(classes) - 1
    with temporary_name(path) as part:
        part.write_text(json.dumps(metadata, indent=4) + "\n", encoding="utf-8")
