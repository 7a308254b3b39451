"""What a container is built from: the application's folder, one TorchScript file, requirements, a build context."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.bundle import ckpt_export

import medsa_nets
from medsa_nets.data.atomic import temporary_name
from medsa_nets.deploy.models import find_model, make_output, prepare
from medsa_nets.deploy.settings import read_settings
from medsa_nets.errors import DataError, OutputError, describe

PINNED = ("torch", "monai", "monai-deploy-app-sdk", "holoscan-cu13", "highdicom", "pydicom", "pylibjpeg",
          "pylibjpeg-openjpeg", "numpy", "nibabel", "itk", "einops", "scipy", "pillow",
          "pytorch-ignite", "fire", "PyYAML", "tqdm", "safetensors", "tensorboard")  # fmt: skip
HERE = "app", "model/model.ts", "app/app.py", "app/app.yaml", "app/requirements.txt", "app/medsa_nets/__init__.py"
ENTRY = '''"""The application of this folder: python app -i DICOM -o OUT -m model."""

import sys

from medsa_nets.deploy.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
'''
DOCKERFILE = """# docker build -t {tag} .     then     docker run --rm --network none --ulimit stack=33554432 \\
#   -v DICOM:/var/holoscan/input:ro -v OUT:/var/holoscan/output {tag}
FROM python:{python}-slim
ENV HOLOSCAN_INPUT_PATH=/var/holoscan/input HOLOSCAN_OUTPUT_PATH=/var/holoscan/output \\
    HOLOSCAN_MODEL_PATH=/opt/holoscan/models PYTHONUNBUFFERED=1
COPY app/requirements.txt /opt/holoscan/app/requirements.txt
RUN pip install --no-cache-dir -r /opt/holoscan/app/requirements.txt
COPY app /opt/holoscan/app
COPY model /opt/holoscan/models
RUN useradd --create-home holoscan && mkdir -p /var/holoscan/input /var/holoscan/output && \\
    chown -R holoscan /var/holoscan
USER holoscan
ENTRYPOINT ["python", "/opt/holoscan/app/app.py"]
"""


def export(model: Path, target: Path, overlays: Sequence[str] = ()) -> Path:
    """Write a bundle, its base and its adapter into one TorchScript file, with its configuration inside.

    Args:
        model: folder of a bundle.
        target: the file; ``.ts`` is appended where it has no suffix.
        overlays: files of the bundle's ``configs`` to lay over.

    Returns:
        The file.

    Raises:
        DataError: when it is no bundle.
        WeightsError: when it has no adapter.
        OutputError: when the file can't be written.
    """
    model, target = find_model(model), Path(target)
    if not model.is_dir():
        raise DataError(f"model {model}: expected the folder of a bundle.")
    target = target if target.suffix else target.with_suffix(".ts")
    make_output(target.parent)
    with tempfile.TemporaryDirectory(prefix="medsa-") as scratch:
        bundle = prepare(model, overlays, Path(scratch))
        read_settings(bundle)
        exported = Path(scratch) / target.name  # the archive keeps this name, and MONAI Deploy reads by it
        ckpt_export(
            net_id="network_def",
            filepath=str(exported),
            ckpt_file=str(bundle / "models" / "model.pt"),
            meta_file=str(bundle / "configs" / "metadata.json"),
            config_file=str(bundle / "configs" / "inference.yaml"),
            bundle_root=str(bundle),
        )
        with temporary_name(target) as part:
            shutil.copyfile(exported, part)
    torch.jit.load(target)  # what can't be read back is no export
    return target


def write(model: Path, folder: Path, overlays: Sequence[str] = (), *, tag: str = "medsa:latest") -> None:
    """Write a complete build context, check it, and print how an image is built from it.

    ``app/`` holds the entry point, ``app.yaml``, ``requirements.txt`` and this package; ``model/model.ts`` the bundle;
    beside them a ``Dockerfile`` and the manifests ``app.json`` and ``pkg.json`` of a MONAI application package.

    Args:
        model: folder of a bundle, or a TorchScript file of one.
        folder: a new or empty folder.
        overlays: files of the bundle's ``configs`` to lay over.
        tag: name of the image.

    Raises:
        DataError: when the model is no bundle.
        OutputError: when the folder is not empty or can't be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: it exists and is not empty. Name a new folder (-o).")
    make_output(folder)
    folder.rmdir()
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        part.chmod(0o755)  # portable: nothing is to be done on Windows
        (part / "model").mkdir()
        source, file = find_model(model), part / "model" / "model.ts"
        if source.is_dir():
            export(source, file, overlays)
        else:
            ready = prepare(source, overlays, part)
            read_settings(ready)
            shutil.copyfile(ready, file)
            if ready.parent == part:
                ready.unlink()
        _write_app(part, tag)
        check(part)
        part.replace(folder)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{folder}: it can't be written ({error.strerror or error}). Name another (-o).") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(
        f"{folder}: complete. With docker, build the image by either of\n"
        f"  docker build -t {tag} {folder}\n"
        f"  monai-deploy package {folder / 'app'} -c {folder / 'app' / 'app.yaml'} -m {folder / 'model'} -t {tag} "
        "--platform x86_64"
    )


def _write_app(folder: Path, tag: str) -> None:
    settings = read_settings(folder / "model" / "model.ts")
    app = folder / "app"
    app.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(Path(medsa_nets.__file__).parent, app / "medsa_nets", ignore=ignored)
    (app / "app.py").write_text(ENTRY, encoding="utf-8")
    requirements = [f"{name}=={version(name)}" for name in PINNED if version(name)]
    (app / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    kind = "DICOM CT or MR series" if settings.rules.volumes else "DICOM photographs, JPEG, PNG"
    described: dict[str, dict[str, Any]] = {
        "application": {
            "title": settings.name,
            "version": medsa_nets.__version__,
            "input-formats": [{"description": kind, "modality": list(settings.rules.modality)}],
            "output-formats": [{"description": "DICOM segmentation, structured report, HTML, JSON, PNG"}],
            "pip-packages": requirements,
        },
        "resources": {"cpu": 2, "gpu": 0, "memory": "8Gi", "gpu-memory": "0Gi"},
    }
    (app / "app.yaml").write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "Dockerfile").write_text(DOCKERFILE.format(tag=tag, python=python), encoding="utf-8")
    formats = described["application"]
    places = {
        "input": {"path": "/var/holoscan/input", "formats": formats["input-formats"]},
        "output": {"path": "/var/holoscan/output", "formats": formats["output-formats"]},
    }
    manifests = {
        "app.json": {
            "apiVersion": "1.0.0",
            "command": '["python", "/opt/holoscan/app/app.py"]',
            "sdk": "monai-deploy",
            "sdkVersion": version("monai-deploy-app-sdk"),
            "version": medsa_nets.__version__,
            "workingDirectory": "/var/holoscan",
            "environment": {
                "HOLOSCAN_INPUT_PATH": places["input"]["path"],
                "HOLOSCAN_OUTPUT_PATH": places["output"]["path"],
                "HOLOSCAN_MODEL_PATH": "/opt/holoscan/models",
            },
            **places,
        },
        "pkg.json": {
            "apiVersion": "1.0.0",
            "applicationRoot": "/opt/holoscan/app",
            "modelRoot": "/opt/holoscan/models",
            "models": {"model": "/opt/holoscan/models"},
            "resources": described["resources"],
            "version": medsa_nets.__version__,
        },
    }
    for name, content in manifests.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def version(package: str) -> str:
    """Installed version of a package without what a local build appends, or nothing where it is not installed."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return ""


def check(folder: Path) -> None:
    """Check that a build context is complete: every file there, the model readable, what the manifests name present.

    Args:
        folder: what :func:`write` wrote.

    Raises:
        DataError: when something is missing or damaged; the message names it.
    """
    folder = Path(folder)
    for name in (*HERE, "Dockerfile", "app.json", "pkg.json"):
        if not (folder / name).exists():
            raise DataError(f"{folder / name}: missing. Write the folder again (python -m medsa_nets.deploy package).")
    try:
        described = yaml.safe_load((folder / "app" / "app.yaml").read_text(encoding="utf-8"))["application"]
        manifests = [json.loads((folder / name).read_text(encoding="utf-8")) for name in ("app.json", "pkg.json")]
        asked = set(described["pip-packages"])
        described["input-formats"], described["output-formats"], manifests[0]["command"]
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"{folder}: app.yaml, app.json or pkg.json is damaged ({error!r}). Write the folder again."
        ) from error
    listed = set((folder / "app" / "requirements.txt").read_text(encoding="utf-8").split())
    if asked != listed or not any(line.startswith("torch==") for line in listed):
        raise DataError(
            f"{folder / 'app' / 'requirements.txt'}: it differs from pip-packages of app.yaml, or lacks torch."
        )
    model = folder / "model" / "model.ts"
    try:
        read_settings(model)
        torch.jit.load(model, map_location="cpu")
    except RuntimeError as error:
        raise DataError(f"{model}: not readable as TorchScript ({describe(error)}). Export it again.") from error
    if os.path.getsize(model) < 10**6:
        raise DataError(f"{model}: {os.path.getsize(model)} bytes are no network with its base. Export it again.")
