"""`FaultyStore`: a store like the one that it stands before, until a hook says otherwise."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter
from dcp_storage.checkpoint.place import Location
from dcp_storage.errors import ConfigError, StoreError
from dcp_storage.testing.faulty import Faulty
from dcp_storage.testing.place import Place
from dcp_storage.testing.suite import StoreSuite
from dcp_storage.verify import verify


@dataclass(frozen=True)
class BehindHooks(Place):
    def open(self, **_):
        return Faulty()(self.url)


class TestFaultyStore(StoreSuite):
    creates_at_once = True

    @pytest.fixture
    def place(self, tmp_path):
        return BehindHooks(str(tmp_path / "run" / "step-1"))


def test_a_writer_meets_what_a_hook_raises(tmp_path):
    async def full(operation):
        if operation.method == "put":
            raise StoreError(f"{operation.url}: no space left on device")

    writer = AsyncStorageWriter(Location(tmp_path, opener=Faulty(before=full)))
    with pytest.raises(CheckpointException, match="no space left"):
        dcp.save({"x": torch.ones(3)}, storage_writer=writer)


def test_readers_and_checks_take_locations_too(tmp_path):
    seen = []

    async def note(operation):
        seen.append(operation.method)

    location = Location(tmp_path, opener=Faulty(after=note))
    dcp.save({"x": torch.ones(3)}, storage_writer=AsyncStorageWriter(location))
    dcp.load({"x": torch.zeros(3)}, storage_reader=AsyncStorageReader(location))
    assert verify(location).sound
    assert {"put", "commit", "get", "get_range", "list"} <= set(seen)


def test_a_location_has_options_of_its_own(tmp_path):
    for options in ({"storage_options": {"key": "x"}}, {"sync_files": False}):
        with pytest.raises(ConfigError, match="its own options"):
            AsyncStorageWriter(Location(tmp_path), **options)
