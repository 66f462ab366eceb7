"""Loads checkpoints of this package into a plan: the blocks that are needed are fetched and decoded once."""

from collections import defaultdict
from math import prod

from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from dcp_storage.collector import gc_paused
from dcp_storage.dcp.dtypes import dtype_from_name
from dcp_storage.dcp.kinds.boxes import read_box
from dcp_storage.dcp.loads.targets import BytesTarget, ChunkTarget
from dcp_storage.dcp.metadata import find_chunk
from dcp_storage.errors import CoverageError
from dcp_storage.format.dtypes import ITEM_BYTES
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
    items = _load_items(manifest, plan, planner)
    await load_items(context, items, manifest.object_names, manifest.codec)


@gc_paused
def _load_items(manifest: Manifest, plan: LoadPlan, planner: LoadPlanner) -> list[LoadItem]:
    """Group the reads by stored chunk: resharding may read one many times."""
    items = []
    by_chunk: defaultdict[tuple[str, int], list[ReadItem]] = defaultdict(list)
    for read in plan.items:
        fqn = read.storage_index.fqn
        if read.type == LoadItemType.BYTE_IO:
            items.append(_bytes_item(manifest, fqn, read, planner))
        elif tensor := manifest.tensors.get(fqn):
            by_chunk[fqn, find_chunk(read.storage_index, tensor.boxes)].append(read)
        else:
            raise _not_stored(fqn)
    items.extend(_chunk_item(manifest, fqn, number, reads, planner) for (fqn, number), reads in by_chunk.items())
    return items


def _bytes_item(manifest: Manifest, fqn: str, read: ReadItem, planner: LoadPlanner) -> LoadItem:
    if fqn not in manifest.bytes:
        raise _not_stored(fqn)
    entry = manifest.bytes[fqn]
    blocks = range(-(-entry.size // manifest.codec.block_bytes))
    return LoadItem(fqn, entry.size, 1, entry.segments, blocks, BytesTarget(read, entry.size, planner))


def _chunk_item(manifest: Manifest, fqn: str, number: int, reads: list[ReadItem], planner: LoadPlanner) -> LoadItem:
    tensor = manifest.tensors[fqn]
    shape = tensor.boxes[number].sizes
    boxes = [read_box(read) for read in reads]
    for box in boxes:
        if not contains(shape, box):
            raise CoverageError(f"{fqn}: the plan reads {box} of a chunk of shape {list(shape)}", fqn=fqn)
    item_bytes = ITEM_BYTES[tensor.dtype]
    wanted = needed_blocks(shape, boxes, item_bytes, manifest.codec.block_bytes)
    target = ChunkTarget(shape, dtype_from_name(tensor.dtype), reads, planner)
    return LoadItem(fqn, prod(shape) * item_bytes, tensor.planes, tensor.segments(number), wanted, target)


def _not_stored(fqn: str) -> CoverageError:
    return CoverageError(f"the plan reads {fqn}, which is not in the checkpoint", fqn=fqn)
