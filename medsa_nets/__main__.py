"""Commands of the package: ``python -m medsa_nets COMMAND``, as ``python -m medsa_nets serve BUNDLE``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {  # module, what it does
    "serve": ("medsa_nets.server.command", "serve a bundle to clients of nnInteractive"),
    "precompute": ("medsa_nets.precomputed", "encode studies ahead of time, for the servers of serve and label"),
    "label": ("medsa_nets.label", "set up a folder that MONAI Label serves"),
    "deploy": ("medsa_nets.deploy.__main__", "segment DICOM series by MONAI Deploy; export, package and check one"),
    "cluster": ("medsa_nets.cluster", "segment a list of studies with several processes or machines"),
    "sweep": ("medsa_nets.sweep", "train a bundle with several settings, and compare what they reach"),
    "weights": ("medsa_nets.weights.__main__", "list, fetch and check the weights of bases"),
    "replay": ("medsa_nets.interaction.__main__", "make the mask of a saved session again"),
    "demo": ("medsa_nets.demo", "adapt a base to lesions in a few minutes"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status, 2 where there is no such command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] and given[0] in COMMANDS:
        status: int = importlib.import_module(COMMANDS[given[0]][0]).main(given[1:])
        return status
    asked = given[:1] in ([], ["--help"], ["-h"])
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    text = "\n".join(["usage: python -m medsa_nets COMMAND ...   (--help says what a command takes)", "", *lines])
    print(text if asked else f"error: there is no command {given[0]!r}\n{text}", file=None if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
