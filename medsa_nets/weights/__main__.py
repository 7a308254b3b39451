"""Command line of weights: ``python -m medsa_nets.weights``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from medsa_nets.adaptations import ADAPTATIONS, DECODERS
from medsa_nets.build import parameter_table
from medsa_nets.errors import MedSAError, WeightsError
from medsa_nets.exchange.command import COMMANDS as ADAPTER_COMMANDS
from medsa_nets.exchange.command import main as adapter_command
from medsa_nets.interaction import refinement
from medsa_nets.weights import BASES, describe_file, fetch, find_base_file


def main(arguments: list[str] | None = None) -> int:
    """Command line: ``list`` (default), ``fetch NAME``, ``check FILE``, ``parameters``, and those on adapters."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] and given[0] in ADAPTER_COMMANDS:
        return adapter_command(given)
    lines = [f"  {name:<10} {(function.__doc__ or '').splitlines()[0]}" for name, function in ADAPTER_COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m medsa_nets.weights",
        description="Base weights for MedSA, and adapters.",
        epilog="\n".join(["on adapters (--help after one says what it takes):", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="list the bases, where they come from, and which are on this machine (default)")
    fetch_parser = commands.add_parser("fetch", help="fetch the weights of a base")
    fetch_parser.add_argument("name", choices=list(BASES))
    fetch_parser.add_argument("--url", help="another address of the same file")
    check_parser = commands.add_parser("check", help="say what a file is: an adapter, what clicks mean, or a base")
    check_parser.add_argument("file")
    parameters_parser = commands.add_parser("parameters", help="table of parameters, total and trainable, per base")
    parameters_parser.add_argument("--adapter_ratio", type=float, default=0.25)
    parameters_parser.add_argument("--adapter_dim", type=int)
    parameters_parser.add_argument("--adaptation", choices=ADAPTATIONS, default="adapters")
    parameters_parser.add_argument("--train_decoder", choices=DECODERS)
    parameters_parser.add_argument("--lora_rank", type=int, default=4)
    parameters_parser.add_argument("--spatial_dims", type=int, choices=(2, 3), default=2)
    parameters_parser.add_argument("--num_classes", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        if options.command == "fetch":
            print(fetch(options.name, url=options.url))
        elif options.command == "check":
            known = refinement.is_refinement(options.file)
            print(refinement.describe_file(options.file) if known else describe_file(options.file))
        elif options.command == "parameters":
            _print_parameters({name: value for name, value in vars(options).items() if name != "command"})
        else:
            _print_bases()
    except MedSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _print_bases() -> None:
    for base in BASES.values():
        try:
            place = str(find_base_file(base))
        except WeightsError as error:
            place = "not on this machine" if "not on this machine" in str(error) else str(error)
        print(f"{base.name}\n  file    {base.filename}, {base.img_size} x {base.img_size}, {base.licence}")
        print(f"  from    {base.url}\n  sha256  {base.sha256 or 'no published figure'}\n  here    {place}")


def _print_parameters(settings: dict[str, Any]) -> None:
    print("| base | total | trainable | of these in the encoder | trainable share |\n| --- | --- | --- | --- | --- |")
    for row in parameter_table(**settings):
        print(
            f"| {row['base']} | {row['total'] / 1e6:.2f} M | {row['trainable'] / 1e6:.2f} M "
            f"| {row['encoder_adapters'] / 1e6:.2f} M | {row['percent']:.2f} % |"
        )


if __name__ == "__main__":
    sys.exit(main())
