"""Every global that a stock DCP manifest may name, each with a stand-in that is plain data."""

from dcp_storage.format.dtypes import ITEM_BYTES
from dcp_storage.format.pickles import Refused
from dcp_storage.format.stock.unpickle import Class, Function

_METADATA = "torch.distributed.checkpoint.metadata"
_METADATA_TO_2_2 = "torch.distributed._shard.sharded_tensor.metadata"
"""The module of tensor properties up to torch 2.2."""
_MEMORY_FORMATS = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")


def _size(arguments: tuple[object, ...]) -> object:
    """Return the tuple itself, never a copy: many calls on one long tuple must not cost its length each."""
    match arguments:
        case ():
            return ()
        case (tuple(size),):
            return size
    raise Refused("calls torch.Size with arguments that no stock manifest has")


def _layout(arguments: tuple[object, ...]) -> object:
    match arguments:
        case (str(name),):
            return name
    raise Refused("calls torch.serialization._get_layout with arguments that no stock manifest has")


def _memory_format(arguments: tuple[object, ...]) -> object:
    match arguments:
        case (int(number),) if 0 <= number < len(_MEMORY_FORMATS):
            return _MEMORY_FORMATS[number]
    raise Refused(f"calls {_METADATA}._MEM_FORMAT_ENCODING with arguments that no stock manifest has")


_MEMORY_FORMAT = Function("_MEM_FORMAT_ENCODING", _memory_format)


def _getattr(arguments: tuple[object, ...]) -> object:
    """Support its only use, by Python 3.11.0 to 3.11.4: a member of an enum."""
    match arguments:
        case (owner, str(name)) if owner is _MEMORY_FORMAT and name in _MEMORY_FORMATS:
            return name
    raise Refused("asks for builtins.getattr, on something that no stock manifest has")


def _forget(_arguments: tuple[object, ...]) -> object:
    """Drop a path: where the checkpoint was written does not matter."""
    return None


def _ordered_dict(arguments: tuple[object, ...]) -> object:
    if arguments:
        raise Refused("calls collections.OrderedDict with arguments")
    return {}


_CLASSES = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "MetadataIndex",
    "StorageMeta",
)
_PATH_MODULES = ("pathlib", "pathlib._local")
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")

KNOWN: dict[tuple[str, str], object] = {
    **{(_METADATA, name): Class(name) for name in _CLASSES},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Class("_StorageInfo"),
    (_METADATA_TO_2_2, "TensorProperties"): Class("TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"): _MEMORY_FORMAT,
    (_METADATA_TO_2_2, "MEM_FORMAT_ENCODING"): _MEMORY_FORMAT,
    ("torch", "Size"): Function("torch.Size", _size),
    ("torch.serialization", "_get_layout"): Function("torch.serialization._get_layout", _layout),
    ("builtins", "getattr"): Function("builtins.getattr", _getattr),
    ("collections", "OrderedDict"): Function("collections.OrderedDict", _ordered_dict),
    **{(module, name): Function(f"{module}.{name}", _forget) for module in _PATH_MODULES for name in _PATHS},
    **{("torch", name): name for name in ITEM_BYTES},
}
"""The stand-ins that `read_pickle` uses for `(module, name)`; anything else is refused."""
