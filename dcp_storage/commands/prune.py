"""`dcp-storage prune` removes what interrupted saves left behind."""

import argparse
import re
from datetime import timedelta

from rich.filesize import decimal

from dcp_storage.commands.common import add_place, print_json, show, storage_options
from dcp_storage.prune import A_DAY, Pruning, prune
from dcp_storage.words import counted

_AGE = re.compile(r"(\d{1,9})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the sub-command."""
    add_place(parser)
    parser.add_argument(
        "--older-than",
        type=_age,
        default=A_DAY,
        metavar="AGE",
        help="minimum age of a save to remove, such as 90s, 30m, 2h or 1d (default: 1d)",
    )
    parser.add_argument("--dry-run", action="store_true", help="remove nothing, but print what would be removed")


def run(args: argparse.Namespace) -> int:
    """Prune and return the exit code, 0."""
    options = storage_options(args)
    done = prune(args.path, older_than=args.older_than, storage_options=options, dry_run=args.dry_run)
    if args.json:
        print_json({"url": done.url, "dry_run": args.dry_run, "removed": done.removed, "kept": done.kept})
    else:
        show(*_report(done, dry_run=args.dry_run))
    return 0


def _report(done: Pruning, *, dry_run: bool) -> list[str]:
    lines = [f"{'Would remove' if dry_run else 'Removed'}  {name}" for name in done.removed]
    verb = "would be removed" if dry_run else "removed"
    total = f"{counted(len(done.removed), 'object')} ({decimal(sum(done.removed.values()))}) {verb}"
    kept = f"; {counted(len(done.kept), 'object')} too recent, perhaps from a running save" if done.kept else ""
    return [*lines, f"{done.url}: {total}{kept}"]


def _age(text: str) -> timedelta:
    match = _AGE.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is an invalid age; use a number and s, m, h or d, such as 2h")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})
