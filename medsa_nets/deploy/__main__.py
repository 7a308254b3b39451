"""Command line of the MONAI Deploy application."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medsa_nets.commands import command
from medsa_nets.deploy.models import find_model, make_output, prepare
from medsa_nets.deploy.settings import read_settings
from medsa_nets.deploy.studies import find_sources
from medsa_nets.errors import DataError

logger = logging.getLogger("medsa_nets.deploy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an application, or one of the commands that make one; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = given.pop(0) if given[:1] and given[0] in COMMANDS else ""
    try:
        name = f"python -m medsa_nets deploy {chosen}".rstrip()
        return command(COMMANDS.get(chosen, run), given, name=name, short=SHORT)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("holoscan", "highdicom", "monai", "typeguard"):
            raise
        print(
            f"error: {error.name} is not installed. In an environment of its own: pip install 'medsa[deploy]'.",
            file=sys.stderr,
        )
        return 1


def run(
    *,
    input: Path | None = None,
    output: Path | None = None,
    model: Path | None = None,
    overlay: Sequence[str] = (),
    make_uids: bool = False,
    backend: str = "",
) -> int:
    """Segment every DICOM series (or photograph) of a folder that a bundle takes.

    Each gets a folder in the output: segmentation.dcm, measurements_sr.dcm, measurements.json, report.html, pictures.
    What is not taken is named with its reason. Exit status: 0 when everything that the bundle takes was segmented, 2
    when only a part of it was, 1 when nothing was.

    Other commands: export (a bundle with base and adapter as one TorchScript file), package (what a container is built
    from), check (whether that is complete).

    Args:
        input: folder of DICOM files or photographs (-i); default: HOLOSCAN_INPUT_PATH, else input.
        output: folder of the results (-o); default: HOLOSCAN_OUTPUT_PATH, else output.
        model: folder of a bundle, or a TorchScript file of one (-m); default: HOLOSCAN_MODEL_PATH, else models.
        overlay: file of the bundle's configs to lay over; may be given more than once.
        make_uids: make the identifiers that DICOM files lack.
        backend: what computes the image encoder: a value of the bundle's setting of that name.
    """
    source, target = place(input, "INPUT", "input"), place(output, "OUTPUT", "output")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("highdicom").setLevel(logging.WARNING)
    os.environ.setdefault("HOLOSCAN_LOG_LEVEL", "WARN")
    with tempfile.TemporaryDirectory(prefix="medsa-") as scratch:
        bundle = prepare(find_model(place(model, "MODEL", "models")), overlay, Path(scratch), backend or None)
        settings = read_settings(bundle)
        found = find_sources(source, settings.rules, make_uids)
        for line in found.skipped:
            logger.warning("left out: %s", line)
        for line in found.damaged:
            logger.error("damaged: %s", line)
        if not found.sources:
            kinds = (
                ("series" if settings.rules.volumes else "image") + " of modality " + ", ".join(settings.rules.modality)
            )
            raise DataError(
                f"input {source}: nothing to segment: no whole {kinds} "
                f"({len(found.skipped)} left out, {len(found.damaged)} damaged; see above)."
            )
        make_output(target)
        from medsa_nets.deploy.application import MedSAApplication
        from medsa_nets.runtime import keep_freed_memory

        keep_freed_memory()
        application = MedSAApplication(bundle, settings, found.sources, target.resolve())
        try:
            application.run()
        finally:
            done, failed = application.outcome.folders, application.outcome.failures
            logger.info("%d segmented, %d failed, %d damaged, %d left out",
                        len(done), len(failed), len(found.damaged), len(found.skipped))  # fmt: skip
    for folder in done:
        print(folder)
    if not done:
        print(f"error: nothing was segmented: {failed[0] if failed else 'see above'}", file=sys.stderr)
        return 1
    return 2 if failed or found.damaged else 0


def export(*, model: Path | None = None, output: Path | None = None, overlay: Sequence[str] = ()) -> None:
    """Write a bundle, its base and its adapter into one TorchScript file.

    Args:
        model: folder of the bundle (-m); default: HOLOSCAN_MODEL_PATH, else models.
        output: the file (-o); default: HOLOSCAN_OUTPUT_PATH, else output.
        overlay: file of the bundle's configs to lay over; may be given more than once.
    """
    from medsa_nets.deploy import package

    file = package.export(place(model, "MODEL", "models"), place(output, "OUTPUT", "output"), overlay)
    print(f"written: {file}")


def write_package(
    *, model: Path | None = None, output: Path | None = None, overlay: Sequence[str] = (), tag: str = "medsa:latest"
) -> None:
    """Write what monai-deploy or docker builds a container from: application, model, requirements.

    Args:
        model: folder of the bundle, or a TorchScript file of it (-m); default: HOLOSCAN_MODEL_PATH, else models.
        output: a new or empty folder (-o); default: HOLOSCAN_OUTPUT_PATH, else output.
        overlay: file of the bundle's configs to lay over; may be given more than once.
        tag: name of the image.
    """
    from medsa_nets.deploy import package

    package.write(place(model, "MODEL", "models"), place(output, "OUTPUT", "output"), overlay, tag=tag)


def check(folder: Path) -> None:
    """Check a folder that the command package wrote.

    Args:
        folder: that folder.
    """
    from medsa_nets.deploy import package

    package.check(folder)
    print(f"{folder}: complete")


COMMANDS: dict[str, Callable[..., Any]] = {"export": export, "package": write_package, "check": check}
SHORT = {"-i": "--input", "-o": "--output", "-m": "--model"}


def place(given: Path | None, variable: str, default: str) -> Path:
    """A path of the command line, else that of the container's environment, else the default."""
    return given or Path(os.environ.get(f"HOLOSCAN_{variable}_PATH") or default)


if __name__ == "__main__":
    sys.exit(main())
