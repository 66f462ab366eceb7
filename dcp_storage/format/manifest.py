"""The manifest, `.metadata`: its schema, and its way to bytes and back. `validate.py` says what must hold in it."""

from math import prod

import msgspec
import zstandard
from msgspec import Struct

from dcp_storage.collector import uncollected
from dcp_storage.errors import ConfigError, ManifestCorrupt, UnsupportedFormat
from dcp_storage.format.dtypes import ITEM_BYTES
from dcp_storage.format.zstd import MAGIC
from dcp_storage.geometry import Box, Shape

FORMAT = "dcp_storage"
VERSION = 1
MAX_JSON_BYTES = 1 << 31
"""A manifest that says it is larger is refused: 2 GiB of JSON describes some 20 million chunks."""
ANY_JSON_BYTES = 64 << 20
MAX_JSON_RATIO = 256
"""... and above 64 MiB one that expands to more than this: the check values of blocks do not compress that well."""


class Segment(Struct, frozen=True, array_like=True, gc=False):
    """Consecutive blocks of one item, back to back in one object.

    Attributes:
        object: Index into the manifest's object table.
        offset: Where in the object the first block begins, in bytes.
        lengths: Stored size of each block, in bytes.
        checks: The check values of the blocks in hexadecimal, one after another, all of one width.
    """

    object: int
    offset: int
    lengths: tuple[int, ...]
    checks: str

    @property
    def stop(self) -> int:
        """Where in the object the last block ends, in bytes."""
        return self.offset + sum(self.lengths)


class StoredObject(Struct, frozen=True, array_like=True, gc=False):
    """A data object: its name below the checkpoint's prefix and its size in bytes."""

    name: str
    size: int


class Chunk(Struct, frozen=True, gc=False):
    """A box of a tensor, stored row-major as one item."""

    offsets: Shape
    sizes: Shape
    segments: tuple[Segment, ...] = ()

    @property
    def box(self) -> Box:
        """The elements of the tensor that this chunk holds."""
        return Box(self.offsets, self.sizes)


class TensorEntry(Struct, frozen=True, gc=False):
    """A tensor: its dtype, its global shape and the chunks that tile it.

    `planes` is the number of byte planes that each of its blocks is laid out in; 1 is none.
    """

    dtype: str
    size: Shape
    planes: int
    chunks: tuple[Chunk, ...]

    def chunk_bytes(self, chunk: Chunk) -> int:
        """Return the raw bytes of one of its chunks."""
        return prod(chunk.sizes) * ITEM_BYTES[self.dtype]


class BytesEntry(Struct, frozen=True, gc=False):
    """An object that is no tensor, as the bytes that the planner made of it."""

    size: int
    segments: tuple[Segment, ...] = ()


class StoredCodec(Struct, frozen=True):
    """What a reader must know of the codec, and the level for those who wonder."""

    compression: str
    block_bytes: int
    level: int


class Manifest(Struct, frozen=True, kw_only=True):
    """All that a checkpoint is, but for its blocks.

    Attributes:
        save_id: Names this save, as no other.
        created: UTC time of the commit, ISO 8601.
        libraries: Versions of the packages that wrote it.
        world_size: Ranks that took part in the save.
        rank: The rank whose part this is, in a save without collectives, or of one rank alone; else `None`.
        attempt: What the parts of a save without collectives share, as no others.
        codec: How blocks are encoded.
        objects: The data objects.
        tensors: By fully qualified name.
        bytes: Entries that are no tensors, by fully qualified name.
        planner_data: For each fully qualified name its path in the nested state dict (`str` for a key, `int` for an
            index), or `None` where the planner did not flatten.
    """

    format: str = FORMAT
    version: int = VERSION
    save_id: str
    created: str
    libraries: dict[str, str]
    world_size: int
    rank: int | None = None
    attempt: str | None = None
    codec: StoredCodec
    objects: tuple[StoredObject, ...]
    tensors: dict[str, TensorEntry]
    bytes: dict[str, BytesEntry]
    planner_data: dict[str, tuple[str | int, ...]] | None = None


class _Header(Struct, frozen=True):
    format: str
    version: int


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as it is stored: one zstd frame, with content size and checksum, of UTF-8 JSON.

    Raises:
        ConfigError: It is larger than what `decode` accepts.
    """
    text = msgspec.json.encode(manifest)
    frame: bytes = zstandard.ZstdCompressor(level=3, write_content_size=True, write_checksum=True).compress(text)
    if len(text) > _most_json(frame):
        raise ConfigError(f"the manifest would be {len(text)} bytes of JSON, too many: raise Codec.block_bytes")
    return frame


def is_manifest(data: bytes) -> bool:
    """Return whether these bytes begin as a manifest of this package does; a stock `.metadata` is a pickle."""
    return data.startswith(MAGIC)


@uncollected
def decode(data: bytes, where: str) -> Manifest:
    """Decode and type-check a manifest that was read at `where`; `validate` must follow.

    Raises:
        ManifestCorrupt: It is damaged or does not follow the schema.
        UnsupportedFormat: It is of a later version of the format.
    """
    text = _decompress(data, where)
    try:
        header = msgspec.json.decode(text, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ManifestCorrupt(f"{where} is no manifest of dcp_storage: {error}", url=where) from error
    if header.format != FORMAT:
        raise ManifestCorrupt(f"{where} is no manifest of dcp_storage: its format is {header.format!r}", url=where)
    if header.version != VERSION:
        raise UnsupportedFormat(
            f"{where} is of format version {header.version} and this dcp_storage reads version {VERSION}: "
            "install a later dcp_storage",
            url=where,
        )
    try:
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ManifestCorrupt(f"{where} does not follow the manifest's schema: {error}", url=where) from error


def _most_json(frame: bytes) -> int:
    return min(MAX_JSON_BYTES, max(ANY_JSON_BYTES, MAX_JSON_RATIO * len(frame)))


def _decompress(data: bytes, where: str) -> bytes:
    try:
        header = zstandard.get_frame_parameters(data)
        if not 0 < header.content_size <= _most_json(data):
            raise ManifestCorrupt(f"{where} says that it holds {header.content_size} bytes of JSON", url=where)
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ManifestCorrupt(f"{where} is damaged: {error}", url=where) from error
