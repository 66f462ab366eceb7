"""Reads, decodes and validates one manifest."""

from msgspec.structs import replace
from xxhash import xxh3_128_hexdigest

from dcp_storage.errors import ManifestCorrupt, UnsupportedFormat
from dcp_storage.format.contents import Contents
from dcp_storage.format.manifest.frames import HEAD_BYTES, MAX_HEAD_BYTES, Head, is_manifest, unpack_head
from dcp_storage.format.manifest.manifest import decode
from dcp_storage.format.names import ObjectName
from dcp_storage.format.stock.manifest import decode_stock_metadata
from dcp_storage.store.base import Store


async def fetch_manifest(store: Store, name: ObjectName) -> Contents:
    """Read a manifest; if it is damaged, read it once more, like a block.

    Raises:
        ObjectNotFound: It is missing.
        ManifestCorrupt: It is damaged or invalid.
        UnsupportedFormat: It has a newer format, or is a pickle that names globals no stock checkpoint uses.
        StoreError: It could not be read.
    """
    where = f"{store.url}/{name}"
    try:
        return _decode(await store.get(name), where)
    except ManifestCorrupt:
        return _decode(await store.get(name), where)


async def fetch_head(store: Store, name: ObjectName) -> Head:
    """Read only the head of a manifest of this package, with one small request unless it is very large.

    Raises:
        ObjectNotFound: There is no such manifest.
        ManifestCorrupt: It is damaged or invalid.
        UnsupportedFormat: It has a newer format, or belongs to a stock checkpoint.
        StoreError: It could not be read.
    """
    where = f"{store.url}/{name}"
    data = bytes(await store.get_range(name, 0, HEAD_BYTES))
    if not is_manifest(data):
        raise UnsupportedFormat(f"{where} belongs to a stock checkpoint, which has no head", url=where)
    try:
        return unpack_head(data, where)[0]
    except ManifestCorrupt:
        if len(data) < HEAD_BYTES:
            raise
    return unpack_head(bytes(await store.get_range(name, 0, MAX_HEAD_BYTES)), where)[0]


def _decode(data: bytes, where: str) -> Contents:
    if is_manifest(data):
        return decode(data, where)
    return replace(decode_stock_metadata(data, where=where), identity=xxh3_128_hexdigest(data))
