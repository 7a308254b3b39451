"""Command line of saved sessions: ``python -m medsa_nets replay LOG IMAGE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from medsa_nets.commands import command


def replay(
    log: Path,
    image: Path,
    *,
    output: Path,
    bundle: Path = Path("."),
    overlay: Sequence[str] = (),
    checkpoint: str = "",
) -> None:
    """Make the mask of a saved session again, bit for bit.

    Args:
        log: the .session.json file that was saved beside the mask, or a DICOM segmentation that holds one.
        image: the image: a file, or the folder of a DICOM series.
        output: where the mask is written, and a log beside it.
        bundle: folder of the bundle; default: this one.
        overlay: file of the bundle's configs to lay over; may be given more than once.
        checkpoint: the adapter; default: the one that the bundle names.
    """
    from medsa_nets.interaction.session import InteractiveSession

    session = InteractiveSession.from_bundle(bundle, overlay, config={"checkpoint": checkpoint} if checkpoint else {})
    session.replay(log, str(image))
    path, saved = session.save(output)
    print(f"wrote {path} and {saved}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; ``python -m medsa_nets.interaction replay LOG IMAGE`` names the command itself."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return command(replay, given[1:] if given[:1] == ["replay"] else given, name="python -m medsa_nets replay")


if __name__ == "__main__":
    sys.exit(main())
