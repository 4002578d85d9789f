"""The command line: ``lightning-condensa inspect FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_condensa.deploy import PackedFileError
from lightning_condensa.deploy.packed import inspect_packed
from lightning_condensa.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Of the command line, without the program's name; the process's own if ``None``.

    Returns:
        The exit status: 0, or 1 where the command failed, with the reason on standard error.
    """
    options = _parser().parse_args(arguments)
    try:
        print(inspect_packed(options.file))
    except (OSError, PackedFileError) as error:
        print(f"lightning-condensa: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-condensa", description="Model compression for PyTorch Lightning."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="show what is in a packed file")
    inspect.add_argument("file", metavar="FILE", help="a .condensa file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
