"""Entries that are not tensors: what loads by itself, what has to be listed, and what is said of the rest."""

import argparse
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import importlib
import io
import pathlib
import pickle
import random
import sys
import uuid
import warnings
import zoneinfo
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner, open_checkpoint
from dcp_storage.dcp.loads.entries import Trusted, load_entry
from dcp_storage.errors import BlockCorrupt, ConfigError, UnsupportedEntry
from dcp_storage.format.values import decode_value, encode_value
from tests import hostile


def same(a, b):
    """Equal, of the same types, all the way down."""
    return type(a) is type(b) and told_apart_by(a) == told_apart_by(b)


def told_apart_by(a):  # noqa: PLR0911
    match a:
        case torch.Tensor():
            return a.dtype, a.shape, a.untyped_storage().tolist()
        case np.ndarray() | np.generic() if not a.dtype.hasobject:
            return a.dtype, a.shape, a.tobytes("A")
        case np.ndarray():
            return a.shape, told_apart_by(a.tolist())
        case dict():
            return told_apart_by([*a, *a.values()])
        case list() | tuple() | collections.deque():
            return [(type(inner), told_apart_by(inner)) for inner in a]
        case io.BytesIO() | io.StringIO():
            return a.getvalue(), a.tell()
    return repr(a) if isinstance(a, float | complex) else a


def ordered_with_attribute():
    made = collections.OrderedDict(a=1)
    made._metadata = {"version": 2}
    return made


def stream():
    made = io.BytesIO(b"abc")
    made.seek(2)
    return made


ONE_LIST = [1]
SAFE = {
    "none": None,
    "bool": True,
    "int": -5,
    "int of 64 bits": (1 << 64) - 1,
    "int of 65 bits": 1 << 64,
    "int of 300 bytes": 7**1000,
    "float": 1.5,
    "nan": float("nan"),
    "minus zero": -0.0,
    "complex": 1 - 2j,
    "str": "é",
    "half a surrogate pair": "\ud800",
    "no bytes": b"",
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"ab"),
    "no bytearray": bytearray(),
    "list": [1, [2.5, None], "x"],
    "empty list": [],
    "tuple": (1, (0.9, 0.999), [(), ("a",)]),
    "dict in a tuple": ({"a": {1: (2,)}, None: 0, True: b"x", (1, 2): 3},),
    "one list twice": (ONE_LIST, ONE_LIST),
    "set": {1, "a", (2, 3)},
    "frozenset": frozenset({1, frozenset()}),
    "range": range(1, 9, 2),
    "slice": slice(None, 3),
    "ellipsis": (Ellipsis, NotImplemented, type(None)),
    "types": (int, list, collections.OrderedDict, np.float32),
    "ordered": (ordered_with_attribute(),),
    "counter": (collections.Counter("abca"),),
    "defaultdict": (collections.defaultdict(list, {1: [2]}),),
    "defaultdict of dicts": (collections.defaultdict(collections.OrderedDict, a=collections.OrderedDict(b=1)),),
    "deque": collections.deque([1, 2], maxlen=3),
    "deque without end": collections.deque("ab"),
    "path": pathlib.Path("/a/b"),
    "paths": (pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("c:/x"), pathlib.Path()),
    "datetime": dt.datetime(2025, 1, 2, 3, 4, 5, 6, tzinfo=dt.UTC),
    "moments": (
        dt.datetime(2025, 1, 1, fold=1),  # noqa: DTZ001
        dt.date(2025, 2, 3),
        dt.time(4, 5),
    ),
    "zone": dt.timezone(dt.timedelta(hours=-3), "here"),
    "timedelta": dt.timedelta(days=-1, microseconds=5),
    "decimal": (decimal.Decimal("1.10"), decimal.Decimal("-Infinity")),
    "fraction": fractions.Fraction(-1, 3),
    "uuid": (uuid.UUID(int=5), uuid.uuid1()),
    "stream": stream(),
    "text stream": io.StringIO("a\nb"),
    "numpy scalar": np.float64(1.5),
    "numpy scalars": (np.float16(1), np.int8(-3), np.bool_(True), np.complex64(1j), np.str_("abc"), np.bytes_(b"x")),
    "numpy times": (np.datetime64("2025-01-02", "s"), np.timedelta64(3, "D"), np.datetime64("NaT", "s")),
    "numpy array": np.arange(6, dtype=np.int16).reshape(2, 3),
    "numpy arrays": (np.array(3.0), np.zeros((0, 4)), np.asfortranarray(np.ones((2, 3))), np.array(["ab", "c"])),
    "big endian": (np.dtype(">f4"), np.dtype(">i8")),
    "numpy dates": np.array(["2025-01-01"], dtype="M8[ns]"),
    "numpy objects": np.array([None, "a", 5, [1]], dtype=object),
    "structured": np.array([(1.5, 2, b"x")], dtype=[("a", "f4"), ("b", ">i2"), ("c", "S3")]),
    "structured scalar": (np.array([(1.5, 2)], dtype=[("a", "f4"), ("b", "i2")])[0],),
    "dtypes": (
        np.dtype("f8"),
        np.dtype([("a", "f4", (2, 3))], align=True),
        np.dtype("U7"),
        np.dtype("M8[5us]"),
        np.dtype("O"),
    ),
    "random state": random.Random(5).getstate(),
    "numpy random state": np.random.RandomState(5).get_state(),
    "numpy bit generator": (np.random.PCG64(5).state, np.random.MT19937(5).state),
    "size": torch.Size([1, 2]),
    "dtype": (torch.float32, torch.device("cpu"), torch.strided),
    "tensors in a tuple": (torch.arange(3), {"a": (torch.ones(2, dtype=torch.bfloat16),)}),
}


def save(state, path, *, own=True, stock=False):
    writer = dcp.FileSystemWriter(path) if stock else AsyncStorageWriter(path)
    dcp.save(state, storage_writer=writer, planner=ShardedSavePlanner() if own else None)


def load(path, planner=None):
    state = {"x": "nothing yet"}
    dcp.load(state, storage_reader=AsyncStorageReader(path), planner=planner)
    return state["x"]


def load_error(path, planner=None):
    with pytest.raises(CheckpointException) as raised:
        load(path, planner)
    error = raised.value.failures[0][0]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("stock", [False, True], ids=["own", "stock"])
def test_what_runs_no_code_loads_as_it_was(tmp_path, name, stock):
    """No warning, no listing; by either planner; exactly what stock loads."""
    value = SAFE[name]
    was = pickle.loads(pickle.dumps(value))  # NumPy itself gives arrays back in the machine's byte order
    for own in (True, False):
        save({"x": value}, tmp_path / str(own), own=own, stock=stock)
        for planner in (ShardedLoadPlanner(), dcp.DefaultLoadPlanner()):
            assert same(load(tmp_path / str(own), planner), was)
    if stock:
        state = {"x": None}
        dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "True"))
        assert same(state["x"], was)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", SAFE)
def test_of_every_protocol(name, protocol):
    buffer = io.BytesIO()
    torch.save(SAFE[name], buffer, pickle_protocol=protocol)
    assert same(load_entry("x", buffer), pickle.loads(pickle.dumps(SAFE[name])))


def test_containers_without_checksums():
    torch.serialization.set_crc32_options(False)
    try:
        data = hostile.container(SAFE["tensors in a tuple"])
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load_entry("x", io.BytesIO(data)), SAFE["tensors in a tuple"])


@pytest.mark.parametrize("old", [b"numpy._core", b"numpy.core"])
@pytest.mark.parametrize("name", ["numpy scalar", "numpy array", "structured scalar"])
def test_names_of_either_numpy(name, old):
    data = pickled(SAFE[name])
    assert same(unpickled(data.replace(b"numpy._core", old).replace(b"numpy.core", old)), SAFE[name])


def test_paths_of_python_3_13():
    data = pickled(pathlib.Path("/a/b"))
    assert b"cpathlib\n" in data or b"cpathlib._local\n" in data
    for module in (b"pathlib", b"pathlib._local"):
        assert unpickled(data.replace(b"pathlib._local", b"pathlib").replace(b"pathlib", module)) == pathlib.Path(
            "/a/b"
        )


def pickled(value):
    return pickle.dumps(value, 2)


def unpickled(data, allowed=()):
    return load_entry("x", io.BytesIO(hostile.rezip({"archive/data.pkl": data})), Trusted(tuple(allowed)))


def test_arrays_of_the_other_byte_order():
    """Read by NumPy's own rules, which turn them where it unpickles their state."""
    array = np.arange(3, dtype=">f4")
    assert same(unpickled(pickled(array)), pickle.loads(pickled(array)))
    for protocol in (4, 5):
        buffer = io.BytesIO()
        torch.save(array, buffer, pickle_protocol=protocol)
        assert same(load_entry("x", buffer), pickle.loads(pickle.dumps(array, protocol)))


def test_tensors_share_what_they_shared():
    base = torch.arange(6.0)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "kept"
    state = (base, base[2:4], base.view(2, 3).t(), parameter, torch.ones(2).requires_grad_())
    loaded = load_entry("x", io.BytesIO(hostile.container(state)))
    loaded[0].fill_(7)
    assert loaded[1].tolist() == [7, 7]
    assert loaded[2].stride() == (1, 3)
    assert type(loaded[3]) is torch.nn.Parameter
    assert loaded[3].note == "kept"
    assert loaded[4].requires_grad


@pytest.mark.filterwarnings("ignore:.*(sparse|nested|Sparse).*")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.tensor([1 + 2j]).conj(),
        lambda: torch.zeros(0, 3),
        lambda: torch.ones(3, dtype=torch.uint16),
        lambda: torch.ones(3).to(torch.float8_e4m3fn),
    ],
)
def test_kinds_of_tensors_in_tuples_load_as_torch_loads_them(make):
    data = hostile.container((make(),))
    [loaded] = load_entry("x", io.BytesIO(data))
    [stock] = torch.load(io.BytesIO(data), weights_only=False)
    assert loaded.dtype == stock.dtype
    assert loaded.layout == stock.layout
    assert torch.equal(loaded.to_dense().to(torch.complex64), stock.to_dense().to(torch.complex64))


# What has to be listed.


@dataclasses.dataclass
class Config:
    lr: float
    layers: list


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    name: str


class Color(enum.Enum):
    RED = 1
    BLUE = "b"


class Level(enum.IntEnum):
    LOW = 1


class Names(list):
    pass


class Options(dict):
    def __init__(self, *args, note=None):
        super().__init__(*args)
        self.note = note


class Tagged(set):
    pass


class Point(NamedTuple):
    x: int
    y: list


class Scaled(float):
    def __new__(cls, value, *, unit):
        made = super().__new__(cls, value)
        made.unit = unit
        return made

    def __getnewargs_ex__(self):
        return (float(self),), {"unit": self.unit}


class Plain:
    def __new__(cls, *, size):
        made = super().__new__(cls)
        made.size = size
        return made

    def __getnewargs_ex__(self):
        return (), {"size": self.size}

    def __eq__(self, other):
        return self.size == other.size

    __hash__ = None


class Outer:
    @dataclasses.dataclass
    class Inner:
        value: int

        class Innermost(list):
            pass

    def method(self):
        return 5

    @classmethod
    def build(cls, number):
        return cls.Inner(number)

    def __eq__(self, other):
        return type(self) is type(other)

    __hash__ = None


class Built:
    """Pickles as a call of a class method."""

    def __init__(self, number):
        self.number = number

    @classmethod
    def build(cls, number):
        return cls(number)

    def __reduce__(self):
        return self.build, (self.number,)

    def __eq__(self, other):
        return self.number == other.number

    __hash__ = None


def make_pair(a, b):
    return Pair(a, b)


class Pair:
    """Pickles as a call of a function, with a state."""

    def __init__(self, a, b):
        self.both = (a, b)

    def __reduce__(self):
        return make_pair, self.both, {"note": "state"}

    def __setstate__(self, state):
        self.note = state["note"]

    def __eq__(self, other):
        return (self.both, self.note) == (other.both, other.note)

    __hash__ = None


class Queue(collections.deque):
    pass


class MyTensor(torch.Tensor):
    pass


def pair(a, b):
    made = Pair(a, b)
    made.note = "state"
    return made


LISTED = {
    "namespace": lambda: argparse.Namespace(lr=0.1, tags=["a"]),
    "dataclass": lambda: Config(0.1, [1, 2]),
    "frozen with slots": lambda: Frozen("a"),
    "enum": lambda: (Color.RED, Color.BLUE),
    "int enum": lambda: {"a": (Level.LOW,)}["a"],
    "list": lambda: Names([1, 2]),
    "dict": lambda: (Options({"a": 1}, note="n"),),
    "set": lambda: Tagged({1}),
    "namedtuple": lambda: Point(1, [2]),
    "deque": lambda: Queue([1], 4),
    "keywords": lambda: Scaled(1.5, unit="m"),
    "keywords of an object": lambda: Plain(size=3),
    "nested class": lambda: Outer.Inner(4),
    "nested twice": lambda: Outer.Inner.Innermost([1]),
    "bound method": lambda: (Outer().method,),
    "class method called": lambda: Built(3),
    "function called": lambda: pair(1, "b"),
    "user dict": lambda: (collections.UserDict(a=1),),
    "chain": lambda: (collections.ChainMap({"a": 1}, {}),),
    "own factory": lambda: (collections.defaultdict(Names, {"a": Names([1])}),),
    "zone": lambda: dt.datetime(2025, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")),
    "generator": lambda: np.random.default_rng(5),
    "random state": lambda: np.random.RandomState(5),
    "random": lambda: random.Random(5),
    "masked": lambda: np.ma.array([1, 2], mask=[True, False]),
    "partial": lambda: functools.partial(make_pair, 1),
    "error": lambda: ValueError("a", 1),
    "tensor subclass": lambda: (torch.ones(2).as_subclass(MyTensor),),
    "keys": lambda: ({Frozen("a"): 1, Color.RED: 2, Point(1, 2): 3},),
}


def found(name):
    """Return what a dotted name names, as its reader would import it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


def equal(a, b):
    return type(a) is type(b) and known_by(a) == known_by(b)


def known_by(a):  # noqa: PLR0911
    """Return what tells an instance of a listed type from others."""
    match a:
        case np.random.Generator() | np.random.RandomState() | random.Random():
            return a.random()
        case np.ma.MaskedArray():
            return a.tolist(), a.mask.tolist()
        case functools.partial():
            return a.func, a.args
        case ValueError():
            return a.args
        case (torch.Tensor(),):
            return type(a[0]), a[0].tolist()
        case (function,) if callable(function):
            return function()
    return a, getattr(a, "__dict__", None)


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("own", [True, False], ids=["own", "default"])
def test_what_an_error_names_is_what_to_list(tmp_path, name, own):
    """The warning of the save and the error of the load name the same; listing just that loads."""
    with pytest.warns(UserWarning, match="x holds") as caught:
        save({"x": LISTED[name]()}, tmp_path, own=own)
    [warning] = [str(w.message) for w in caught if "x holds" in str(w.message)]
    error = load_error(tmp_path, ShardedLoadPlanner())
    assert isinstance(error, UnsupportedEntry)
    assert error.fqn == "x"
    assert error.names
    for text in (str(error), warning):
        assert f"allowed_types=[{', '.join(error.names)}]" in text
    allowed = [found(dotted) for dotted in error.names]
    assert equal(load(tmp_path, ShardedLoadPlanner(allowed_types=allowed)), LISTED[name]())
    with torch.serialization.safe_globals(allowed):
        assert equal(load(tmp_path), LISTED[name]())
        assert equal(load(tmp_path, ShardedLoadPlanner()), LISTED[name]())
    assert load_error(tmp_path).names == error.names
    if len(allowed) > 1:
        assert isinstance(load_error(tmp_path, ShardedLoadPlanner(allowed_types=allowed[:-1])), UnsupportedEntry)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", LISTED)
def test_listed_types_of_every_protocol(name, protocol):
    buffer = io.BytesIO()
    torch.save(LISTED[name](), buffer, pickle_protocol=protocol)
    with pytest.raises(UnsupportedEntry) as raised:
        load_entry("x", buffer)
    assert equal(
        load_entry("x", buffer, Trusted(tuple(found(dotted) for dotted in raised.value.names))), LISTED[name]()
    )


@pytest.mark.filterwarnings("ignore:x holds")
@pytest.mark.parametrize("name", LISTED)
def test_trust_of_all(tmp_path, name):
    save({"x": LISTED[name]()}, tmp_path)
    assert equal(load(tmp_path, ShardedLoadPlanner(trust="all")), LISTED[name]())


def test_a_type_that_was_stored_under_another_name():
    data = pickled(Config(0.5, [])).replace(b"ctests.test_entries\nConfig", b"cold.module\nSettings")
    with pytest.raises(UnsupportedEntry, match="old.module.Settings"):
        unpickled(data)
    assert unpickled(data, [(Config, "old.module.Settings")]) == Config(0.5, [])


def test_a_type_that_other_versions_define_elsewhere():
    """NumPy 1 pickles `numpy.ma.core.MaskedArray`, and NumPy 2 `numpy.ma.MaskedArray`."""
    value = np.ma.array([1, 2], mask=[True, False])
    data = pickled(value).replace(b"cnumpy.ma.core\nMaskedArray", b"cnumpy.ma\nMaskedArray")
    allowed = [np.ma.MaskedArray, found("numpy.ma.core._mareconstruct")]
    for module in (b"numpy.ma", b"numpy.ma.core"):
        renamed = data.replace(b"cnumpy.ma\nMaskedArray", b"c" + module + b"\nMaskedArray")
        assert equal(unpickled(renamed, allowed), value)


@pytest.mark.parametrize("flags", [-112, 144])
def test_dtypes_of_either_numpy(flags):
    aligned = np.dtype([("a", "f4"), ("b", "i1")], align=True)
    data = pickled(aligned)
    one, other = b"J" + (-112).to_bytes(4, "little", signed=True), b"K" + bytes([144])
    assert one in data or other in data
    assert unpickled(data.replace(one, other).replace(other, one if flags < 0 else other)) == aligned


def test_one_warning_for_all_entries_of_a_save(tmp_path):
    state = {f"x{number}": Frozen(str(number)) for number in range(9)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(state, tmp_path)
    [warning] = [w for w in caught if "allowed_types" in str(w.message)]
    assert "x0 holds" in str(warning.message)
    assert "and 4 more" in str(warning.message)


# What is not damage.


class Shrinking(enum.Enum):
    OLD = 1
    GONE = 2


class Strict:
    def __init__(self, size):
        self.size = size

    def __reduce__(self):
        return Strict, (self.size,)


class Stateful:
    def __init__(self):
        self.a = 1

    def __setstate__(self, state):
        raise LookupError("b is new")


class Hashed:
    def __init__(self):
        self.name = "a"

    def __hash__(self):
        raise RuntimeError("not yet")


def changed_enum(monkeypatch):
    return pickled(Shrinking.GONE).replace(b"K\x02", b"K\x09"), [Shrinking]


def changed_constructor(monkeypatch):
    data = pickled(Strict(3))
    monkeypatch.setattr(Strict, "__init__", lambda self, size, required: None)
    return data, [Strict]


def changed_state(monkeypatch):
    return pickled(Stateful()), [Stateful]


def abstract(monkeypatch):
    data = pickled(Names([1]))
    monkeypatch.setattr(Names, "extend", lambda self, values: 1 / 0, raising=False)
    return data, [Names]


@pytest.mark.parametrize("change", [changed_enum, changed_constructor, changed_state, abstract])
def test_a_type_that_changed_is_not_damage(change, monkeypatch):
    data, allowed = change(monkeypatch)
    with pytest.raises(UnsupportedEntry, match="x could not be rebuilt: tests.test_entries.*changed") as raised:
        unpickled(data, allowed)
    assert not isinstance(raised.value, BlockCorrupt)
    causes = [raised.value]
    while causes[-1].__cause__:
        causes.append(causes[-1].__cause__)
    assert type(causes[-1]) in {ValueError, TypeError, LookupError, ZeroDivisionError}


@pytest.mark.parametrize("data", [b"", b"\x80\x02.", b"\x80\x02]q\x00K\x01", b"\x80\x02\xff.", b"\x80\x02K\x01K\x02."])
def test_what_is_damage(data):
    with pytest.raises(BlockCorrupt, match="x is damaged"):
        unpickled(data)


def test_what_cannot_be_pickled_is_named(tmp_path):
    for value in (lambda: 0, (i for i in ()), sys.stdout, warnings):
        with pytest.raises(CheckpointException) as raised:
            save({"x": value}, tmp_path)
        error = raised.value.failures[0][0]
        assert isinstance(error, UnsupportedEntry)
        assert "x cannot be pickled" in str(error)


# Values of built-in types.

atoms = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
keys = st.none() | st.booleans() | st.integers() | st.text() | st.binary()
values = st.recursive(
    atoms, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner), max_leaves=30
)


@given(values)
def test_values_come_back_by_either_way(value):
    encoded = encode_value(value)
    if encoded is not None:
        assert same(decode_value(encoded), value)
    assert same(load_entry("x", io.BytesIO(hostile.container(value))), value)


@given(st.binary())
def test_bytes_as_a_value(data):
    try:
        value = decode_value(b"\xc1msgpack" + data)
    except ValueError:
        return
    assert isinstance(value, None | bool | int | float | str | bytes | list | tuple | dict)


def test_planners_of_other_kinds_get_what_they_know(tmp_path):
    """A planner's own `load_bytes` reads a container, whatever was stored; what its save made comes back as it is."""

    class Saver(dcp.DefaultSavePlanner):
        def resolve_data(self, item):
            return io.BytesIO(b"\x05mine") if item.index.fqn == "x" else super().resolve_data(item)

    class Loader(dcp.DefaultLoadPlanner):
        def load_bytes(self, read, value):
            got[read.dest_index.fqn] = value.read()

    got = {}
    state = {"x": 5, "y": {"a": [1, (2, 3)]}}
    dcp.save(state, storage_writer=AsyncStorageWriter(tmp_path), planner=Saver())
    dcp.load(state, storage_reader=AsyncStorageReader(tmp_path), planner=Loader())
    assert got["x"] == b"\x05mine"
    assert torch.load(io.BytesIO(got["y.a"])) == [1, (2, 3)]


@pytest.mark.parametrize("make", [ShardedLoadPlanner, functools.partial(open_checkpoint, "memory://nowhere")])
@pytest.mark.parametrize(
    "arguments",
    [
        {"trust": "some"},
        {"allowed_types": ["collections.Counter"]},
        {"allowed_types": 3},
        {"allowed_types": [(collections.Counter, 3)]},
        {"allowed_types": [("collections.Counter", collections.Counter)]},
    ],
    ids=str,
)
def test_impossible_trust(make, arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        make(**arguments)
