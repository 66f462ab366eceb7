"""`.metadata` as bytes: zstd frames one after another, each JSON on a line; the first, the head, lists the others."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import zstandard
from msgspec import Struct

from dcp_storage.config import KIB, MIB
from dcp_storage.errors import ConfigError, ManifestCorrupt, UnsupportedFormat
from dcp_storage.format.codecs.digests import DEFAULT_DIGEST, DIGEST_CHARS, digest_of
from dcp_storage.format.codecs.libzstd import MAGIC

FORMAT = "dcp_storage"
VERSION = 1
FEATURES: frozenset[str] = frozenset()
"""What a checkpoint may require of its readers, and this one knows."""

HEAD_BYTES = 16 * KIB
"""What is read of a manifest at first where its head alone is wanted: nearly all fit."""
MAX_HEAD_BYTES = MIB
MAX_FRAMES = 256
MAX_TEXT_BYTES = 1 << 31
"""A frame that says it is larger is refused."""
ANY_TEXT_BYTES = 64 << 20
MAX_TEXT_RATIO = 256
"""... and above 64 MiB one that expands to more than this: the check values of blocks do not compress that well."""
MAX_INFO_BYTES = 4 * KIB


class StoredCodec(Struct, frozen=True):
    """What a reader must know of the codec, and the level for those who wonder."""

    compression: str
    block_bytes: int
    level: int


class Frame(Struct, frozen=True, array_like=True):
    """A frame of the body.

    Attributes:
        kind: What it holds.
        size: Its stored size in bytes.
        digest: That of its stored bytes, in hexadecimal: by the head's algorithm, or XXH3-128.
        first: The first name in it.
    """

    kind: str
    size: int
    digest: str
    first: str


class Head(Struct, frozen=True, kw_only=True):
    """What a manifest says of the whole checkpoint.

    Attributes:
        requires: Features that a reader must know to read this checkpoint right.
        save_id: Unique to this save.
        created: UTC time of the commit, ISO 8601.
        libraries: Versions of the packages that wrote it.
        world_size: Ranks that took part in the save.
        rank: The rank whose part this is, in a save without collectives, or of one rank alone; else `None`.
        attempt: What the parts of a save without collectives share, as no others.
        codec: How blocks are encoded.
        digest: The algorithm of the digests of raw bytes and of frames, or `None` where there are none of raw bytes.
        info: What the caller said of it: any JSON object.
        tensors: Tensors in it.
        entries: Entries in it that are not tensors.
        objects: Data objects in it.
        raw_bytes: Size of all that it holds, in memory.
        stored_bytes: Size of its data objects.
        frames: The body.
    """

    format: str = FORMAT
    version: int = VERSION
    requires: tuple[str, ...] = ()
    save_id: str
    created: str
    libraries: dict[str, str]
    world_size: int
    rank: int | None = None
    attempt: str | None = None
    codec: StoredCodec
    digest: str | None = None
    info: dict[str, Any] = {}
    tensors: int
    entries: int
    objects: int
    raw_bytes: int
    stored_bytes: int
    frames: tuple[Frame, ...] = ()


class _Versions(Struct, frozen=True):
    format: str
    version: int
    requires: tuple[str, ...] = ()
    libraries: dict[str, str] = {}
    frames: Any = None


def check_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the caller's part of a head as it will be read.

    Raises:
        ConfigError: It is not a JSON object, or larger than 4 KiB.
    """
    try:
        text = json.dumps(dict(info), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"info is not a JSON object: {error}") from error
    if len(text) > MAX_INFO_BYTES:
        raise ConfigError(f"info is {len(text)} bytes of JSON; at most {MAX_INFO_BYTES} are kept")
    return dict(msgspec.json.decode(text))


def pack(head: Head, frames: Sequence[bytes]) -> bytes:
    """Return a manifest: the head's frame and those of the body, which the head lists already.

    Raises:
        ConfigError: The head is larger than a reader takes.
    """
    first = pack_frame(msgspec.json.encode(head))
    if len(first) > MAX_HEAD_BYTES:
        raise ConfigError(f"the head of the manifest would be {len(first)} bytes; at most {MAX_HEAD_BYTES} are read")
    return b"".join((first, *frames))


def pack_frame(text: bytes) -> bytes:
    """Return JSON as one frame, with content size and checksum.

    Raises:
        ConfigError: It is larger than what `unpack_frame` accepts.
    """
    text += b"\n"
    frame: bytes = zstandard.ZstdCompressor(level=3, write_content_size=True, write_checksum=True).compress(text)
    if len(text) > _most_text(frame):
        raise ConfigError(f"the manifest would be {len(text)} bytes of JSON, too many: raise Codec.block_bytes")
    return frame


def list_frame(kind: str, frame: bytes, first: str, digest: str | None) -> Frame:
    """Return what the head says of a frame."""
    return Frame(kind, len(frame), digest_of(frame, digest or DEFAULT_DIGEST), first)


def is_manifest(data: bytes) -> bool:
    """Return whether these bytes begin as a manifest of this package does; a stock `.metadata` is a pickle."""
    return data.startswith(MAGIC)


def unpack_head(data: bytes, where: str) -> tuple[Head, int]:
    """Return the head with which a manifest begins, and its stored size in bytes.

    Raises:
        ManifestCorrupt: It is damaged, not whole, or does not follow the schema.
        UnsupportedFormat: It is of another version of the format, or requires a feature that this one lacks.
    """
    text, size = _first_frame(data, where)
    try:
        _check_versions(msgspec.json.decode(text, type=_Versions), where)
        head = msgspec.json.decode(text, type=Head)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ManifestCorrupt(f"{where} does not follow the schema of a head: {error}", url=where) from error
    if head.digest is not None and head.digest not in DIGEST_CHARS:
        raise UnsupportedFormat(
            f"{where} has digests by {head.digest!r:.40}, which this dcp_storage does not know: install a later one",
            url=where,
        )
    if len(head.frames) > MAX_FRAMES or any(frame.size < 0 for frame in head.frames):
        raise ManifestCorrupt(f"{where} has {len(head.frames)} frames, or one of a negative size", url=where)
    return head, size


def _first_frame(data: bytes, where: str) -> tuple[bytes, int]:
    try:
        content = zstandard.get_frame_parameters(data).content_size
        if not 0 < content <= _most_text(data[:MAX_HEAD_BYTES]):
            raise ManifestCorrupt(f"{where} says that it holds {content} bytes of JSON", url=where)
        stream = zstandard.ZstdDecompressor().decompressobj()
        text = stream.decompress(data)
    except zstandard.ZstdError as error:
        raise ManifestCorrupt(f"{where} is damaged: {error}", url=where) from error
    if not stream.eof:
        raise ManifestCorrupt(f"{where} is damaged: it ends within its head", url=where)
    return text, len(data) - len(stream.unused_data)


def _check_versions(head: _Versions, where: str) -> None:
    wrote = head.libraries.get("dcp_storage", "an unknown version")
    if head.format != FORMAT:
        raise ManifestCorrupt(f"{where} is not a manifest of dcp_storage: its format is {head.format!r}", url=where)
    if head.version != VERSION:
        raise UnsupportedFormat(
            f"{where} is of format version {head.version} and this dcp_storage reads version {VERSION}: "
            "install a later dcp_storage",
            url=where,
        )
    if unknown := sorted(set(head.requires) - FEATURES):
        raise UnsupportedFormat(
            f"{where}, written by dcp_storage {wrote}, requires {', '.join(unknown)}, which this dcp_storage does not "
            "know: install that version or a later one",
            url=where,
        )
    if head.frames is None:
        raise UnsupportedFormat(
            f"{where} is of dcp_storage {wrote} before its format was final: load it with that, and save it anew",
            url=where,
        )


def split_frames(head: Head, data: bytes, start: int, where: str) -> list[bytes]:
    """Return the frames of the body, which begins at `start`.

    Raises:
        ManifestCorrupt: They are not those that the head lists.
    """
    stop = start + sum(frame.size for frame in head.frames)
    if stop != len(data):
        raise ManifestCorrupt(f"{where} is damaged: it is {len(data)} bytes long in place of {stop}", url=where)
    frames = []
    for frame in head.frames:
        frames.append(check_frame(head, frame, data[start : start + frame.size], where))
        start += frame.size
    return frames


def check_frame(head: Head, listed: Frame, frame: bytes, where: str) -> bytes:
    """Return a frame of the body, if it is the one that the head lists.

    Raises:
        ManifestCorrupt: It is damaged, or of another save.
    """
    if len(frame) != listed.size or digest_of(frame, head.digest or DEFAULT_DIGEST) != listed.digest:
        raise ManifestCorrupt(
            f"{where} is damaged: a frame with {listed.kind} is not the one that was written", url=where
        )
    return frame


def unpack_frame(frame: bytes, where: str) -> bytes:
    """Return the JSON of a frame of the body.

    Raises:
        ManifestCorrupt: It is not a frame, or says that it is larger than any is.
    """
    try:
        content = zstandard.get_frame_parameters(frame).content_size
        if not 0 < content <= _most_text(frame):
            raise ManifestCorrupt(f"{where} says that a frame holds {content} bytes of JSON", url=where)
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ManifestCorrupt(f"{where} is damaged: {error}", url=where) from error


def _most_text(frame: bytes) -> int:
    return min(MAX_TEXT_BYTES, max(ANY_TEXT_BYTES, MAX_TEXT_RATIO * len(frame)))
