"""How much a load into other shards reads: one stored chunk, loaded as rows, columns and cells of a grid."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner
from dcp_storage.config import KIB, MIB
from dcp_storage.geometry import Box
from dcp_storage.observe import Advance, Operation
from integration.bench.contestants import OURS, OURS_RAW, STOCK, Place
from integration.bench.processes import bytes_read, in_fresh_process
from integration.bench.results import Reshard
from integration.bench.stores import LocalShelf
from tests.fake_ranks import Shards

_ITEM = torch.bfloat16.itemsize
_NOISE = 64 * KIB
"""What a process reads besides: counting itself, a module that is imported late."""


@dataclass(frozen=True)
class Case:
    """The boxes that one process loads.

    Attributes:
        compact: Whether they leave out no element between others that are wanted, so that the target holds for the
            elements; otherwise for the blocks that hold them.
    """

    name: str
    boxes: list[Box]
    compact: bool


def measure(shelf: LocalShelf, rows: int) -> list[Reshard]:
    """Return what each contestant reads in each case."""
    place = shelf.new_place()
    Path(place.url).mkdir()
    found = in_fresh_process(_measure, place, rows)
    shelf.delete(place)
    return found


def cases(rows: int, columns: int) -> list[Case]:
    """Return the ways to cut a matrix."""
    shape = (rows, columns)
    shards, grid = _grid(shape, 1, 8), _grid(shape, 4, 2)
    return [
        Case("rows 3/8", [_grid(shape, 8, 1)[3]], compact=True),
        Case("8 column shards", shards, compact=True),
        Case("columns 3/8", [shards[3]], compact=False),
        Case("grid of 4x2", grid, compact=True),
        Case("cell of 4x2", [grid[3]], compact=False),
    ]


def blocks_touched(shape: tuple[int, int], boxes: Sequence[Box], item_bytes: int, block_bytes: int) -> int:
    """Return the bytes of the blocks that hold an element of the boxes, found by looking at every row."""
    touched: set[int] = set()
    for box in boxes:
        for row in range(box.offsets[0], box.offsets[0] + box.sizes[0]):
            start = (row * shape[1] + box.offsets[1]) * item_bytes
            touched.update(range(start // block_bytes, (start + box.sizes[1] * item_bytes - 1) // block_bytes + 1))
    total = shape[0] * shape[1] * item_bytes
    return sum(min(block_bytes, total - number * block_bytes) for number in touched)


def _grid(shape: tuple[int, int], down: int, across: int) -> list[Box]:
    height, width = shape[0] // down, shape[1] // across
    return [Box((row * height, column * width), (height, width)) for row, column in product(range(down), range(across))]


class _Decoded:
    """Adds up the raw bytes of decoded blocks."""

    def __init__(self) -> None:
        self.raw_bytes = 0

    @contextmanager
    def __call__(self, operation: Operation, url: str, raw_bytes: int) -> Iterator[Advance]:
        yield self._advance

    def _advance(self, raw_bytes: int, stored_bytes: int) -> None:
        self.raw_bytes += raw_bytes


def _measure(place: Place, rows: int) -> list[Reshard]:
    warnings.simplefilter("ignore")
    matrix = torch.randn(rows, rows // 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    return [
        reshard
        for name, codec in ((OURS, Codec()), (OURS_RAW, Codec(compression="none")), (STOCK, None))
        for reshard in _contestant(name, codec, f"{place.url}/{name}", matrix)
    ]


def _contestant(name: str, codec: Codec | None, url: str, matrix: Tensor) -> Iterator[Reshard]:
    writer = AsyncStorageWriter(url, codec=codec) if codec else FileSystemWriter(url)
    dcp_save({"matrix": matrix}, storage_writer=writer, no_dist=True)
    sizes = {path.name: path.stat().st_size for path in Path(url).iterdir()}
    manifest = sizes.pop(".metadata")
    ratio = sum(sizes.values()) / matrix.nbytes
    shape, decoded = (matrix.shape[0], matrix.shape[1]), _Decoded()
    wanted = cases(*shape)
    _load(url, matrix, wanted[0], _reader(url, codec, decoded))  # modules are imported once in a process's life
    for case in wanted:
        decoded.raw_bytes = 0
        read = _load(url, matrix, case, _reader(url, codec, decoded))
        needed = sum(box.numel for box in case.boxes) * _ITEM
        blocks = blocks_touched(shape, case.boxes, _ITEM, MIB)
        allowed = int(1.1 * ratio * (needed if case.compact else blocks)) + 2 * MIB + manifest + _NOISE
        yield Reshard(name, case.name, needed, blocks, int(ratio * blocks), read, decoded.raw_bytes, allowed)


def _reader(url: str, codec: Codec | None, observer: _Decoded) -> Callable[[], dict[str, Any]]:
    """Return what makes the arguments of a load, so that both are made anew for each."""
    if codec is None:
        return lambda: {"storage_reader": FileSystemReader(url)}
    return lambda: {"storage_reader": AsyncStorageReader(url, observer=observer), "planner": ShardedLoadPlanner()}


def _load(url: str, matrix: Tensor, case: Case, reader: Callable[[], dict[str, Any]]) -> int:
    """Load a case, compare it, and return the bytes read."""
    shards = [(box, torch.zeros(box.sizes, dtype=matrix.dtype)) for box in case.boxes]
    state = {"matrix": Shards(tuple(matrix.shape), shards, matrix.dtype)}
    before = bytes_read()
    dcp_load(state, **reader(), no_dist=True)
    read = bytes_read() - before
    if not all(torch.equal(shard, matrix[box.slices]) for box, shard in shards):
        raise RuntimeError(f"{url}: {case.name} did not give back what was saved")
    return read
