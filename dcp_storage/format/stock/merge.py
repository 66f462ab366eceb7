"""Merges the stock manifests that the ranks of a save without collectives each wrote."""

from collections.abc import Mapping

from msgspec.structs import replace
from xxhash import xxh3_128_hexdigest

from dcp_storage.errors import ManifestCorrupt
from dcp_storage.format.stock.manifest import StockItem, StockManifest, StockTensor, StorageKey


def merge_stock(parts: Mapping[int, StockManifest], where: str) -> StockManifest:
    """Merge the ranks' parts into the whole checkpoint, as DCP's own writers store it without collectives.

    The parts do not say how many ranks there were. If the last ones are missing, only a load that needs them fails.

    Raises:
        ManifestCorrupt: The part of a rank below the highest is missing, or two parts disagree on a tensor.
    """
    missing = sorted(set(range(max(parts))) - parts.keys())
    if missing:
        raise ManifestCorrupt(
            f"{where} was saved without collectives and lacks the parts of ranks {missing}", url=where
        )
    tensors: dict[str, StockTensor] = {}
    storage: dict[StorageKey, StockItem] = {}
    planner_data: dict[str, tuple[str | int, ...]] = {}
    for rank, part in sorted(parts.items()):
        for fqn, tensor in part.tensors.items():
            known = tensors.setdefault(fqn, tensor)
            if (known.dtype, known.size) != (tensor.dtype, tensor.size):
                raise ManifestCorrupt(f"{where}: the ranks' manifests disagree on {fqn} (rank {rank})", url=where)
            tensors[fqn] = replace(known, chunks=tuple(dict.fromkeys((*known.chunks, *tensor.chunks))))
        storage = part.storage | storage
        planner_data = (part.planner_data or {}) | planner_data
    return replace(
        parts[0],
        tensors=tensors,
        bytes=tuple(dict.fromkeys(fqn for _, part in sorted(parts.items()) for fqn in part.bytes)),
        storage=storage,
        planner_data=None if parts[0].planner_data is None else planner_data,
        save_id=None,  # each rank has one of its own
        identity=xxh3_128_hexdigest("".join(part.identity for _, part in sorted(parts.items())).encode()),
    )
