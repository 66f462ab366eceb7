"""What users get wrong, and what they are told: a typed error that says what, where and what to do."""

import errno
import pickle
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
import zstandard
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import (
    AsyncStorageReader,
    AsyncStorageWriter,
    Checkpoints,
    Codec,
    ShardedLoadPlanner,
    Transfer,
    errors,
    load,
    open_checkpoint,
)
from dcp_storage.errors import (
    BlockCorrupt,
    CheckpointNotFound,
    ConfigError,
    CoverageError,
    DcpStorageError,
    DtypeMismatch,
    ManifestCorrupt,
    MissingKeys,
    ObjectNotFound,
    UnsupportedFormat,
)
from dcp_storage.prune import prune
from dcp_storage.verify import verify
from tests import documents
from tests.states import blank_like

STATE = {"model": {"weight": torch.arange(5000.0), "bias": torch.ones(3)}, "step": 7}


@pytest.fixture
def saved(tmp_path):
    dcp.save(STATE, storage_writer=AsyncStorageWriter(tmp_path, codec=Codec("none", block_bytes=4096)))
    return tmp_path


def load_error(path, state=None, planner=None, **options):
    with pytest.raises(CheckpointException) as raised:
        dcp.load(
            blank_like(STATE) if state is None else state,
            storage_reader=AsyncStorageReader(path, **options),
            planner=planner or ShardedLoadPlanner(),
        )
    error = raised.value.failures[0][0]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error


def save_error(path, **options):
    with pytest.raises(CheckpointException) as raised:
        dcp.save(STATE, storage_writer=AsyncStorageWriter(path, **options))
    return raised.value.failures[0][0]


def rewrite(saved, change):
    """Change the manifest's JSON and store it again, whole."""
    path = saved / ".metadata"
    document = documents.unpack(path.read_bytes())
    change(document)
    path.write_bytes(documents.pack(document))


@pytest.mark.parametrize("make", [lambda p: p / "nothing" / "here", lambda p: p])
def test_a_path_without_a_checkpoint(tmp_path, make):
    (tmp_path / "weights.bin").write_bytes(b"data")
    path = make(tmp_path)
    error = load_error(path)
    assert isinstance(error, CheckpointNotFound)
    assert isinstance(error, FileNotFoundError)
    assert str(path) in str(error)


def test_reading_metadata_directly_raises_the_typed_error(tmp_path):
    with pytest.raises(CheckpointNotFound):
        AsyncStorageReader(tmp_path).read_metadata()


def test_a_reader_works_again_once_the_checkpoint_is_there(tmp_path):
    reader, state = AsyncStorageReader(tmp_path), blank_like(STATE)
    with pytest.raises(CheckpointException):
        dcp.load(state, storage_reader=reader)
    dcp.save(STATE, storage_writer=AsyncStorageWriter(tmp_path))
    dcp.load(state, storage_reader=reader)
    assert state["step"] == 7


def test_a_format_version_from_the_future(saved):
    rewrite(saved, lambda document: document["head"].update(version=2, tensors="who knows"))
    error = load_error(saved)
    assert isinstance(error, UnsupportedFormat)
    assert "version 2" in str(error)
    assert "install a later dcp_storage" in str(error)


@pytest.mark.parametrize("cut", [0, 1, 5, -1])
def test_a_damaged_manifest_is_not_taken_for_an_absent_one(saved, cut):
    path = saved / ".metadata"
    path.write_bytes(path.read_bytes()[:cut] if cut else b"")
    error = load_error(saved)
    assert isinstance(error, ManifestCorrupt)
    assert str(path) in str(error)


def set_in(*path, value):
    def change(manifest):
        for step in path[:-1]:
            manifest = manifest[step]
        manifest[path[-1]] = value

    return change


STORED = ("tensors", "stored")


def boxes(*listed):
    return set_in("tensors", "layouts", 1, value={"boxes": list(listed)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_in("objects", "names", 0, value="../../etc/passwd"), "leaves the checkpoint"),
        (set_in("objects", "names", 0, value="/etc/passwd"), "leaves the checkpoint"),
        (set_in("objects", "names", 0, value="s3://bucket/key"), "leaves the checkpoint"),
        (set_in("objects", "names", 0, value=".."), "leaves the checkpoint"),
        (set_in("objects", "names", 0, value="a\0b"), "leaves the checkpoint"),
        (set_in("objects", "sizes", 0, value=10), "beyond object"),
        (set_in("objects", "sizes", 0, value=-1), "schema"),
        (set_in("objects", value={"names": [], "sizes": []}), "0 objects instead of 1"),
        (set_in("head", "objects", value=2), "1 objects instead of 2"),
        (set_in("head", "tensors", value=3), "does not match its head"),
        (set_in("head", "codec", "compression", value="lz4"), "lz4"),
        (set_in("head", "codec", "block_bytes", value=1 << 40), "block_bytes is"),
        (set_in("head", "codec", "block_bytes", value=0), "block_bytes is"),
        (set_in("head", "codec", "block_bytes", value=1000), "splits elements"),
        (set_in("head", "codec", "block_bytes", value=8192), "5 blocks for 20000 bytes"),
        (set_in("head", "world_size", value=0), "world_size is 0"),
        (set_in("head", "rank", value=3), "rank 3 of 1"),
        (set_in("head", "info", value=[]), "schema"),
        (set_in("head", "frames", value=[["tensors", -1, "", ""]]), "a negative frame size"),
        (set_in("head", "frames", value=[["tensors", 1, "", ""]] * 300), "frames (300)"),
        (set_in("head", "frames", value=[]), "bytes long instead of"),
        (set_in("tensors", "dtypes", 1, value="float128"), "float128"),
        (set_in("tensors", "dtypes", value=[]), "different lengths"),
        (set_in("tensors", "names", value=["model.weight", "model.bias"]), "do not ascend"),
        (set_in("tensors", "names", value=[]), "does not begin with"),
        (set_in("tensors", "planes", 1, value=8), "8 byte planes"),
        (set_in("tensors", "sizes", 1, value=[1 << 50]), "blocks for"),
        (set_in("tensors", "sizes", 1, value=[-1]), "schema"),
        (set_in("tensors", "sizes", 1, value=[1 << 61, 4]), "shape"),
        (boxes(), "no part covers"),
        (boxes([0, 4999]), "no part covers"),
        (boxes([0, 1 << 60]), "outside"),
        (boxes([1, 5000]), "outside"),
        (boxes([0]), "a box of wrong dimensions"),
        (boxes([0, 3000], [2000, 3000]), "overlap"),
        (set_in("tensors", "layouts", 1, value=[]), "a grid of wrong dimensions"),
        (set_in("tensors", "layouts", 1, value=[0]), "every 0 elements"),
        (set_in("tensors", "layouts", 1, value=[1]), "more parts than are stored"),
        (set_in("tensors", "layouts", 1, value=[[0, 5000]]), "invalid cuts"),
        (set_in("tensors", "layouts", 1, value=[[1, 2]]), "invalid cuts"),
        (set_in("tensors", "layouts", 1, value=[[0, 9, 9]]), "invalid cuts"),
        (set_in(*STORED, "segments", value=0), "that are not listed"),
        (set_in(*STORED, "segments", value=1 << 60), "that are not listed"),
        (set_in(*STORED, "blocks", value=4), "that are not listed"),
        (set_in(*STORED, "objects", value=5), "which is not listed"),
        (set_in(*STORED, "objects", value=-1), "schema"),
        (set_in(*STORED, "offsets", 1, value=-8), "schema"),
        (set_in(*STORED, "offsets", 1, value=1 << 40), "beyond object"),
        (set_in(*STORED, "offsets", 1, value=(1 << 63) - 1), "beyond object"),
        (set_in(*STORED, "lengths", value=[12, 3616, 4096, 4096, 4096, 4096]), "stored in 3616"),
        (set_in(*STORED, "lengths", value=[12, -4096, 4096, 4096, 4096, 3616]), "schema"),
        (set_in(*STORED, "checks", value="00"), "wrong number of check values"),
        (set_in(*STORED, "checks", value="x" * 96), "hexadecimal"),
        (set_in("entries", "sizes", 0, value=-5), "schema"),
        (set_in("entries", "sizes", 0, value=1 << 40), "blocks for"),
        (set_in("entries", "names", 0, value="model.weight"), "both a tensor and another entry"),
        (set_in("tensors", value=[[]]), "schema"),
        (set_in("head", "format", value="other"), "format is 'other'"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused_before_anything_is_read(saved, change, says):
    rewrite(saved, change)
    error = load_error(saved)
    assert isinstance(error, ManifestCorrupt)
    assert says in str(error)
    assert str(saved) in str(error)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_in("paths", "paths", 0, value=[{}]), "schema"),
        (set_in("paths", "names", value=["a"]), "different lengths"),
    ],
)
def test_paths_that_cannot_be_are_refused_by_whoever_asks_for_them(saved, change, says):
    rewrite(saved, change)
    with pytest.raises(ManifestCorrupt, match=says):
        verify(saved)
    metadata = AsyncStorageReader(saved).read_metadata()
    with pytest.raises(ManifestCorrupt, match=says):
        dict(metadata.planner_data)


def test_a_manifest_may_have_keys_of_later_minor_versions(saved):
    rewrite(saved, lambda document: [part.update(signature="abc") for part in document.values()])
    state = blank_like(STATE)
    dcp.load(state, storage_reader=AsyncStorageReader(saved))
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])


def test_a_manifest_that_inflates_without_end_is_refused_unread(saved):
    frame = bytearray(zstandard.ZstdCompressor().compress(b" " * 100))
    bomb = frame[:4] + bytes([0xE0]) + (1 << 42).to_bytes(8, "little") + frame[6:]
    (saved / ".metadata").write_bytes(bomb)
    assert isinstance(load_error(saved), ManifestCorrupt)


def data_file(saved):
    return next(saved.glob("*.distcp"))


def test_a_missing_object(saved):
    data_file(saved).unlink()
    error = load_error(saved)
    assert isinstance(error, ObjectNotFound)
    assert ".distcp" in str(error)


def test_a_short_object(saved):
    data_file(saved).write_bytes(data_file(saved).read_bytes()[:100])
    error = load_error(saved)
    assert isinstance(error, BlockCorrupt)
    assert "too early" in str(error)
    assert error.fqn in str(error)


def test_a_damaged_block_names_object_offset_and_entry(saved):
    data = bytearray(data_file(saved).read_bytes())
    stored = documents.unpack((saved / ".metadata").read_bytes())["tensors"]["stored"]
    offset, lengths = stored["offsets"][1], stored["lengths"][1:]
    data[offset + lengths[0] + 5] ^= 1
    data_file(saved).write_bytes(data)
    error = load_error(saved)
    assert isinstance(error, BlockCorrupt)
    assert (error.fqn, error.object_name) == ("model.weight", data_file(saved).name)
    assert error.offset == offset + lengths[0]
    assert all(part in str(error) for part in (error.fqn, error.object_name, str(error.offset)))


def test_damage_to_what_is_not_loaded_does_no_harm(saved):
    data = bytearray(data_file(saved).read_bytes())
    data[2] ^= 1
    data_file(saved).write_bytes(data)
    state = {"model": {"bias": torch.zeros(3)}}
    dcp.load(state, storage_reader=AsyncStorageReader(saved))
    assert torch.equal(state["model"]["bias"], torch.ones(3))


def test_missing_keys_are_listed_and_may_be_allowed(saved):
    state = {"model": {"weight": torch.zeros(5000), "scale": torch.zeros(1)}}
    error = load_error(saved, state)
    assert isinstance(error, MissingKeys)
    assert "model.scale" in str(error)
    planner = ShardedLoadPlanner(allow_partial_load=True)
    with pytest.warns(UserWarning, match=r"1 of 2 entries are not in the checkpoint .*: model.scale"):
        dcp.load(state, storage_reader=AsyncStorageReader(saved), planner=planner)
    assert planner.skipped == ["model.scale"]
    assert sorted(planner.unexpected) == ["model.bias", "step"]
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"model": {"weight": torch.zeros(4999)}}, "Size mismatch between saved [5000] and current [4999]"),
        ({"model": {"weight": torch.zeros(5000, 1)}}, "Size mismatch between saved [5000] and current [5000, 1]"),
        ({"model": {"weight": 3}}, "a int here and a tensor"),
        ({"step": torch.zeros(2)}, "a tensor here and another object"),
    ],
)
def test_shapes_and_kinds_that_differ(saved, state, says):
    error = load_error(saved, state)
    assert isinstance(error, CoverageError)
    assert says in str(error)


def test_dtype_policies(saved):
    def state():
        return {"model": {"weight": torch.zeros(5000, dtype=torch.float16)}}

    with pytest.warns(UserWarning, match="torch.float32 -> torch.float16"):
        dcp.load(state(), storage_reader=AsyncStorageReader(saved), planner=ShardedLoadPlanner())
    error = load_error(saved, state(), ShardedLoadPlanner(dtype_policy="error"))
    assert isinstance(error, DtypeMismatch)
    assert "model.weight" in str(error)


class Custom:
    pass


def test_objects_of_unknown_types_need_to_be_allowed(tmp_path):
    from dcp_storage import ShardedSavePlanner

    writer = AsyncStorageWriter(tmp_path)
    with pytest.warns(UserWarning, match=r"config holds .*Custom.*allowed_types"):
        dcp.save({"config": Custom()}, storage_writer=writer, planner=ShardedSavePlanner())
    error = load_error(tmp_path, {"config": None})
    assert isinstance(error, UnsupportedFormat)
    assert "config holds" in str(error)
    assert "Custom" in str(error)
    state = {"config": None}
    planner = ShardedLoadPlanner(allowed_types=[Custom])
    dcp.load(state, storage_reader=AsyncStorageReader(tmp_path), planner=planner)
    assert type(state["config"]).__name__ == "Custom"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Codec("lz4"),
        lambda: Codec(level=0),
        lambda: Codec(level=23),
        lambda: Codec(block_bytes=1000),
        lambda: Codec(block_bytes=4104),
        lambda: Codec(block_bytes=1 << 30),
        lambda: Codec(block_bytes=1e6),
        lambda: Transfer(object_bytes=0),
        lambda: Transfer(concurrency=0),
        lambda: Transfer(threads=0),
        lambda: Transfer(max_gap_bytes=-1),
        lambda: ShardedLoadPlanner(dtype_policy="maybe"),
        lambda: AsyncStorageWriter(""),
        lambda: AsyncStorageWriter("nosuch://bucket/key"),
        lambda: AsyncStorageReader("nosuch://bucket/key"),
        lambda: AsyncStorageReader("/tmp/x", storage_options={"key": "k"}),
        lambda: AsyncStorageReader("s3://bucket/run", storage_options="key"),
        lambda: AsyncStorageWriter("s3://"),
        lambda: AsyncStorageWriter("s3:///run"),
        lambda: Codec(byte_planes="yes"),
        lambda: Transfer(keep_staging=None),
        *(
            partial(call, "/tmp/x", **{name: value})
            for call, arguments in {
                AsyncStorageWriter: {"codec": "zstd", "transfer": 4, "observer": 3},
                AsyncStorageReader: {"transfer": Transfer, "observer": 3},
                Checkpoints: {"codec": Codec, "transfer": 4, "keep": 3, "signals": "SIGTERM", "observer": 3},
                open_checkpoint: {"transfer": 4, "observer": 3},
                verify: {"transfer": 4, "observer": 3},
                prune: {"older_than": 5},
            }.items()
            for name, value in arguments.items()
        ),
        lambda: Checkpoints("/tmp/x", signals=[12345]),
        lambda: Checkpoints("/tmp/x", signals=15),
        lambda: load({}, "/tmp/x"),
    ],
)
def test_impossible_arguments_are_refused_when_they_are_given(make):
    with pytest.raises(ConfigError) as raised:
        make()
    assert isinstance(raised.value, ValueError)


def test_a_bucket_that_is_not_there(moto_s3):
    place = moto_s3.beside("s3://no-such-bucket/run")
    error = save_error(place.url, storage_options=place.storage_options)
    assert isinstance(error, errors.StoreError)
    assert "s3://no-such-bucket/run/.metadata" in str(error), "before anything is encoded"
    assert "bucket does not exist" in str(error)
    error = load_error(place.url, storage_options=place.storage_options)
    assert isinstance(error, errors.StoreError)
    assert "bucket does not exist" in str(error)


def test_an_endpoint_that_nobody_listens_on_fails_in_bounded_time(moto_s3):
    options = moto_s3.storage_options | {"endpoint_url": "http://127.0.0.1:9", "secret": "do-not-print-me"}
    options["config_kwargs"] = {"retries": {"total_max_attempts": 2}, "connect_timeout": 2}
    for error in (save_error(moto_s3.url, storage_options=options), load_error(moto_s3.url, storage_options=options)):
        assert isinstance(error, errors.StoreError)
        assert moto_s3.url in str(error)
        assert "do-not-print-me" not in repr(error) + str(error)


def kinds_of_errors():
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DcpStorageError)]


def test_every_error_pickles_with_its_context():
    assert len(kinds_of_errors()) > 10
    for kind in kinds_of_errors():
        error = pickle.loads(pickle.dumps(kind("what, where, what to do", fqn="a.b", offset=3)))
        assert type(error) is kind
        assert (str(error), error.fqn, error.offset) == ("what, where, what to do", "a.b", 3)


@pytest.mark.parametrize(
    "cause", [OSError(28, "No space left"), ValueError("x"), type("Local", (Exception,), {})("of a function")]
)
def test_every_error_pickles_with_its_cause(cause):
    for kind in kinds_of_errors():
        error = kind("what, where, what to do")
        error.__cause__ = cause
        found = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
        assert str(cause) in str(found.__cause__)
        assert type(found.__cause__) in {type(cause), RuntimeError}
        assert (found.fqn, found.url, found.ranks) == (None, None, ())


@pytest.mark.parametrize("call", ["files.NewFile", "files.replace_file", "reads.read_range"])
def test_the_cause_of_a_failure_survives_a_whole_save_or_load(saved, monkeypatch, call):
    def broken(*args, **kwargs):
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(f"dcp_storage.store.{call}", broken)
    error = load_error(saved) if call == "reads.read_range" else save_error(saved)
    assert isinstance(error, errors.StoreError)
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == errno.EIO
