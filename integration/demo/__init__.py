"""A model trains, checkpoints, dies, resumes on other numbers of ranks and is verified."""

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from dcp_storage.errors import DcpStorageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code: 0 where every check holds; 130 interrupted."""
    try:
        return run(_parser().parse_args(argv))
    except DcpStorageError as error:
        print(f"demo: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m integration.demo", description=__doc__)
    parser.add_argument("--url", help="where to save, kept afterwards (default: a temporary directory, about 1 GB)")
    parser.add_argument("--endpoint-url", help="endpoint of an S3-compatible server, for an s3:// URL")
    parser.add_argument("--steps", type=_positive, default=6, help="training steps (default: %(default)s)")
    parser.add_argument("--ranks", type=_positive, default=2, help="ranks that train (default: %(default)s)")
    parser.add_argument(
        "--resume-ranks", type=_positive_list, default=[1, 3, 4], metavar="N,N", help="ranks to resume on (1,3,4)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document with all figures, nothing else")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the demo and return the exit code: 0 when every check holds."""
    from integration.demo import report
    from integration.demo.figures import Config, Place, Results, document
    from integration.demo.machine import describe_machine, find_model
    from integration.demo.screen import Screen
    from integration.demo.story import Story

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
