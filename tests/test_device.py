"""Tensors on accelerators: on a real one where there is one, else on host memory that plays the part of one."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner, Transfer
from dcp_storage.dcp import device as device_module
from dcp_storage.dcp.saves.sources import TensorSource

TRANSFER = Transfer(object_bytes=1 << 20, threads=3)


class FakeModule:
    """What torch's module of a device offers, on the host: it notes what happens, in order."""

    def __init__(self):
        self.events, self.pinned = [], 0

    def Stream(self, device):  # noqa: N802 (torch's name)
        return FakeStream(self)

    @contextmanager
    def stream(self, stream):
        self.events.append("enter")
        yield
        self.events.append("leave")


class FakeStream:
    def __init__(self, module):
        self._module = module

    def synchronize(self):
        self._module.events.append("synchronize")


@pytest.fixture
def fake(monkeypatch):
    """The host's memory plays CUDA's: what is strided is copied from it, what is converted is copied to it."""
    module, empty = FakeModule(), torch.empty

    def pinned_empty(*args, pin_memory=False, **kwargs):
        module.pinned += pin_memory
        return empty(*args, **kwargs)

    monkeypatch.setattr(device_module, "_PINNED", "cpu")
    monkeypatch.setattr(device_module, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch, "empty", pinned_empty)
    return module


def test_a_slice_is_copied_on_a_stream_of_its_own_and_is_there_when_it_is_read(fake):
    tensor = torch.arange(12, dtype=torch.int16).view(3, 4).t()
    source = TensorSource(tensor, "t", Codec())
    assert bytes(source.read(4, 20)) == tensor.contiguous().numpy().tobytes()[4:20]
    assert fake.events == ["enter", "leave", "synchronize"]
    assert fake.pinned == 1


def test_what_is_copied_to_a_device_is_decoded_into_pinned_memory(tmp_path, fake):
    saved, loaded = torch.randn(1000, 700), torch.zeros(700, 1000).t()
    dcp.save({"t": saved}, storage_writer=AsyncStorageWriter(tmp_path))
    before = fake.pinned
    dcp.load({"t": loaded}, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner())
    assert torch.equal(loaded, saved)
    assert fake.pinned - before == 3, "one for each block"


def test_memory_of_the_host_is_neither_pinned_nor_copied_on_streams(monkeypatch, tmp_path):
    monkeypatch.setattr(device_module, "get_device_module", lambda device: 1 / 0)
    state, loaded = {"t": torch.randn(30, 40).t()}, {"t": torch.zeros(30, 40).t()}
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path))
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner())
    assert torch.equal(loaded["t"], state["t"])


@pytest.mark.parametrize("offers", [("current_stream", "synchronize"), ("synchronize",), ()])
def test_a_device_is_waited_for_by_what_it_offers(monkeypatch, offers):
    """CUDA has streams, MPS one for all work; another may run nothing ahead of the program."""
    waited, module = [], SimpleNamespace()
    stream = SimpleNamespace(synchronize=lambda: waited.append("its stream"))
    if "current_stream" in offers:
        module.current_stream = lambda device: stream
    if "synchronize" in offers:
        module.synchronize = lambda: waited.append("all of it")
    monkeypatch.setattr(device_module, "get_device_module", lambda device: module)
    device_module.wait_for_device(SimpleNamespace(device=SimpleNamespace(type="mps")))
    assert waited == {2: ["its stream"], 1: ["all of it"], 0: []}[len(offers)]


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def gpu_state():
    torch.manual_seed(0)
    return {
        "large": torch.randn(3 << 20, device="cuda"),
        "strided": torch.randn(700, 300, device="cuda", dtype=torch.bfloat16).t(),
        "complex": torch.randn(50, 20, device="cuda", dtype=torch.complex64).conj(),
        "scalar": torch.tensor(3, device="cuda"),
        "empty": torch.zeros(0, 5, device="cuda"),
        "host": torch.randn(1000),
    }


@cuda
@pytest.mark.parametrize("codec", [Codec(), Codec("none")], ids=["zstd", "none"])
@pytest.mark.parametrize("save", ["save", "async_save"])
def test_gpu_tensors_come_back_on_gpu_and_host(tmp_path, save, codec):
    state = gpu_state()
    writer = AsyncStorageWriter(tmp_path, codec=codec, transfer=TRANSFER)
    if save == "save":
        dcp.save(state, storage_writer=writer)
    else:
        dcp.async_save(state, storage_writer=writer, no_dist=True).result(60)
    for device in ("cuda", "cpu"):
        loaded = {name: torch.zeros_like(tensor, device=device) for name, tensor in state.items()}
        dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner())
        assert all(torch.equal(loaded[name].cpu(), state[name].cpu()) for name in state)


@cuda
def test_what_a_stream_still_computes_is_saved_as_it_will_be(tmp_path):
    tensor = torch.zeros(8 << 20, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(200):
            tensor += 1
        dcp.save({"t": tensor}, storage_writer=AsyncStorageWriter(tmp_path, transfer=TRANSFER))
    loaded = {"t": torch.zeros(8 << 20)}
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner())
    assert torch.equal(loaded["t"], torch.full((8 << 20,), 200.0))
