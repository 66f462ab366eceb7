"""Manifests, pickles, blocks and entries that mean harm are refused by name, or do none."""

import builtins
import io
import os
import pickle
import subprocess
import tracemalloc
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner
from dcp_storage.dcp.loads.entries import load_entry
from dcp_storage.errors import BlockCorrupt, DcpStorageError, ManifestCorrupt, UnsupportedFormat
from dcp_storage.format.manifest.manifest import decode
from dcp_storage.verify import verify
from tests import documents, hostile
from tests.states import blank_like
from tests.test_bad_input import rewrite, set_in

several = settings(max_examples=150)


def picks(data):
    return lambda count: data.draw(st.integers(0, count - 1))


def test_the_sound_ones_are_taken():
    assert hostile.read_manifest(documents.pack(hostile.sound_manifest())) is not None
    hostile.read_stock(hostile.stock_pickle())
    for compression, planes in (("zstd", 4), ("zstd", 1), ("none", 1)):
        hostile.read_block(hostile.sound_block(compression, planes), compression, planes)


@several
@given(st.data())
def test_changed_manifests(data):
    hostile.read_manifest(documents.pack(hostile.mutate(hostile.sound_manifest(), picks(data))))


@several
@given(st.data())
def test_changed_stock_manifests(data):
    hostile.read_stock(hostile.mutate_bytes(hostile.stock_pickle(), picks(data)))


@several
@given(st.data(), st.sampled_from([("zstd", 4), ("zstd", 2), ("zstd", 1), ("none", 1)]))
def test_changed_blocks(data, kind):
    hostile.read_block(hostile.mutate_bytes(hostile.sound_block(*kind), picks(data)), *kind)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A checkpoint, its state and its manifest as JSON values."""
    path = tmp_path_factory.mktemp("real")
    state = {"w": torch.randn(50, 64), "half": torch.ones(9, dtype=torch.bfloat16), "list": [torch.ones(2), "text", 3]}
    dcp.save(state, storage_writer=AsyncStorageWriter(path, codec=Codec(block_bytes=4096)))
    return path, state, documents.unpack((path / ".metadata").read_bytes())


@settings(max_examples=60)
@given(st.data())
def test_loads_by_changed_manifests(real, data):
    """What is accepted is read with it: a load ends with a typed error, or with values of the right shapes."""
    path, state, document = real
    (path / ".metadata").write_bytes(documents.pack(hostile.mutate(document, picks(data))))
    loaded = blank_like(state)
    try:
        dcp.load(loaded, storage_reader=AsyncStorageReader(path), planner=ShardedLoadPlanner(dtype_policy="cast"))
    except CheckpointException as raised:
        error = raised.failures[0][0]
        assert isinstance(error, DcpStorageError), repr(error)
        assert "".join(map(str, error.args))
    else:
        assert loaded["w"].shape == (50, 64)
    try:
        verify(path)
    except DcpStorageError as error:
        assert str(path) in str(error)


ENTRY = hostile.container({"a": [1, 2.5, "three"], "t": torch.arange(8)})


@settings(max_examples=100)
@given(st.data())
def test_changed_entries(data):
    try:
        load_entry("step", io.BytesIO(hostile.mutate_bytes(ENTRY, picks(data))))
    except (BlockCorrupt, UnsupportedFormat) as error:
        assert error.fqn == "step"
        assert "step" in str(error)


def refused(document, says):
    with pytest.raises(ManifestCorrupt, match=says) as caught:
        decode(documents.pack(document), "s3://bucket/run/.metadata").check_whole()
    assert "s3://bucket/run/.metadata" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_in("objects", "sizes", 1, value=1 << 63), "schema"),
        (set_in("tensors", "sizes", 0, value=[0, 1 << 63]), "schema"),
        (set_in("tensors", "sizes", 0, value=[1 << 62, 1 << 62]), "empty has shape"),
        (set_in("paths", "paths", 3, value=[]), "w has an invalid path"),
        (set_in("paths", "paths", 3, value=["x", -1]), "w has an invalid path"),
        (set_in("paths", "paths", 3, value=["x", 1 << 40]), "lists too long"),
        (
            set_in("paths", value={"names": list("abcde"), "paths": [["x", n, 1 << 18] for n in "abcde"]}),
            "lists too long",
        ),
    ],
)
def test_values_that_no_machine_holds(change, says):
    document = hostile.sound_manifest()
    change(document)
    refused(document, says)


NAMES = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/../../x",
    "a//b",
    "a\\b",
    "a\0b",
    "s3://b/k",
    "c:x",
    "a\nb",
    "x" * 300,
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_leave_the_checkpoint(name):
    document = hostile.sound_manifest()
    document["objects"]["names"][0] = name
    refused(document, "leaves the checkpoint")


def peak_of(call):
    """Return the most memory that Python allocated during a call, in bytes."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("says", ["in its header", "only in its blocks"])
def test_a_manifest_that_inflates(says):
    frame = zstandard.ZstdCompressor(write_content_size=says == "in its header").compress(bytes(100 << 20))
    assert len(frame) < 20_000

    def read():
        with pytest.raises(ManifestCorrupt, match="bytes of JSON"):
            decode(frame, "here")

    assert peak_of(read) < 1 << 20


def test_a_block_that_inflates():
    """Whatever the frame says of itself: a block is decoded to its own size, or not at all."""
    bomb = bytes(64 << 20)
    frames = [zstandard.ZstdCompressor(write_content_size=size, write_checksum=True).compress(bomb) for size in (0, 1)]
    honest = hostile.sound_block("zstd", 1)
    liar = bytearray(frames[1])
    liar[5:9] = hostile.RAW_BYTES.to_bytes(4, "little")
    for frame in (*frames, honest + frames[1], bytes(liar)):
        assert peak_of(lambda frame=frame: hostile.read_block(frame, "zstd", 1)) < 4 << 20


@pytest.mark.timeout(40)
def test_a_gap_among_many_chunks_is_found_in_time():
    """A refusal must not take longer than the load would: these cost minutes where each cut meets each chunk."""
    document = hostile.sound_manifest()
    count = 30_000
    boxes = [[n, 1] for n in range(count)]
    del boxes[count // 2]
    document["head"]["tensors"] = 1
    document["tensors"] = {
        "names": ["w"],
        "dtypes": ["int8"],
        "sizes": [[count]],
        "planes": [1],
        "layouts": [{"boxes": boxes[::2] + boxes[1::2]}],
        "stored": {
            "segments": 1,
            "blocks": 1,
            "objects": 0,
            "offsets": [0] * len(boxes),
            "lengths": [20] * len(boxes),
            "checks": "0a1b2c3d" * len(boxes),
        },
    }
    refused(document, rf"no part covers \[{count // 2}:{count // 2 + 1}\]")


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


class State:
    """Pickles as an object whose state is set by code of its own."""

    def __setstate__(self, state):
        raise AssertionError("it ran")

    def __getstate__(self):
        return {"a": 1}


def payloads(sentinel):
    touch = f"touch {sentinel}"
    return {
        "posix.system": Call(os.system, touch),
        "subprocess.check_output": Call(subprocess.check_output, ["touch", sentinel]),
        "builtins.eval": Call(builtins.eval, f"open({sentinel!r}, 'w')"),
        "builtins.exec": Call(builtins.exec, f"open({sentinel!r}, 'w')"),
        "io.open": Call(open, sentinel, "w"),
        "builtins.getattr": Call(getattr, torch.Size, "__new__"),
        "torch.serialization.load": Call(torch.load, sentinel),
        "torch.hub.load": Call(torch.hub.load, "x", "y"),
        "tests.test_hostile.State": State(),
    }


@pytest.fixture(params=[ShardedLoadPlanner, DefaultLoadPlanner])
def make_planner(request):
    return request.param


def load_error(path, planner):
    with pytest.raises(CheckpointException) as raised:
        dcp.load({"w": torch.zeros(2), "x": None}, storage_reader=AsyncStorageReader(path), planner=planner)
    return raised.value.failures[0][0]


@pytest.mark.filterwarnings("ignore")  # the planner that saves warns of types that will not load
@pytest.mark.parametrize("stock", [False, True], ids=["own", "stock"])
@pytest.mark.parametrize("name", payloads("x"))
def test_code_in_entries_is_refused_by_name(tmp_path, name, stock, make_planner):
    sentinel = tmp_path / "sentinel"
    writer = dcp.FileSystemWriter(tmp_path / "c") if stock else AsyncStorageWriter(tmp_path / "c")
    dcp.save({"w": torch.ones(2), "x": payloads(str(sentinel))[name]}, storage_writer=writer)
    error = load_error(tmp_path / "c", make_planner())
    assert isinstance(error, UnsupportedFormat)
    assert error.fqn == "x"
    assert name in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert not sentinel.exists()


PLAIN = hostile.records_of(ENTRY)
ODD_ENTRIES = {
    "nothing": b"",
    "no container": b"\x80\x02K\x07.",
    "the old format of torch": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
    "a container that inflates": hostile.rezip(PLAIN | {"archive/data/0": bytes(50 << 20)}, zipfile.ZIP_DEFLATED),
    "a truncated container": ENTRY[:-30],
    "without a pickle": hostile.rezip({name: data for name, data in PLAIN.items() if not name.endswith("data.pkl")}),
    "an empty pickle": hostile.rezip(PLAIN | {"archive/data.pkl": b""}),
    "a pickle that ends early": hostile.rezip(PLAIN | {"archive/data.pkl": PLAIN["archive/data.pkl"][:-9]}),
    "a pickle of garbage": hostile.rezip(PLAIN | {"archive/data.pkl": b"\x80\x02\xff\xff"}),
    "an empty stack": hostile.rezip(PLAIN | {"archive/data.pkl": b"\x80\x02."}),
    "a storage that is not there": hostile.rezip(
        {name: data for name, data in PLAIN.items() if not name.endswith("data/0")}
    ),
    "a storage that is too short": hostile.rezip(PLAIN | {"archive/data/0": b"1"}),
    "an extension": hostile.rezip(PLAIN | {"archive/data.pkl": b"\x80\x02\x82\x01."}),
    "an instance": hostile.rezip(PLAIN | {"archive/data.pkl": b"(iposix\nsystem\n."}),
    "a script": hostile.rezip(
        {"archive/data.pkl": b"K\x01.", "archive/version": b"3", "archive/constants.pkl": b"K\x01."}
    ),
}


@pytest.mark.parametrize("name", ODD_ENTRIES)
def test_odd_entries_are_typed_and_bounded(tmp_path, name, make_planner, monkeypatch):
    data = ODD_ENTRIES[name]

    class Saver(dcp.DefaultSavePlanner):
        def resolve_data(self, item):
            return io.BytesIO(data) if item.index.fqn == "x" else super().resolve_data(item)

    dcp.save({"w": torch.ones(2), "x": 3}, storage_writer=AsyncStorageWriter(tmp_path), planner=Saver())
    error = None

    def load():
        nonlocal error
        error = load_error(tmp_path, make_planner())

    assert peak_of(load) < 4 * len(data) + (8 << 20)
    assert isinstance(error, BlockCorrupt | UnsupportedFormat), repr(error)
    assert error.fqn == "x"
    assert "x " in str(error)


def test_a_rank_s_manifest_cannot_claim_what_it_likes(tmp_path):
    """Manifests of single ranks are merged, and all of them are as hostile as one."""
    dcp.save({"w": torch.ones(2)}, storage_writer=AsyncStorageWriter(tmp_path), use_collectives=False)
    [source] = tmp_path.glob("__0-*.metadata")
    whole = documents.unpack(source.read_bytes())
    for world_size, rank in ((1, 1), (2, 0), (1 << 40, 0), (1 << 62, 0), (1, -1), (1, None)):
        head = whole["head"] | {"world_size": world_size, "rank": rank}
        source.write_bytes(documents.pack(whole | {"head": head}))

        def load():
            with pytest.raises(DcpStorageError):
                AsyncStorageReader(tmp_path).read_metadata()

        if rank is not None:
            assert peak_of(load) < 4 << 20


def test_an_entry_larger_than_memory_is_typed(tmp_path):
    """A manifest may name one small block over and over, and sum up to any size."""
    dcp.save({"w": torch.ones(2), "x": "x" * 100_000}, storage_writer=AsyncStorageWriter(tmp_path))

    def swell(document):
        count, entries = 1 << 12, document["entries"]
        document["head"]["codec"]["block_bytes"] = 64 << 20
        entries["sizes"] = [count * (64 << 20)]
        stored = entries["stored"]
        entries["stored"] = {
            "segments": count,
            "blocks": 1,
            "objects": stored["objects"],
            "offsets": stored["offsets"] * count,
            "lengths": stored["lengths"] * count,
            "checks": stored["checks"] * count,
        }

    rewrite(tmp_path, swell)
    error = load_error(tmp_path, ShardedLoadPlanner())
    assert isinstance(error, DcpStorageError)
