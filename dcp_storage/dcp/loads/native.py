"""Loads checkpoints of this package into a plan: the blocks that are needed are fetched and decoded once."""

from typing import NamedTuple

from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from dcp_storage.collector import gc_paused
from dcp_storage.dcp.dtypes import dtype_from_name
from dcp_storage.dcp.kinds.boxes import read_box
from dcp_storage.dcp.loads.destination import Destinations
from dcp_storage.dcp.loads.scatter import Scatter
from dcp_storage.dcp.loads.sharing import shared_items
from dcp_storage.dcp.loads.targets import BytesTarget, ChunkTarget
from dcp_storage.dcp.metadata import find_chunk
from dcp_storage.errors import CoverageError
from dcp_storage.format.dtypes import ITEM_BYTES
from dcp_storage.format.manifest.frames import StoredCodec
from dcp_storage.format.manifest.items import TensorEntry
from dcp_storage.format.manifest.manifest import Manifest
from dcp_storage.geometry import contains
from dcp_storage.transfer.context import Context
from dcp_storage.transfer.load import LoadItem, load_items
from dcp_storage.transfer.ranges import needed_blocks


async def load_native(context: Context, manifest: Manifest, plan: LoadPlan, planner: LoadPlanner) -> None:
    """Read every item of a plan. Planner hooks are called on this thread only.

    Raises:
        BlockCorrupt: A block failed its check twice.
        CoverageError: The plan reads something that is not in the checkpoint.
        ObjectNotFound: An object is missing.
        StoreError: A range could not be read.
    """
    scatter = Scatter()
    items = _load_items(manifest, plan, planner, scatter)
    await load_items(context, items, manifest.object_names, manifest.codec)
    scatter.finish()


class _Chunk(NamedTuple):
    """A stored chunk and all reads of it."""

    fqn: str
    number: int
    tensor: TensorEntry
    reads: list[ReadItem]
    shared: bool


@gc_paused
def _load_items(manifest: Manifest, plan: LoadPlan, planner: LoadPlanner, scatter: Scatter) -> list[LoadItem]:
    """Group the reads by stored chunk: resharding may read one many times."""
    items = []
    chunks: dict[tuple[str, int], _Chunk] = {}
    for read, shared in zip(plan.items, shared_items(plan), strict=True):
        fqn = read.storage_index.fqn
        if read.type == LoadItemType.BYTE_IO:
            items.append(_bytes_item(manifest, read, planner, shared=shared))
            continue
        tensor = manifest.tensors.get(fqn)
        if tensor is None:
            raise _not_stored(fqn)
        number = find_chunk(read.storage_index, tensor.boxes)
        chunks.setdefault((fqn, number), _Chunk(fqn, number, tensor, [], shared)).reads.append(read)
    destinations = Destinations(planner)
    items.extend(_chunk_item(chunk, manifest.codec, destinations, scatter) for chunk in chunks.values())
    return items


def _bytes_item(manifest: Manifest, read: ReadItem, planner: LoadPlanner, *, shared: bool) -> LoadItem:
    fqn = read.storage_index.fqn
    if fqn not in manifest.bytes:
        raise _not_stored(fqn)
    entry = manifest.bytes[fqn]
    blocks = range(-(-entry.size // manifest.codec.block_bytes))
    return LoadItem(fqn, entry.size, 1, entry.segments, blocks, BytesTarget(read, entry.size, planner), shared)


def _chunk_item(chunk: _Chunk, codec: StoredCodec, destinations: Destinations, scatter: Scatter) -> LoadItem:
    fqn, number, tensor, reads, shared = chunk
    shape = tensor.boxes[number].sizes
    boxes = [read_box(read) for read in reads]
    for box in boxes:
        if not contains(shape, box):
            raise CoverageError(f"{fqn}: the plan reads {box} of a chunk of shape {list(shape)}", fqn=fqn)
    wanted = needed_blocks(shape, boxes, ITEM_BYTES[tensor.dtype], codec.block_bytes)
    target = ChunkTarget(shape, dtype_from_name(tensor.dtype), reads, destinations, scatter)
    return LoadItem(fqn, target.nbytes, tensor.planes, tensor.segments(number), wanted, target, shared)


def _not_stored(fqn: str) -> CoverageError:
    return CoverageError(f"the plan reads {fqn}, which is not in the checkpoint", fqn=fqn)
