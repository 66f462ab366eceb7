"""What lies in a checkpoint's directory beside the checkpoint: left by a save that died, or somebody else's."""

from collections.abc import Iterable

from dcp_storage.format.legacy import StockManifest
from dcp_storage.format.manifest import Manifest
from dcp_storage.format.names import MANIFEST, parse_part_manifest, save_of


def object_names(manifest: Manifest | StockManifest | None) -> set[str]:
    """Return the data objects that a manifest names; none where nothing was committed."""
    if manifest is None:
        return set()
    if isinstance(manifest, StockManifest):
        return {item.object_name for item in manifest.storage.values()}
    return {stored.name for stored in manifest.objects}


def split(listed: Iterable[str], manifest: Manifest | StockManifest | None) -> tuple[list[str], list[str]]:
    """Return what is there and not part of the checkpoint: orphans of this package's saves, and foreign objects.

    The manifests of single ranks are the checkpoint where there is no `.metadata` and they are of the attempt that is
    loaded, and left over elsewhere.
    """
    listed = set(listed)
    unnamed = sorted(listed - object_names(manifest) - {MANIFEST})
    if MANIFEST not in listed:
        loaded = getattr(manifest, "attempt", None)
        unnamed = [name for name in unnamed if not (part := parse_part_manifest(name)) or part.attempt != loaded]
    orphans = [name for name in unnamed if save_of(name)]
    return orphans, [name for name in unnamed if not save_of(name)]
