"""Manifests as plain JSON values, to change and to store again: `{"head": ..., "objects": ..., "tensors": ...}`."""

import json
from typing import Any

import zstandard
from xxhash import xxh3_128_hexdigest

KINDS = ("objects", "tensors", "tensors_digests", "entries", "entries_digests", "paths")


def unpack(data: bytes) -> dict[str, Any]:
    """Return the head without its index, and the columns of each frame by its kind; of several frames, a list."""
    reader = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True)
    head, *frames = (json.loads(line) for line in reader.read().splitlines())
    document: dict[str, Any] = {"head": {name: value for name, value in head.items() if name != "frames"}}
    for (kind, *_), columns in zip(head["frames"], frames, strict=True):
        if kind in document:
            document[kind] = [*_each(document[kind]), columns]
        else:
            document[kind] = columns
    return document


def pack(document: Any) -> bytes:
    """Return a document as `.metadata` holds it, whatever it has become: with the index that belongs to its frames."""
    document = document if isinstance(document, dict) else {"head": document}
    stored, listed = [], []
    for kind in KINDS:
        for columns in _each(document.get(kind)):
            stored.append(frame(columns))
            first = listed[-1][3] if kind.endswith("_digests") and listed else _first(columns)
            listed.append([kind, len(stored[-1]), xxh3_128_hexdigest(stored[-1]), first])
    head = document.get("head")
    if isinstance(head, dict):
        head = {**head, "frames": head.get("frames", listed)}
    return b"".join([frame(head), *stored])


def index_of(data: bytes) -> tuple[dict[str, Any], list[Any], bytes]:
    """Return a manifest's head without its index, the index, and the body."""
    stream = zstandard.ZstdDecompressor().decompressobj()
    head = json.loads(stream.decompress(data))
    return head, head.pop("frames"), stream.unused_data


def frame(value: Any) -> bytes:
    """Return JSON, or bytes as they are, as a frame."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode("utf-8", "surrogatepass") + b"\n"
    return zstandard.ZstdCompressor(write_checksum=True).compress(text)


def _each(columns: Any) -> list[Any]:
    return columns if isinstance(columns, list) else [] if columns is None else [columns]


def _first(columns: Any) -> Any:
    """Return what the index says: a table of objects has no first name."""
    names = columns.get("names") if isinstance(columns, dict) else None
    named = isinstance(names, list) and names and isinstance(names[0], str)
    return names[0] if named and ("paths" in columns or "stored" in columns) else ""
