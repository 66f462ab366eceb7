"""`python -m integration.fuzz [--minutes 10] [--target NAME]`: hostile bytes for everything that reads a checkpoint.

Needs atheris, which guides itself by the branches that the code takes (`pip install atheris`). Each target runs in a
process of its own, an equal share of the time; an input that crashes, hangs, eats memory or raises anything but a typed
error ends it, is written to the directory that `--keep` names, and makes the exit code 1.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import torch
import zstandard

_MEMORY_MB = 2000
_SECONDS_AN_INPUT = 10

with atheris.instrument_imports(include=["dcp_storage"]):
    from dcp_storage.dcp.loads.entries import load_entry
    from dcp_storage.errors import BlockCorrupt, UnsupportedFormat
    from dcp_storage.format.values import MAGIC, encode_value
    from tests import documents, hostile
    from tests.test_entries import SAFE

BLOCKS = (("zstd", 4), ("zstd", 2), ("zstd", 1), ("none", 1))


def _pick(provider: Any) -> hostile.Pick:
    return lambda count: provider.ConsumeIntInRange(0, count - 1)


def manifest(data: bytes) -> None:
    """Bytes as a manifest's JSON, or as its frame."""
    hostile.read_manifest(zstandard.ZstdCompressor().compress(data))
    hostile.read_manifest(data)


def changed_manifest(data: bytes) -> None:
    """A sound manifest with values changed."""
    provider = atheris.FuzzedDataProvider(data)
    hostile.read_manifest(documents.pack(hostile.mutate(hostile.sound_manifest(), _pick(provider))))


def head(data: bytes) -> None:
    """Bytes as a head, before a sound body."""
    _, _, body = documents.index_of(documents.pack(hostile.sound_manifest()))
    hostile.read_manifest(documents.frame(data) + body)


def body(data: bytes) -> None:
    """Bytes as each frame of a body, with the index that belongs to it."""
    try:
        columns = json.loads(data)
    except (ValueError, RecursionError):
        columns = data
    for kind in documents.KINDS:
        hostile.read_manifest(documents.pack({**hostile.sound_manifest(), kind: columns}))


def index(data: bytes) -> None:
    """A sound manifest whose index has changed."""
    provider = atheris.FuzzedDataProvider(data)
    head, listed, rest = documents.index_of(documents.pack(hostile.sound_manifest()))
    changed = hostile.mutate({"frames": listed}, _pick(provider))
    hostile.read_manifest(documents.frame(head | changed) + rest)


def stock(data: bytes) -> None:
    """Bytes as a stock manifest's pickle."""
    hostile.read_stock(data)


def block(data: bytes) -> None:
    """Bytes as a block, of each kind."""
    for kind in BLOCKS:
        hostile.read_block(data, *kind)


def entry(data: bytes) -> None:
    """Bytes as an entry that is not a tensor."""
    try:
        load_entry("x", io.BytesIO(data))
    except (BlockCorrupt, UnsupportedFormat):
        return


def value(data: bytes) -> None:
    """Bytes as a value of built-in types."""
    entry(MAGIC + data)


def entry_pickle(data: bytes) -> None:
    """Bytes as the pickle of an entry, in a sound archive."""
    entry(hostile.rezip({"archive/data.pkl": data, "archive/data/0": bytes(32)}))


def _entry_pickles() -> list[bytes]:
    return [hostile.records_of(hostile.container(held))["archive/data.pkl"] for held in SAFE.values()]


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "manifest": (manifest, lambda: [documents.pack(hostile.sound_manifest())]),
    "changed-manifest": (changed_manifest, lambda: [bytes(range(64))]),
    "head": (head, lambda: [json.dumps(hostile.sound_manifest()["head"]).encode()]),
    "body": (body, lambda: [json.dumps(part).encode() for part in hostile.sound_manifest().values()]),
    "index": (index, lambda: [bytes(range(64))]),
    "stock": (stock, lambda: [hostile.stock_pickle()]),
    "block": (block, lambda: [hostile.sound_block(*kind) for kind in BLOCKS]),
    "entry": (entry, lambda: [hostile.container({1, "two"}), hostile.container((1, (torch.ones(8),)))]),
    "entry-pickle": (entry_pickle, _entry_pickles),
    "value": (value, lambda: [encode_value(held)[len(MAGIC) :] for held in SAFE.values() if encode_value(held)]),
}


def fuzz(name: str, seconds: int, keep: str) -> None:
    """Fuzz one target in this process, which ends with it."""
    target, seeds = TARGETS[name]
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds()):
            Path(corpus, str(number)).write_bytes(seed)
        options = [f"-max_total_time={seconds}", f"-timeout={_SECONDS_AN_INPUT}", f"-rss_limit_mb={_MEMORY_MB}"]
        options += [
            f"-malloc_limit_mb={_MEMORY_MB}",
            "-max_len=20000",
            "-print_final_stats=1",
            f"-artifact_prefix={keep}/",
        ]
        atheris.Setup([sys.argv[0], *options, corpus], target)
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="for all targets together (10)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one; may be repeated")
    parser.add_argument("--keep", default=".", help="directory for inputs that fail")
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)  # of the one target that this process fuzzes
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    if args.seconds:
        fuzz(names[0], args.seconds, args.keep)
    seconds = max(1, int(args.minutes * 60 / len(names)))
    failed = [name for name in names if not _fuzz_apart(name, seconds, args.keep)]
    print(f"FAILED: {', '.join(failed)}" if failed else f"OK: {len(names)} targets, {seconds} s each")
    return 1 if failed else 0


def _fuzz_apart(name: str, seconds: int, keep: str) -> bool:
    command = [sys.executable, "-m", "integration.fuzz", "--target", name, "--seconds", str(seconds), "--keep", keep]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    stats = dict(
        line.removeprefix("stat::").split(":") for line in done.stdout.splitlines() if line.startswith("stat::")
    )
    inputs, memory = (stats.get(key, "?").strip() for key in ("number_of_executed_units", "peak_rss_mb"))
    print(f"{name:18} {inputs:>10} inputs in {seconds} s, {memory} MB: {'ok' if done.returncode == 0 else 'FAILED'}")
    if done.returncode:
        print(done.stdout[-6000:])
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
