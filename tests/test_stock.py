"""Checkpoints of DCP's own writers, loaded through this package's reader."""

import asyncio
import io
import pickle
import zipfile
from dataclasses import replace

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
import zstandard
from torch.distributed.checkpoint._extension import StreamTransformExtension, ZStandard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.config import MIB, Transfer
from dcp_storage.dcp.metadata import to_metadata
from dcp_storage.dcp.stock.load import load_stock
from dcp_storage.dcp.undocumented import stock_url_writer
from dcp_storage.errors import (
    BlockCorrupt,
    CoverageError,
    DcpStorageError,
    ManifestCorrupt,
    ObjectNotFound,
    UnsupportedFormat,
)
from dcp_storage.format.dtypes import ITEM_BYTES
from dcp_storage.format.stock.manifest import StockItem, decode_stock_metadata
from dcp_storage.geometry import Box
from dcp_storage.store.local import LocalStore
from dcp_storage.transfer.context import Context
from tests.states import DTYPES


def _noise(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    raw = torch.randint(0, 256, (*shape, ITEM_BYTES[dtype]), dtype=torch.uint8)
    return (raw & 1).view(torch.bool)[..., 0] if dtype == "bool" else raw.view(getattr(torch, dtype))[..., 0]


def _state() -> dict:
    torch.manual_seed(0)
    return {
        "model": {name: _noise(name, (7, 5)) for name in DTYPES},
        "shapes": {
            "scalar": torch.tensor(2.5),
            "empty": torch.ones(0),
            "no rows": torch.ones(0, 3, dtype=torch.bfloat16),
            "transposed": torch.randn(6, 4).t(),
            "view": torch.randn(100)[10:20],
            "cube": torch.randn(2, 3, 4),
        },
        "steps": [1, {"lr": 0.1, "buffer": torch.arange(9)}],
        "note": "hello",
        "nothing": None,
    }


def _zeroed(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: _zeroed(one) for key, one in value.items()}
    return [_zeroed(one) for one in value] if isinstance(value, list) else 0


def _assert_same(loaded: object, saved: object) -> None:
    if isinstance(saved, torch.Tensor):
        assert loaded.dtype == saved.dtype
        assert loaded.shape == saved.shape
        assert loaded.contiguous().view(-1).view(torch.uint8).equal(saved.contiguous().view(-1).view(torch.uint8))
    elif isinstance(saved, dict):
        assert loaded.keys() == saved.keys()
        for key in saved:
            _assert_same(loaded[key], saved[key])
    elif isinstance(saved, list):
        assert len(loaded) == len(saved)
        for one, other in zip(loaded, saved, strict=True):
            _assert_same(one, other)
    else:
        assert loaded == saved


@pytest.mark.parametrize("extensions", [None, [ZStandard()]], ids=["plain", "zstd"])
@pytest.mark.parametrize(
    "options",
    [{}, {"thread_count": 2}, {"single_file_per_rank": False}],
    ids=["one file", "two threads", "a file an item"],
)
def test_filesystem_writer(tmp_path, options, extensions):
    saved = _state()
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(tmp_path, _extensions=extensions, **options))
    loaded = _zeroed(saved)
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path))
    _assert_same(loaded, saved)


@pytest.mark.parametrize("extensions", [None, [ZStandard()]], ids=["plain", "zstd"])
def test_fsspec_writer(extensions):
    url = "memory://stock/step-1"
    saved = _state()
    dcp.save(saved, storage_writer=stock_url_writer(url, _extensions=extensions))
    loaded = _zeroed(saved)
    try:
        dcp.load(loaded, storage_reader=AsyncStorageReader(url))
    finally:
        fsspec.filesystem("memory").rm("/stock", recursive=True)
    _assert_same(loaded, saved)


def test_manifest_is_dcps_own_metadata(tmp_path):
    dcp.save(_state(), storage_writer=dcp.FileSystemWriter(tmp_path))
    data = (tmp_path / ".metadata").read_bytes()
    theirs = pickle.loads(data)
    ours = to_metadata(decode_stock_metadata(data, where="here"))
    for entry in theirs.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.properties = TensorProperties(entry.properties.dtype)  # the one that a load needs
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert {
        MetadataIndex(fqn, offset): (item.object_name, item.offset, item.length)
        for (fqn, offset), item in ours.storage_data.storage.items()
    } == {
        index: (info.relative_path, info.offset, info.length)
        for index, info in theirs.storage_data.items()
    }  # fmt: skip


class _Counting(LocalStore):
    def __init__(self, path):
        super().__init__(path)
        self.reads = []

    async def get_range(self, name, start, stop):
        self.reads.append((name, start, stop))
        return await super().get_range(name, start, stop)


class _Targets(DefaultLoadPlanner):
    """Gives the tensors that a test set aside for each read."""

    def __init__(self, targets):
        super().__init__()
        self.targets = targets
        self.committed = []

    def resolve_tensor(self, read_item):
        return self.targets[read_item.dest_index]

    def commit_tensor(self, read_item, tensor):
        self.committed.append(read_item.dest_index)


def _read(fqn: str, start: tuple[int, ...], lengths: tuple[int, ...], name: str) -> ReadItem:
    sizes = torch.Size(lengths)
    zero = torch.Size([0] * len(lengths))
    source = MetadataIndex(fqn, zero)
    return ReadItem(LoadItemType.TENSOR, MetadataIndex(name), zero, source, torch.Size(start), sizes)


def _run(store, plan, planner, manifest=None, transfer=None):
    manifest = manifest or decode_stock_metadata((store._directory / ".metadata").read_bytes(), where="here")
    asyncio.run(load_stock(Context(store, transfer or Transfer()), manifest, plan, planner))


def test_many_reads_of_one_item_fetch_it_once(tmp_path):
    saved = torch.randn(6, 8)
    dcp.save({"w": saved}, storage_writer=dcp.FileSystemWriter(tmp_path, _extensions=[ZStandard()]))
    reads = [_read("w", (0, 2 * i), (6, 2), f"part {i}") for i in range(4)] + [_read("w", (3, 3), (0, 2), "none")]
    planner = _Targets({read.dest_index: torch.zeros(read.lengths) for read in reads})
    store = _Counting(tmp_path)
    _run(store, LoadPlan(reads), planner)
    assert len(store.reads) == 1
    assert torch.cat([planner.targets[MetadataIndex(f"part {i}")] for i in range(4)], 1).equal(saved)
    assert planner.committed == [read.dest_index for read in reads]


def test_resharding_casts_and_gradients(tmp_path):
    saved = torch.randn(6, 8)
    dcp.save({"w": saved}, storage_writer=dcp.FileSystemWriter(tmp_path))
    read = _read("w", (2, 1), (3, 5), "w")
    target = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    _run(_Counting(tmp_path), LoadPlan([read]), _Targets({read.dest_index: target}))
    assert target.detach().equal(saved[2:5, 1:6].double())


def test_large_items_are_read_in_pieces_within_a_budget(tmp_path):
    saved = {f"w{i}": torch.randn(1024, 1024) for i in range(3)}
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(tmp_path))
    metadata = to_metadata(decode_stock_metadata((tmp_path / ".metadata").read_bytes(), where="here"))
    loaded = _zeroed(saved)
    planner = DefaultLoadPlanner()
    planner.set_up_planner(loaded, metadata, is_coordinator=True)
    store = _Counting(tmp_path)
    transfer = Transfer(object_bytes=MIB, concurrency=2)
    _run(store, create_default_local_load_plan(loaded, metadata), planner, transfer=transfer)
    _assert_same(loaded, saved)
    assert max(stop - start for _, start, stop in store.reads) == MIB
    assert len(store.reads) == 15


@pytest.fixture
def one(tmp_path):
    """A stock checkpoint of one tensor: its folder, its manifest and a plan that reads all of it."""
    saved = torch.arange(12.0).view(3, 4)
    dcp.save({"w": saved}, storage_writer=dcp.FileSystemWriter(tmp_path))
    return tmp_path, decode_stock_metadata((tmp_path / ".metadata").read_bytes(), where="here")


def _load_one(folder, manifest, read=None, target=None):
    read = read or _read("w", (0, 0), (3, 4), "w")
    planner = _Targets({read.dest_index: torch.zeros(3, 4) if target is None else target})
    _run(LocalStore(folder), LoadPlan([read]), planner, manifest)
    return planner.targets[read.dest_index]


def _with_item(manifest, folder, data, transforms=()):
    """The same manifest, with other bytes as the tensor's item."""
    (folder / "other.distcp").write_bytes(data)
    item = StockItem("other.distcp", 0, len(data), transforms)
    return stock_replace(manifest, storage={("w", (0, 0)): item})


def stock_replace(manifest, **changes):
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    return type(manifest)(**fields | changes)


def _saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_missing_object(one):
    folder, manifest = one
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(ObjectNotFound):
        _load_one(folder, manifest)


def test_a_short_object(one):
    folder, manifest = one
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BlockCorrupt, match=r"w is damaged: the object ends 7 bytes too early"):
        _load_one(folder, manifest)


@pytest.mark.parametrize("extensions", [None, [ZStandard()]], ids=["plain", "zstd"])
def test_damaged_bytes_are_typed_or_harmless(tmp_path, extensions):
    saved = torch.arange(12.0).view(3, 4)
    dcp.save({"w": saved}, storage_writer=dcp.FileSystemWriter(tmp_path, _extensions=extensions))
    manifest = decode_stock_metadata((tmp_path / ".metadata").read_bytes(), where="here")
    path = tmp_path / "__0_0.distcp"
    whole = path.read_bytes()
    failures = []
    for at in range(0, len(whole), 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            _load_one(tmp_path, manifest)
        except BlockCorrupt as error:
            failures.append((error.fqn, error.object_name))
    assert set(failures) == {("w", "__0_0.distcp")}
    assert len(failures) > 10


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.zeros(4, 3), "holds a torch.float32 of shape"),
        (torch.zeros(3, 4, dtype=torch.int32), "holds a torch.int32"),
        ({"w": torch.zeros(3, 4)}, "it is not a plain tensor"),
        ([torch.zeros(3, 4), torch.ones(1)], "holds 2 storages"),
        (torch.zeros(3, 4, device="meta"), "holds 0 storages"),
        (torch.zeros(3, 4).to_sparse(), "storages"),
        ("text", "holds 0 storages"),
    ],
)
def test_another_object_than_the_manifest_says(one, value, says):
    folder, manifest = one
    with pytest.raises(BlockCorrupt, match=says):
        _load_one(folder, _with_item(manifest, folder, _saved(value)))


def test_code_in_an_item_is_refused(one, tmp_path):
    folder, manifest = one
    sentinel = tmp_path / "sentinel"
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved(torch.zeros(3, 4)))) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            evil = b"cposix\nsystem\nX" + len(f"touch {sentinel}").to_bytes(4, "little") + f"touch {sentinel}".encode()
            new.writestr(name, evil + b"\x85R." if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(UnsupportedFormat, match=r"not a plain tensor's \(posix.system\)"):
        _load_one(folder, _with_item(manifest, folder, buffer.getvalue()))
    assert not sentinel.exists()


def _rezipped(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as new:
        for name, data in records.items():
            new.writestr(name, data)
    return buffer.getvalue()


def _records(value) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(_saved(value))) as old:
        return {name: old.read(name) for name in old.namelist()}


def test_a_storage_that_claims_more_than_is_stored(one):
    folder, manifest = one
    records = _records(torch.zeros(3, 4))
    records["archive/data/0"] = b"\0" * 8
    with pytest.raises(BlockCorrupt, match=r"extends beyond|record size"):
        _load_one(folder, _with_item(manifest, folder, _rezipped(records)))


def test_a_container_that_inflates(one):
    folder, manifest = one
    records = _records(torch.zeros(3, 4)) | {"archive/data/0": bytes(100 * MIB)}
    data = _rezipped(records, zipfile.ZIP_DEFLATED)
    manifest = _with_item(manifest, folder, zstandard.compress(data), ("stream.zstd/1",))
    with pytest.raises(BlockCorrupt, match=r"decompresses to more than|not a container that torch"):
        _load_one(folder, manifest)


@pytest.mark.parametrize("transforms", [("stream.zstd/1",), ("stream.zstd/1", "stream.zstd/1.3")])
def test_a_frame_that_inflates(one, transforms):
    folder, manifest = one
    data = bytes(200 * MIB)
    for _ in transforms:
        data = zstandard.compress(data)
    with pytest.raises(BlockCorrupt, match=r"is damaged: (it decompresses to more than|it is not a container)"):
        _load_one(folder, _with_item(manifest, folder, data, transforms))


def test_several_frames_are_one_stream(one):
    folder, manifest = one
    data = _saved(torch.arange(12.0).view(3, 4))
    frames = zstandard.compress(data[:500]) + zstandard.compress(data[500:]) + zstandard.compress(b"")
    assert _load_one(folder, _with_item(manifest, folder, frames, ("stream.zstd/1",))).sum() == 66


@pytest.mark.parametrize("transform", ["stream.zstd/2", "stream.zstd", "stream.cipher/1", "", "stream.zstd@here/1"])
def test_an_unknown_transform(one, transform):
    folder, manifest = one
    with pytest.raises(UnsupportedFormat, match="w was written through the extension"):
        _load_one(folder, _with_item(manifest, folder, b"x", (transform,)))


class _Reverse(StreamTransformExtension):
    @staticmethod
    def registry_name():
        return "stream.reverse"

    @staticmethod
    def from_descriptor(version):
        return _Reverse()

    def get_descriptor(self):
        return "stream.reverse/1"

    def transform_to(self, output):
        return output

    def transform_from(self, input):  # noqa: A002 - DCP's name
        return input


def test_a_foreign_extension_through_dcp(tmp_path):
    dcp.save({"w": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(tmp_path, _extensions=[_Reverse()]))
    with pytest.raises(CheckpointException) as failure:
        dcp.load({"w": torch.zeros(3)}, storage_reader=AsyncStorageReader(tmp_path))
    assert isinstance(failure.value.failures[0][0], UnsupportedFormat)


def test_an_item_that_is_too_long(one):
    folder, manifest = one
    item = replace_item(manifest.storage["w", (0, 0)], length=1 << 40)
    with pytest.raises(ManifestCorrupt, match="cannot be 1099511627776 bytes long"):
        _load_one(folder, stock_replace(manifest, storage={("w", (0, 0)): item}))


def replace_item(item, **changes):
    return StockItem(**{name: getattr(item, name) for name in item.__struct_fields__} | changes)


def test_an_object_entry_that_claims_more_than_its_file_holds(tmp_path):
    dcp.save({"note": "hello"}, storage_writer=dcp.FileSystemWriter(tmp_path))
    manifest = decode_stock_metadata((tmp_path / ".metadata").read_bytes(), where="here")
    item = replace_item(manifest.storage["note", None], length=1 << 60)
    zero = torch.Size([])
    read = ReadItem(LoadItemType.BYTE_IO, MetadataIndex("note"), zero, MetadataIndex("note"), zero, zero)
    with pytest.raises(BlockCorrupt, match=r"ends .* bytes too early"):
        _run(LocalStore(tmp_path), LoadPlan([read]), None, stock_replace(manifest, storage={("note", None): item}))


@pytest.mark.parametrize(
    ("read", "shape"),
    [
        (_read("w", (0, 0), (3, 4), "w"), (4, 3)),
        (_read("w", (0, 0), (3, 4), "w"), (3,)),
        (_read("w", (1, 0), (3, 4), "w"), (3, 4)),
        (_read("absent", (0, 0), (3, 4), "w"), (3, 4)),
        (replace(_read("w", (0, 0), (3, 4), "w"), storage_index=MetadataIndex("w", (1, 0))), (3, 4)),
        (replace(_read("w", (0, 0), (3, 4), "w"), type=LoadItemType.BYTE_IO), (3, 4)),
    ],
)
def test_a_plan_that_does_not_fit(one, read, shape):
    folder, manifest = one
    with pytest.raises(CoverageError):
        _load_one(folder, manifest, read, torch.zeros(shape))


def test_empty_chunks_may_share_an_offset(one):
    folder, manifest = one
    tensor = manifest.tensors["w"]
    chunks = (Box((0, 0), (0, 4)), *tensor.chunks)
    shared = stock_replace(manifest, tensors={"w": type(tensor)(tensor.dtype, tensor.size, chunks)})
    assert _load_one(folder, shared).sum() == 66
    with pytest.raises(CoverageError, match="was not stored, only"):
        _load_one(folder, _with_item(shared, folder, _saved(torch.zeros(0, 4))))


def test_every_typed_error_pickles(one):
    folder, manifest = one
    (folder / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(DcpStorageError) as failure:
        _load_one(folder, manifest)
    again = pickle.loads(pickle.dumps(failure.value))
    assert str(again) == str(failure.value)


def _nested(depth: int, leaf: object) -> dict:
    for level in range(depth):
        leaf = {"a": leaf} if level % 2 else [leaf]
    return {"top": leaf}


def _loads(state: dict, checkpoint, reader, planner=None) -> bool:
    loaded = _zeroed(state)
    try:
        dcp.load(loaded, storage_reader=reader(checkpoint), planner=planner)
        _assert_same(loaded, state)
    except (CheckpointException, RecursionError):
        return False
    return True


@pytest.mark.parametrize("depth", [3, 65, 200])
def test_nesting_as_deep_as_stock_takes(tmp_path, depth):
    state = _nested(depth, torch.ones(2))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path))
    assert _loads(state, tmp_path, dcp.FileSystemReader)
    assert _loads(state, tmp_path, AsyncStorageReader)
    assert _loads(state, tmp_path, AsyncStorageReader, ShardedLoadPlanner())
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=ShardedSavePlanner())
    assert _loads(state, tmp_path, AsyncStorageReader, ShardedLoadPlanner())


@pytest.mark.parametrize(
    "name", ["\ud800", "end\udfff", "\udfff\ud800 the wrong way round", "\x00", "Grüße \U0001f642"]
)
def test_any_name_that_stock_takes(tmp_path, name):
    state = {name: torch.ones(2), "inner": {name: "text"}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path))
    assert _loads(state, tmp_path, dcp.FileSystemReader)
    assert _loads(state, tmp_path, AsyncStorageReader)
    assert _loads(state, tmp_path, AsyncStorageReader, ShardedLoadPlanner())
