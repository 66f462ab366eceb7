"""`dcp-storage demo`: a model trains, checkpoints, dies, resumes on other numbers of ranks and is verified."""

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NoReturn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the sub-command."""
    parser.add_argument("--url", help="where to save, kept afterwards (default: a temporary directory, about 1 GB)")
    parser.add_argument("--endpoint-url", help="endpoint of an S3-compatible server, for an s3:// URL")
    parser.add_argument("--steps", type=_positive, default=6, help="training steps (default: %(default)s)")
    parser.add_argument("--ranks", type=_positive, default=2, help="ranks that train (default: %(default)s)")
    parser.add_argument(
        "--resume-ranks", type=_positive_list, default=[1, 3, 4], metavar="N,N", help="ranks to resume on (1,3,4)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document with all figures, nothing else")


def run(args: argparse.Namespace) -> int:
    """Run the demo and return the exit code: 0 when every check holds."""
    from dcp_storage.demo import report
    from dcp_storage.demo.figures import Config, Place, Results, document
    from dcp_storage.demo.machine import describe_machine, find_model
    from dcp_storage.demo.screen import Screen
    from dcp_storage.demo.story import Story

    model_dir = str(find_model())
    with _ended_politely(), tempfile.TemporaryDirectory(prefix="dcp-storage-demo-") as scratch:
        place = Place(args.url or scratch, _storage_options(args))
        results = Results(describe_machine(), place, args.ranks)
        with Screen(silent=args.json) as screen:
            screen.show(f"{report.machine_text(results.machine)}\nCheckpoints in {place.url}\n")
            Story(Config(place, scratch, model_dir, args.steps), results, screen).play(args.resume_ranks)
        for part in report.closing(results):
            screen.show(part)
    if args.json:
        json.dump(document(results), sys.stdout, indent=2)
        sys.stdout.write("\n")
    return 1 if results.failures else 0


def _storage_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"endpoint_url": args.endpoint_url} if args.endpoint_url else {}


@contextlib.contextmanager
def _ended_politely() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that ranks and temporary files go as they do after Ctrl-C."""
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _positive_list(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]
