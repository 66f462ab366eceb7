"""`.metadata` as bytes: a sequence of zstd frames, each one line of JSON; the first, the head, lists the others."""

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
"""Features that a checkpoint may require of its readers, and that this version supports."""

HEAD_BYTES = 16 * KIB
"""How much of a manifest is read at first if only its head is needed: nearly all heads fit."""
MAX_HEAD_BYTES = MIB
MAX_FRAMES = 256
MAX_TEXT_BYTES = 1 << 31
"""A frame that claims to be larger is refused."""
ANY_TEXT_BYTES = 64 << 20
MAX_TEXT_RATIO = 256
"""... and so is one above 64 MiB with a larger ratio than this: the check values of blocks compress less well."""
MAX_INFO_BYTES = 4 * KIB


class StoredCodec(Struct, frozen=True):
    """What a reader must know about the codec, and the level for information."""

    compression: str
    block_bytes: int
    level: int


class Frame(Struct, frozen=True, array_like=True):
    """A frame of the body.

    Attributes:
        kind: The kind of its contents.
        size: Its stored size in bytes.
        digest: Digest of its stored bytes, in hexadecimal: with the head's algorithm, or XXH3-128.
        first: The first name in it.
    """

    kind: str
    size: int
    digest: str
    first: str


class Head(Struct, frozen=True, kw_only=True):
    """The part of a manifest that describes the whole checkpoint.

    Attributes:
        requires: Features that a reader must support to read this checkpoint correctly.
        save_id: Unique to this save.
        created: UTC time of the commit, ISO 8601.
        libraries: Versions of the packages that wrote it.
        world_size: Number of ranks that took part in the save.
        rank: The rank whose part this is, in a save without collectives or of a single rank; else `None`.
        attempt: Id shared by the parts of one save without collectives, and by no others.
        codec: How blocks are encoded.
        digest: The algorithm of the digests of raw bytes and of frames, or `None` without digests of raw bytes.
        info: Any JSON object, given by the caller.
        tensors: Number of tensors.
        entries: Number of entries that are not tensors.
        objects: Number of data objects.
        raw_bytes: Total size of the contents in memory.
        stored_bytes: Total size of the data objects.
        frames: The frames of the body.
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
    """Return the caller's `info` as it will be read back.

    Raises:
        ConfigError: It is not a JSON object, or larger than 4 KiB.
    """
    try:
        text = json.dumps(dict(info), allow_nan=False).encode()
        found = dict(msgspec.json.decode(text))
    except (TypeError, ValueError, RecursionError, msgspec.DecodeError) as error:
        raise ConfigError(f"info is not a JSON object: {error}") from error
    if len(text) > MAX_INFO_BYTES:
        raise ConfigError(f"info is {len(text)} bytes of JSON; at most {MAX_INFO_BYTES} are allowed")
    return found


def pack(head: Head, frames: Sequence[bytes]) -> bytes:
    """Return a manifest: the head's frame and those of the body, which the head already lists.

    Raises:
        ConfigError: The head is larger than a reader accepts.
    """
    first = pack_frame(msgspec.json.encode(head))
    if len(first) > MAX_HEAD_BYTES:
        raise ConfigError(f"the head of the manifest would be {len(first)} bytes; at most {MAX_HEAD_BYTES} are allowed")
    return b"".join((first, *frames))


def pack_frame(text: bytes) -> bytes:
    """Return JSON as one frame, with content size and checksum.

    Raises:
        ConfigError: It is larger than `unpack_frame` accepts.
    """
    text += b"\n"
    frame: bytes = zstandard.ZstdCompressor(level=3, write_content_size=True, write_checksum=True).compress(text)
    if len(text) > _most_text(frame):
        raise ConfigError(f"the manifest would be {len(text)} bytes of JSON, too many: increase Codec.block_bytes")
    return frame


def list_frame(kind: str, frame: bytes, first: str, digest: str | None) -> Frame:
    """Return the head's record of a frame."""
    return Frame(kind, len(frame), digest_of(frame, digest or DEFAULT_DIGEST), first)


def is_manifest(data: bytes) -> bool:
    """Return whether these bytes begin like a manifest of this package; a stock `.metadata` is a pickle."""
    return data.startswith(MAGIC)


def unpack_head(data: bytes, where: str) -> tuple[Head, int]:
    """Return the head of a manifest, and its stored size in bytes.

    Raises:
        ManifestCorrupt: It is damaged, incomplete, or does not follow the schema.
        UnsupportedFormat: It has another format version, or requires a feature that this version lacks.
    """
    text, size = _first_frame(data, where)
    try:
        _check_versions(msgspec.json.decode(text, type=_Versions), where)
        head = msgspec.json.decode(text, type=Head)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ManifestCorrupt(f"{where} does not follow the schema of a head: {error}", url=where) from error
    if head.digest is not None and head.digest not in DIGEST_CHARS:
        raise UnsupportedFormat(
            f"{where} has {head.digest!r:.40} digests, which this dcp_storage does not support: install a later one",
            url=where,
        )
    if len(head.frames) > MAX_FRAMES or any(frame.size < 0 for frame in head.frames):
        raise ManifestCorrupt(f"{where} has too many frames ({len(head.frames)}) or a negative frame size", url=where)
    return head, size


def _first_frame(data: bytes, where: str) -> tuple[bytes, int]:
    try:
        content = zstandard.get_frame_parameters(data).content_size
        if not 0 < content <= _most_text(data[:MAX_HEAD_BYTES]):
            raise ManifestCorrupt(f"{where} claims to contain {content} bytes of JSON", url=where)
        stream = zstandard.ZstdDecompressor().decompressobj()
        text = stream.decompress(data)
    except zstandard.ZstdError as error:
        raise ManifestCorrupt(f"{where} is damaged: {error}", url=where) from error
    if not stream.eof:
        raise ManifestCorrupt(f"{where} is damaged: it ends inside its head", url=where)
    return text, len(data) - len(stream.unused_data)


def _check_versions(head: _Versions, where: str) -> None:
    wrote = head.libraries.get("dcp_storage", "an unknown version")
    if head.format != FORMAT:
        raise ManifestCorrupt(f"{where} is not a manifest of dcp_storage: its format is {head.format!r}", url=where)
    if head.version != VERSION:
        raise UnsupportedFormat(
            f"{where} has format version {head.version}, but this dcp_storage reads version {VERSION}: "
            "install a later dcp_storage",
            url=where,
        )
    if unknown := sorted(set(head.requires) - FEATURES):
        raise UnsupportedFormat(
            f"{where}, written by dcp_storage {wrote}, requires {', '.join(unknown)}, which this dcp_storage does not "
            "support: install that version or a later one",
            url=where,
        )
    if head.frames is None:
        raise UnsupportedFormat(
            f"{where} was written by dcp_storage {wrote}, before the format was final: load it with that version and "
            "save it again",
            url=where,
        )


def split_frames(head: Head, data: bytes, start: int, where: str) -> list[bytes]:
    """Return the frames of the body, which begins at `start`.

    Raises:
        ManifestCorrupt: They are not the ones that the head lists.
    """
    stop = start + sum(frame.size for frame in head.frames)
    if stop != len(data):
        raise ManifestCorrupt(f"{where} is damaged: it is {len(data)} bytes long instead of {stop}", url=where)
    frames = []
    for frame in head.frames:
        frames.append(check_frame(head, frame, data[start : start + frame.size], where))
        start += frame.size
    return frames


def check_frame(head: Head, listed: Frame, frame: bytes, where: str) -> bytes:
    """Return a frame of the body, if it is the one that the head lists.

    Raises:
        ManifestCorrupt: It is damaged, or from another save.
    """
    if len(frame) != listed.size or digest_of(frame, head.digest or DEFAULT_DIGEST) != listed.digest:
        raise ManifestCorrupt(
            f"{where} is damaged: a frame of {listed.kind} is not the one that was written", url=where
        )
    return frame


def unpack_frame(frame: bytes, where: str) -> bytes:
    """Return the JSON of a frame of the body.

    Raises:
        ManifestCorrupt: It is not a frame, or claims to be larger than allowed.
    """
    try:
        content = zstandard.get_frame_parameters(frame).content_size
        if not 0 < content <= _most_text(frame):
            raise ManifestCorrupt(f"{where} has a frame that claims to contain {content} bytes of JSON", url=where)
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ManifestCorrupt(f"{where} is damaged: {error}", url=where) from error


def _most_text(frame: bytes) -> int:
    return min(MAX_TEXT_BYTES, max(ANY_TEXT_BYTES, MAX_TEXT_RATIO * len(frame)))
