"""A small model trained under one parallelism, stopped, and trained on under another."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from integration.demo.ranks import Rank, Ranks
from tests.states import bits

STEPS = 3
GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Leg:
    """Train `STEPS` under a parallelism (`fsdp`, `tp x fsdp` or `one`), from a checkpoint or from the start, and save.

    Then train as many steps more: what a run does that nobody stopped.
    """

    parallelism: str
    start: Path | None
    save: Path


@dataclass(frozen=True)
class Told:
    """What a leg made: losses before and after its save, and how what it loaded differs from what was saved."""

    before: list[float]
    after: list[float]
    different: list[str]
    compared: int


def run_legs(world: int, legs: list[Leg], limit_s: float = 120) -> list[Told]:
    """Run legs in one set of ranks; rank 0 tells."""
    with Ranks(world, run_in_rank, legs, limit_s=limit_s) as ranks:
        return [event.data for event in ranks.events() if event.rank == 0]


def run_in_rank(rank: Rank, legs: list[Leg]) -> None:
    for leg in legs:
        run = Run(leg.parallelism)
        different: list[str] = []
        compared = 0
        if leg.start:
            compared, different = run.load(leg.start)
        before = list(islice(run.losses(), STEPS))
        run.save(leg.save)
        rank.report("told", Told(before, list(islice(run.losses(), STEPS)), different, compared))


class Net(nn.Module):
    """Sizes that no number of ranks divides evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 10)
        self.up = nn.Linear(10, 14)
        self.down = nn.Linear(14, 10)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 5)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids).mean(1)
        return self.head(self.norm(hidden + self.down(torch.relu(self.up(hidden)))))


class Run:
    """A model under a parallelism, its optimizer, and the step that it is at."""

    def __init__(self, parallelism: str) -> None:
        torch.manual_seed(0)
        self.model, data_mesh = parallelize(Net(), parallelism)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.01, foreach=False
        )  # one mesh for all is not given
        self.step = 0
        self.part, self.parts = data_mesh.get_local_rank(), data_mesh.size()
        self.group = data_mesh.get_group()

    def losses(self) -> Iterator[float]:
        while True:
            random = torch.Generator().manual_seed(self.step)
            ids = torch.randint(0, 37, (GLOBAL_BATCH, 6), generator=random).chunk(self.parts)[self.part]
            labels = torch.randint(0, 5, (GLOBAL_BATCH,), generator=random).chunk(self.parts)[self.part]
            loss = nn.functional.cross_entropy(self.model(ids), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            total = loss.detach().clone()
            dist.all_reduce(total, group=self.group)
            yield total.item() / self.parts

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer, "step": self.step}

    def save(self, place: Path) -> None:
        state = self.state()
        dcp.save(state, storage_writer=AsyncStorageWriter(place, sync_files=False), planner=ShardedSavePlanner())
        gathered = whole(state)
        if dist.get_rank() == 0:
            torch.save(gathered, place / "reference.pt")
        dist.barrier()

    def load(self, place: Path) -> tuple[int, list[str]]:
        """Load a checkpoint; return how many tensors and numbers there are, and which are not what was saved."""
        state = self.state()
        dcp.load(state, storage_reader=AsyncStorageReader(place), planner=ShardedLoadPlanner(dtype_policy="error"))
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        self.step = state["step"]
        found, expected = whole(self.state()), torch.load(place / "reference.pt", weights_only=False)
        return len(expected), [name for name in {*found, *expected} if not same(found.get(name), expected.get(name))]


def parallelize(model: Net, parallelism: str) -> tuple[nn.Module, DeviceMesh]:
    if parallelism == "one":
        return model, init_device_mesh("cpu", (1,))
    if parallelism == "fsdp":
        data = init_device_mesh("cpu", (dist.get_world_size(),))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(
            model,
            mesh["tensor"],
            {
                "up": ColwiseParallel(),
                "down": RowwiseParallel(),
                "embedding": ColwiseParallel(output_layouts=Replicate()),
            },
        )
        data = mesh["data"]
    for part in (model.up, model.down):
        fully_shard(part, mesh=data)
    fully_shard(model, mesh=data)
    return model, data


def whole(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every leaf by its name, tensors whole."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= whole(value, f"{name}.")
        else:
            flat[name] = value.full_tensor().detach().clone() if isinstance(value, DTensor) else value
    return flat


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and found.shape == expected.shape and bits(found).equal(bits(expected))
    return bool(found == expected)
