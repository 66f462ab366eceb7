"""Stock `.metadata` that is hostile, damaged, old or odd: read without executing it, or refused with a typed error."""

import codecs
import collections
import copyreg
import functools
import io
import os
import pathlib
import pickle
import struct
import subprocess
import time
import tracemalloc

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_storage.errors import DcpStorageError, ManifestCorrupt, UnsupportedFormat
from dcp_storage.format.stock.globals import KNOWN
from dcp_storage.format.stock.manifest import StockItem, decode_stock_metadata
from dcp_storage.geometry import Box

META = b"ctorch.distributed.checkpoint.metadata\n"


def decode(data: bytes):
    return decode_stock_metadata(data, where="s3://bucket/run/.metadata")


def refuse(data: bytes, says: str = "run/.metadata") -> None:
    with pytest.raises((UnsupportedFormat, ManifestCorrupt), match=says) as failure:
        decode(data)
    assert "s3://bucket/run/.metadata" in str(failure.value)
    assert str(pickle.loads(pickle.dumps(failure.value))) == str(failure.value)


def sample(**changes) -> Metadata:
    """One tensor of two chunks and one object, as a stock writer describes them."""
    size = torch.Size
    chunks = [ChunkStorageMetadata(size([0, 0]), size([2, 3])), ChunkStorageMetadata(size([2, 0]), size([2, 3]))]
    fields = {
        "state_dict_metadata": {
            "w": TensorStorageMetadata(TensorProperties(torch.bfloat16), size([4, 3]), chunks),
            "note": BytesStorageMetadata(),
        },
        "planner_data": {"w": ("w",), "note": ("note",)},
        "storage_data": {
            MetadataIndex("w", [0, 0], 0): _StorageInfo("__0_0.distcp", 0, 100),
            MetadataIndex("w", [2, 0], 1): _StorageInfo("__1_0.distcp", 0, 100, ["stream.zstd/1"]),
            MetadataIndex("note"): _StorageInfo("__0_0.distcp", 100, 50),
        },
        "storage_meta": StorageMeta(checkpoint_id=pathlib.PurePosixPath("/run/step-1"), save_id="x"),
    }
    return Metadata(**fields | changes)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_sample(protocol):
    manifest = decode(pickle.dumps(sample(), protocol))
    assert manifest.tensors["w"].dtype == "bfloat16"
    assert manifest.tensors["w"].chunks == (Box((0, 0), (2, 3)), Box((2, 0), (2, 3)))
    assert manifest.bytes == ("note",)
    assert manifest.storage["w", (2, 0)] == StockItem("__1_0.distcp", 0, 100, ("stream.zstd/1",))
    assert manifest.planner_data == {"w": ("w",), "note": ("note",)}
    assert pickle.loads(pickle.dumps(manifest)) == manifest


def test_old_checkpoints_lack_fields():
    metadata = sample()
    for field in ("storage_meta", "version", "planner_data"):
        del metadata.__dict__[field]
    for info in metadata.storage_data.values():
        info.__dict__.pop("transform_descriptors")
    manifest = decode(pickle.dumps(metadata))
    assert manifest.planner_data is None
    assert {item.transforms for item in manifest.storage.values()} == {()}


def test_enums_by_name():
    """Python 3.11.0 to 3.11.4 pickle a member of an enum through `getattr`."""

    class Pickler(pickle._Pickler):
        def save(self, obj, *args, **kwargs):
            if isinstance(obj, _MEM_FORMAT_ENCODING):
                return self.save_reduce(getattr, (_MEM_FORMAT_ENCODING, obj.name), obj=None)
            return super().save(obj, *args, **kwargs)

    buffer = io.BytesIO()
    Pickler(buffer, 4).dump(sample())
    assert b"getattr" in buffer.getvalue()
    assert decode(buffer.getvalue()) == decode(pickle.dumps(sample()))


@pytest.mark.parametrize("module", [b"pathlib._local", b"pathlib"])
@pytest.mark.parametrize("name", [b"PosixPath", b"WindowsPath"])
def test_paths_of_other_pythons(module, name):
    path = b"c" + module + b"\n" + name + b"\nX\x01\0\0\0/X\x03\0\0\0run\x86R"
    data = pickle.dumps(sample(storage_meta=StorageMeta("the path", "x")), 2)
    text = b"X\x08\0\0\0the path"
    assert text in data
    assert decode(data.replace(text, path)) == decode(data)


def test_ordered_dicts():
    ordered = collections.OrderedDict(sample().state_dict_metadata)
    assert decode(pickle.dumps(sample(state_dict_metadata=ordered))) == decode(pickle.dumps(sample()))


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self):
        return self.reduced


def _hostile(sentinel: str) -> dict:
    touch = f"touch {sentinel}"
    write = f"open({sentinel!r}, 'w')"
    return {
        "os.system": Call(os.system, touch),
        "subprocess": Call(subprocess.check_output, ["touch", sentinel]),
        "eval": Call(eval, write),
        "exec": Call(exec, write),
        "open": Call(open, sentinel, "w"),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "getattr of an allowed class": Call(getattr, Metadata, "__init__"),
        "getattr of an enum": Call(getattr, _MEM_FORMAT_ENCODING, "__class__"),
        "torch.load": Call(torch.load, sentinel),
        "partial": Call(functools.partial, os.system, touch),
        "codecs": Call(codecs.encode, "x", "rot13"),
        "int": Call(int, "9" * 4000),
        "bytearray": Call(bytearray, 1 << 40),
        "tuple": Call(tuple, [1]),
        "touch": Call(pathlib.Path.touch, pathlib.PurePosixPath(sentinel)),
        "copyreg": Call(copyreg._reconstructor, Metadata, object, None),
        "class with arguments": Call(StorageMeta, sentinel),
        "size of numbers": Call(torch.Size, 1, 2, 3),
        "layout of a number": Call(torch.serialization._get_layout, 3),
        "enum of text": Call(_MEM_FORMAT_ENCODING, "x"),
        "enum out of range": Call(torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING, 77),
        "ordered dict": Call(collections.OrderedDict, [(1, 2)]),
        "a dtype as function": Call(torch.Size, (), state={"x": 1}),
    }


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", _hostile("x"))
def test_hostile_calls(tmp_path, name, protocol):
    sentinel = tmp_path / "sentinel"
    call = _hostile(str(sentinel))[name]
    refuse(pickle.dumps(call, protocol))
    refuse(pickle.dumps(sample(planner_data=call), protocol))
    assert not sentinel.exists()


def test_the_refused_name_is_told():
    refuse(pickle.dumps(Call(os.system, "true")), r"asks for (posix|nt)\.system.*Nothing was executed")
    refuse(pickle.dumps(Call(eval, "1")), r"builtins\.eval")


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.distributed.checkpoint", "metadata.Metadata"),
        ("torch", "distributed.checkpoint.metadata.Metadata"),
        ("torch", "Size.__new__"),
        ("torch", "load"),
        ("torch", "hub"),
        ("torch.serialization", "os.system"),
        ("pathlib", "os.system"),
        ("pathlib", "Path"),
        ("collections", "namedtuple"),
        ("builtins", "getattr.__call__"),
        ("", ""),
    ],
)
def test_hostile_names(module, name):
    refuse(b"\x80\x04" + text(module) + text(name) + b"\x93.", r"asks for")
    if module:
        refuse(f"c{module}\n{name}\n.".encode(), r"asks for")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"Pos\n.", "PERSID"),
        (b"K\x01Q.", "BINPERSID"),
        (b"\x82\x01.", "EXT1"),
        (b"\x83\x01\x00.", "EXT2"),
        (b"\x84\x01\x00\x00\x00.", "EXT4"),
        (b"(ios\nsystem\n.", "INST"),
        (b"(" + META + b"Metadata\no.", "OBJ"),
        (META + b"Metadata\n)}\x92.", "NEWOBJ_EX"),
        (b"\x97.", "NEXT_BUFFER"),
        (b"K\x01\x98.", "READONLY_BUFFER"),
        (META + b"Metadata\n)\x81}X\x09\0\0\0__class__N" + b"sbK\x01b.", "changes the state"),
        (META + b"Metadata\n)\x81}b}b.", "changes the state"),
        (META + b"Metadata\n}b.", "changes the state"),
        (b"ctorch\nSize\n}X\x04\0\0\0callNsb.", "changes the state"),
        (b"ctorch\nfloat32\n)R.", "calls something that is not a function"),
        (b"ctorch\nfloat32\n)\x81.", "not a class"),
        (b"ctorch\nSize\n)\x81.", "not a class"),
        (META + b"Metadata\nK\x01\x85\x81.", "with arguments"),
        (META + b"Metadata\n)R.", "calls Metadata"),
        (b"\x80\x06N.", "protocol 6"),
        (b"K\x01K\x02\x93.", "global without a name"),
        (b"K\x01K\x02s.", "damaged"),
        (b"}K\x01K\x02s.", "a key that is not a name"),
        (b"}))s.", "a key that is not a name"),
        (b"})(K\x01u.", "damaged"),
        (b"]N\x94K\x01a.", "not a list"),
        (b"h\x07.", "damaged"),
        (b"\x85.", "damaged"),
        (b"N\x87.", "damaged"),
        (b"a.", "damaged"),
        (b"u.", "damaged"),
        (b"(N(R0.", "damaged"),
        (b"NN.", "stops too early"),
        (b"(N.", "stops too early"),
        (b".", "stops too early"),
        (b"", "ends early"),
        (b"N.N.", "stops too early"),
        (b"\xff\xfe garbage", "unknown instruction"),
        (b"\x8c\x02\xff\xff.", "damaged"),
        (b"N.", "a Metadata is missing"),
        (b"ctorch\nSize\n.", "a Metadata is missing"),
        (META + b"Metadata\n.", "a Metadata is missing"),
        (META + b"Metadata\n)\x81.", "a Metadata is empty"),
        (META + b"Metadata\n)\x81)b.", "a Metadata is empty"),
    ],
)
def test_hostile_instructions(body, says):
    refuse(body, says)


def test_registered_extensions_are_not_used(tmp_path):
    copyreg.add_extension("os", "system", 200)
    try:
        refuse(b"\x80\x02\x82\xc8" + text(f"touch {tmp_path / 'sentinel'}") + b"\x85R.", "EXT1")
    finally:
        copyreg.remove_extension("os", "system", 200)
    assert not (tmp_path / "sentinel").exists()


def test_state_cannot_change_a_stand_in():
    """State is kept as data: no attribute of anything is set."""
    state = b"}(X\x09\0\0\0__class__N" + b"X\x08\0\0\0__dict__}X\x0c\0\0\0__setstate__NX\x05\0\0\0stateNu"
    refuse(META + b"Metadata\n)\x81" + state + b"b.", "state_dict_metadata is not a dict")
    assert not any(isinstance(value, type) for value in KNOWN.values())


HUGE = struct.pack("<Q", 1 << 60)
BIG = struct.pack("<I", 0xFFFFFFFE)


@pytest.mark.parametrize(
    "data",
    [
        b"\x8e" + HUGE,
        b"\x96" + HUGE,
        b"B" + BIG,
        b"\x8d" + HUGE,
        b"X" + BIG,
        b"\x8b" + struct.pack("<i", 0x7FFFFFFF),
        b"\x95" + HUGE + b"N",
        b"Nr" + BIG + b".",
        b"Np99999999999\n.",
        b"I" + b"9" * 100_000 + b"\n.",
        b"(" * 200_000 + b".",
        b"]" * 200_000 + b"a" * 199_999 + b".",
        b")" + b"\x85" * 200_000 + b".",
        b"}" + b")" + b"\x85" * 200_000 + b"Ns.",
        b"}" + b")\x94" + b"h\x00\x86\x94" * 100_000 + b"Ns.",
        b"N" + b"q\x00h\x00h\x00\x86" * 100_000 + b".",
        b"\x80\x04" * 500_000,
        b"ctorch\nSize\nq\x00(" + b"K\x01" * 300_000 + b"tq\x010" + b".",
        META + b"Metadata\nq\x000" + b"",
        META + b"Metadata\nq\x00)\x81" + b"}X\x01\0\0\0ah\x00)\x81" * 30_000 + b"sb" * 30_000 + b"b.",
    ],
    ids=range(20),
)
def test_bombs(data):
    tracemalloc.start()
    start = time.monotonic()
    try:
        refuse(data)
        assert tracemalloc.get_traced_memory()[1] < 400 * len(data) + 2_000_000
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 30


def test_sizes_are_not_copied():
    size = b"(" + b"K\x01" * 100_000 + b"tq\x01"
    calls = b"ctorch\nSize\nq\x00](" + b"h\x00h\x01\x85R" * 100_000 + b"e."
    tracemalloc.start()
    try:
        refuse(size + calls)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_one_chunk_named_over_and_over():
    metadata = sample()
    chunks = [metadata.state_dict_metadata["w"].chunks[0]] * 10_000
    entry = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([4, 3]), chunks)
    metadata.state_dict_metadata = dict.fromkeys(map(str, range(1000)), entry)
    refuse(pickle.dumps(metadata), "more chunks than fit in the manifest")


def _tensor(**changes) -> dict:
    size = torch.Size
    fields = {
        "properties": TensorProperties(torch.float32),
        "size": size([4, 3]),
        "chunks": [ChunkStorageMetadata(size([0, 0]), size([4, 3]))],
    }
    return {"state_dict_metadata": {"w": TensorStorageMetadata(**fields | changes)}, "planner_data": None}


def _stored(*arguments) -> dict:
    return {"storage_data": sample().storage_data | {MetadataIndex("note"): _StorageInfo(*arguments)}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"state_dict_metadata": None}, "state_dict_metadata is not a dict"),
        ({"state_dict_metadata": {"w": None}}, "TensorStorageMetadata is missing"),
        ({"state_dict_metadata": {"w": MetadataIndex("w")}}, "TensorStorageMetadata is missing"),
        ({"state_dict_metadata": {MetadataIndex("w"): BytesStorageMetadata()}}, "no name"),
        ({"storage_data": None}, "storage_data is not a dict"),
        ({"storage_data": {}}, r"it does not say where w at \[0, 0\] is stored"),
        ({"storage_data": {"w": _StorageInfo("a", 0, 1)}}, "MetadataIndex is missing"),
        ({"storage_data": {MetadataIndex("w", [0]): None}}, "_StorageInfo is missing"),
        ({"storage_data": {MetadataIndex(None): _StorageInfo("a", 0, 1)}}, "without|no name"),
        ({"storage_data": {MetadataIndex("w", [-1, 0]): _StorageInfo("a", 0, 1)}}, "an invalid shape or offset"),
        ({"planner_data": ["w"]}, "planner_data is not a dict"),
        ({"planner_data": {"w": "w"}}, "an invalid path"),
        ({"planner_data": {"w": ()}}, "an invalid path"),
        ({"planner_data": {"w": ("w", -1)}}, "an invalid path"),
        ({"planner_data": {"w": ("w", None)}}, "an invalid path"),
        ({"planner_data": {"w": ("w", True)}}, "an invalid path"),
        ({"planner_data": dict.fromkeys(map(str, range(99)), ("w",) * 999)}, "more steps than"),
        ({"version": 1}, "version is not text"),
        ({"storage_meta": StorageMeta(save_id=1)}, "save_id is not text"),
        ({"storage_meta": 1}, "a StorageMeta is missing"),
        ({"planner_data": {"w": ("w", 1 << 40)}}, "lists too long"),
        ({"planner_data": {str(i): ("w", str(i), 500) for i in range(100)}}, "lists too long"),
        (_tensor(size=None), "shape"),
        (_tensor(size=torch.Size([4, 2])), "part outside its shape"),
        (_tensor(size=torch.Size([4])), "part outside its shape"),
        (_tensor(size=(4, "3")), "shape"),
        (_tensor(size=(4, True)), "shape"),
        (_tensor(size=(4, -3)), "shape"),
        (_tensor(size=(1,) * 65), "shape"),
        (_tensor(size=(1 << 62, 1 << 62), chunks=[]), "shape"),
        (_tensor(size=(1 << 64, 0), chunks=[]), "shape"),
        (_tensor(chunks=None), "not a list"),
        (_tensor(chunks=[None]), "ChunkStorageMetadata is missing"),
        (_tensor(chunks=[ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([3, 3]))]), "outside"),
        (_tensor(chunks=[ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))]), "outside"),
        (_tensor(chunks=[ChunkStorageMetadata(None, torch.Size([3]))]), "shape"),
        (_tensor(properties=None), "no properties"),
        (_tensor(properties=TensorProperties("text")), "no dtype"),
        (_tensor(properties=TensorProperties((1, 2))), "no dtype"),
        (_tensor(properties=TensorProperties(torch.quint8)), r"torch\.quint8"),
        (_tensor(properties=TensorProperties(torch.float32, torch.sparse_coo)), r"layout 'torch\.sparse_coo'"),
        (_stored(None, 0, 1), "does not say where"),
        (_stored("a", -1, 1), "does not say where"),
        (_stored("a", 0, -1), "does not say where"),
        (_stored("a", 0, 1 << 63), "does not say where"),
        (_stored("a", True, 1), "does not say where"),
        (_stored("a", 0, None), "does not say where"),
        (_stored("a", 0, 1, "stream.zstd/1"), "no transforms"),
        (_stored("a", 0, 1, ["x"] * 9), "no transforms"),
        (_stored("a", 0, 1, [3]), "without a name"),
        (_stored("shard-3/__0_0.distcp", 0, 1), "prefix strategy"),
    ],
)
def test_impossible_values(changes, says):
    refuse(pickle.dumps(sample(**changes)), says)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/etc/passwd", "a/../../x", "a//b", "a\\b", "a\0b", "s3://b/k", "c:x", "a\nb", "x" * 300],
)
def test_names_that_leave_the_checkpoint(name):
    with pytest.raises(ManifestCorrupt, match="leaves the checkpoint"):
        decode(pickle.dumps(sample(**_stored(name, 0, 1))))


def test_lists_with_gaps_are_kept():
    """An empty mapping in a list is no entry, so that indices may be missing."""
    paths = {"w": ("w",), "note": ("note", 3, "x", 7)}
    assert decode(pickle.dumps(sample(planner_data=paths))).planner_data == paths


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("stock")
    state = {f"layer.{i}": {"w": torch.zeros(3, 2), "note": "x"} for i in range(5)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
    return (folder / ".metadata").read_bytes()


def test_truncation(written):
    decode(written)
    for length in range(0, len(written), 7):
        with pytest.raises(ManifestCorrupt):
            decode(written[:length])


@settings(max_examples=300)
@given(st.data())
def test_damage_is_typed_or_harmless(written, data):
    at = data.draw(st.integers(0, len(written) - 1))
    value = data.draw(st.integers(0, 255))
    try:
        decode(written[:at] + bytes([value]) + written[at + 1 :])
    except DcpStorageError as error:
        assert "s3://bucket/run/.metadata" in str(error)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_garbage_is_typed(data):
    refuse(data)
