"""Pickles that mean harm by what loads without being listed: refused, bounded, and nothing in them runs."""

import collections
import datetime as dt
import decimal
import fractions
import functools
import io
import operator
import pathlib
import pickle
import resource
import struct
import sys
import tracemalloc
import uuid

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_storage.dcp.loads.entries import Trusted, load_entry
from dcp_storage.errors import BlockCorrupt, UnsupportedEntry
from tests import hostile
from tests.test_entries import SAFE

MULTIARRAY = np.array([0]).__reduce__()[0]
SCALAR = np.float64(0).__reduce__()[0]


class Call:
    """Pickles as a call, with a state, elements and items."""

    def __init__(self, function, *arguments, state=None, elements=None, items=None):
        self.reduced = (function, arguments, state)
        self.following = (elements, items)

    def __reduce__(self):
        return *self.reduced, *(values and iter(values) for values in self.following)


class Tensor:
    """Pickles as a storage and a function that rebuilds a tensor on it."""

    def __init__(self, *arguments, function=torch._utils._rebuild_tensor_v2):
        storage = torch.arange(4.0).untyped_storage()
        self.reduced = (
            function,
            (torch.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True), *arguments),
        )

    def __reduce__(self):
        return self.reduced


def array(shape, dtype, data, *, made=(np.ndarray, (0,), b"b")):
    return Call(MULTIARRAY, *made, state=(1, shape, dtype, False, data))


def dtype(code, *state):
    return Call(np.dtype, code, False, True, state=state)


def deep_tuple(levels):
    made = ()
    for _ in range(levels):
        made = (made,)
    return made


def doubled_tuple(levels):
    made = (1,)
    for _ in range(levels):
        made = (made, made)
    return made


REBUILD = torch._tensor._rebuild_from_type_v2
F4 = np.dtype("f4")
HUGE = 1 << 40

CALLS = {
    "a power of ten": Call(fractions.Fraction, "1e3000000"),
    "a fraction of huge numbers": Call(fractions.Fraction, 1 << 100_000, 3),
    "a fraction by zero": Call(fractions.Fraction, 1, 0),
    "bytes of a size": Call(bytes, HUGE),
    "bytearray of a size": Call(bytearray, HUGE),
    "a set of a range": Call(set, range(HUGE)),
    "a frozenset of a range": Call(frozenset, range(HUGE)),
    "a deque of a range": Call(collections.deque, range(HUGE)),
    "a counter of a range": Call(collections.Counter, range(HUGE)),
    "an ordered dict of a list": Call(collections.OrderedDict, [("a", 1)]),
    "a list of a range": Call(list, range(HUGE)),
    "a tuple of a range": Call(tuple, range(HUGE)),
    "a dict": Call(dict, [("a", 1)]),
    "a number of text": Call(int, "9" * 4000),
    "a float of text": Call(float, "1"),
    "a complex of text": Call(complex, "1j"),
    "text": Call(str, b"a", "idna"),
    "a type of three": Call(type, "A", (), {}),
    "a type of a number": Call(type, 1),
    "an object": Call(object),
    "a factory that calls": Call(collections.defaultdict, print),
    "a factory that is listed nowhere": Call(collections.defaultdict, fractions.Fraction),
    "a decimal of a float": Call(decimal.Decimal, 1.5),
    "a moment of words": Call(dt.datetime, b"short"),
    "a moment of numbers": Call(dt.datetime, 1, 2, 3),
    "a zone that is not": Call(dt.datetime, b"\x07\xe9\1\1\1\1\1\0\0\0", "UTC"),
    "a duration too long": Call(dt.timedelta, 10**400),
    "a path of bytes": Call(pathlib.PurePosixPath, b"a"),
    "codecs": Call(__import__("_codecs").encode, "a" * 9, "zip"),
    "numpy's array by size": Call(np.ndarray, (HUGE,)),
    "numpy's array rebuilt by size": Call(MULTIARRAY, np.ndarray, (HUGE,), b"b"),
    "numpy's array of a type": Call(MULTIARRAY, list, (0,), b"b"),
    "numpy's scalar by size": Call(SCALAR, F4, b"12345678"),
    "numpy's scalar of objects": Call(SCALAR, np.dtype("O"), b"\0" * 8),
    "numpy's dtype by a class": Call(np.dtype, dict),
    "numpy's dtype by words": Call(np.dtype, "f4, (1000000000,)f4", False, True),
    "numpy's float by a number": Call(np.float64, 1),
    "torch's tensor by size": Call(torch.Tensor, HUGE),
    "torch's storage by size": Call(torch.UntypedStorage, HUGE),
    "getattr of an object": Call(getattr, [], "append"),
    "getattr of a class": Call(getattr, list, "__subclasses__"),
    "getattr of a function": Call(getattr, torch._utils._rebuild_tensor_v2, "__globals__"),
    "a partial of a type": Call(functools.partial, dict),
    "a partial of getattr": Call(functools.partial, getattr),
    "a tensor by getattr": Call(REBUILD, getattr, dict, ("", "format"), None),
    "a tensor by bytes": Call(REBUILD, bytearray, bytearray, (HUGE,), None),
    "a tensor by itself": Call(REBUILD, REBUILD, torch.Tensor, (bytes, bytes, (), None), None),
    "a tensor without a storage": Call(torch._utils._rebuild_tensor_v2, 1, 0, (HUGE,), (1,), False, {}),
    "a parameter of a list": Call(torch._utils._rebuild_parameter, [1], True, {}),
    "a device that is not": Call(torch.device, "nothing"),
}

STATES = {
    "numpy's array of another size": array((HUGE,), F4, b"1234"),
    "numpy's array of less than nothing": array((-1, -1), F4, b"1234"),
    "numpy's array of a shape that overflows": array((1 << 61, 8), F4, b""),
    "numpy's array of no size": array((HUGE,), np.dtype("V1"), b""),
    "numpy's objects of bytes": array((1,), np.dtype("O"), b"\1" * 8),
    "numpy's objects of fewer": array((3,), np.dtype("O"), [1]),
    "numpy's objects in a structure": array((1,), np.dtype([("a", "O")]), b"\1" * 8),
    "numpy's numbers of a list": array((1,), F4, [1]),
    "numpy's array by a word": array((1,), "f4", b"1234"),
    "numpy's array of no state": Call(MULTIARRAY, np.ndarray, (0,), b"b", state=()),
    "a field beyond its dtype": dtype("V4", 3, "|", None, ("a",), {"a": (np.dtype("f8"), 4)}, 4, 1, 16),
    "a field before its dtype": dtype("V4", 3, "|", None, ("a",), {"a": (F4, -4)}, 4, 1, 16),
    "a field of no dtype": dtype("V4", 3, "|", None, ("a",), {"a": ("O", 0)}, 4, 1, 16),
    "fields of other names": dtype("V4", 3, "|", None, ("a",), {"b": (F4, 0)}, 4, 1, 16),
    "a dtype of another size": dtype("f4", 3, "<", None, None, None, 400, 4, 0),
    "a dtype that holds objects": dtype("f8", 3, "<", None, None, None, -1, -1, 63),
    "a subarray of another size": dtype("V4", 3, "|", (F4, (HUGE,)), None, None, 4, 4, 0),
    "a dtype of no state": dtype("f4"),
    "a dtype of a list": Call(np.dtype, "f4", False, True, state=[1]),
    "a unit of code": dtype("M8", 4, "<", None, None, None, -1, -1, 0, (None, (b"s]; x", 1, 1, 1))),
    "a class": Call(type, None, state={"a": 1}),
    "attributes of a deque": Call(collections.deque, (), state={"a": 1}),
    "attributes that are no names": Call(collections.OrderedDict, state={1: 1}),
    "elements for a number": Call(complex, 1, 2, elements=[1]),
    "items for a deque": Call(collections.deque, (), items=[(1, 2)]),
    "items for a class": Call(type, None, items=[(1, 2)]),
    "a tensor beyond its storage": Tensor(0, (HUGE,), (1,), False, collections.OrderedDict()),
    "a tensor before its storage": Tensor(-8, (2,), (1,), False, collections.OrderedDict()),
    "a tensor of backward strides": Tensor(0, (2,), (-1,), False, collections.OrderedDict()),
    "a tensor of words": Tensor("0", "2", "1", False, collections.OrderedDict()),
    "a quantized tensor": Tensor(
        0, (HUGE,), (1,), (torch.per_tensor_affine, 1.0, 0), function=torch._utils._rebuild_qtensor
    ),
}


def pickled(*codes):
    return b"\x80\x02" + b"".join(codes) + b"."


def named(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def plain(value):
    return pickle.dumps(value, 2)[2:-1]


def new(cls, *arguments, state=None):
    """An instance without a call of its initializer."""
    return pickled(named(cls.__module__, cls.__qualname__), plain(arguments), b"\x81", plain(state), b"b")


RAW = {
    "a constructor of another class": pickled(
        named("functools", "partial"),
        plain(Call(getattr, object, "__new__")),
        b"\x85R(h\0" + named("collections", "deque") + b"\x85NNtb)R",
    ),
    "a uuid of text": new(uuid.UUID, state={"int": "x"}),
    "a uuid too large": new(uuid.UUID, state={"int": 1 << 128}),
    "a uuid with more": new(uuid.UUID, state={"int": 1, "hex": 2}),
    "a uuid with arguments": new(uuid.UUID, "x"),
    "a stream of numbers": new(io.BytesIO, state=(5, 0, None)),
    "a stream before its beginning": new(io.BytesIO, state=(b"", -1, None)),
    "a stream of no place": new(io.BytesIO, state=(b"", None, None)),
    "a list": new(list),
    "a tensor": new(torch.Tensor),
    "an int": new(int, 5),
    "a memo that is empty": pickled(b"h\x05"),
    "bytes that are not there": pickled(b"B\xff\xff\xff\x7f"),
    "more bytes that are not there": pickled(b"\x8e" + struct.pack("<Q", 1 << 62)),
    "a bytearray that is not there": pickled(b"\x96" + struct.pack("<Q", 1 << 62)),
    "text that is not there": pickled(b"\x8d" + struct.pack("<Q", 1 << 62)),
    "an integer that is not there": pickled(b"\x8b\xff\xff\xff\xff"),
    "marks": pickled(b"(" * 100_000),
    "a mark within": pickled(b"]((e"),
    "a nest of tuples": pickled(b")" + b"\x85" * 100_000),
    "a nest of tuples as a key": pickled(b"})" + b"\x85" * 99 + b"\x85" * 99_000 + b"Ns"),
    "a nest of lists as a key": pickled(b"}" + b"]" * 10 + b"Ns"),
    "a key that cannot be hashed": pickled(b"}]Ns"),
    "an element that cannot be hashed": pickled(named("__builtin__", "set") + b"]]a\x85R"),
    "state for nothing": pickled(b"}b"),
    "state for a function": pickled(named("torch._utils", "_rebuild_tensor_v2") + b"}(X\x01\0\0\0aK\x01ub"),
    "state for a class": pickled(named("collections", "OrderedDict") + b"}(X\x01\0\0\0aK\x01ub"),
    "slots for a class": pickled(named("collections", "OrderedDict") + b"N}(X\x01\0\0\0aK\x01u\x86b"),
    "items for a function": pickled(named("torch._utils", "_rebuild_tensor_v2") + b"K\x01K\x01s"),
    "elements for a class": pickled(named("collections", "deque") + b"K\x01a"),
    "an instance of a number": pickled(b"K\x01)\x81"),
    "a call of a number": pickled(b"K\x01)R"),
    "a call without arguments": pickled(named("collections", "deque") + b"K\x01R"),
    "INST": pickled(b"(iposix\nsystem\n"),
    "OBJ": pickled(b"(" + named("collections", "deque") + b"o"),
    "EXT1": pickled(b"\x82\x01"),
    "PERSID": pickled(b"Pa\n"),
    "a storage of a container without": pickled(b"X\x01\0\0\0aQ"),
    "a name of numbers": pickled(b"K\x01K\x02\x93"),
    "a module that is not loaded": pickled(named("antigravity", "webbrowser")),
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x02os\x93.",
    "a name within a module": b"\x80\x04\x8c\x0bcollections\x8c\x0f_sys.modules.get\x93.",
    "two values": pickled(b"K\x01K\x02"),
    "bytes after its end": pickled(b"K\x01") + b"K",
    "a later protocol": b"\x80\x09K\x01.",
}


def peak_of(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


load_entry(
    "x", io.BytesIO(hostile.rezip({"archive/data.pkl": pickled(b"N")}))
)  # what that imports is not the next pickle's


def refuse(data):
    modules, before = set(sys.modules), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    caught = []

    def load():
        with pytest.raises((UnsupportedEntry, BlockCorrupt)) as raised:
            load_entry("x", io.BytesIO(data))
        caught.append(raised.value)

    assert peak_of(load) < 60 * len(data) + (4 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert set(sys.modules) <= modules
    [error] = caught
    assert error.fqn == "x"
    assert "x " in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", [*CALLS, *STATES])
def test_what_no_pickler_asks_for(name, protocol):
    buffer = io.BytesIO()
    torch.save((CALLS | STATES)[name], buffer, pickle_protocol=protocol)
    refuse(buffer.getvalue())


@pytest.mark.parametrize("name", RAW)
def test_what_no_pickler_writes(name):
    refuse(hostile.rezip({"archive/data.pkl": RAW[name]}))


@pytest.mark.parametrize("make", [dict.fromkeys, set, frozenset])
def test_keys_whose_hash_takes_for_ever(make):
    """Thirty tuples, each of the one before twice: their hash visits a thousand million."""
    hashed = {
        dict.fromkeys: b"}h\x63Ns",
        set: named("__builtin__", "set") + b"]h\x63a\x85R",
        frozenset: named("__builtin__", "frozenset") + b"]h\x63a\x85R",
    }[make]
    body = b")" + b"".join(b"q%ch%ch%c\x86" % (n, n, n) for n in range(1, 31)) + b"q\x63" + hashed
    refuse(hostile.rezip({"archive/data.pkl": pickled(body)}))


def test_a_memo_takes_no_index_on_trust():
    data = hostile.rezip({"archive/data.pkl": pickled(b"K\x01r\xff\xff\xff\xffj\xff\xff\xff\xff0")})
    assert peak_of(lambda: load_entry("x", io.BytesIO(data))) < 1 << 20


def test_a_nest_that_picklers_do_write():
    value = {deep_tuple(50): 1}
    assert load_entry("x", io.BytesIO(hostile.container((value,)))) == (value,)
    assert load_entry("x", io.BytesIO(hostile.container(doubled_tuple(30)))) is not None


def test_listed_types_are_not_trusted_with_more():
    """A listed function may be called; what it is made of may not be reached, and no other function called by it."""
    for value in (
        Call(getattr, operator.add, "__globals__"),
        Call(getattr, operator.add, "__class__"),
        Call(getattr, operator.add, "__self__"),
        Call(operator.sub, 1, 2),
    ):
        with pytest.raises(UnsupportedEntry):
            load_entry("x", io.BytesIO(hostile.container(value)), Trusted((operator.add, collections.UserDict)))
    for name in ("__init__", "__globals__", "__class__", "__reduce__", "__subclasses__", "__dict__", "__mro__", "data"):
        with pytest.raises((UnsupportedEntry, BlockCorrupt)):
            data = hostile.container(Call(getattr, collections.UserDict, name))
            load_entry("x", io.BytesIO(data), Trusted((collections.UserDict,)))


def test_tuples_nested_too_deeply_to_be_hashed_are_no_damage():
    value = ()
    for _ in range(150):
        value = (value, set())
    data = hostile.container(value)
    with pytest.raises(UnsupportedEntry, match="tuples more than 100 deep.*trust"):
        load_entry("x", io.BytesIO(data))
    assert load_entry("x", io.BytesIO(data), Trusted((), "all")) == value


CONTAINERS = [hostile.container(SAFE[name]) for name in SAFE if name != "int of 300 bytes"]


@settings(max_examples=300)
@given(st.data())
def test_changed_entries_of_every_type(data):
    """Bytes of a pickle changed, within an archive whose checksums are right."""
    archive = CONTAINERS[data.draw(st.integers(0, len(CONTAINERS) - 1))]
    records = hostile.records_of(archive)
    records["archive/data.pkl"] = hostile.mutate_bytes(
        records["archive/data.pkl"], lambda count: data.draw(st.integers(0, count - 1))
    )
    try:
        load_entry("x", io.BytesIO(hostile.rezip(records)))
    except (BlockCorrupt, UnsupportedEntry) as error:
        assert error.fqn == "x"
