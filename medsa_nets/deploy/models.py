"""The model and the output of a run: bundles and TorchScript files, as containers and users give them."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from medsa_nets.bundles import ADAPTER, Bundle, copy_bundle
from medsa_nets.data.atomic import make_writable
from medsa_nets.errors import DataError, WeightsError

logger = logging.getLogger("medsa_nets.deploy")


def make_output(folder: Path) -> None:
    """Make the folder of the results.

    Raises:
        OutputError: when it can't be made or written to.
    """
    make_writable(folder, "-o")


def find_model(path: Path) -> Path:
    """The bundle that a path means: itself, or what a folder of one model holds, as containers have it."""
    path = Path(path)
    if path.is_dir() and not (path / "configs").is_dir():
        inside = sorted(path.rglob("*.ts")) or [p.parent for p in sorted(path.rglob("configs"))]
        if len(inside) == 1:
            return inside[0]
    return path


def under_its_name(file: Path, scratch: Path) -> Path:
    """A TorchScript file under the name that it was exported with.

    Its archive keeps that name. MONAI Deploy looks for the configuration under the file's present name, and where it
    finds none it runs the network without the bundle's transforms and inferer, without a word.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            name = archive.namelist()[0].split("/")[0]
    except (zipfile.BadZipFile, OSError, IndexError):
        return file  # read_settings says what is wrong
    if name == file.stem:
        return file
    return Path(shutil.copyfile(file, scratch / f"{name}.ts"))


def with_facts(file: Path, scratch: Path) -> Path:
    """A TorchScript file that holds the facts of its task: itself, or a copy of what ``monai.bundle`` has exported.

    ``monai.bundle ckpt_export`` keeps the configuration as it stands, which reads a file of the bundle.

    Raises:
        DataError: when the facts are neither in the file nor in the bundle that it lies in (``models/model.ts``).
    """
    bundle = Bundle.of_torchscript(file)
    if not isinstance(bundle.config.get("facts"), str):
        return file
    root = file.resolve().parent.parent
    if not (root / "configs" / "tasks").is_dir():
        raise DataError(
            f"model {file}: it does not hold the facts of its task, and does not lie in the folder models of a bundle. "
            "Export it with python -m medsa_nets.deploy export."
        )
    import torch

    whole = Bundle({**bundle.config, "bundle_root": str(root)}, bundle.metadata, root).whole()
    with zipfile.ZipFile(file) as archive:
        inside = [name.partition("/extra/")[2] for name in archive.namelist() if "/extra/" in name]
    extra = dict.fromkeys(inside, "")
    network = torch.jit.load(file, map_location="cpu", _extra_files=extra)
    target = scratch / file.name
    torch.jit.save(network, target, _extra_files={**extra, "inference.json": json.dumps(whole)})
    return target


def prepare(model: Path, overlays: Sequence[str], scratch: Path, backend: str | None = None) -> Path:
    """A bundle as MONAI Deploy loads it: one folder with ``models/model.pt``, or a TorchScript file.

    Raises:
        DataError: when there is no such bundle, it has no adapter, or a TorchScript file comes with overlays.
    """
    if not model.is_dir():
        if overlays or backend:
            raise DataError(f"model {model}: overlays and back ends are chosen when a TorchScript file is exported.")
        return under_its_name(with_facts(model, scratch), scratch)
    target = scratch / model.resolve().name
    settings = {"bundle_root": str(target), **({"backend": backend} if backend else {})}
    if not copy_bundle(model, target, overlays, settings):
        known = (
            ", ".join(sorted(p.name for p in (model / "models").glob("*.pt") if not p.name.endswith(".clicks.pt")))
            or "none"
        )
        raise WeightsError(
            f"bundle {model}: it has no trained adapter ({ADAPTER}; adapters that are there: {known}). Train one, or "
            "name the overlay that belongs to an adapter, as --overlay hippocampus.yaml."
        )
    return target
