"""Commands of the package: ``python -m medsa_nets serve BUNDLE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from medsa_nets.errors import MedSAError, print_anything
from medsa_nets.precomputed import precompute
from medsa_nets.server.command import serve

COMMANDS = {"serve": serve, "precompute": precompute}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    import fire

    print_anything()
    try:
        fire.Fire(COMMANDS, None if arguments is None else list(arguments), name="python -m medsa_nets")
    except MedSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
