"""Set up a folder that MONAI Label serves: ``python -m medsa_nets.label APP --bundle bundles/medsa_btcv``.

The server is MONAI Label's own (its ``monaibundle`` app, unmodified). This command copies that app and the bundle into
``APP``, so that training from the viewer changes the copy, and prints the command that starts the server.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from medsa_nets.bundle import ADAPTER, copy_bundle
from medsa_nets.errors import DataError, MedSAError
from medsa_nets.handlers import save_atomically
from medsa_nets.precomputed import precompute

EMBEDDINGS = "embeddings"  # folder beside the models; an adapter that is trained later has embeddings of its own


def find_stock_app() -> Path:
    """Folder of the ``monaibundle`` app in the installed MONAI Label.

    Raises:
        DataError: when MONAI Label is not installed.
    """
    spec = importlib.util.find_spec("monailabel")
    places = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    candidates = [place / "sample-apps" for place in places] + [place.parent / "sample-apps" for place in places]
    candidates.append(Path(sys.prefix) / "monailabel" / "sample-apps")
    for candidate in candidates:
        if (candidate / "monaibundle" / "main.py").is_file():
            return candidate / "monaibundle"
    raise DataError(
        "MONAI Label is not installed in this environment. In an environment of its own: pip install 'medsa[label]'."
    )


def add_app(app: Path, source: Path | None = None) -> None:
    """Copy the stock app into ``app``, unless one is there."""
    if (app / "main.py").is_file():
        return
    source = find_stock_app() if source is None else source
    ignored = shutil.ignore_patterns("logs", "model", "__pycache__")
    shutil.copytree(source, app, ignore=ignored, dirs_exist_ok=True)


def add_bundle(
    app: Path,
    bundle: Path,
    name: str | None = None,
    overlays: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Copy a bundle to ``app/model/NAME``, with overlays merged into its configurations.

    Args:
        app: folder of the app.
        bundle: folder of the bundle.
        name: name of the model in the server; none takes that of the bundle. ``deepedit`` is appended where it is
            missing: MONAI Label offers clicks to such names.
        overlays: files of the bundle's ``configs``, as ``hippocampus.yaml``.
        settings: keys of its configurations to set.

    Returns:
        Folder of the model. Where it exists, its adapter stays as it is.

    Raises:
        DataError: when there is no such bundle or overlay.
    """
    name = name or "_".join([bundle.resolve().name, *(Path(overlay).stem for overlay in overlays)])
    if "deepedit" not in name:
        name += "_deepedit"
    target = app / "model" / name
    if not copy_bundle(bundle, target, overlays, settings):
        _write_fresh_adapter(target, target / ADAPTER)
    return target


def _write_fresh_adapter(target: Path, adapter: Path) -> None:
    config = ConfigParser()
    config.read_config(str(target / "configs" / "inference.yaml"))
    network = config.get_parsed_content("network_def")
    save_atomically(network.state_dict(), adapter)
    print(f"{target.name}: the bundle has no trained adapter yet; the frozen model answers until you train.")


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m medsa_nets.label", description=__doc__.splitlines()[0])
    parser.add_argument("app", type=Path, help="folder of the app, made where it is missing")
    parser.add_argument(
        "--bundle", type=Path, action="append", required=True, help="folder of a bundle; may be repeated"
    )
    parser.add_argument("--overlay", action="append", default=[], help="file of the bundle's configs to lay over")
    parser.add_argument("--name", help="name of the model in the server")
    parser.add_argument("--studies", default="STUDIES", help="folder of images, or address of a DICOMweb server")
    parser.add_argument(
        "--precompute", action="store_true", help="encode all studies of the folder now, so that first clicks are fast"
    )
    options = parser.parse_args(arguments)
    try:
        if len(options.bundle) > 1 and (options.name or options.overlay):
            raise DataError("--name and --overlay belong to one bundle: run the command once for each.")
        add_app(options.app)
        if options.precompute and not Path(options.studies).is_dir():
            raise DataError(f"--precompute needs a folder of studies, --studies is {options.studies}.")
        for bundle in options.bundle:
            settings = {"precomputed": str(options.app.resolve() / EMBEDDINGS)} if options.precompute else None
            model = add_bundle(options.app, bundle, options.name, options.overlay, settings)
            print(f"added {model}", flush=True)
            if options.precompute:
                precompute(str(model), options.studies, str(options.app / EMBEDDINGS))
    except MedSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    models = ",".join(sorted(p.name for p in (options.app / "model").iterdir() if (p / "configs").is_dir()))
    command = ["monailabel", "start_server", "--app", str(options.app), "--studies", options.studies,
               "--conf", "models", models, "--conf", "zoo_source", "local", "--conf", "sam2", "false"]  # fmt: skip
    quoted = subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
    print(f"\nStart the server:\n  {quoted}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
