"""Load planners of the user's own, of which DCP's reader asks for one tensor at a time."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner
from tests.states import assert_same, blank_like

STATE = {f"w{number}": torch.full((number % 5, 7), float(number)) for number in range(40)}
STATE |= {"large": torch.arange(300_000.0), "scalar": torch.tensor(3.0), "step": 7}


def scratch(base, hook):
    """Return a planner that gives the same memory for every tensor, and copies it when it is committed."""

    def resolve(self, *asked):
        real = getattr(super(planner, self), hook)(*asked)
        self.real = real
        self.memory = torch.empty(0, dtype=torch.float64).resize_(real.shape) if self.memory is None else self.memory
        return self.memory.resize_(real.shape)

    def commit(self, read, tensor):
        assert tensor.data_ptr() == self.memory.data_ptr()
        self.real.copy_(tensor)
        self.memory.fill_(-1)

    planner = type("Planner", (base,), {"memory": None, hook: resolve, "commit_tensor": commit})
    return planner()


@pytest.mark.parametrize("base", [DefaultLoadPlanner, ShardedLoadPlanner])
@pytest.mark.parametrize("hook", ["resolve_tensor", "lookup_tensor"])
@pytest.mark.parametrize("stored", ["ours", "ours, not compressed", "stock"])
def test_memory_that_is_used_for_one_tensor_after_the_other(tmp_path, base, hook, stored):
    codec = Codec("none" if "not" in stored else "zstd", block_bytes=4096)
    writer = FileSystemWriter(tmp_path) if stored == "stock" else AsyncStorageWriter(tmp_path, codec=codec)
    dcp.save(STATE, storage_writer=writer, no_dist=True)
    found = blank_like(STATE)
    dcp.load(found, storage_reader=AsyncStorageReader(tmp_path), planner=scratch(base, hook), no_dist=True)
    assert_same(found, STATE)
    if stored == "stock" and base is DefaultLoadPlanner:
        expected = blank_like(STATE)
        dcp.load(expected, storage_reader=FileSystemReader(tmp_path), planner=scratch(base, hook), no_dist=True)
        assert_same(found, expected)
