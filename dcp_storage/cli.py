"""The command line, `dcp-storage`. Each sub-command declares its options and has a function that runs it."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from dcp_storage import demo
from dcp_storage.errors import DcpStorageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command and return the exit code: 0 done, 1 failed, 130 interrupted; wrong usage exits with 2."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except DcpStorageError as error:
        print(f"dcp-storage: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("dcp-storage: interrupted", file=sys.stderr)  # noqa: T201
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dcp-storage", description="Checkpoints of torch.distributed.checkpoint.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('dcp-storage')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser("demo", help="watch a real model train, checkpoint, die, resume and be verified")
    demo.add_arguments(command)
    command.set_defaults(run=demo.run)
    return parser
