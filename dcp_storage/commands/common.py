"""Shared by the sub-commands: arguments for the checkpoint's location, and output."""

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

_PIPED_WIDTH = 120


def add_place(parser: argparse.ArgumentParser) -> None:
    """Declare the checkpoint's path, the options of its file system, and `--json`."""
    parser.add_argument("path", metavar="PATH", help="a directory, or a URL such as s3://bucket/run/step-100")
    parser.add_argument(
        "--storage-options", type=_options, default={}, metavar="JSON", help="options of the fsspec file system"
    )
    parser.add_argument("--endpoint-url", help="endpoint of an S3-compatible server, for an s3:// URL")
    parser.add_argument("--json", action="store_true", help="print only one JSON document")


def storage_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the file system."""
    options: dict[str, Any] = args.storage_options
    return options | ({"endpoint_url": args.endpoint_url} if args.endpoint_url else {})


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on standard output."""
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


def show(*parts: str | Table) -> None:
    """Print lines and tables on standard output; names in them are not markup."""
    console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None  # the text itself may contain a secret
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError("the options must be a JSON object")
    return options
