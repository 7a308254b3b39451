"""Set up a folder that MONAI Label serves: ``python -m medsa_nets.label APP --bundle bundles/medsa_btcv``.

The server is MONAI Label's own, with its ``monaibundle`` app, to which :mod:`medsa_nets.label_app` adds scribbles. This
command copies that app and the bundle into ``APP``, so that training from the viewer changes the copy, and prints the
command that starts the server.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medsa_nets.bundles import ADAPTER, Bundle, copy_bundle
from medsa_nets.commands import command
from medsa_nets.data.atomic import temporary_name
from medsa_nets.errors import DataError
from medsa_nets.precomputed import precompute
from medsa_nets.training import save_atomically

STOCK = "bundle_app.py"  # MONAI Label's app as it came, beside MAIN, the file that the server looks for
MAIN = '''"""MONAI Label's app for bundles (bundle_app.py, as it came), which takes scribbles too."""

import bundle_app

from medsa_nets.label_app import with_scribbles

App = with_scribbles(bundle_app.MyApp)
'''
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
    """Copy the stock app into ``app``, and let it take scribbles; an app that its owner changed stays as it is."""
    main = app / "main.py"
    if main.is_file() and (app / STOCK).is_file():
        return
    source = find_stock_app() if source is None else source
    if main.is_file() and main.read_bytes() != (source / "main.py").read_bytes():
        return
    ignored = shutil.ignore_patterns("logs", "model", "__pycache__")
    shutil.copytree(source, app, ignore=ignored, dirs_exist_ok=True)
    os.replace(main, app / STOCK)
    with temporary_name(main) as part:
        part.write_text(MAIN, encoding="utf-8")


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
    if not copy_bundle(bundle, target, overlays, settings, server=True):
        _write_fresh_adapter(target, target / ADAPTER)
    return target


def _write_fresh_adapter(target: Path, adapter: Path) -> None:
    network = Bundle.open(target).value("network_def")
    save_atomically(network.state_dict(), adapter)
    print(f"{target.name}: the bundle has no trained adapter yet; the frozen model answers until you train.")


def serve_with_monai_label(
    app: Path,
    *,
    bundle: Sequence[str],
    overlay: Sequence[str] = (),
    name: str = "",
    studies: str = "STUDIES",
    precomputed: bool = False,
) -> None:
    """Set up a folder that MONAI Label serves, and print the command that starts the server.

    Args:
        app: folder of the app, made where it is missing.
        bundle: folder of a bundle; may be given more than once.
        overlay: file of the bundle's configs to lay over; may be given more than once.
        name: name of the model in the server.
        studies: folder of images, or address of a DICOMweb server.
        precomputed: encode all studies of the folder now, so that the first answer on each is fast.
    """
    if len(bundle) > 1 and (name or overlay):
        raise DataError("--name and --overlay belong to one bundle: run the command once for each.")
    if precomputed and not Path(studies).is_dir():
        raise DataError(f"--precomputed needs a folder of studies, --studies is {studies}.")
    add_app(app)
    settings = {"precomputed": str(app.resolve() / EMBEDDINGS)} if precomputed else None
    for one in bundle:
        model = add_bundle(app, Path(one), name or None, overlay, settings)
        print(f"added {model}", flush=True)
        if precomputed:
            precompute(str(model), studies, str(app / EMBEDDINGS))
    models = ",".join(sorted(p.name for p in (app / "model").iterdir() if (p / "configs").is_dir()))
    start = ["monailabel", "start_server", "--app", str(app), "--studies", studies,
             "--conf", "models", models, "--conf", "zoo_source", "local", "--conf", "sam2", "false"]  # fmt: skip
    quoted = subprocess.list2cmdline(start) if os.name == "nt" else shlex.join(start)
    print(f"\nStart the server:\n  {quoted}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return command(serve_with_monai_label, arguments, name="python -m medsa_nets label")


if __name__ == "__main__":
    sys.exit(main())
