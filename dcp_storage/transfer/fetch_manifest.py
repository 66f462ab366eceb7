"""One manifest, read from its store, decoded and validated."""

from dcp_storage.errors import ManifestCorrupt
from dcp_storage.format.legacy import StockManifest, decode_stock_metadata
from dcp_storage.format.manifest import Manifest, decode, is_manifest
from dcp_storage.format.validate import validate
from dcp_storage.store.base import Store


async def fetch_manifest(store: Store, name: str) -> Manifest | StockManifest:
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


def _decode(data: bytes, where: str) -> Manifest | StockManifest:
    return validate(decode(data, where), where) if is_manifest(data) else decode_stock_metadata(data, where=where)
