"""`dcp-storage verify` reads and checks every block of a checkpoint."""

import argparse
from dataclasses import asdict

from rich.filesize import decimal
from rich.table import Table

from dcp_storage.commands.common import add_place, print_json, show, storage_options
from dcp_storage.progress import progress_bar
from dcp_storage.verify import Verification, verify
from dcp_storage.words import counted

_ROWS = 20
_NAMES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the sub-command."""
    add_place(parser)
    parser.add_argument("--expect", metavar="HEX", help="the SHA-256 that an earlier verify printed")


def run(args: argparse.Namespace) -> int:
    """Verify a checkpoint and return the exit code: 0 if it is sound, 1 if it is damaged."""
    found = verify(args.path, storage_options=storage_options(args), observer=progress_bar(), expect=args.expect)
    if args.json:
        print_json({"sound": found.sound} | asdict(found))
    else:
        show(*_report(found))
    return 0 if found.sound else 1


def _report(found: Verification) -> list[str | Table]:
    parts: list[str | Table] = [_verdict(found)]
    if found.damage:
        parts.append(_table(found))
    if len(found.damage) > _ROWS:
        parts.append(f"and {len(found.damage) - _ROWS:,} more; use --json to list all")
    if found.orphans:
        orphans = f"{counted(len(found.orphans), 'object')} ({decimal(sum(found.orphans.values()))})"
        parts.append(f"Left over: {orphans} of an interrupted or running save; see `dcp-storage prune`")
    return parts


def _verdict(found: Verification) -> str:
    entries = f"{counted(found.tensors, 'tensor')} and {counted(found.others, 'other entry', 'other entries')}"
    held = f"{entries} in {counted(found.objects, 'object')}, {decimal(found.stored_bytes)}"
    if not found.sound:
        return f"DAMAGED  {found.url}: {counted(len(found.damage), 'fault')} in {held}"
    if found.stock:
        return f"UNCHECKED  {found.url}: {held}, all present; stock DCP stores no check values for their contents"
    part = "; the part of rank {} of {}, which saved it alone".format(*found.part) if found.part else ""
    checked = f"{counted(found.blocks, 'block')}, {decimal(found.raw_bytes)} raw, all checked"
    proof = f"; SHA-256 {found.sha256}" if found.sha256 else ""
    return f"SOUND  {found.url}: {held}; {checked}{part}{proof}"


def _table(found: Verification) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("Object", no_wrap=True)
    table.add_column("Offset", justify="right")
    table.add_column("Entry")
    table.add_column("Fault")
    for fault in found.damage[:_ROWS]:
        names = ", ".join(fault.fqns[:_NAMES])
        more = f" and {len(fault.fqns) - _NAMES} more" if len(fault.fqns) > _NAMES else ""
        offset = "" if fault.offset is None else str(fault.offset)
        table.add_row(fault.object_name, offset, names + more, fault.what)
    return table
