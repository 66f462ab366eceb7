"""The planners in one process: who writes what, what is refused with which words, and what a cached plan may not do."""

import collections
import io
import pickle
import types
from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.dcp.kinds.of import kind_of
from dcp_storage.dcp.planners import plan_cache
from dcp_storage.dcp.planners.flatten import flatten
from dcp_storage.errors import ConfigError, CoverageError, DtypeMismatch, MissingKeys, UnsupportedTensor
from dcp_storage.geometry import Box
from tests import fake_ranks
from tests.fake_ranks import Shards, plan_save


def rows(first, last, columns=2, dtype=torch.float32):
    return Box((first, 0), (last - first, columns)), torch.full((last - first, columns), float(first), dtype=dtype)


def hooks(*shards, shape=(8, 2)):
    return Shards(shape, list(shards), torch.float32)


def bare(*shards):
    return LocalShardsWrapper([tensor for _, tensor in shards], [box.offsets for box, _ in shards])


def plan(states, **options):
    return plan_save(states, [ShardedSavePlanner(**options) for _ in states])


def nbytes(plans):
    return [
        sum(torch.Size(i.tensor_data.chunk.sizes).numel() * 4 for i in plan.items if i.tensor_data) for plan in plans
    ]


# Who writes what


def test_replicas_are_written_once_and_the_bytes_are_shared_out():
    """As HSDP leaves a model: 2 x 2 ranks, each shard on two of them, some of it on all."""
    torch.manual_seed(0)
    sizes = [int(n) for n in torch.randint(1, 2000, (40,))]
    states = []
    for rank in range(4):
        half = rank % 2
        sharded = {f"w{n}": hooks(rows(half * n, half * n + n), shape=(2 * n, 2)) for n in sizes}
        states.append({"sharded": sharded, "norm": {f"n{n}": torch.zeros(n) for n in sizes[:10]}, "step": 3})
    plans, metadata = plan(states)
    written = nbytes(plans)
    whole = sum(entry.size.numel() * 4 for entry in metadata.state_dict_metadata.values() if hasattr(entry, "size"))
    assert sum(written) == whole
    assert max(written) <= 1.15 * sum(written) / 4


def test_what_only_one_rank_has_is_counted_before_replicas_are_shared_out():
    states = [{"all": {str(n): torch.zeros(100) for n in range(9)}} for _ in range(3)]
    states[1]["mine"] = torch.zeros(300)  # 1200 bytes; with the replicas there are 4800
    assert nbytes(plan(states)[0]) == [1600, 1600, 1600]


def test_a_bare_wrapper_of_no_shards_is_no_missing_key(tmp_path):
    fake_ranks.save([{"a": torch.ones(2)}], lambda: AsyncStorageWriter(tmp_path))
    fake_ranks.load([{"a": torch.ones(2), "table": bare()}], lambda: AsyncStorageReader(tmp_path))


# DTensors whose rows lie apart


def fsdp_over_tp(index, shape, at):
    """What FSDP (first dimension of the mesh) leaves a rank of what TP (second) left."""
    return chunk(chunk(index, shape[1])[at[1]], shape[0])[at[0]]


def chunk(index, count):
    parts = list(index.chunk(count))
    return parts + [index[:0]] * (count - len(parts))


@pytest.mark.parametrize("shape", [(2, 2), (4, 2), (2, 4)])
def test_a_strided_shard_is_placed_right_or_refused_by_name(as_rank, shape):
    """FSDP over TP, of any number of rows: where the placements alone mislead, the local tensor's extent decides."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor.placement_types import _StridedShard

    refused = placed = 0
    ranks = torch.arange(shape[0] * shape[1]).view(shape)
    for rank in range(ranks.numel()):
        as_rank(rank, ranks.numel())
        mesh = DeviceMesh("cpu", ranks)
        for count in range(1, 20):
            held = fsdp_over_tp(torch.arange(count), shape, divmod(rank, shape[1]))
            meta = TensorMeta(torch.Size((count, 2)), (2, 1), torch.float32)
            spec = DTensorSpec(mesh, (_StridedShard(0, split_factor=shape[1]), Shard(0)), tensor_meta=meta)
            value = DTensor(torch.zeros(len(held), 2), spec, requires_grad=False)
            try:
                boxes = kind_of("t", value).boxes()
                found = [box.offsets[0] + n for box in boxes for n in range(box.sizes[0])]
            except CoverageError as error:
                assert "t: a local tensor" in str(error)
                refused += 1
            else:
                assert found == held.tolist(), (rank, count)
                placed += 1
    assert placed > 9 * refused


# What is refused at a save


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        ([[rows(0, 4)], [rows(5, 8)]], "no part covers [4:5, 0:2] of shape [8, 2]"),
        ([[rows(0, 5)], [rows(4, 8)]], "parts [0:5, 0:2] and [4:8, 0:2] overlap"),
        ([[rows(0, 4)], [rows(4, 9)]], "part [4:9, 0:2] is outside the tensor, whose shape is [8, 2]"),
        ([[(Box((-1, 0), (4, 2)), torch.ones(4, 2))], [rows(3, 8)]], "part [-1:3, 0:2] is outside"),
        ([[(Box((0,), (4, 2)), torch.ones(4, 2))], [rows(4, 8)]], "different lengths"),
    ],
)
def test_shards_that_do_not_make_up_their_tensor(shards, says):
    with pytest.raises(CoverageError, match="a.t") as raised:
        plan([{"a": {"t": hooks(*held)}} for held in shards])
    assert says in str(raised.value)
    assert raised.value.fqn == "a.t"


def test_wrappers_that_leave_a_gap_or_overlap():
    with pytest.raises(CoverageError, match=r"a: no part covers \[2:3, 0:2\]"):
        plan([{"a": bare(rows(0, 2))}, {"a": bare(rows(3, 4))}])
    with pytest.raises(CoverageError, match=r"a: parts .* overlap"):
        plan([{"a": bare(rows(0, 2), rows(1, 4))}, {"a": bare()}])


def test_ranks_that_hold_a_tensor_in_different_dtypes_or_kinds():
    with pytest.raises(DtypeMismatch, match=r"a is torch.float32 on rank 0, torch.float16 on rank 1"):
        plan([{"a": bare(rows(0, 2))}, {"a": bare(rows(2, 4, dtype=torch.float16))}])
    with pytest.raises(CoverageError, match="a is a tensor on some ranks and another object on others"):
        plan([{"a": torch.ones(1)}, {"a": 1}])
    with pytest.raises(CoverageError, match=r"a has \[1, 2\] dimensions"):
        plan([{"a": torch.ones(4)}, {"a": torch.ones(4, 1)}])


class BadHooks(Shards):
    """Hooks that return what they are told, or raise it."""

    answers: dict

    def __create_write_items__(self, fqn, value):
        return self._answer("items", super().__create_write_items__(fqn, value))

    def __create_chunk_list__(self):
        return self._answer("chunks", super().__create_chunk_list__())

    def __get_tensor_shard__(self, index):
        return self._answer("shard", super().__get_tensor_shard__(index))

    def _answer(self, hook, right):
        answer = self.answers.get(hook, right)
        if isinstance(answer, Exception):
            raise answer
        return answer


def bad(**answers):
    value = BadHooks((8, 2), [rows(0, 8)], torch.float32)
    value.answers = answers
    return value


def save_failure(path, state):
    with pytest.raises(CheckpointException) as raised:
        dcp.save(state, storage_writer=AsyncStorageWriter(path), planner=ShardedSavePlanner())
    assert not (path / ".metadata").exists()
    return raised.value.failures[0][0]


@pytest.mark.parametrize(
    ("answers", "kind", "says"),
    [
        ({"items": RuntimeError("boom")}, UnsupportedTensor, "__create_write_items__ failed: RuntimeError('boom')"),
        ({"items": None}, CoverageError, "__create_write_items__ returned None"),
        ({"items": ["x"]}, CoverageError, "__create_write_items__ returned ['x']"),
        ({"items": hooks(rows(0, 8)).__create_write_items__("b", None)}, CoverageError, "an item of 'b'"),
        (
            {"shard": torch.ones(7, 2)},
            CoverageError,
            "a chunk of shape [8, 2] was planned, but the state dict has [7, 2]",
        ),
        ({"shard": torch.ones(8, 2, dtype=torch.float64)}, DtypeMismatch, "torch.float32 was planned"),
        ({"shard": None}, CoverageError, "__get_tensor_shard__ returned None"),
        ({"shard": KeyError("gone")}, UnsupportedTensor, "__get_tensor_shard__ failed: KeyError('gone')"),
    ],
)
def test_hooks_that_answer_nonsense_at_a_save(tmp_path, answers, kind, says):
    error = save_failure(tmp_path, {"m": {"t": bad(**answers)}})
    assert type(error) is kind
    assert says in str(error)
    assert error.fqn == "m.t"


@pytest.mark.parametrize(
    ("answers", "kind", "says"),
    [
        ({"chunks": RuntimeError("boom")}, UnsupportedTensor, "__create_chunk_list__ failed: RuntimeError('boom')"),
        ({"chunks": None}, CoverageError, "__create_chunk_list__ returned None"),
        ({"chunks": [3]}, CoverageError, "which are not chunks"),
        (
            {"chunks": [ChunkStorageMetadata(torch.Size([4, 0]), torch.Size([5, 2]))]},
            CoverageError,
            "[4:9, 0:2] is outs",
        ),
        (
            {"chunks": [ChunkStorageMetadata(torch.Size([-1, 0]), torch.Size([5, 2]))]},
            CoverageError,
            "[-1:4, 0:2] is o",
        ),
        (
            {"chunks": [ChunkStorageMetadata(torch.Size([0]), torch.Size([5, 2]))]},
            CoverageError,
            "different lengths",
        ),
        ({"chunks": [ChunkStorageMetadata(torch.Size([0]), torch.Size([8]))]}, CoverageError, "[0:8] is outside"),
        ({"shard": torch.ones(9, 2)}, CoverageError, "its shard [0:8, 0:2] has shape [9, 2]"),
        ({"shard": None}, CoverageError, "__get_tensor_shard__ returned None"),
        ({"shard": KeyError("gone")}, UnsupportedTensor, "__get_tensor_shard__ failed: KeyError('gone')"),
    ],
)
def test_hooks_that_answer_nonsense_at_a_load(tmp_path, monkeypatch, answers, kind, says):
    fake_ranks.save([{"m": {"t": torch.ones(8, 2)}}], lambda: AsyncStorageWriter(tmp_path))
    monkeypatch.setattr(AsyncStorageReader, "read_data", lambda *_: pytest.fail("data was read"))
    with pytest.raises(CheckpointException) as raised:
        dcp.load(
            {"m": {"t": bad(**answers)}}, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner()
        )
    error = raised.value.failures[0][0]
    assert type(error) is kind
    assert says in str(error)
    assert error.fqn == "m.t"


# What is refused at a load


def load_plan(state, stored, **options):
    planner = ShardedLoadPlanner(**options)
    planner.set_up_planner(state, Metadata(stored), is_coordinator=True)
    return planner, planner.create_local_plan()


def stored(*boxes, shape=(8, 2), dtype=torch.float32):
    chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in boxes]
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks)


@pytest.mark.parametrize("wrap", [lambda: torch.empty(8, 2), lambda: bare(rows(0, 8)), lambda: hooks(rows(0, 8))])
def test_a_destination_that_is_not_covered_names_the_box(wrap):
    with pytest.raises(CoverageError, match=r"t: the checkpoint does not contain \[3:5, 0:2\] of shape \[8, 2\]"):
        load_plan({"t": wrap()}, {"t": stored(rows(0, 3)[0], rows(5, 8)[0])})
    # Overlaps could make up for a gap in the count of elements.
    with pytest.raises(CoverageError, match=r"t: stored chunks overlap in \[2:3, 0:2\]"):
        load_plan({"t": wrap()}, {"t": stored(rows(0, 3)[0], rows(2, 7)[0])})


def test_a_wrapper_beyond_the_stored_tensor():
    with pytest.raises(CoverageError, match=r"t: its shard \[6:10, 0:2\] is outside the stored shape \[8, 2\]"):
        load_plan({"t": bare(rows(6, 10))}, {"t": stored(rows(0, 8)[0])})


def test_many_chunks_are_found_as_few_are():
    edges = [0, *sorted({*torch.randint(1, 400, (60,)).tolist()}), 400]
    boxes = [rows(a, b)[0] for a, b in pairwise(edges)]
    for first, last in ((0, 400), (17, 18), (100, 350), (399, 400)):
        _, planned = load_plan({"t": bare(rows(first, last))}, {"t": stored(*boxes, shape=(400, 2))})
        assert sum(read.lengths[0] for read in planned.items) == last - first


def test_dtype_policies_see_every_shard():
    state = {"t": bare(rows(0, 4), rows(4, 8, dtype=torch.float64)), "none": bare()}
    entries = {"t": stored(rows(0, 8)[0]), "none": stored(rows(0, 8)[0], dtype=torch.float16)}
    load_plan(state, entries, dtype_policy="cast")
    with pytest.warns(UserWarning, match=r"1 tensors .* t \(torch.float32 -> torch.float64\)"):
        load_plan(state, entries)
    with pytest.raises(DtypeMismatch, match=r"t \(torch.float32"):
        load_plan(state, entries, dtype_policy="error")


def test_what_is_missing_stays_as_it_is_and_is_listed():
    marker, meta = object(), torch.empty(3, device="meta")
    state = {"t": torch.empty(8, 2), "mine": marker, "new": {"head": meta}}
    entries = {"t": stored(rows(0, 8)[0]), "old": stored(rows(0, 8)[0])}
    with pytest.raises(
        MissingKeys, match=r"Missing key in checkpoint .*: mine, new.head \(2 in all\); it has 1 .*: old"
    ):
        load_plan(state, entries)
    with pytest.warns(UserWarning, match="2 of 3 entries are not in the checkpoint"):
        planner, _ = load_plan(state, entries, allow_partial_load=True)
    assert (planner.skipped, planner.unexpected) == (["mine", "new.head"], ["old"])
    assert state["mine"] is marker
    assert state["new"]["head"] is meta


def test_meta_tensors_get_memory_where_they_stand():
    wrapper = LocalShardsWrapper([torch.empty(4, 2, device="meta")] * 2, [(0, 0), (4, 0)])
    state = {"a": [torch.empty(8, 2, device="meta"), 1], "w": wrapper}
    load_plan(
        state,
        {"a.0": stored(rows(0, 8)[0]), "a.1": BytesStorageMetadata(), "w": stored(rows(0, 8)[0])},
    )
    assert state["a"][0].device.type == "cpu"
    assert [shard.device.type for shard in state["w"].local_shards()] == ["cpu", "cpu"]
    with pytest.raises(UnsupportedTensor, match="t is a Meta on the meta device"):
        load_plan({"t": Meta((8, 2), [], torch.float32)}, {"t": stored(rows(0, 8)[0])})


class Meta(Shards):
    device = torch.device("meta")


# Where loaded objects go


def test_objects_under_keys_that_are_no_text_are_loaded_in_place(tmp_path):
    """As an optimizer's state is keyed: DCP's planner would put what it loads beside it, under the key's text."""
    state = {"state": {0: {"step": 5, "m": torch.ones(2)}, 1: {"step": 6, "m": torch.zeros(2)}}, "l": [{7: "x"}, 2]}
    fake_ranks.save([state], lambda: AsyncStorageWriter(tmp_path))
    found = {"state": {n: {"step": 0, "m": torch.full((2,), 9.0)} for n in (0, 1)}, "l": [{7: ""}, 0]}
    fake_ranks.load([found], lambda: AsyncStorageReader(tmp_path))
    assert {key: value["step"] for key, value in found["state"].items()} == {0: 5, 1: 6}
    assert found["l"] == [{7: "x"}, 2]


def test_objects_without_flattening_reach_the_caller_s_dict(tmp_path):
    dcp.save(
        {"opt": {"lr": 0.5, 3: "x"}},
        storage_writer=AsyncStorageWriter(tmp_path),
        planner=ShardedSavePlanner(flatten_state_dict=False),
    )
    state = {"opt": {"lr": 0}}
    planner = ShardedLoadPlanner(flatten_state_dict=False)
    dcp.load(state, storage_reader=AsyncStorageReader(tmp_path), planner=planner)
    assert state == {"opt": {"lr": 0.5, 3: "x"}}


def test_two_paths_of_one_name_are_refused(tmp_path):
    error = save_failure(tmp_path, {"a": {"b": 1}, "a.b": 2})
    assert isinstance(error, ConfigError)
    assert "a.b" in str(error)


# Cached plans


class Run:
    """Ranks that keep their planners over saves, as `dcp.save` calls them; planners travel by pickle if asked to."""

    def __init__(self, world=3, *, by_pickle=False):
        self.planners = [ShardedSavePlanner(enable_plan_caching=True) for _ in range(world)]
        self.by_pickle = by_pickle
        self.sent = []

    def save(self, states, writers=None):
        if self.by_pickle:
            self.planners = [pickle.loads(pickle.dumps(planner)) for planner in self.planners]
        plans = []
        for rank, (planner, state) in enumerate(zip(self.planners, states, strict=True)):
            planner.set_up_planner(state, None, is_coordinator=rank == 0)
            plans.append(pickle.loads(pickle.dumps(planner.create_local_plan())))
        self.sent = [plan.usable for plan in plans]
        plans, metadata = self.planners[0].create_global_plan(plans)
        self.answered = [plan.usable for plan in plans]
        plans = [pickle.loads(pickle.dumps(plan)) for plan in plans]
        return [planner.finish_plan(plan) for planner, plan in zip(self.planners, plans, strict=True)], metadata

    def check(self, states):
        """A save must plan as one without a cache would."""
        plans, metadata = self.save(states)
        fresh, expected = plan(states)
        assert [plan.items for plan in plans] == [plan.items for plan in fresh]
        assert metadata == expected


def state(rank, dtype=torch.float32, rows_=8, **more):
    return {
        "w": hooks(rows(rank * rows_, (rank + 1) * rows_), shape=(3 * rows_, 2)),
        "r": torch.ones(5, dtype=dtype),
        **more,
    }


@pytest.mark.parametrize("failing", range(3))
def test_a_save_that_fails_on_one_rank_before_it_is_planned_does_not_fail_the_next(failing):
    run = Run()
    states = [state(rank) for rank in range(3)]
    run.check(states)
    for rank in set(range(3)) - {failing}:  # the others had sent their plans
        run.planners[rank].set_up_planner(states[rank], None, is_coordinator=rank == 0)
        run.planners[rank].create_local_plan()
    run.check(states)
    run.check(states)
    assert (run.sent, run.answered) == ([False] * 3, [False] * 3)


@pytest.mark.parametrize("by_pickle", [False, True])
def test_unchanged_plans_are_neither_sent_nor_answered_and_changes_are_seen(by_pickle):
    run = Run(by_pickle=by_pickle)
    states = [state(rank) for rank in range(3)]
    run.check(states)
    assert (run.sent, run.answered) == ([True] * 3, [True] * 3)
    run.check(states)
    assert (run.sent, run.answered) == ([False] * 3, [False] * 3)
    run.check([state(rank, dtype=torch.float16) for rank in range(3)])
    assert run.sent == [True] * 3
    run.check([state(rank, dtype=torch.float16, **({"extra": 1} if rank == 1 else {})) for rank in range(3)])
    assert (run.sent, run.answered) == ([False, True, False], [True] * 3)
    run.check([state(rank, dtype=torch.float16) for rank in range(3)])
    run.check([state(rank, dtype=torch.float16, rows_=4) for rank in range(3)])
    run.check([state(rank, dtype=torch.float16, rows_=4) for rank in range(3)])
    assert (run.sent, run.answered) == ([False] * 3, [False] * 3)


def test_a_save_that_was_never_planned_is_not_remembered():
    run = Run()
    states = [state(rank) for rank in range(3)]
    run.check(states)
    with pytest.raises(CoverageError):
        run.save([*states[:2], {**states[2], "w": hooks(rows(17, 24), shape=(24, 2))}])
    run.check(states)
    assert run.sent == [True] * 3
    run.check(states)
    assert run.sent == [False] * 3


def test_planners_of_two_states_do_not_mix():
    one, two = Run(), Run()
    for _ in range(3):
        one.check([state(rank) for rank in range(3)])
        two.check([state(rank, rows_=2, other=1) for rank in range(3)])
    assert one.sent == two.sent == [False] * 3


def test_mixed_up_planners_are_refused_and_the_next_save_is_right():
    run, other = Run(), Run()
    states = [{"a": torch.ones(4), "b": 1}] * 3  # alike on all ranks: every planner finds its plan unchanged
    run.check(states)
    other.check(states)
    run.planners[1], run.planners[2] = run.planners[2], run.planners[1]
    with pytest.raises(ConfigError, match="keep one ShardedSavePlanner on each rank"):
        run.save(states)
    run.check(states)
    run.planners[0] = other.planners[0]
    with pytest.raises(ConfigError, match="rank 1 of the process group refers to a plan"):
        run.save(states)
    run.check(states)


def test_memory_for_cached_plans_is_bounded():
    states = [state(rank) for rank in range(3)]
    runs = [Run() for _ in range(plan_cache.MOST_PLANNERS)]
    for _ in range(2):
        for run in runs:
            run.check(states)
    assert len(plan_cache._entries) <= plan_cache.MOST_PLANNERS


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_cached_plans_with_changed_dtypes_keys_and_paths_store_what_is_there(tmp_path, compression):
    from dcp_storage import Codec

    planner = ShardedSavePlanner(enable_plan_caching=True)
    writer = AsyncStorageWriter(tmp_path / "unused", codec=Codec(compression))
    versions = [
        {"a": torch.arange(6.0)},
        {"a": torch.arange(6.0) * 2},
        {"a": torch.arange(6.0).to(torch.float64)},
        {"a": torch.arange(6.0).to(torch.float64), "b": 3},
        {"b": 4},
    ]
    for number, version in enumerate(versions):
        dcp.save(version, storage_writer=writer, planner=planner, checkpoint_id=tmp_path / str(number))
    for number, version in enumerate(versions):
        found = {key: torch.empty_like(value) if key == "a" else None for key, value in version.items()}
        reader = AsyncStorageReader(tmp_path / str(number))
        dcp.load(found, storage_reader=reader, planner=ShardedLoadPlanner(dtype_policy="error"))
        assert found.keys() == version.keys()
        assert "a" not in version or torch.equal(found["a"], version["a"])
        assert found.get("b") == version.get("b")


def test_stock_writers_take_cached_plans_too(tmp_path):
    planner = ShardedSavePlanner(enable_plan_caching=True)
    for number in range(3):
        dcp.save(
            {"a": torch.full((4,), float(number))},
            storage_writer=dcp.FileSystemWriter(tmp_path / str(number)),
            planner=planner,
        )
        found = {"a": torch.empty(4)}
        dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path / str(number)))
        assert found["a"].tolist() == [number] * 4


def test_a_planner_pickles_without_the_state_that_it_saved():
    planner = ShardedSavePlanner()
    planner.set_up_planner({"a": torch.zeros(100_000), "b": io.BytesIO()}, None, is_coordinator=True)
    planner.create_local_plan()
    assert len(pickle.dumps(planner)) < 2000


class Halved(torch.Tensor):
    """A type that knows its shards, and has no list of them."""

    def __get_tensor_shard__(self, index):
        return self.as_subclass(torch.Tensor) / 2


def test_a_hook_for_shards_is_asked_also_without_one_for_chunks():
    value = torch.tensor([2.0, 4.0]).as_subclass(Halved)
    assert torch.equal(kind_of("w", value).shard(MetadataIndex("w", torch.Size([0]))), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"a": {}, "b": [], "c": [[]], "d": [{}], "e": ({}, torch.ones(1))},
        {"a": [1, [2, [torch.ones(1)]], {"x": 3}], "b": [1, 2], 3: {4: {None: torch.ones(1)}}},
        {"a": collections.OrderedDict(b=[torch.ones(1), 2]), "m": types.MappingProxyType({"x": 1})},
        {"a": [(torch.ones(1),)], "b": [[1, 2], [3]], "c": [[{}]], "d": {"e": {"f": [5]}}},
    ],
)
def test_names_are_those_of_dcp(state):
    stock = dcp.DefaultSavePlanner()
    stock.set_up_planner(state)
    flat, mappings = flatten(state, nested=True)
    assert list(flat) == list(stock.state_dict)
    assert all(flat[fqn] is stock.state_dict[fqn] for fqn in flat)
    assert mappings == stock.mappings
