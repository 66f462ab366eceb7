"""One manifest, read from its store, decoded and validated."""

from msgspec.structs import replace
from xxhash import xxh3_128_hexdigest

from dcp_storage.errors import ManifestCorrupt, UnsupportedFormat
from dcp_storage.format.contents import Contents
from dcp_storage.format.manifest.frames import HEAD_BYTES, MAX_HEAD_BYTES, Head, is_manifest, unpack_head
from dcp_storage.format.manifest.manifest import decode
from dcp_storage.format.stock.manifest import decode_stock_metadata
from dcp_storage.store.base import Store


async def fetch_manifest(store: Store, name: str) -> Contents:
    """Read a manifest; one that is damaged is read once more, as a block is.

    Raises:
        ObjectNotFound: It is not there.
        ManifestCorrupt: It is damaged, or cannot be right.
        UnsupportedFormat: It is of a later format, or a pickle that names what no stock checkpoint does.
        StoreError: It could not be read.
    """
    where = f"{store.url}/{name}"
    try:
        return _decode(await store.get(name), where)
    except ManifestCorrupt:
        return _decode(await store.get(name), where)


async def fetch_head(store: Store, name: str) -> Head:
    """Read the head of a manifest of this package alone, with one small request where it is not very large.

    Raises:
        ObjectNotFound: There is no such manifest.
        ManifestCorrupt: It is damaged, or cannot be right.
        UnsupportedFormat: It is of a later format, or a stock checkpoint's.
        StoreError: It could not be read.
    """
    where = f"{store.url}/{name}"
    data = bytes(await store.get_range(name, 0, HEAD_BYTES))
    if not is_manifest(data):
        raise UnsupportedFormat(f"{where} is a stock checkpoint's, which has no head", url=where)
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
