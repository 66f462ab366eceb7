"""Checkpoints that stock DCP wrote with each torch that people have, on whichever torch runs this."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.torch_version import TorchVersion

from dcp_storage import AsyncStorageReader, ShardedLoadPlanner
from dcp_storage.format.stock.manifest import decode_stock_metadata
from tests.fixtures.make_stock import DTYPES, HERE, ROWS, numbers, state
from tests.states import assert_same, blank_like

CHECKPOINTS = sorted(path.parent for path in HERE.glob("*/*/.metadata"))


def expected(checkpoint: Path) -> dict:
    manifest = decode_stock_metadata((checkpoint / ".metadata").read_bytes(), where="here")
    stored = tuple(name for name in DTYPES if f"dtype.{name}" in manifest.tensors)
    assert len(stored) == (2 if checkpoint.name == "zstd" else len(stored)) >= 2
    return {**state(stored), "sharded": numbers(torch.float32, (ROWS, 4))}


def test_there_are_fixtures_of_old_and_new_torch():
    versions = {checkpoint.parent.name for checkpoint in CHECKPOINTS}
    assert versions >= {"2.0.1", "2.2.2", "2.9.1", "2.10.0", "2.13.0", "2.14.1", "2.15.0"}


@pytest.mark.parametrize("planner", [ShardedLoadPlanner, None], ids=["ours", "stock planner"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: f"{path.parent.name} {path.name}")
def test_loads_bit_for_bit(checkpoint, planner):
    wanted = expected(checkpoint)
    if planner is None and TorchVersion(checkpoint.parent.name) < "2.4":
        del wanted["optimizer"]  # the planner of a later torch knows it by other names
    loaded = blank_like(wanted)
    dcp.load(loaded, storage_reader=AsyncStorageReader(checkpoint), planner=planner and planner())
    assert_same(loaded, wanted)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: f"{path.parent.name} {path.name}")
def test_metadata_says_what_stock_s_own_reader_says(checkpoint):
    if TorchVersion(checkpoint.parent.name) > torch.__version__:
        pytest.skip("stock DCP does not read what a later torch wrote")
    ours, theirs = AsyncStorageReader(checkpoint).read_metadata(), dcp.FileSystemReader(checkpoint).read_metadata()
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for fqn, entry in theirs.state_dict_metadata.items():
        if isinstance(entry, dcp.metadata.TensorStorageMetadata):
            assert ours.state_dict_metadata[fqn].size == entry.size
            assert ours.state_dict_metadata[fqn].chunks == entry.chunks
            assert ours.state_dict_metadata[fqn].properties.dtype == entry.properties.dtype
    assert ours.planner_data == theirs.planner_data
    assert ours.version == getattr(theirs, "version", None)
    assert ours.storage_meta.save_id == theirs.storage_meta.save_id
    assert ours.storage_meta.load_id
