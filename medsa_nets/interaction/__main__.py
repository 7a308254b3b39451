"""Command line of saved sessions: ``python -m medsa_nets.interaction replay LOG IMAGE``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medsa_nets.errors import MedSAError, print_anything


def main(arguments: list[str] | None = None) -> int:
    """Command line: ``replay LOG IMAGE --bundle BUNDLE [--overlay NAME] --output MASK``."""
    parser = argparse.ArgumentParser(prog="python -m medsa_nets.interaction", description="Saved sessions of clicks.")
    commands = parser.add_subparsers(dest="command", required=True)
    replay = commands.add_parser("replay", help="make the mask of a saved session again, bit for bit")
    replay.add_argument("log", type=Path, help="the .session.json file that was saved beside the mask")
    replay.add_argument("image", type=Path, help="the image: a file, or the folder of a DICOM series")
    replay.add_argument("--bundle", type=Path, default=Path("."), help="folder of the bundle; default: this one")
    replay.add_argument("--overlay", action="append", default=[], help="file of the bundle's configs to lay over")
    replay.add_argument("--checkpoint", help="the adapter; default: the one that the bundle names")
    replay.add_argument("--output", type=Path, required=True, help="where the mask is written, and a log beside it")
    options = parser.parse_args(arguments)
    print_anything()
    from medsa_nets.interaction.session import InteractiveSession

    config = {} if options.checkpoint is None else {"checkpoint": options.checkpoint}
    try:
        session = InteractiveSession.from_bundle(options.bundle, options.overlay, config=config)
        session.replay(options.log, str(options.image))
        path, log = session.save(options.output)
    except MedSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path} and {log}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
