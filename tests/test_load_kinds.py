"""Numbers that have become tensors since a checkpoint was saved, and tensors that have become numbers."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner
from dcp_storage.dcp.planners.numbers import fill, number_like
from dcp_storage.errors import CoverageError, DtypeMismatch

WRITERS = {"own": AsyncStorageWriter, "stock": dcp.FileSystemWriter}


@pytest.fixture(params=WRITERS)
def saver(request, tmp_path):
    def save(value):
        dcp.save({"a": [{"x": value}], "w": torch.ones(2)}, storage_writer=WRITERS[request.param](tmp_path))
        return tmp_path

    return save


def load(path, value, policy="warn", planner=None):
    state = {"a": [{"x": value}], "w": torch.zeros(2)}
    planner = planner or ShardedLoadPlanner(dtype_policy=policy)
    dcp.load(state, storage_reader=AsyncStorageReader(path), planner=planner)
    assert state["w"].tolist() == [1, 1]
    return state["a"][0]["x"]


def load_error(path, value, policy="warn"):
    with pytest.raises(CheckpointException) as raised:
        load(path, value, policy)
    return raised.value.failures[0][0]


@pytest.mark.parametrize(
    ("stored", "here"),
    [
        (5, torch.tensor(0.0)),
        (5, torch.zeros(1, 1, dtype=torch.int8)),
        (True, torch.zeros((), dtype=torch.bool)),
        (2.5, torch.tensor(0.0, dtype=torch.bfloat16)),
        (2.5, torch.nn.Parameter(torch.zeros(1))),
        (np.float64(2.5), torch.tensor(0.0)),
        (np.int64(3), torch.tensor(0)),
        (1 + 2j, torch.zeros(1, dtype=torch.complex64)),
        ((1 << 64) - 1, torch.zeros((), dtype=torch.uint64)),
        (3.0, torch.zeros((), dtype=torch.int32)),
    ],
)
def test_a_number_into_a_tensor(saver, stored, here):
    path, address = saver(stored), here.data_ptr()
    with pytest.warns(UserWarning, match=rf"a.0.x \(a number -> {here.dtype}\)"):
        loaded = load(path, here)
    assert loaded is here
    assert loaded.data_ptr() == address
    assert loaded.item() == stored
    assert load(path, here, "cast").item() == stored
    assert isinstance(load_error(path, here, "error"), DtypeMismatch)


@pytest.mark.parametrize(
    ("stored", "here"),
    [
        (5.5, torch.tensor(0)),
        (300, torch.tensor(0, dtype=torch.uint8)),
        (-1, torch.tensor(0, dtype=torch.uint8)),
        (2, torch.tensor(False)),
        (1e39, torch.tensor(0.0)),
        (1 + 2j, torch.tensor(0.0)),
        (float("nan"), torch.tensor(0)),
        (10**400, torch.tensor(0.0)),
    ],
)
@pytest.mark.filterwarnings("ignore:1 tensors have another dtype")
def test_a_number_that_a_tensor_does_not_hold(saver, stored, here):
    before = here.clone()
    error = load_error(saver(stored), here)
    assert isinstance(error, DtypeMismatch)
    assert "a.0.x" in str(error)
    assert torch.equal(here, before)


@pytest.mark.parametrize(
    ("stored", "here", "loaded"),
    [
        (torch.tensor(5.0), 0, 5),
        (torch.tensor([5.0]), 0.5, 5.0),
        (torch.tensor(5), 0.5, 5.0),
        (torch.tensor(1), False, True),
        (torch.tensor(2.5, dtype=torch.bfloat16), 1j, 2.5 + 0j),
        (torch.tensor([[7]], dtype=torch.uint8), np.float32(0), np.float32(7)),
        (torch.tensor(2.0, dtype=torch.float8_e4m3fn), 0, 2),
    ],
)
def test_a_tensor_into_a_number(saver, stored, here, loaded):
    path = saver(stored)
    with pytest.warns(UserWarning, match=rf"a.0.x \({stored.dtype} -> {type(here).__name__}\)"):
        found = load(path, here)
    assert type(found) is type(loaded)
    assert found == loaded
    assert load(path, here, "cast") == loaded
    assert isinstance(load_error(path, here, "error"), DtypeMismatch)


@pytest.mark.filterwarnings("ignore:1 tensors have another dtype")
@pytest.mark.parametrize(
    ("stored", "here"),
    [(torch.tensor(5.5), 0), (torch.tensor(float("inf")), 0), (torch.tensor(2), True), (torch.tensor(1j), 0.0)],
)
def test_a_tensor_that_a_number_does_not_hold(saver, stored, here):
    error = load_error(saver(stored), here)
    assert isinstance(error, DtypeMismatch)
    assert "a.0.x" in str(error)


@pytest.mark.parametrize(("stored", "here"), [(5.7, torch.tensor(0)), (torch.tensor(5.7), 0)])
def test_what_cast_does_as_torch_does(saver, stored, here):
    assert load(saver(stored), here, "cast") == 5


@pytest.mark.filterwarnings("ignore:1 tensors have another dtype")
@pytest.mark.parametrize(
    ("stored", "here", "says"),
    [
        (5, torch.zeros(2), "a tensor here and another object in the checkpoint: put None"),
        ("five", torch.zeros(1), "a str in the checkpoint, which is not a number"),
        (None, torch.tensor(0), "a NoneType in the checkpoint, which is not a number"),
        ((1, 2), torch.tensor(0), "a tuple in the checkpoint"),
        (torch.zeros(3), 0, r"a int here and a tensor of shape \[3\] and dtype torch.float32"),
        (torch.zeros(()), None, r"a NoneType here and a tensor of shape \[\] and dtype torch.float32"),
        (torch.zeros(()), "x", "a str here and a tensor"),
    ],
)
def test_other_kinds_are_refused_with_advice_that_helps(saver, stored, here, says):
    path = saver(stored)
    error = load_error(path, here)
    assert isinstance(error, CoverageError)
    assert "a.0.x" in str(error)
    with pytest.raises(CoverageError, match=says):
        raise error
    if "put None" in str(error):
        assert load(path, None) == stored
    if "put such a tensor" in str(error):
        assert torch.equal(load(path, torch.ones_like(stored)), stored)


def test_the_default_planner_does_as_stock(saver, tmp_path):
    """It puts the number where the tensor was."""
    assert load(saver(5), torch.tensor(0.0), planner=dcp.DefaultLoadPlanner()) == 5
    dcp.save({"x": 5}, storage_writer=dcp.FileSystemWriter(tmp_path / "stock"))
    states = [{"x": torch.zeros(3)}, {"x": torch.zeros(3)}]
    dcp.load(states[0], storage_reader=dcp.FileSystemReader(tmp_path / "stock"))
    dcp.load(states[1], storage_reader=AsyncStorageReader(tmp_path / "stock"), planner=dcp.DefaultLoadPlanner())
    assert states[0] == states[1] == {"x": 5}


numbers = st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.complex_numbers()
dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex128]
)


@given(numbers, dtypes)
def test_what_is_not_refused_is_kept(number, dtype):
    target = torch.zeros(1, dtype=dtype)
    try:
        fill("x", target, copy.copy(number), "warn")
    except DtypeMismatch:
        return
    kept, number = target.item(), number + 0  # booleans are not approximate
    if dtype.is_floating_point or dtype.is_complex:
        assert kept == pytest.approx(number, rel=0.01, abs=1e-38, nan_ok=True)
    else:
        assert kept == number
    for kind in (0, 0.0, 0j, False):
        try:
            assert number_like("x", target, kind, "warn") + 0 == pytest.approx(kept + 0, rel=1e-15, nan_ok=True)
        except DtypeMismatch:
            assert type(kind) in {int, bool} or isinstance(kept, complex)
