"""Every layout saved, and loaded into every other, by one contestant; what the ranks make of it, case by case."""

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner, ShardedSavePlanner
from integration.demo.ranks import Rank, Ranks
from integration.resharding.layouts import Layout, layouts, mesh, parts, upstream
from tests.states import bits, random_bits

SHAPES = {1: (13,), 2: (13, 9), 3: (9, 5, 4)}
RIGHT = "right"
CONTESTANTS = ("ours", "ours, no compression", "default planners", "default planners, no compression", "stock")


@dataclass(frozen=True)
class Matrix:
    """What to run: tensors of so many dimensions, by one contestant, from and into these kinds of layouts."""

    contestant: str
    dims: int
    scratch: Path
    meta: bool = False
    only_upstream: bool = False


Outcomes = dict[tuple[str, str], str]
"""For each layout saved and each loaded: `right`, `wrong: ...` or `raised at ...`."""


def run_matrices(matrices: Sequence[Matrix], *, world: int = 4, limit_s: float = 240) -> list[Outcomes]:
    """Run them one after the other in one set of ranks; the worst that a rank says of a case is its outcome."""
    outcomes: list[Outcomes] = [{} for _ in matrices]
    with Ranks(world, run_in_rank, list(matrices), limit_s=limit_s) as ranks:
        for event in ranks.events():
            number, of_rank = event.data
            for case, outcome in of_rank.items():
                outcomes[number][case] = max(outcomes[number].get(case, ""), outcome, key=_badness)
    return outcomes


def _badness(outcome: str) -> tuple[int, str]:
    return (["", RIGHT, "raised", "wrong"].index(outcome.partition(" ")[0].rstrip(":")), outcome)


def run_in_rank(rank: Rank, matrices: list[Matrix]) -> None:
    logging.disable(logging.WARNING)  # DCP's planner warns of each case that it is about to refuse
    for ranks, shape in ((tuple(range(rank.world_size)), None), ((0, 1, 2, 3), (2, 2)), ((1, 2), None)):
        if max(ranks) < rank.world_size:
            mesh(ranks, shape)  # collective: on all ranks, in one order
    for number, matrix in enumerate(matrices):
        rank.report("outcomes", (number, _run(rank, matrix, matrix.scratch / str(number))))


def _run(rank: Rank, matrix: Matrix, scratch: Path) -> Outcomes:
    full = whole_tensor(matrix.dims)
    known = (upstream if matrix.only_upstream else layouts)(rank.world_size, matrix.dims)
    outcomes: Outcomes = {}
    places = count()

    def try_save(sources: Sequence[Layout]) -> None:
        place = scratch / str(next(places))
        state = {layout.name: layout.build(rank.rank, full) for layout in sources}
        save(matrix.contestant, state, place)
        for target in known:
            in_halves(sources, partial(try_load, target, place), failed(target))
        dist.barrier()
        shutil.rmtree(place, ignore_errors=True)

    def try_load(target: Layout, place: Path, sources: Sequence[Layout]) -> None:
        outcomes.update(_load(rank, matrix, place, sources, target))

    def failed(target: Layout) -> Callable[[Layout, str], None]:
        return lambda source, error: outcomes.update({(source.name, target.name): f"raised at load: {error}"})

    def failed_save(source: Layout, error: str) -> None:
        outcomes.update({(source.name, target.name): f"raised at save: {error}" for target in known})

    in_halves(known, try_save, failed_save)
    return outcomes


def in_halves(some: Sequence[Layout], attempt: Callable[..., None], failed: Callable[[Layout, str], None]) -> None:
    """Attempt all at once; where that fails, halves of it, down to the single ones that do; in lockstep."""
    try:
        attempt(some)
    except (CheckpointException, NotImplementedError, RuntimeError, ValueError, AssertionError) as error:
        message = _first_cause(error)
    else:
        message = None
    if any_rank(message is not None):
        if len(some) == 1:
            failed(some[0], message or "on another rank")
        else:
            in_halves(some[: len(some) // 2], attempt, failed)
            in_halves(some[len(some) // 2 :], attempt, failed)


def any_rank(here: bool) -> bool:
    flag = torch.tensor([int(here)])
    dist.all_reduce(flag)
    return bool(flag.item())


def _first_cause(error: BaseException) -> str:
    failures = getattr(error, "failures", None) or {}
    cause = next((failure[0] for failure in failures.values()), error)
    return f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"


def _load(
    rank: Rank, matrix: Matrix, place: Path, sources: Iterable[Layout], target: Layout
) -> dict[tuple[str, str], str]:
    full = whole_tensor(matrix.dims)
    state = {source.name: blank(target.build(rank.rank, full), meta=matrix.meta) for source in sources}
    load(matrix.contestant, state, place)
    expected = parts(target.build(rank.rank, full))
    return {(source, target.name): compare(parts(value), expected) for source, value in state.items()}


def blank(value: Any, *, meta: bool) -> Any:
    """Return the value with other bits in all of its memory, or with none."""
    if meta:
        return _to_meta(value)
    for tensor in parts(value):
        if tensor.numel():
            tensor.copy_(random_bits(tensor.dtype, tuple(tensor.shape)))
    return value


def _to_meta(value: Any) -> Any:
    if isinstance(value, DTensor):
        return DTensor(_to_meta(value._local_tensor), value._spec, requires_grad=False)
    if isinstance(value, LocalShardsWrapper):
        return LocalShardsWrapper([shard.to("meta") for shard in value.local_shards()], value.local_offsets())
    return value.to("meta") if type(value) is Tensor else value


def compare(found: list[Tensor], expected: list[Tensor]) -> str:
    """Compare a rank's memory with what should be in it, bit for bit."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return f"wrong: shapes {[list(tensor.shape) for tensor in found]}"
    different = sum(int((bits(a) != bits(b)).sum()) for a, b in zip(found, expected, strict=True))
    return f"wrong: {different} bytes" if different else RIGHT


def whole_tensor(dims: int) -> Tensor:
    torch.manual_seed(dims)
    return random_bits(torch.float32, SHAPES[dims])


def save(contestant: str, state: dict[str, Any], place: Path) -> None:
    if contestant == "stock":
        dcp.save(state, storage_writer=dcp.FileSystemWriter(place, sync_files=False))
        return
    codec = Codec("none" if contestant.endswith("no compression") else "zstd", block_bytes=4096)
    planner = ShardedSavePlanner() if contestant.startswith("ours") else None
    dcp.save(state, storage_writer=AsyncStorageWriter(place, codec=codec, sync_files=False), planner=planner)


def load(contestant: str, state: dict[str, Any], place: Path) -> None:
    if contestant == "stock":
        dcp.load(state, storage_reader=dcp.FileSystemReader(place))
        return
    planner = ShardedLoadPlanner() if contestant.startswith("ours") else None
    dcp.load(state, storage_reader=AsyncStorageReader(place), planner=planner)
