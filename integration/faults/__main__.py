"""What was tried against a save, and what survived: python -m integration.faults [part ...]."""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from integration.faults import full, strace
from integration.faults.http import try_requests
from integration.faults.oracle import OURS
from integration.faults.parts import try_mutants, try_points, try_power, try_power_after_deaths, try_stock
from integration.faults.places import Bucket, Directory
from integration.faults.soak import try_kills
from integration.faults.tally import Tally, show
from integration.servers import seaweedfs


def parts(tally: Tally, kills: int, **of: int) -> dict[str, Callable[[], str | None]]:
    """Return the parts by name, in the order of the table."""
    return {
        "local": partial(try_points, tally, Directory, OURS, **of),
        "objects": partial(try_points, tally, Bucket, OURS, **of),
        "power": partial(try_power, tally, OURS),
        "after-deaths": partial(try_power_after_deaths, tally, OURS, **of),
        "strace": partial(_where_possible, strace, strace.try_system_calls, tally, **of),
        "full": partial(_where_possible, full, full.try_full_disks, tally, **of),
        "soak": partial(try_kills, tally, kills),
        "soak-s3": partial(_on_server, try_kills, tally, kills // 5),
        "http": partial(_on_server, try_requests, tally, **of),
        "mutants": partial(try_mutants, tally),
        "stock": partial(try_stock, tally, **of),
    }


def _where_possible(module: ModuleType, run: Callable[..., None], *args: Any, **kwargs: Any) -> str | None:
    return run(*args, **kwargs) if module.is_possible() else f"{module.__name__}: not possible here"


def _on_server(run: Callable[..., str | None], *args: Any, **kwargs: Any) -> str | None:
    with seaweedfs() as server:
        return run(*args, server=server, **kwargs)


def main() -> int:
    logging.disable(logging.ERROR)  # every refusal is logged, and is meant
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python -m integration.faults", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(parts(Tally(), 0))}; all if none is named")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try each N-th point only")
    parser.add_argument("--first", type=int, default=0, metavar="M", help="... from the one of this number on")
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="SIGKILLs; a fifth of them on S3")
    options = parser.parse_args()
    tally, notes, console = Tally(), [], Console(width=140)
    known = parts(tally, options.kills, every=options.every, first=options.first)
    for name in options.parts or known:
        begin = time.monotonic()
        with console.status(name):
            said = known[name]()
        notes += [f"{name}: {time.monotonic() - begin:.0f} s", *filter(None, [said])]
    show(console, tally, [*notes, *tally.wrong(OURS.name)])
    return 1 if tally.wrong(OURS.name) else 0


if __name__ == "__main__":
    sys.exit(main())
