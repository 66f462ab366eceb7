"""Stock DCP checkpoints, whose `.metadata` is a pickle that is read without executing it."""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, ClassVar

from msgspec import Struct

from dcp_storage.errors import UnsupportedFormat
from dcp_storage.format.contents import CheckedItem, HeldObject
from dcp_storage.format.dtypes import ITEM_BYTES
from dcp_storage.format.faults import MAX_INT, Blamed, Fault, require
from dcp_storage.format.manifest.boxes import Boxes, Listed
from dcp_storage.format.names import ObjectName, is_safe, is_stock_object
from dcp_storage.format.paths import list_slots
from dcp_storage.format.stock.globals import KNOWN
from dcp_storage.format.stock.unpickle import Record, read_pickle
from dcp_storage.geometry import Box, Shape, contains

StorageKey = tuple[str, Shape | None]
"""A stored item: the fqn, and the offsets of a tensor's chunk or `None` for an object that is not a tensor."""

_MAX_DIMS = 64
_MAX_TRANSFORMS = 8
_MIN_CHUNK_BYTES = 16
"""Fewer than a chunk takes in a pickle: if there are more chunks than that, one chunk is referenced repeatedly."""


class StockTensor(Struct, frozen=True):
    """A tensor: its dtype (torch's name), its global shape and the chunks that are stored."""

    dtype: str
    size: Shape
    chunks: tuple[Box, ...]

    @property
    def boxes(self) -> Boxes:
        """The chunks."""
        return Listed(self.size, self.chunks)


class StockItem(Struct, frozen=True):
    """Where one item is stored, and the descriptors of the stream transforms to undo, outermost first."""

    object_name: ObjectName
    offset: int
    length: int
    transforms: tuple[str, ...] = ()


class StockManifest(Struct, frozen=True):
    """The contents of a stock `.metadata`, as plain, validated values.

    Attributes:
        tensors: The tensors by fqn.
        bytes: The fqns of all other entries, stored as `torch.save` writes them.
        planner_data: The path of each fqn in the nested state dict, or `None` if it was not flattened.
        storage: Where each chunk and each bytes entry is stored.
        version: The version of DCP's metadata, or `None` if torch had none yet.
        save_id: Unique to this save, or `None` if torch had none yet.
        identity: Unique to the `.metadata` that it was read from.
    """

    tensors: dict[str, StockTensor]
    bytes: tuple[str, ...]
    planner_data: dict[str, tuple[str | int, ...]] | None
    storage: dict[StorageKey, StockItem]
    version: str | None = None
    save_id: str | None = None
    identity: str = ""

    stock: ClassVar[bool] = True
    info: ClassVar[Mapping[str, Any]] = {}
    part: ClassVar[None] = None
    attempt: ClassVar[None] = None
    codec: ClassVar[None] = None
    digest: ClassVar[None] = None
    proof: ClassVar[None] = None

    @property
    def object_names(self) -> list[ObjectName]:
        """The names of the data objects."""
        return list(dict.fromkeys(item.object_name for item in self.storage.values()))

    def check_whole(self) -> None:
        """Do nothing: everything was checked when it was decoded."""

    def check_names(self) -> None:
        """Do nothing: names were checked when they were decoded."""

    def objects_held(self) -> list[HeldObject]:
        """Return the data objects and the entries stored in each; an object must be long enough for its last item."""
        stops = dict.fromkeys(self.object_names, 0)
        fqns: dict[ObjectName, dict[str, None]] = {name: {} for name in stops}
        for (fqn, _), item in self.storage.items():
            stops[item.object_name] = max(stops[item.object_name], item.offset + item.length)
            fqns[item.object_name][fqn] = None
        return [HeldObject(name, stop, False, tuple(fqns[name])) for name, stop in stops.items()]

    def checked_items(self) -> Iterator[CheckedItem]:
        """Yield nothing: items have no check values."""
        yield from ()

    def deletable(self) -> list[ObjectName]:
        """Return the objects that are named as DCP's own writers name them."""
        return sorted(filter(is_stock_object, self.object_names))


def decode_stock_metadata(data: bytes, *, where: str) -> StockManifest:
    """Decode a stock `.metadata`; nothing in it is executed or imported.

    Raises:
        UnsupportedFormat: It asks for a class or function that no stock manifest needs, or contains a kind of tensor
            or object name that this package does not read.
        ManifestCorrupt: It is truncated, not a pickle, or its contents are invalid.
    """
    root = read_pickle(data, KNOWN, where=where)
    try:
        with Blamed(where):
            return _manifest(_fields(root, "Metadata"), len(data))
    except _Unread as kind:
        raise UnsupportedFormat(f"{where} describes {kind}", url=where) from None


class _Unread(Exception):
    """Something valid that this package does not read."""


def _fields(value: object, name: str) -> dict[str, Any]:
    require(isinstance(value, Record) and value.name == name, f"a {name} is missing")
    assert isinstance(value, Record)
    require(isinstance(value.state, dict), f"a {name} is empty")
    assert isinstance(value.state, dict)
    return value.state


def _dict(value: object, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise Fault(f"{what} is not a dict")
    return value


def _manifest(fields: dict[str, Any], pickle_bytes: int) -> StockManifest:
    entries = _dict(fields.get("state_dict_metadata"), "state_dict_metadata")
    tensors: dict[str, StockTensor] = {}
    others: list[str] = []
    chunks_left = pickle_bytes // _MIN_CHUNK_BYTES
    for fqn, entry in entries.items():
        require(isinstance(fqn, str), "an entry has no name")
        if isinstance(entry, Record) and entry.name == "BytesStorageMetadata":
            others.append(fqn)
            continue
        state = _fields(entry, "TensorStorageMetadata")
        chunks_left -= len(_list(state.get("chunks"), f"{fqn}'s chunks"))
        require(chunks_left >= 0, f"{fqn} has more chunks than fit in the manifest")
        tensors[fqn] = _tensor(fqn, state)
    storage = dict(map(_stored, *_columns(_dict(fields.get("storage_data"), "storage_data"))))
    manifest = StockManifest(
        tensors,
        tuple(others),
        _paths(fields.get("planner_data"), pickle_bytes),
        storage,
        _text(fields.get("version"), "version"),
        _save_id(fields.get("storage_meta")),
    )
    _check_complete(manifest)
    return manifest


def _text(value: object, what: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise Fault(f"its {what} is not text")
    return value


def _save_id(meta: object) -> str | None:
    return None if meta is None else _text(_fields(meta, "StorageMeta").get("save_id"), "save_id")


def _columns(items: dict[Any, Any]) -> tuple[Iterable[Any], Iterable[Any]]:
    return items.keys(), items.values()


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise Fault(f"{what} are not a list")
    return value


def _tensor(fqn: str, state: dict[str, Any]) -> StockTensor:
    size = _shape(state.get("size"), fqn)
    dtype = _dtype(fqn, state.get("properties"))
    require(prod(size) * ITEM_BYTES[dtype] <= MAX_INT, f"{fqn} has shape {list(size)}")
    return StockTensor(dtype, size, tuple(_chunk(fqn, size, chunk) for chunk in state["chunks"]))


def _dtype(fqn: str, properties: object) -> str:
    state = properties.state if isinstance(properties, Record) and properties.name == "TensorProperties" else None
    if not isinstance(state, tuple) or len(state) < 2:  # noqa: PLR2004 - later ones differ by torch, and are not used
        raise Fault(f"{fqn} has no properties")
    dtype, layout = state[:2]
    if layout != "torch.strided":
        raise _Unread(f"{fqn} with the layout {layout!r:.80}; only strided tensors can be loaded")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise Fault(f"{fqn} has no dtype")
    return dtype


def _chunk(fqn: str, size: Shape, chunk: object) -> Box:
    state = _fields(chunk, "ChunkStorageMetadata")
    box = Box(_shape(state.get("offsets"), fqn), _shape(state.get("sizes"), fqn))
    require(contains(size, box), f"{fqn} has a part outside its shape {list(size)}")
    return box


def _shape(value: object, fqn: str) -> Shape:
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMS or not all(map(_is_count, value)):
        raise Fault(f"{fqn} has an invalid shape or offset")
    return tuple(value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_INT


def _stored(index: object, info: object) -> tuple[StorageKey, StockItem]:
    key = _fields(index, "MetadataIndex")
    fqn, offset = key.get("fqn"), key.get("offset")
    if not isinstance(fqn, str):
        raise Fault("a stored item has no name")
    return (fqn, None if offset is None else _shape(offset, fqn)), _item(fqn, _fields(info, "_StorageInfo"))


def _item(fqn: str, state: dict[str, Any]) -> StockItem:
    name, offset, length = (state.get(key) for key in ("relative_path", "offset", "length"))
    transforms = state.get("transform_descriptors") or ()
    if not isinstance(name, str) or not _is_count(offset) or not _is_count(length):
        raise Fault(f"{fqn} does not say where it is stored")
    if "/" in name and all(map(is_safe, name.split("/"))):
        raise _Unread(f"the object {name!r:.80} in a subfolder (a prefix strategy); only flat names are read")
    require(is_safe(name), f"object name {name!r:.80} leaves the checkpoint")
    require(isinstance(transforms, (tuple, list)) and len(transforms) <= _MAX_TRANSFORMS, f"{fqn} has no transforms")
    require(all(isinstance(one, str) for one in transforms), f"{fqn} has a transform without a name")
    return StockItem(ObjectName(name), offset or 0, length or 0, tuple(transforms))


def _paths(value: object, pickle_bytes: int) -> dict[str, tuple[str | int, ...]] | None:
    if value is None:
        return None
    paths = _dict(value, "planner_data")
    steps_left = pickle_bytes
    for fqn, path in paths.items():
        require(isinstance(fqn, str) and isinstance(path, tuple) and bool(path), "planner_data has an invalid path")
        steps_left -= len(path)
        require(steps_left >= 0, "planner_data has more steps than fit in the manifest")
        require(all(map(_is_step, path)), "planner_data has an invalid path")
    require(list_slots(paths.values()) <= pickle_bytes, "planner_data implies lists too long for the checkpoint")
    return paths


def _is_step(step: object) -> bool:
    return isinstance(step, str) or _is_count(step)


def _keys(manifest: StockManifest) -> Iterator[StorageKey]:
    for fqn, tensor in manifest.tensors.items():
        yield from ((fqn, chunk.offsets) for chunk in tensor.chunks)
    yield from ((fqn, None) for fqn in manifest.bytes)


def _check_complete(manifest: StockManifest) -> None:
    for fqn, offset in _keys(manifest):
        at = "" if offset is None else f" at {list(offset)}"
        require((fqn, offset) in manifest.storage, f"it does not say where {fqn}{at} is stored")
