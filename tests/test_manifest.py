"""The manifest: what is written is read, frame by frame; and whatever happens to its frames is found out."""

import asyncio
import random
from itertools import pairwise, product

import msgspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner
from dcp_storage.checkpoint.fetch import fetch_head
from dcp_storage.errors import ConfigError, ManifestCorrupt, ObjectNotFound, UnsupportedFormat
from dcp_storage.format.manifest import draft as drafts
from dcp_storage.format.manifest import frames
from dcp_storage.format.manifest.boxes import Grid, Listed, Whole, grid_of
from dcp_storage.format.manifest.draft import Draft, DraftTensor, encode
from dcp_storage.format.manifest.frames import StoredCodec
from dcp_storage.format.manifest.manifest import StoredObject, decode
from dcp_storage.format.manifest.schema import ListedBoxes, Segment
from dcp_storage.geometry import Box, intersect
from dcp_storage.store.open import open_store
from tests import documents
from tests.drafts import arrays_of, columns_of, layout

BLOCK = 4096
OBJECT_BYTES = 1 << 40


@st.composite
def grids(draw):
    """A shape and the boxes of a grid in it, ascending."""
    size = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    starts = [sorted({0, *draw(st.sets(st.integers(0, extent - 1), max_size=3))}) for extent in size]
    edges = [list(pairwise([*cuts, extent])) for cuts, extent in zip(starts, size, strict=True)]
    boxes = [Box(tuple(a for a, _ in each), tuple(b - a for a, b in each)) for each in product(*edges)]
    return size, boxes


@st.composite
def tilings(draw):
    """A shape and boxes that tile it, ascending: mostly no grid."""
    size = tuple(draw(st.lists(st.integers(1, 8), max_size=3)))
    boxes = [Box((0,) * len(size), size)]
    for _ in range(draw(st.integers(0, 4)) if size else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(size) - 1))
        if box.sizes[dim] < 2:
            boxes.append(box)
            continue
        cut = draw(st.integers(1, box.sizes[dim] - 1))
        for start, extent in ((0, cut), (cut, box.sizes[dim] - cut)):
            offsets = (*box.offsets[:dim], box.offsets[dim] + start, *box.offsets[dim + 1 :])
            boxes.append(Box(offsets, (*box.sizes[:dim], extent, *box.sizes[dim + 1 :])))
    return size, sorted(boxes)


def boxes_from(size, boxes):
    cuts = grid_of(size, *arrays_of(size, boxes))
    if cuts is None:
        return None
    return Grid(
        size, [range(0, n, each) if isinstance(each, int) else each for each, n in zip(cuts, size, strict=True)]
    )


@given(grids())
def test_grids_are_found_and_give_their_boxes_back(case):
    size, boxes = case
    grid = boxes_from(size, boxes)
    assert list(grid) == boxes
    assert grid == Listed(size, boxes)
    assert grid.counts() == [box.numel for box in boxes]


@given(tilings(), st.data())
def test_every_kind_of_boxes_answers_alike(case, data):
    size, boxes = case
    kinds = [Listed(size, boxes), *filter(None, [boxes_from(size, boxes)])]
    if len(boxes) == 1:
        kinds.append(Whole(size))
    offsets = tuple(data.draw(st.integers(0, extent - 1)) for extent in size)
    wanted = Box(offsets, tuple(data.draw(st.integers(0, n - o)) for n, o in zip(size, offsets, strict=True)))
    for kind in kinds:
        assert list(kind) == boxes
        assert [kind[number] for number in range(-len(boxes), 0)] == boxes
        assert kind.near(wanted) == [n for n, box in enumerate(boxes) if intersect(wanted, box)]
        assert [kind.at(box.offsets) for box in boxes] == list(range(len(boxes)))
        assert kind.at((99,) * len(size)) is None or not size
        assert kind.at((0,) * (len(size) + 1)) is None
        with pytest.raises(IndexError):
            kind[len(boxes)]


@given(st.integers(8, 40), st.data())
def test_many_listed_boxes_are_compared_at_once(count, data):
    boxes = [Box((n, 0), (1, 4)) for n in range(count)]
    data.draw(st.randoms()).shuffle(boxes)
    wanted = Box((data.draw(st.integers(0, count - 1)), 1), (3, 2))
    assert Listed((count, 4), boxes).near(wanted) == [n for n, box in enumerate(boxes) if intersect(wanted, box)]


def test_a_cut_is_a_number_where_it_is_regular():
    assert grid_of((10, 4), *arrays_of((10, 4), [Box((0, 0), (4, 4)), Box((4, 0), (4, 4)), Box((8, 0), (2, 4))])) == [
        4,
        4,
    ]
    assert grid_of((10,), *arrays_of((10,), [Box((0,), (1,)), Box((1,), (9,))])) == [[0, 1]]
    assert layout((3,), [Box((0,), (3,))]) is None
    assert isinstance(layout((3,), []), ListedBoxes)


def segments_of(random, nbytes, objects):
    """Return segments of random lengths for so many raw bytes."""
    blocks = -(-nbytes // BLOCK)
    cuts = sorted({0, blocks, *(random.randrange(blocks) for _ in range(random.randrange(3)))}) if blocks else []
    return [
        Segment(
            random.randrange(objects),
            random.randrange(OBJECT_BYTES // 2),
            tuple(random.randrange(1, 60) for _ in range(stop - start)),
            "".join(f"{random.randrange(1 << 32):08x}" for _ in range(stop - start)),
        )
        for start, stop in pairwise(cuts)
    ]


def make_draft(seed, cuts, entries=3, objects=2, **said):
    """Return a draft of tensors with these boxes."""
    chance = random.Random(seed)
    names = sorted(f"t{number}.{chance.randrange(1000)}" for number in range(len(cuts)))
    held = [[segments_of(chance, box.numel * 4, objects) for box in boxes] for _, boxes in cuts]
    tensors = {
        name: DraftTensor("float32", size, 4, len(boxes), layout(size, boxes))
        for name, (size, boxes) in zip(names, cuts, strict=True)
    }
    sizes = {f"e{number}": chance.randrange(20_000) for number in range(entries)}
    held.append([segments_of(chance, size, objects) for size in sizes.values()])
    return Draft(
        save_id="0123456789abcdef",
        created="2026-01-01T00:00:00+00:00",
        libraries={"dcp_storage": "0.1.0"},
        world_size=2,
        codec=StoredCodec("zstd", BLOCK, 1),
        objects=[StoredObject(f"0123456789abcdef-{n}-0.distcp.zst", OBJECT_BYTES) for n in range(objects)],
        tensors=tensors,
        entries=sizes,
        stored=columns_of(item for items in held for item in items),
        planner_data={name: tuple(name.split(".")) for name in [*tensors, *sizes]},
        **said,
    )


@given(st.integers(0, 1 << 30), st.lists(grids() | tilings(), max_size=8), st.sampled_from([1, 200, 1 << 20]))
def test_what_is_written_is_read(seed, cuts, weight):
    draft = make_draft(seed, cuts, info={"step": seed})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafts, "_FRAME_WEIGHT", weight)
        manifest = decode(encode(draft), "here")
    manifest.check_whole()
    assert manifest.head.info == {"step": seed}
    assert list(manifest.tensors) == sorted(draft.tensors)
    assert list(manifest.bytes) == sorted(draft.entries)
    assert manifest.planner_data == dict(sorted(draft.planner_data.items()))
    assert list(manifest.objects) == list(draft.objects)
    held = []
    for (name, tensor), (_, boxes) in zip(draft.tensors.items(), cuts, strict=True):
        found = manifest.tensors[name]
        assert (found.dtype, found.planes, found.size) == (tensor.dtype, tensor.planes, tensor.size)
        assert list(found.boxes) == boxes
        held += [found.segments(number) for number in range(len(boxes))]
    assert {name: entry.size for name, entry in manifest.bytes.items()} == draft.entries
    held += [entry.segments for entry in manifest.bytes.values()]
    for ours, theirs, whole in zip(columns_of(held), draft.stored, manifest.stored(), strict=True):
        assert ours.tolist() == theirs.tolist() == whole.tolist()
    assert manifest.head.raw_bytes == draft.raw_bytes
    assert "nothing" not in manifest.tensors
    assert manifest.tensors.get("\0") is None


def many(count=2000):
    return make_draft(1, [((8, 8), [Box((0, 0), (8, 8))])] * count)


def test_one_tensor_costs_its_frame(monkeypatch):
    monkeypatch.setattr(drafts, "_FRAME_WEIGHT", 4096)
    manifest = decode(encode(many()), "here")
    decoded = []
    real = msgspec.json.decode
    monkeypatch.setattr(msgspec.json, "decode", lambda text, **how: decoded.append(len(text)) or real(text, **how))
    name = sorted(many().tensors)[1000]
    assert manifest.tensors[name].size == (8, 8)
    assert manifest.tensors[name].segments(0)
    assert len(decoded) == 2, "the objects, and one frame of some forty"
    assert len(manifest.head.frames) > 20


def test_frames_grow_before_they_are_too_many(monkeypatch):
    monkeypatch.setattr(drafts, "_FRAME_WEIGHT", 1)
    data = encode(many(5000))
    head, size = frames.unpack_head(data, "here")
    assert 64 < len(head.frames) <= frames.MAX_FRAMES
    assert size <= frames.HEAD_BYTES


def cut_up(data):
    """Return a manifest's frames, the head first."""
    head, size = frames.unpack_head(data, "here")
    return [data[:size], *frames.split_frames(head, data, size, "here")]


@pytest.fixture(scope="module")
def parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafts, "_FRAME_WEIGHT", 2000)
        ours, others = (cut_up(encode(make_draft(seed, [((8, 8), [Box((0, 0), (8, 8))])] * 40))) for seed in (1, 2))
    assert len(ours) == len(others) > 4
    return ours, others


def test_whatever_happens_to_frames_is_found_out(parts):
    ours, others = parts
    whole = b"".join(ours)
    decode(whole, "here").check_whole()
    swapped = [ours[0], ours[2], ours[1], *ours[3:]]
    broken = {
        "swapped": swapped,
        "repeated": [*ours, ours[-1]],
        "missing": ours[:-1],
        "missing in the middle": [*ours[:2], *ours[3:]],
        "all missing": ours[:1],
        "the head alone is another's": [others[0], *ours[1:]],
        "one of another save": [*ours[:2], others[2], *ours[3:]],
        "trailing bytes": [*ours, b"\0"],
        "a trailing frame": [*ours, ours[1]],
        "nothing": [],
        "no head": ours[1:],
    }
    for what, pieces in broken.items():
        with pytest.raises(ManifestCorrupt, match="here") as caught:
            decode(b"".join(pieces), "here")
        assert "here" in str(caught.value), what


def test_truncated_anywhere(parts):
    whole = b"".join(parts[0])
    for stop in [*range(40), *range(len(whole) // 2, len(whole), 97), len(whole) - 1]:
        with pytest.raises(ManifestCorrupt):
            decode(whole[:stop], "here")


def test_a_flipped_bit_anywhere(parts):
    whole = b"".join(parts[0])
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        with pytest.raises((ManifestCorrupt, UnsupportedFormat)):
            decode(bytes(damaged), "here").check_whole()


def test_a_feature_that_is_required_and_not_known_is_refused_by_name():
    document = documents.unpack(encode(make_draft(1, [])))
    document["head"]["requires"] = ["deltas", "telepathy"]
    with pytest.raises(UnsupportedFormat, match=r"written by dcp_storage 0\.1\.0, requires deltas, telepathy"):
        decode(documents.pack(document), "here")


def test_what_is_unknown_and_not_required_is_ignored():
    document = documents.unpack(encode(make_draft(1, [((4,), [Box((0,), (4,))])])))
    for part in document.values():
        part["later"] = [1, 2, 3]
    document["tensors"]["stored"]["later"] = "x"
    decode(documents.pack(document), "here").check_whole()


def test_a_head_that_is_larger_than_any_reader_takes():
    with pytest.raises(ConfigError, match="the head of the manifest would be"):
        encode(make_draft(1, [], info={"x": "".join(random.Random(1).choices("abcdefghijklmnop", k=4 << 20))}))


@pytest.mark.timeout(60)
def test_a_million_chunks_in_one_tensor():
    count = 1 << 20
    boxes = [Box((number,), (1,)) for number in range(count)]
    segments = [[Segment(0, number, (1,), "0a1b2c3d")] for number in range(count)]
    tensor = DraftTensor("float32", (count,), 4, count, layout((count,), boxes))
    draft = make_draft(1, [], entries=0)
    data = encode(Draft(**{**vars(draft), "tensors": {"w": tensor}, "stored": columns_of(segments)}))
    manifest = decode(data, "here")
    manifest.check_whole()
    assert manifest.tensors["w"].boxes.near(Box((5,), (2,))) == [5, 6]
    assert manifest.tensors["w"].segments(count - 1)[0].offset == count - 1


def test_boxes_without_elements_are_no_grid():
    assert grid_of((1,), *arrays_of((1,), [Box((0,), (1,)), Box((1,), (0,))])) is None
    assert grid_of((2,), *arrays_of((2,), [Box((0,), (0,)), Box((0,), (2,))])) is None


@pytest.mark.parametrize("extra", [0, 10_000], ids=["small", "larger than one request"])
def test_a_head_is_read_alone(tmp_path, extra):
    path = tmp_path / ".metadata"
    libraries = {f"{number:09x}": f"{random.Random(number).getrandbits(128):x}" for number in range(extra)}
    draft = make_draft(1, [((8,), [Box((0,), (8,))])] * 3, info={"step": 5})
    path.write_bytes(encode(Draft(**{**vars(draft), "libraries": libraries})))
    asked = []

    async def read():
        async with open_store(tmp_path) as store:
            real = store.get_range
            store.get_range = lambda name, start, stop: asked.append(stop - start) or real(name, start, stop)
            return await fetch_head(store, ".metadata")

    head = asyncio.run(read())
    assert (head.tensors, head.info, head.libraries) == (3, {"step": 5}, libraries)
    assert asked == [16 << 10] if not extra else [16 << 10, 1 << 20]


def test_a_head_of_a_damaged_or_a_stock_checkpoint(tmp_path):
    async def read():
        async with open_store(tmp_path) as store:
            return await fetch_head(store, ".metadata")

    with pytest.raises(ObjectNotFound):
        asyncio.run(read())
    (tmp_path / ".metadata").write_bytes(encode(make_draft(1, []))[:50])
    with pytest.raises(ManifestCorrupt):
        asyncio.run(read())
    (tmp_path / ".metadata").write_bytes(b"\x80\x04a pickle")
    with pytest.raises(UnsupportedFormat, match="stock"):
        asyncio.run(read())


def test_a_load_decodes_the_frames_of_what_it_asks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(drafts, "_FRAME_WEIGHT", 1)
    state = {f"layer{number:02}.weight": torch.full((3,), float(number)) for number in range(40)}
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path))
    for planner in (ShardedLoadPlanner(), DefaultLoadPlanner()):
        reader = AsyncStorageReader(tmp_path)
        wanted = {"layer07.weight": torch.zeros(3), "layer31.weight": torch.zeros(3)}
        dcp.load(wanted, storage_reader=reader, planner=planner)
        assert wanted["layer31.weight"].tolist() == [31.0] * 3
        assert [len(frame) for frame in reader._manifest.tensors._frames.values()] == [1, 1]
