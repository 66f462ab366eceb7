"""The command line, `dcp-storage`. Each sub-command declares its options and has a function that runs it."""

import argparse
import sys
from collections.abc import Callable, Sequence

from dcp_storage.commands import prune, verify
from dcp_storage.commands.common import print_json
from dcp_storage.errors import CheckpointNotFound, ConfigError, DcpStorageError, StoreError
from dcp_storage.version import __version__

_NOTHING_TO_JUDGE = (CheckpointNotFound, ConfigError, StoreError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command and return the exit code.

    0: done, and the checkpoint is sound; 1: failed, or damaged; 2: wrong usage, no checkpoint, or the store failed;
    130: interrupted.
    """
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except DcpStorageError as error:
        if getattr(args, "json", False):
            print_json({"error": type(error).__name__, "message": str(error)})
        print(f"dcp-storage: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, _NOTHING_TO_JUDGE) else 1
    except KeyboardInterrupt:
        print("dcp-storage: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dcp-storage", description="Checkpoints of torch.distributed.checkpoint.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module, says in (
        ("verify", verify, "read and check every block of a checkpoint"),
        ("prune", prune, "remove what interrupted saves left next to a checkpoint"),
    ):
        command = commands.add_parser(name, help=says)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
