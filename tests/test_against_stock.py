"""Random states of every dtype, layout and kind: where stock DCP's round trip is exact, ours is, or says why not.

Run as a program to try more cases than the tests do: `python -m tests.test_against_stock 20000`.
"""

import collections
import contextlib
import functools
import logging
import os
import re
import sys
import tempfile
import warnings
from concurrent.futures import Future
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.testing._internal.two_tensor import TwoTensor

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.errors import CoverageError, DcpStorageError, UnsupportedTensor
from dcp_storage.geometry import Box
from tests.fake_ranks import Shards
from tests.states import DTYPES, bits, random_bits
from tests.test_resharding import tilings

EXAMPLES = int(os.environ.get("AGAINST_STOCK_EXAMPLES", "150"))
SHARED = "/dev/shm" if os.path.isdir("/dev/shm") else None
COUNTS: collections.Counter[str] = collections.Counter()

# What a case is made of


class Plain(NamedTuple):
    """A tensor of any strides."""

    dtype: str
    shape: tuple[int, ...]
    layout: str
    numbers: tuple[int, ...]  # one more than dimensions: the steps or strides, and the offset
    view: str
    wrap: str
    seed: int

    @property
    def is_lazy(self):
        """Whether some of its value is in no memory."""
        return self.layout == "zeros" or self.view in {"conj", "neg", "neg imag"}


class Parts(NamedTuple):
    """Shards of a tensor, all of it on this rank."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    boxes: list[Any]
    padding: int
    seed: int


class Two(NamedTuple):
    """A tensor with operations of its own."""

    shape: tuple[int, ...]


class Object(NamedTuple):
    """No tensor."""

    value: Any


REFUSALS = {
    Two: [(UnsupportedTensor, r"is a TwoTensor of layout")],
    "attributes": [(UnsupportedTensor, r"is a shard by its attributes .* save with ShardedSavePlanner")],
    "wrapper": [
        (ValueError, r"^Failed to validate global plan"),  # DCP's planner says so itself
        (CoverageError, r"The state dict's sharding does not describe this tensor: nothing was committed"),
    ],
}
"""What may be refused although stock's trip is exact, by what the state holds; the last two by DCP's planner only."""

KNOWN = [
    "empty bytes",  # saved with a warning, and no load takes them
]
"""What is known to be wrong, and is not tried."""


LAYOUTS = ["contiguous", "transposed", "sliced", "any", "expanded", "channels last", "zeros"]
WITHOUT_OVERLAP = {"contiguous", "transposed", "sliced", "channels last"}
VIEWS = ["", "", "", "conj", "neg", "imag", "neg imag", "real"]


@st.composite
def plain(draw):
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 5]), max_size=4)))
    numbers = tuple(draw(st.integers(0, 6)) for _ in range(len(shape) + 1))
    dtype = draw(st.sampled_from(DTYPES))
    view = draw(st.sampled_from(VIEWS)) if is_number(dtype) else ""
    if view in {"neg", "conj"} if dtype == "bcomplex32" else view != "neg" and not is_complex(dtype):
        view = ""  # torch itself can neither negate nor conjugate a bcomplex32
    layout = draw(st.sampled_from([layout for layout in LAYOUTS if layout != "channels last" or len(shape) == 4]))
    wrap = draw(st.sampled_from(["", "", "parameter", *["not a leaf"] * is_number(dtype)]))
    return Plain(dtype, shape, layout, numbers, view, wrap, draw(st.integers(0, 99)))


def is_complex(dtype):
    return getattr(torch, dtype).is_complex


def is_number(dtype):
    """Whether tensors of a dtype may have a gradient, and be negated."""
    return is_complex(dtype) or (getattr(torch, dtype).is_floating_point and dtype[:6] not in {"float8", "float4"})


@st.composite
def parts(draw):
    kind = draw(st.sampled_from(["hooks", "wrapper", "attributes"]))
    shape = tuple(draw(st.lists(st.integers(1 if kind == "wrapper" else 0, 5), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from(DTYPES))
    return Parts(kind, dtype, shape, draw(tilings(shape)), draw(st.integers(0, 2)), draw(st.integers(0, 99)))


scalars = st.one_of(
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.none(),
    st.booleans(),
    st.binary(min_size=int("empty bytes" in KNOWN), max_size=5),
    st.complex_numbers(),
)
objects = st.one_of(scalars, st.lists(scalars, max_size=3)).map(Object)
keys = st.sampled_from(["a", "b", "c", "weight", "0", "1", "", "ä b", "x/y", "a.b"])
in_tuples = st.lists(st.one_of(plain(), objects), max_size=3).map(tuple)
leaves = st.one_of(plain(), plain(), plain(), plain(), objects, in_tuples, parts())
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(st.dictionaries(keys, inner, min_size=1, max_size=4), st.lists(inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def states(draw):
    made = draw(st.dictionaries(keys, trees, min_size=1, max_size=5))
    return {**made, "two": Two((2, 3))} if draw(st.integers(0, 39)) == 39 else made


class Way(NamedTuple):
    """How a case is made, saved and loaded."""

    made_in: str
    saved_in: str
    loaded_in: str
    by: str
    save_planner: bool
    load_planner: bool
    same_strides: bool


CONTEXTS = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}
of_state = st.sampled_from(["grad", "no_grad", "inference"])
of_call = st.sampled_from(["grad", "grad", "no_grad", "inference", "float64", "meta"])
ways = st.builds(
    Way,
    of_state,
    of_call,
    of_call,
    st.sampled_from(["save", "async_save", "async_save, stager of DCP's"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# Values of cases


def change(tree, leaf):
    """The same containers with other leaves; what is in a tuple is in one entry, and so a leaf."""
    if type(tree) is dict:
        return {key: change(inner, leaf) for key, inner in tree.items()}
    if type(tree) is list:
        return [change(inner, leaf) for inner in tree]
    return leaf(tree)


def each(tree):
    """All leaves, those in tuples too."""
    if type(tree) is dict or type(tree) in {list, tuple}:
        return [leaf for inner in (tree.values() if type(tree) is dict else tree) for leaf in each(inner)]
    return [tree]


def strides(spec):
    """The strides of a tensor, and the elements of its storage."""
    *numbers, offset = spec.numbers
    steps = [1 + number % 3 for number in numbers] if spec.layout == "sliced" else [1] * len(numbers)
    order = {"transposed": range(len(numbers)), "channels last": (1, 3, 2, 0)}.get(
        spec.layout, reversed(range(len(numbers)))
    )
    made, extent = [0] * len(numbers), 1
    for dim in order:
        made[dim] = extent * steps[dim]
        extent *= max(1, spec.shape[dim]) * steps[dim] + (spec.layout == "sliced")
    if spec.layout == "any":
        made = numbers
    elif spec.layout == "expanded":
        made = [0 if number % 2 else stride for number, stride in zip(numbers, made, strict=True)]
    reach = sum(stride * max(0, size - 1) for stride, size in zip(made, spec.shape, strict=True))
    return made, offset, offset + max(reach + 1, extent)


def tensor(spec, *, blank=False):
    torch.manual_seed(spec.seed)
    dtype = getattr(torch, spec.dtype)
    if spec.layout == "zeros" and spec.dtype in {"float32", "float64"}:
        made = torch._efficientzerotensor(spec.shape, dtype=dtype)
    else:
        steps, offset, count = strides(spec)
        flat = zeros(dtype, (count,)) if blank else random_bits(dtype, (count,))
        made = flat.as_strided(spec.shape, steps, offset)
    if spec.view == "neg":
        made = torch._neg_view(made)
    elif spec.view:
        made = {"conj": torch.conj, "imag": torch.imag, "neg imag": lambda x: x.conj().imag, "real": torch.real}[
            spec.view
        ](made)
    if spec.wrap == "parameter":
        return torch.nn.Parameter(made.detach(), requires_grad=is_number(spec.dtype))
    if spec.wrap == "not a leaf":
        made = made.detach().requires_grad_()
        return made.view_as(made)
    return made


def zeros(dtype, shape):
    return torch.zeros(prod(shape) * dtype.itemsize, dtype=torch.uint8).view(dtype).view(shape)


def full(spec):
    torch.manual_seed(spec.seed)
    dtype = getattr(torch, spec.dtype)
    return random_bits(dtype, spec.shape)


def shards(spec):
    whole = full(spec)
    held = [(box, whole[box.slices].clone()) for box in spec.boxes]
    if spec.kind == "hooks":
        return Shards(spec.shape, held, whole.dtype)
    if spec.kind == "wrapper":
        return LocalShardsWrapper([part for _, part in held], [box.offsets for box, _ in held])
    return with_attributes(spec, held)


def with_attributes(spec, held):
    """One tensor that has the shards one below the other, with something between them."""
    beside = [max(box.sizes[dim] for box, _ in held) + spec.padding for dim in range(1, len(spec.shape))]
    rows = sum(box.sizes[0] + spec.padding for box, _ in held)
    made, places, row = random_bits(getattr(torch, spec.dtype), (rows, *beside)), [], 0
    for box, part in held:
        row += spec.padding
        places.append(Box((row, *(0 for _ in beside)), box.sizes))
        made[places[-1].slices].copy_(part)
        row += box.sizes[0]
    made.global_shape, made.global_offsets = spec.shape, [box.offsets for box, _ in held]
    made.local_offsets, made.local_sizes = zip(*places, strict=True)
    return made


def make(spec):
    if isinstance(spec, Plain):
        return tensor(spec)
    if isinstance(spec, Parts):
        return shards(spec)
    if isinstance(spec, Two):
        return TwoTensor(torch.ones(spec.shape), torch.ones(spec.shape))
    if isinstance(spec, Object):
        return spec.value
    return tuple(make(inner) for inner in spec)


def destination(way, spec):
    if isinstance(spec, Plain):
        if way.same_strides and spec.layout in WITHOUT_OVERLAP:
            return tensor(spec, blank=True)
        made = zeros(tensor(spec).dtype, spec.shape)
        # Neither stock's reader nor ours can detach such a tensor in inference mode.
        wraps = way.same_strides and spec.layout == "zeros" and "inference" not in {way.made_in, way.loaded_in}
        return TwoTensor(made, made.clone()) if wraps else made
    if isinstance(spec, Parts):
        return zeros(getattr(torch, spec.dtype), spec.shape)
    return torch.zeros(spec.shape) if isinstance(spec, Two) else None


def content(value):
    """What of a value can be compared: the bits of tensors, and the exact objects."""
    if isinstance(value, dict):
        return {key: content(inner) for key, inner in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(map(content, value))
    return tensor_content(value) if isinstance(value, torch.Tensor) else (type(value), repr(value))


def tensor_content(value):
    if type(value) in {Shards, LocalShardsWrapper}:
        return content(parts_of(value))
    if type(value) is TwoTensor:
        assert content(value.a) == content(value.b)
        value = value.a
    if value._is_zerotensor():  # which has no bits
        value = torch.zeros_like(value)
    value = value.detach().clone(memory_format=torch.contiguous_format)  # whatever strides of one element
    return value.dtype, tuple(value.shape), bits(value).numpy().tobytes() if value.numel() else b""


def parts_of(value):
    """The plain tensors that a tensor consists of."""
    if isinstance(value, LocalShardsWrapper):
        return value.local_shards()
    if isinstance(value, TwoTensor):
        return [value.a, value.b]
    return [part for _, part in value.shards] if isinstance(value, Shards) else [value]


def wanted(spec):
    """The content that a load has to give."""
    return content(full(spec) if isinstance(spec, Parts) else make(spec))


# Round trips


def failure(error):
    return error.failures[0][0] if isinstance(error, CheckpointException) else error


def trip(spec, way, writer, reader, save, planners):  # noqa: PLR0917
    """Save and load, and return the content that came back, or the error."""
    with CONTEXTS[way.made_in]():
        state = change(spec, make)
        loaded = change(spec, functools.partial(destination, way))
    destinations = change(loaded, lambda value: value)
    before = content(state)
    try:
        with CONTEXTS[way.saved_in]():
            future = save(state, storage_writer=writer, planner=planners[0], no_dist=True)
        if content(state) != before:
            pytest.fail("the state was changed by its save")
        if isinstance(future, Future):
            overwrite(state)  # as training does
            future.result(60)
        with CONTEXTS[way.loaded_in]():
            dcp.load(loaded, storage_reader=reader, planner=planners[1], no_dist=True)
    except (CheckpointException, Exception) as error:  # noqa: BLE001  # it is judged later
        return failure(error)
    for was, found in pairs(destinations, loaded):
        check_filled(was, found)
    return content(loaded)


def pairs(tree, other):
    if type(tree) in {dict, list}:
        steps = tree if type(tree) is dict else range(len(tree))
        return [pair for step in steps for pair in pairs(tree[step], other[step])]
    return [(tree, other)]


def check_filled(destination, found):
    """Whether a destination is still there, and the memory beside it in its storage is as it was."""
    if not isinstance(destination, torch.Tensor):
        return
    assert found is destination, "a destination was replaced"
    if not isinstance(destination, TwoTensor):
        item = destination.element_size()
        with torch.inference_mode():
            memory = torch.tensor([], dtype=torch.uint8).set_(destination.untyped_storage()).clone()
            steps = (*(step * item for step in destination.stride()), 1)
            memory.as_strided((*destination.shape, item), steps, destination.storage_offset() * item).zero_()
            assert not memory.any(), "memory beside a destination was written to"


def overwrite(state):
    with torch.inference_mode():
        for value in each(state):
            for part in parts_of(value) if isinstance(value, torch.Tensor) else ():
                if not part._is_zerotensor():
                    torch.tensor([], dtype=torch.uint8, device="cpu").set_(part.untyped_storage()).bitwise_not_()


@functools.cache
def kept_stager():
    return DefaultStager(StagingOptions(False, False, False, False))


SAVES = {
    "save": dcp.save,
    "async_save": dcp.async_save,
    "async_save, stager of DCP's": lambda state, **options: dcp.async_save(
        state, async_stager=kept_stager(), **options
    ),
}


def tried(spec, way):
    """Whether a case is one that ours can be asked for."""
    held = each(spec)
    by_dcp = way.by == "async_save, stager of DCP's"
    return not by_dcp or not any(isinstance(leaf, Parts | Two) or getattr(leaf, "is_lazy", False) for leaf in held)


def known_to_stock(leaf):
    """Stock has no idea of the whole tensor that a bare wrapper or attributes are a part of."""
    return Object(None) if isinstance(leaf, Parts) and leaf.kind != "hooks" else leaf


def check(spec, way):
    COUNTS["tried"] += 1
    with tempfile.TemporaryDirectory(dir=SHARED) as path:
        stock = trip(
            change(spec, known_to_stock),
            way,
            dcp.FileSystemWriter(f"{path}/stock", sync_files=False),
            dcp.FileSystemReader(f"{path}/stock"),
            dcp.save,
            (None, None),
        )
        ours = trip(
            spec,
            way,
            AsyncStorageWriter(f"{path}/ours", sync_files=False),
            AsyncStorageReader(f"{path}/ours"),
            SAVES[way.by],
            (ShardedSavePlanner() if way.save_planner else None, ShardedLoadPlanner() if way.load_planner else None),
        )
    stock_is_exact = stock == change(change(spec, known_to_stock), wanted)
    COUNTS["stock exact" if stock_is_exact else f"stock failed: {type(stock).__name__}"] += 1
    if not isinstance(ours, BaseException):
        assert ours == change(spec, wanted), "silently wrong"
        COUNTS["equal"] += 1
        return
    said = refusal(ours, spec, way)
    if said is None and (stock_is_exact or not (isinstance(ours, DcpStorageError) or alike(ours, stock))):
        raise ours
    COUNTS[f"refused: {said}" if said else f"both failed: {type(ours).__name__}"] += 1


def refusal(error, spec, way):
    """What of a state its save may refuse."""
    for why in {leaf.kind if isinstance(leaf, Parts) else type(leaf) for leaf in each(spec)}.intersection(REFUSALS):
        for kind, says in REFUSALS[why]:
            if isinstance(error, kind) and re.search(says, str(error)) and (why is Two or not way.save_planner):
                return why if isinstance(why, str) else why.__name__
    return None


def alike(ours, stock):
    """Whether two errors are one of DCP's own, of whatever entry."""
    return type(ours) is type(stock) and str(ours).partition(":")[0] == str(stock).partition(":")[0]


def run(examples):
    def case(spec, way):
        if tried(spec, way):
            check(spec, way)

    options = settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck), print_blob=False)
    options(given(states(), ways)(case))()


def test_what_stock_gets_right_ours_does_or_says_why_not():
    run(EXAMPLES)


@pytest.mark.usefixtures("process_group")
def test_the_process_executor_saves_many_kinds_at_once(tmp_path):
    specs = {}
    options = settings(
        max_examples=100, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    options(given(leaves)(lambda leaf: specs.update({f"entry {len(specs)}": leaf})))()
    state = change(specs, make)
    future = dcp.async_save(
        state,
        storage_writer=AsyncStorageWriter(tmp_path),
        planner=ShardedSavePlanner(),
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
    )
    future.result(100)
    way = Way("grad", "grad", "grad", "async_save", save_planner=True, load_planner=True, same_strides=True)
    loaded = change(specs, functools.partial(destination, way))
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner())
    assert content(loaded) == change(specs, wanted)
    assert len(specs) >= 60


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable()
    try:
        run(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
    finally:
        for what, count in sorted(COUNTS.items()):
            print(f"{count:8,} {what}")
