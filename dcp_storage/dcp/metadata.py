"""DCP's `Metadata` of a checkpoint."""

from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from dcp_storage.collector import gc_paused
from dcp_storage.dcp.kinds.boxes import chunk_box
from dcp_storage.dcp.stored import StoredEntries
from dcp_storage.errors import CoverageError
from dcp_storage.format.contents import Contents
from dcp_storage.format.manifest.boxes import Boxes
from dcp_storage.geometry import tiling_fault


def is_whole(metadata: Metadata) -> bool:
    """Return whether the chunks of every tensor tile it."""
    entries = [entry for entry in metadata.state_dict_metadata.values() if isinstance(entry, TensorStorageMetadata)]
    return all(tiling_fault(tuple(entry.size), list(map(chunk_box, entry.chunks))) is None for entry in entries)


@gc_paused
def to_metadata(manifest: Contents) -> Metadata:
    """Return the `Metadata` for DCP's planners; the manifest itself is its `storage_data`.

    Raises:
        ManifestCorrupt: The names of its entries are invalid.
    """
    manifest.check_names()
    return Metadata(
        StoredEntries(manifest),  # type: ignore[arg-type]
        planner_data=manifest.planner_data,
        storage_data=manifest,
        version=manifest.version,
    )


def find_chunk(index: MetadataIndex, boxes: Boxes) -> int:
    """Return the number of the chunk that begins at an index's offset; of several (empty ones), the one it hints at.

    Raises:
        CoverageError: No chunk begins there.
    """
    wanted = tuple(index.offset or ())
    if index.index is not None and index.index < len(boxes) and boxes[index.index].offsets == wanted:
        return index.index
    number = boxes.at(wanted)
    if number is None:
        raise CoverageError(f"{index.fqn} has no chunk that begins at {list(wanted)}", fqn=index.fqn)
    return number
