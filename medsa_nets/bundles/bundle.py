"""A bundle as the package's commands read it: configurations laid over each other, settings, metadata."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from medsa_nets.errors import DataError, find_cause

INFERENCE, TRAINING, SERVER = "inference.yaml", "train.yaml", "server.yaml"
METADATA = "metadata.json"


class Bundle:
    """Configurations of a bundle, laid over each other, with settings.

    Args:
        config: the merged configuration.
        metadata: content of ``metadata.json``; empty where there is none.
        root: folder of the bundle; none where it is in a file.
        source: what messages name: folder or file.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        metadata: Mapping[str, Any],
        root: Path | None = None,
        source: Path | None = None,
    ) -> None:
        self.config = dict(config)
        self.metadata = dict(metadata)
        self.root = root
        self.source = source or root

    @classmethod
    def open(
        cls,
        root: str | Path,
        overlays: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        *,
        config: str = INFERENCE,
        server: bool = False,
    ) -> Bundle:
        """Read a bundle's folder.

        Args:
            root: folder of the bundle.
            overlays: files of its ``configs`` to lay over, as ``hippocampus.yaml``.
            settings: keys to set, as ``{"amp": False}``; ``bundle_root`` is set to ``root``.
            config: the configuration below the overlays.
            server: whether the mode of a server (``server.yaml``) is laid over too, below the overlays.

        Raises:
            DataError: when there is no such bundle or overlay.
        """
        root = Path(root)
        files = [root / "configs" / config]
        if not files[0].is_file():
            raise DataError(f"{files[0]}: there is no such file. Expected the folder of a MedSA bundle.")
        paths = overlay_paths(root, overlays)
        if server and (root / "configs" / SERVER).is_file():
            files.append(root / "configs" / SERVER)
        return cls.of_files([*files, *paths], {"bundle_root": str(root), **(settings or {})})

    @classmethod
    def of_files(
        cls,
        files: Sequence[str | Path],
        settings: Mapping[str, Any] | None = None,
        metadata: str | Path | None = None,
    ) -> Bundle:
        """Read configurations by their paths, as ``monai.bundle run`` takes them.

        Args:
            files: the configuration, and what is laid over it; the first one lies in the bundle's ``configs``.
            settings: keys to set; a name may be a path, as ``network_def#dropout``. A ``bundle_root`` of ``.`` becomes
                the bundle's folder.
            metadata: path of the metadata; none takes ``metadata.json`` beside the first configuration.
        """
        first = Path(files[0]).resolve()
        parser = ConfigParser(ConfigParser.load_config_files([str(file) for file in files]))
        if parser.get("bundle_root") == ".":
            parser["bundle_root"] = str(first.parents[1])
        for name, value in (settings or {}).items():
            parser[name] = value
        path = first.parent / METADATA if metadata is None else Path(metadata)
        described = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return cls({k: v for k, v in parser.get().items() if k != parser.meta_key}, described, first.parents[1])

    @classmethod
    def of_torchscript(cls, file: Path) -> Bundle:
        """Read the configuration that a TorchScript export holds.

        Raises:
            DataError: when the file is missing, is no TorchScript file, or holds none.
        """
        if not file.is_file():
            raise DataError(
                f"model {file}: there is no such bundle. Pass its folder, or a TorchScript file of it (-m)."
            )
        texts: dict[str, Any] = {}
        try:
            with zipfile.ZipFile(file) as archive:
                for name in ("inference.json", METADATA):
                    inside = next((n for n in archive.namelist() if n.endswith(f"/extra/{name}")), None)
                    texts[name] = None if inside is None else json.loads(archive.read(inside))
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise DataError(f"model {file}: it is no TorchScript file ({error}). Export it again.") from error
        absent = [name for name, text in texts.items() if text is None]
        if absent:
            raise DataError(
                f"model {file}: it does not hold {', '.join(absent)}. Export it by python -m medsa_nets.deploy export."
            )
        return cls(texts["inference.json"], texts[METADATA], source=file)

    def parser(self) -> ConfigParser:
        """A parser of the configuration, with the metadata, that makes its parts when they are asked for."""
        parser = ConfigParser(copy.deepcopy(self.config))
        if self.metadata:
            parser[parser.meta_key] = copy.deepcopy(self.metadata)
        return parser

    def value(self, name: str, default: Any = None) -> Any:
        """What a key of the configuration holds once it is evaluated, or ``default`` where there is none.

        Raises:
            MedSAError: of what evaluating it met; other errors as MONAI raises them.
        """
        parser = self.parser()
        return read(parser, name) if name in parser else default

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their ids."""
        if "classes" in self.config:
            return [str(name) for name in self.value("classes")]
        try:
            names: dict[str, str] = self.metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.source}: neither 'classes' in the configuration nor the metadata name its classes."
            ) from error
        return [names[key] for key in sorted(names, key=int) if names[key] != "background"]

    def whole(self) -> dict[str, Any]:
        """The configuration with the task's facts in it, so that it needs no other file."""
        if not isinstance(self.config.get("facts"), str):
            return self.config
        return {**self.config, "facts": dict(self.value("facts"))}


def read(parser: ConfigParser, name: str) -> Any:
    """What a key holds once it is evaluated.

    Raises:
        MedSAError: of what evaluating it met, in place of MONAI's error around it; other errors as MONAI raises them.
    """
    try:
        return parser.get_parsed_content(name)
    except RuntimeError as error:
        if (cause := find_cause(error)) is None:
            raise
        raise cause from None


def overlay_paths(root: Path, overlays: Sequence[str]) -> list[Path]:
    """Paths of overlays of a bundle.

    Raises:
        DataError: when there is no such bundle or overlay.
    """
    if not (root / "configs" / METADATA).is_file():
        raise DataError(f"bundle {root}: there is no configs/metadata.json. Expected the folder of a MedSA bundle.")
    paths = [root / "configs" / overlay for overlay in overlays]
    for path in paths:
        if not path.is_file():
            there = ", ".join(sorted(p.name for p in (root / "configs").glob("*.yaml")))
            raise DataError(f"overlay {path}: there is no such file; expected one of {there}.")
    return paths
