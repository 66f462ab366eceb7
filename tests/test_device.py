"""Tensors on accelerators: on a real one where there is one, else on host memory that plays the part of one."""

import mmap
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from dcp_storage import (
    AsyncStorageReader,
    AsyncStorageWriter,
    Codec,
    ShardedLoadPlanner,
    ShardedSavePlanner,
    Transfer,
)
from dcp_storage.config import MIB
from dcp_storage.dcp import device as device_module
from dcp_storage.dcp import small
from dcp_storage.dcp.loads import scatter
from dcp_storage.dcp.saves.gather import Gather
from dcp_storage.dcp.saves.sources import TensorSource
from dcp_storage.dcp.small import gather_to_host
from dcp_storage.dcp.staging import pool
from dcp_storage.dcp.staging.stage import stage
from tests.states import assert_same

TRANSFER = Transfer(object_bytes=1 << 20, threads=3)


class FakeModule:
    """What torch's module of a device offers, on the host: it notes what happens, in order."""

    def __init__(self):
        self.events, self.pinned = [], 0

    def Stream(self, device):  # noqa: N802 (torch's name)
        return FakeStream(self)

    def synchronize(self):
        self.events.append("waited")

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
    monkeypatch.setattr(device_module, "_HOST", "another")
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


@pytest.mark.parametrize("action", ["save", "stage"])
def test_what_torch_changes_on_the_host_is_waited_for(tmp_path, monkeypatch, fake, action):
    """A copy that does not block would be conjugated or negated before it is there."""
    values = torch.randn(300, 200, dtype=torch.complex64)
    state = {"conjugate": values.conj(), "negative": values.conj().imag, "strided": values.t(), "plain": values}
    unblocked, real = [], torch.Tensor.copy_

    def copy_(self, source, non_blocking=False):
        if non_blocking:
            unblocked.append(source.is_conj() or source.is_neg())
        return real(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    if action == "save":
        dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner(), no_dist=True)
    else:
        assert_same(stage(state, keep=False), {name: value.clone() for name, value in state.items()})
    assert len(unblocked) >= 2
    assert not any(unblocked)


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
    device_module.wait_for_device(SimpleNamespace(type="mps"))
    assert waited == {2: ["its stream"], 1: ["all of it"], 0: []}[len(offers)]


def small_tensors():
    """Small tensors of every kind of memory, among large ones: what a model's biases and norms are like."""
    torch.manual_seed(1)
    found = {}
    for number in range(300):
        found[f"{number}.bias"] = torch.randn(number + 1)
        found[f"{number}.odd"] = torch.randint(0, 255, (number % 7,), dtype=torch.uint8)
        found[f"{number}.wide"] = torch.randn(3, number + 1, dtype=torch.bfloat16).t()
    found["large"] = torch.randn(1 << 17)
    found["tied"] = found["7.bias"]
    found["scalar"] = torch.tensor(True)
    return found


def count_calls(monkeypatch, module, name):
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    return calls


def test_small_tensors_are_saved_in_batches(tmp_path, monkeypatch, fake):
    state, batches = small_tensors(), count_calls(monkeypatch, small, "flatten")
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner(), no_dist=True)
    assert len(batches) == 4, "one of each dtype"
    monkeypatch.undo()
    assert_loads(tmp_path, state)


def test_a_batch_is_read_in_parts_and_dropped_when_all_was_read(fake):
    gather = Gather()
    tensors = [torch.arange(100), torch.arange(50, dtype=torch.int16)]
    first, second = (gather.source(TensorSource(tensor, "t", Codec())) for tensor in tensors)
    for _ in range(2):  # a put that is begun anew reads again
        assert first.read(0, 80) == tensors[0].numpy().tobytes()[:80]
        assert second.read(0, 100) == tensors[1].numpy().tobytes()
        assert first._batch._copy is not None
        assert first.read(80, 800) == tensors[0].numpy().tobytes()[80:]
        assert first._batch._copy is None


def test_small_tensors_are_staged_in_batches(tmp_path, monkeypatch, fake):
    state, batches = small_tensors(), count_calls(monkeypatch, small, "flatten")
    staged = stage(state, keep=False)
    assert len(batches) == 2, "and a single tensor of another dtype"
    assert_same(staged, state)


@pytest.mark.parametrize("batch_bytes", [1 << 20, 5000])
def test_small_tensors_are_loaded_in_batches(tmp_path, monkeypatch, fake, batch_bytes):
    monkeypatch.setattr("dcp_storage.dcp.loads.scatter.BATCH_BYTES", max(batch_bytes, 1 << 16))
    batches = count_calls(monkeypatch, scatter, "copy_all")
    state = small_tensors()
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner(), no_dist=True)
    fake.events.clear()
    assert_loads(tmp_path, state)
    assert 0 < len(batches) < 30
    assert fake.events == ["waited"] * len(batches), "the caller may use them in another stream"


def test_where_an_accelerator_is_full_small_tensors_are_copied_one_by_one(monkeypatch):
    tensors = [torch.arange(number, dtype=torch.int16).view(-1, 1) for number in range(1, 90)]
    found, expected = (torch.zeros(sum(range(90)), dtype=torch.int16) for _ in range(2))
    gather_to_host(tensors, expected, non_blocking=False)

    def full(_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("dcp_storage.dcp.small.flatten", full)
    gather_to_host(tensors, found, non_blocking=False)
    assert torch.equal(found, expected)
    assert torch.equal(found, torch.cat([torch.arange(number, dtype=torch.int16) for number in range(1, 90)]))


def test_lazily_changed_destinations_are_filled_alone(tmp_path, monkeypatch, fake):
    """The kernel that fills many tensors at once writes to their memory as it is."""
    values = torch.randn(30, 20, dtype=torch.complex64)
    state = {"conjugate": values.conj(), "negative": values.conj().imag, "plain": values.t()}
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner(), no_dist=True)
    filled = count_calls(monkeypatch, scatter, "copy_all")
    zeros = torch.zeros(30, 20, dtype=torch.complex64)
    loaded = {"conjugate": zeros.conj(), "negative": zeros.clone().conj().imag, "plain": zeros.clone().t()}
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner(), no_dist=True)
    assert_same(loaded, state)
    assert [target.shape for targets, _ in filled for target in targets] == [(20, 30)]


def test_where_an_accelerator_is_full_small_tensors_are_loaded_one_by_one(tmp_path, monkeypatch, fake):
    state, real = small_tensors(), torch.Tensor.to
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner(), no_dist=True)
    refused = []

    def full(self, *args, **kwargs):
        if args == (torch.device("cpu"),):
            refused.append(self)
            raise torch.OutOfMemoryError("no memory")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", full)
    assert_loads(tmp_path, state)
    assert refused


def test_a_load_of_small_tensors_that_fails_hands_over_no_batch_that_is_not_whole(tmp_path, monkeypatch, fake):
    state = small_tensors()
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner(), no_dist=True)
    [data] = tmp_path.glob("*.distcp*")
    data.write_bytes(data.read_bytes()[:-3000])
    with pytest.raises(CheckpointException, match="damaged"):
        assert_loads(tmp_path, state)


def assert_loads(path, state):
    """Load into memory of other strides, so that nothing is decoded where it belongs."""
    loaded = {name: torch.zeros(*value.shape, 2, dtype=value.dtype)[..., 0] for name, value in state.items()}
    dcp.load(loaded, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner(), no_dist=True)
    assert_same(loaded, state)


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
        **{f"small {name}": tensor.to("cuda") for name, tensor in small_tensors().items()},
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
    tensor, small = torch.zeros(8 << 20, device="cuda"), torch.zeros(9, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(200):
            tensor += 1
            small += 1
        state = {"t": tensor, "small": small, "other": torch.ones(5, device="cuda")}
        dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path, transfer=TRANSFER))
    loaded = {"t": torch.zeros(8 << 20), "small": torch.zeros(9)}
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner())
    assert torch.equal(loaded["t"], torch.full((8 << 20,), 200.0))
    assert torch.equal(loaded["small"], torch.full((9,), 200.0))


@cuda
@pytest.mark.parametrize("shares", [False, True])
def test_a_gpu_state_is_staged_in_pinned_memory_of_its_size(monkeypatch, shares):
    own = pool.Pool()
    own.shares = shares
    monkeypatch.setattr("dcp_storage.dcp.staging.stage.POOL", own)
    tensor = torch.randn(9 << 20, device="cuda")
    before = rss_bytes()
    for _ in range(2):
        staged = stage({"t": tensor}, keep=True)
        assert staged["t"].is_pinned()
        assert torch.equal(staged["t"], tensor.cpu())
        del staged
    assert rss_bytes() - before < 45 * MIB
    [kept] = own._kept
    assert kept.pinned
    assert kept.where == ("shared" if shares else "private")


@cuda
def test_a_gpu_state_is_saved_by_a_process(tmp_path):
    state = gpu_state()
    join_alone(tmp_path)
    try:
        for number in range(2):  # the second is staged in shared memory
            writer = AsyncStorageWriter(tmp_path / str(number))
            done = dcp.async_save(
                state,
                storage_writer=writer,
                planner=ShardedSavePlanner(),
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            )
            done.result(60)
            assert_loads(tmp_path / str(number), {name: tensor.cpu() for name, tensor in state.items()})
    finally:
        dist.destroy_process_group()


@cuda
def test_a_gpu_without_room_for_a_batch_is_saved(tmp_path):
    state = {f"{number}": torch.randn(1000, device="cuda") for number in range(500)}
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        filling = fill_gpu()
        dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner())
        del filling
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_loads(tmp_path, {name: tensor.cpu() for name, tensor in state.items()})


def fill_gpu():
    found = []
    for nbytes in (1 << 20, 1 << 12, 512):
        try:
            while True:
                found.append(torch.empty(nbytes, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            pass
    return found


def rss_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def join_alone(tmp_path):
    """Make a process group of one, which saves by a process need."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
