import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from dcp_storage import AsyncStorageWriter, ShardedSavePlanner
from dcp_storage.config import MIB, Transfer
from dcp_storage.dcp.saves.groups import group_items
from dcp_storage.format.manifest.manifest import decode
from dcp_storage.transfer.layout import MIN_OBJECT_BYTES, Piece, lay_out, split_units, target_bytes
from dcp_storage.transfer.workers import useful_threads

BLOCK = 16
sizes = st.lists(st.integers(0, 300), max_size=12)
targets = st.integers(1, 200)


@given(sizes, targets)
def test_objects_hold_every_byte_once_and_in_order(sizes, target):
    pieces = [piece for pieces in lay_out(sizes, BLOCK, target) for piece in pieces]
    assert pieces == sorted(pieces)
    for item, size in enumerate(sizes):
        stop = 0
        for piece in (piece for piece in pieces if piece.item == item):
            assert piece.start == stop
            assert piece.start % BLOCK == 0
            stop = piece.stop
        assert stop == size


@given(sizes, targets)
def test_objects_are_filled_and_never_overfull(sizes, target):
    held = [sum(piece.stop - piece.start for piece in pieces) for pieces in lay_out(sizes, BLOCK, target)]
    most = max(target, BLOCK)
    assert all(0 < size <= most for size in held)
    assert all(size > most - BLOCK for size in held[:-1])


@given(sizes, targets, st.integers(1, 100))
def test_units_are_the_pieces_cut_smaller(sizes, target, unit_bytes):
    for pieces in lay_out(sizes, BLOCK, target):
        units = split_units(pieces, BLOCK, unit_bytes)
        joined: list[Piece] = []
        for piece in (piece for unit in units for piece in unit):
            if joined and joined[-1].item == piece.item and joined[-1].stop == piece.start:
                joined[-1] = Piece(piece.item, joined[-1].start, piece.stop)
            else:
                joined.append(piece)
        assert joined == pieces
        held = [sum(piece.stop - piece.start for piece in unit) for unit in units]
        assert all(0 < size <= max(unit_bytes, BLOCK) for size in held)


groups = st.lists(st.sampled_from(["model", "optim", ""]), min_size=12, max_size=12)


@given(sizes, targets, groups)
def test_large_items_of_different_groups_share_no_object(sizes, target, groups):
    groups = groups[: len(sizes)]
    objects = lay_out(sizes, BLOCK, target, groups)
    for pieces in objects:
        assert len({groups[piece.item] for piece in pieces if sizes[piece.item] >= BLOCK}) <= 1
        assert sum(piece.stop - piece.start for piece in pieces) <= max(target, BLOCK)
    for item, size in enumerate(sizes):
        mine = [piece for pieces in objects for piece in pieces if piece.item == item]
        assert [piece.start for piece in mine] == [0, *(piece.stop for piece in mine)][: len(mine)]
        assert sum(piece.stop - piece.start for piece in mine) == size
    more = len(objects) - len(lay_out(sizes, BLOCK, target))
    assert more <= len(set(groups))


def test_groups_of_small_items_cost_no_object():
    assert len(lay_out([4096] * 100, MIB, 64 * MIB, ["a", "b"] * 50)) == 1
    assert len(lay_out([2 * MIB, 4096, 2 * MIB, 4096], MIB, 64 * MIB, ["a", "b", "c", "d"])) == 2


def mapped(*paths):
    items = [WriteItem(MetadataIndex(".".join(path)), WriteItemType.BYTE_IO) for path in paths]
    planner = ShardedSavePlanner()
    planner.mappings = {".".join(path): path for path in paths}
    return group_items(SavePlan(items), planner)


def test_groups_are_the_top_level_mappings():
    model, optim = ("model", "w"), ("optim", "state", "w", "exp_avg")
    assert mapped(model, optim, ("step",), ("rng",)) == ["model", "optim", "", ""]
    assert mapped(("app", *model), ("app", *optim)) == ["model", "optim"], "single mappings are looked through"
    assert mapped(("w",), ("b",)) == [], "loose tensors are one"
    assert mapped(model, ("model", "b")) == []
    assert mapped(*((f"layer{n}", "w") for n in range(40))) == [], "these are names, not parts"
    assert mapped() == []


def test_dropping_a_group_is_deleting_objects(tmp_path):
    state = {part: {"w": torch.randn(600, 1024), "b": torch.ones(3)} for part in ("model", "optim")} | {"step": 3}
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner(), no_dist=True)
    manifest = decode((tmp_path / ".metadata").read_bytes(), "here")
    objects = {name: {s.object for s in manifest.tensors[f"{name}.w"].segments(0)} for name in ("model", "optim")}
    assert objects["model"].isdisjoint(objects["optim"])
    assert len(manifest.objects) == 2


def test_many_small_items_share_few_objects():
    assert len(lay_out([4096] * 20_000, MIB, 64 * MIB)) == 2


def test_every_worker_gets_an_object_unless_objects_would_be_small():
    assert target_bytes(total=800 * MIB, object_bytes=64 * MIB, concurrency=8) == 64 * MIB
    assert len(lay_out([160 * MIB + 5], MIB, target_bytes(160 * MIB + 5, 64 * MIB, concurrency=8))) == 8
    assert target_bytes(total=MIB, object_bytes=64 * MIB, concurrency=8) == MIN_OBJECT_BYTES
    assert target_bytes(total=800 * MIB, object_bytes=4 * MIB, concurrency=8) == 4 * MIB


def test_small_items_are_encoded_in_one_thread():
    transfer = Transfer(threads=8)
    assert useful_threads(transfer, items=20_000, nbytes=20_000 * 4096) == 1
    assert useful_threads(transfer, items=20_000, nbytes=20_000 * MIB) == 8
    assert useful_threads(transfer, items=0, nbytes=0) == 8
