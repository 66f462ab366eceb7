"""Kinds of tensors beyond plain ones: shards by attributes, hooks on local tensors, placements of one's own."""

import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DeviceMesh, DTensor, Placement, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.two_tensor import TwoTensor

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.dcp.kinds.of import kind_of
from dcp_storage.dcp.kinds.plain import Checkpointable, Plain
from dcp_storage.dcp.undocumented import LocalShardsWrapper, local_tensor
from dcp_storage.errors import CoverageError, DcpStorageError, UnsupportedTensor
from dcp_storage.geometry import Box
from tests import fake_ranks
from tests.fake_ranks import Shards
from tests.states import assert_same

SHAPE = (11, 6)
WHOLE = torch.arange(66, dtype=torch.float32).view(SHAPE)
STOCK_KNOWS_ATTRIBUTES = hasattr(dcp, "CheckpointableTensor")


def checkpointable(local, boxes, local_offsets, shape=SHAPE):
    local.global_shape = shape
    local.global_offsets = tuple(box.offsets for box in boxes)
    local.local_sizes = tuple(box.sizes for box in boxes)
    local.local_offsets = tuple(local_offsets)
    return local


def cut(count, of):
    """Where `count` uneven parts of a dimension begin and end; there may be empty ones."""
    stops = [min(of, -(-of // count) * (n + 1)) for n in range(count)]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def by_rows(world, pad=0):
    """Each rank's rows at the beginning of a buffer, with rows of padding after them, as Megatron-FSDP leaves them."""
    for first, stop in cut(world, SHAPE[0]):
        local = torch.full((stop - first + pad, 6), torch.nan)
        yield checkpointable(local, [Box((first, 0), (stop - first, 6))], [(0, 0)])


def by_columns(world):
    for first, stop in cut(world, SHAPE[1]):
        yield checkpointable(torch.full((11, stop - first), torch.nan), [Box((0, first), (11, stop - first))], [(0, 0)])


def interleaved(world):
    """Several shards a rank, stored in reverse, with padding before, between and after them."""
    for rank in range(world):
        rows = list(range(rank, SHAPE[0], world))
        local = torch.full((2 * len(rows) + 1, 8), torch.nan)
        places = [(2 * (len(rows) - n) - 1, 1) for n in range(len(rows))]
        yield checkpointable(local, [Box((row, 0), (1, 6)) for row in rows], places)


def hooked(world):
    for first, stop in cut(world, SHAPE[0]):
        yield Shards(
            SHAPE, [(Box((first, 0), (stop - first, 6)), torch.full((stop - first, 6), torch.nan))], torch.float32
        )


def wrapped(world):
    for first, stop in cut(world, SHAPE[0]):
        held = [torch.full((stop - first, 6), torch.nan)] if stop > first else []
        yield LocalShardsWrapper(held, [(first, 0)] * len(held))


def whole(world):
    for _ in range(world):
        yield torch.full(SHAPE, torch.nan)


LAYOUTS = {
    "rows": by_rows,
    "padded rows": lambda world: by_rows(world, pad=3),
    "columns": by_columns,
    "interleaved": interleaved,
    "hooked": hooked,
    "wrapped": wrapped,
    "whole": whole,
}


def buffers(value):
    kind = kind_of("w", value)
    return [(box, kind.shard(MetadataIndex("w", box.offsets, n))) for n, box in enumerate(kind.boxes())]


def filled(values):
    for value in values:
        for box, memory in buffers(value):
            memory.copy_(WHOLE[box.slices])
        yield value


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", ["rows", "padded rows", "columns", "interleaved"])
def test_shards_by_attributes_reshard_into_every_kind(tmp_path, source, target):
    for world in (1, 2, 4):
        path = tmp_path / str(world)
        states = [{"w": value} for value in filled(LAYOUTS[source](world))]
        before = [state["w"].clone() for state in states]
        metadata = fake_ranks.save(states, lambda path=path: AsyncStorageWriter(path))
        assert metadata.state_dict_metadata["w"].size == torch.Size(SHAPE)
        for state, copy in zip(states, before, strict=True):
            assert_same(state["w"], copy)
        for other in (1, 3, 4):
            loaded = [{"w": value} for value in LAYOUTS[target](other)]
            fake_ranks.load(loaded, lambda path=path: AsyncStorageReader(path))
            for state in loaded:
                assert_holds_what_it_should_and_no_more(state["w"])


def assert_holds_what_it_should_and_no_more(value):
    held = 0
    for box, memory in buffers(value):
        assert torch.equal(memory, WHOLE[box.slices]), box
        held += box.numel
    if type(value) is torch.Tensor:
        assert int((~value.isnan()).sum()) == held, "padding was written to"


def test_a_save_of_one_part_of_several_kinds_round_trips_into_shards_by_attributes(tmp_path):
    for source, layout in LAYOUTS.items():
        path = tmp_path / source
        fake_ranks.save([{"w": value} for value in filled(layout(3))], lambda path=path: AsyncStorageWriter(path))
        for target in ("padded rows", "interleaved"):
            loaded = [{"w": value} for value in LAYOUTS[target](2)]
            fake_ranks.load(loaded, lambda path=path: AsyncStorageReader(path))
            for state in loaded:
                assert_holds_what_it_should_and_no_more(state["w"])


def one_rank(pad=2):
    [value] = filled(by_rows(1, pad))
    return value


@pytest.mark.parametrize("how", [dcp.save, dcp.async_save], ids=["save", "async_save"])
def test_shards_by_attributes_with_dcp_s_own_planner_are_right_or_refused(tmp_path, how):
    try:
        saved = how({"w": one_rank()}, storage_writer=AsyncStorageWriter(tmp_path), no_dist=True)
        saved.result(100) if how is dcp.async_save else None
    except CheckpointException as error:
        assert not STOCK_KNOWS_ATTRIBUTES
        assert how is dcp.save
        assert isinstance(error.failures[0][0], UnsupportedTensor)
        assert "save with ShardedSavePlanner" in str(error)
        return
    loaded = {"w": torch.zeros(SHAPE)}
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path), no_dist=True)
    assert torch.equal(loaded["w"], WHOLE)


def test_attributes_that_say_what_is_so_anyway_do_no_harm(tmp_path):
    dcp.save({"w": one_rank(pad=0)}, storage_writer=AsyncStorageWriter(tmp_path), no_dist=True)
    loaded = {"w": torch.zeros(SHAPE)}
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path), no_dist=True)
    assert torch.equal(loaded["w"], WHOLE)


@pytest.mark.skipif(not STOCK_KNOWS_ATTRIBUTES, reason="this torch's planner does not know them")
def test_shards_by_attributes_load_with_dcp_s_own_planner(tmp_path):
    dcp.save({"w": one_rank()}, storage_writer=AsyncStorageWriter(tmp_path), no_dist=True)
    [value] = by_rows(1, 3)
    dcp.load({"w": value}, storage_reader=AsyncStorageReader(tmp_path), no_dist=True)
    assert_holds_what_it_should_and_no_more(value)


def test_what_stock_saves_of_attributes_loads_by_us_and_the_reverse(tmp_path):
    if not STOCK_KNOWS_ATTRIBUTES:
        pytest.skip("this torch's planner does not know them")
    dcp.save({"w": one_rank()}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    [value] = interleaved(1)
    dcp.load({"w": value}, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner(), no_dist=True)
    assert_holds_what_it_should_and_no_more(value)


def test_a_parameter_may_carry_the_attributes_and_a_lone_shard_needs_no_offset():
    value = one_rank()
    parameter = checkpointable(torch.nn.Parameter(torch.ones(11, 6)), [Box((0, 0), SHAPE)], [(0, 0)])
    assert isinstance(kind_of("w", parameter), Checkpointable)
    assert torch.equal(kind_of("w", value).shard(MetadataIndex("w")), WHOLE)
    two = checkpointable(torch.ones(2, 6), [Box((0, 0), (1, 6)), Box((5, 0), (1, 6))], [(0, 0), (1, 0)])
    with pytest.raises(CoverageError, match=r"no shard that begins at \[\]"):
        kind_of("w", two).shard(MetadataIndex("w"))


def test_hooks_count_for_more_than_attributes(as_rank):
    as_rank(1, 2)
    spec = DTensorSpec(
        DeviceMesh("cpu", [0, 1]), (Shard(0),), tensor_meta=TensorMeta(torch.Size(SHAPE), (6, 1), torch.float32)
    )
    value = checkpointable(DTensor(torch.ones(5, 6), spec, requires_grad=False), [Box((0, 0), (5, 6))], [(0, 0)])
    assert kind_of("w", value).boxes() == [Box((6, 0), (5, 6))]
    assert kind_of("w", checkpointable(next(hooked(1)), [], [])).boxes() == [Box((0, 0), SHAPE)]


def test_three_attributes_are_not_enough():
    value = torch.ones(2)
    value.global_shape, value.global_offsets, value.local_sizes = (4,), ((0,),), ((2,),)
    assert isinstance(kind_of("w", value), Plain)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"global_offsets": ((8, 0),)}, r"\[8:19, 0:6\] is outside the global shape \[11, 6\]"),
        ({"local_offsets": ((3, 0),)}, r"\[3:14, 0:6\] is outside the local shape \[13, 6\]"),
        ({"local_sizes": ((11,),)}, "different lengths"),
        ({"local_sizes": ()}, "shorter"),
        ({"global_offsets": None}, "NoneType"),
        ({"global_offsets": (("x", 0),)}, "invalid literal"),
        ({"global_offsets": ((-1, 0),)}, r"\[-1:10, 0:6\] is outside"),
    ],
)
def test_attributes_that_cannot_be_are_refused_by_name(tmp_path, attributes, says):
    value = one_rank()
    for name, wrong in attributes.items():
        setattr(value, name, wrong)
    for save in (dcp.save, dcp.async_save):
        with pytest.raises(CheckpointException, match=says) as failure:
            saved = save(
                {"w": value}, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner(), no_dist=True
            )
            saved.result(100)
        assert isinstance(failure.value.failures[0][0], CoverageError)
        assert "w: its attributes" in str(failure.value)


def test_meta_destinations_keep_their_attributes(tmp_path):
    fake_ranks.save([{"w": value} for value in filled(by_rows(2))], lambda: AsyncStorageWriter(tmp_path))
    loaded = []
    for value in by_rows(3, pad=1):
        meta = value.to("meta")
        meta.__dict__.update(value.__dict__)
        loaded.append({"w": meta})
    fake_ranks.load(loaded, lambda: AsyncStorageReader(tmp_path))
    for state in loaded:
        assert isinstance(kind_of("w", state["w"]), Checkpointable)
        for box, memory in buffers(state["w"]):
            assert torch.equal(memory, WHOLE[box.slices])


# DTensors that are not what their placements say


def dtensor(local, rank, world, placements=(Shard(0),), shape=SHAPE):
    mesh = DeviceMesh("cpu", list(range(world)))
    stride = torch.empty(shape).stride()
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(torch.Size(shape), stride, local.dtype))
    return DTensor(local, spec, requires_grad=False)


def with_hooks(value, box):
    """The hooks that Megatron puts on the local tensor of an uneven DTensor."""
    from dcp_storage.dcp.kinds.boxes import box_chunk, box_item

    local = local_tensor(value)
    local.__create_chunk_list__ = lambda: [box_chunk(box)]
    local.__create_write_items__ = lambda fqn, _: [box_item(fqn, box, SHAPE, torch.float32)]
    return value


@pytest.mark.parametrize("how", [dcp.save, dcp.async_save], ids=["save", "async_save"])
def test_hooks_of_a_local_tensor_survive_saves_and_meta_destinations(tmp_path, as_rank, how):
    """Two equal halves, the first of which is the second rank's."""
    as_rank(0, 2)
    shape, halves = (10, 6), {0: Box((5, 0), (5, 6)), 1: Box((0, 0), (5, 6))}
    for rank, box in halves.items():
        as_rank(rank, 2)
        value = with_hooks(dtensor(WHOLE[:10][box.slices].clone(), rank, 2, shape=shape), box)
        if how is dcp.save:
            assert kind_of("w", value).boxes() == [box]
        else:
            staged = AsyncStorageWriter(tmp_path).stage({"w": value})
            assert staged.error is None
            assert kind_of("w", staged["w"]).boxes() == [box]
            assert torch.equal(buffers(staged["w"])[0][1], WHOLE[:10][box.slices])
        meta = with_hooks(dtensor(torch.empty(5, 6, device="meta"), rank, 2, shape=shape), box)
        made = kind_of("w", meta).materialized()
        assert kind_of("w", made).boxes() == [box]
        assert not local_tensor(made).is_meta


def test_a_hook_that_still_gives_the_tensor_without_memory_is_refused(tmp_path):
    fake_ranks.save([{"w": WHOLE}], lambda: AsyncStorageWriter(tmp_path))
    meta = torch.empty(SHAPE, device="meta")
    meta.__get_tensor_shard__ = lambda index: meta
    with pytest.raises(UnsupportedTensor, match="w is a Tensor on the meta device: allocate its memory"):
        fake_ranks.load([{"w": meta}], lambda: AsyncStorageReader(tmp_path))


class Interleaved(Shard):
    """Deals the rows out one by one."""

    def _split_tensor(self, tensor, num_chunks, *, with_padding=True, contiguous=True):
        index = [torch.arange(n, tensor.size(self.dim), num_chunks) for n in range(num_chunks)]
        return [tensor.index_select(self.dim, rows) for rows in index], [0] * num_chunks


class Renamed(Shard):
    """Shards as Shard does."""

    def __repr__(self):
        return "Renamed"


class Secret(Shard):
    """Shards in a way of its own that it does not tell."""

    def _to_replicate_tensor(self, *args):
        raise NotImplementedError


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_placement_of_ones_own_is_asked(as_rank, world):
    found = torch.zeros(11, dtype=torch.int64)
    for rank in range(world):
        as_rank(rank, world)
        rows = torch.arange(rank, 11, world)
        kind = kind_of("w", dtensor(WHOLE[rows].clone(), rank, world, [Interleaved(0)]))
        for n, box in enumerate(kind.boxes()):
            assert torch.equal(kind.shard(MetadataIndex("w", box.offsets, n)), WHOLE[box.slices])
            found[box.offsets[0] : box.offsets[0] + box.sizes[0]] += 1
        assert len(kind.write_items()) == len(kind.boxes())
    assert found.eq(1).all()


def test_a_placement_that_only_has_another_name_is_a_shard(as_rank):
    as_rank(1, 2)
    assert kind_of("w", dtensor(torch.ones(5, 6), 1, 2, [Renamed(0)])).boxes() == [Box((6, 0), (5, 6))]


class Own(Placement):
    """Neither shards nor replicates."""


@pytest.mark.parametrize("placement", [Secret(0), Own()], ids=["shard", "other"])
def test_a_placement_that_does_not_tell_is_refused_by_name(as_rank, placement):
    as_rank(1, 2)
    kind = kind_of("w", dtensor(torch.ones(5, 6), 1, 2, [placement]))
    for ask in (kind.write_items, kind.boxes):
        with pytest.raises(UnsupportedTensor, match="w has the placement .* which does not say in _split_tensor"):
            ask()


def test_a_local_tensor_of_another_size_than_the_placement_says_is_refused(as_rank):
    as_rank(0, 2)
    with pytest.raises(CoverageError, match="w: with a local size of 4"):
        kind_of("w", dtensor(torch.ones(4, 6), 0, 2, [Interleaved(0)])).boxes()


# What is pickled whole


@pytest.mark.parametrize(
    "make",
    [
        lambda: dtensor(torch.ones(6, 6), 0, 2),
        lambda: next(wrapped(1)),
        one_rank,
    ],
    ids=["DTensor", "LocalShardsWrapper", "CheckpointableTensor"],
)
@pytest.mark.parametrize("hide", [lambda part: (part, 1), lambda part: [(1, {"deep": part})], Exception], ids=str)
@pytest.mark.parametrize("how", ["save", "async_save"])
@pytest.mark.filterwarnings("ignore:.*list these types")
def test_parts_of_distributed_tensors_in_tuples_and_objects_are_refused(tmp_path, as_rank, make, hide, how):
    as_rank(0, 2)
    state = {"fine": (torch.ones(2), "text"), "odd": hide(make())}
    writer = AsyncStorageWriter(tmp_path)
    if how == "async_save":
        staged = writer.stage(state)
        if staged.error:  # an object whose part cannot be copied
            assert isinstance(staged.error, DcpStorageError)
            return
        state = dict(staged)
    with pytest.raises((UnsupportedTensor, CheckpointException), match=r"odd.* is stored whole, from one rank|Missing"):
        fake_ranks.save([state], lambda: writer)


# Subclasses with operations of their own


def test_a_destination_with_operations_of_its_own_is_filled_by_its_copy(tmp_path):
    state = {"w": WHOLE, "half": WHOLE.half()}
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path / "ours"), no_dist=True)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "stock"), no_dist=True)
    for path in ("ours", "stock"):
        for planner in (ShardedLoadPlanner(dtype_policy="cast"), None):
            loaded = {name: TwoTensor(torch.zeros(SHAPE), torch.ones(SHAPE)) for name in state}
            dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path / path), planner=planner, no_dist=True)
            for value in loaded.values():
                assert type(value) is TwoTensor
                assert torch.equal(value.a, WHOLE)
                assert torch.equal(value.b, WHOLE)


def test_a_stock_checkpoint_of_a_subclass_is_called_what_it_is(tmp_path):
    dcp.save(
        {"two": TwoTensor(torch.ones(3), torch.ones(3))}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True
    )
    with pytest.raises(CheckpointException, match="two was stored as an object of types .*TwoTensor"):
        dcp.load({"two": torch.zeros(3)}, storage_reader=AsyncStorageReader(tmp_path), no_dist=True)


def test_loads_under_inference_mode(tmp_path):
    state = {"w": WHOLE, "turned": WHOLE.t(), "zero": torch.tensor(5)}
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path / "ours"), no_dist=True)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "stock"), no_dist=True)
    for path, planner in itertools.product(("ours", "stock"), (ShardedLoadPlanner(), None)):
        with torch.inference_mode():
            loaded = {"w": torch.zeros(SHAPE), "turned": torch.zeros(11, 6).t(), "zero": torch.tensor(0)}
            dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path / path), planner=planner, no_dist=True)
            assert_same(loaded, state)
