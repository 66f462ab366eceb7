"""Decodes one item of a stock checkpoint to a tensor: bounded, checked, and without running any code in it."""

import io
import pickle
from math import prod
from typing import NamedTuple

import torch
import zstandard
from torch import Tensor

from dcp_storage.config import KIB, MIB
from dcp_storage.errors import BlockCorrupt, ManifestCorrupt, UnsupportedFormat
from dcp_storage.format.container import read_container
from dcp_storage.format.stock.manifest import StockItem
from dcp_storage.geometry import Shape

_CONTAINER_BYTES = 64 * KIB
"""The most that `torch.save` may add to a tensor's bytes; about 1.5 KiB with its usual alignment."""
_MAX_WINDOW_BYTES = 128 * MIB
_MAX_RECORDS = 64


class StoredKind(NamedTuple):
    """The expected dtype and shape of a stored tensor; chunks with the same offset (empty ones) share an item."""

    dtype: torch.dtype
    shapes: tuple[Shape, ...]


class Item(NamedTuple):
    """A stored item and its name in messages; `kind` is `None` for an object that is not a tensor."""

    fqn: str
    url: str
    stored: StockItem
    kind: StoredKind | None

    @property
    def place(self) -> str:
        """Where the item is stored, for messages."""
        return f"{self.url}/{self.stored.object_name} at {self.stored.offset}"

    @property
    def raw_bytes(self) -> int:
        """The size of the tensor in bytes; for an object that is not a tensor, its stored size."""
        if self.kind is None:
            return self.stored.length
        return self.kind.dtype.itemsize * max(map(prod, self.kind.shapes))

    @property
    def limit(self) -> int:
        """The most bytes that the item may have, stored or decoded (zstd adds less than 1 in 128)."""
        if self.kind is None:
            return max(64 * MIB, 256 * self.stored.length)
        most = _CONTAINER_BYTES + self.raw_bytes
        return most + most // 128

    def damaged(self, says: str) -> BlockCorrupt:
        """Return an error about this item."""
        return BlockCorrupt(
            f"{self.place}: {self.fqn} is damaged: {says}. Restore this object from a copy, or load another checkpoint",
            url=self.url,
            object_name=self.stored.object_name,
            offset=self.stored.offset,
            fqn=self.fqn,
        )


def check_item(item: Item) -> None:
    """Refuse an item that cannot be read, before anything is read.

    Raises:
        UnsupportedFormat: It went through a transform other than DCP's ZStandard, version 1.
        ManifestCorrupt: It is longer than its tensor can be.
    """
    for transform in item.stored.transforms:
        name, _, version = transform.partition("/")
        if name != "stream.zstd" or version.partition(".")[0] != "1":
            raise UnsupportedFormat(
                f"{item.place}: {item.fqn} was written through the extension {transform!r:.80}; "
                'only "stream.zstd/1" can be read. Load it with DCP\'s own reader',
                fqn=item.fqn,
            )
    if item.stored.length > item.limit:
        raise ManifestCorrupt(f"{item.place}: {item.fqn} cannot be {item.stored.length} bytes long", fqn=item.fqn)


def make_decompressor() -> zstandard.ZstdDecompressor:
    """Return a decompressor for one thread."""
    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)


def undo_transforms(item: Item, data: bytes, decompressor: zstandard.ZstdDecompressor) -> bytes:
    """Return the bytes that `torch.save` wrote.

    Raises:
        BlockCorrupt: They are damaged, or larger than the item may be.
    """
    for _ in item.stored.transforms:
        try:
            data = decompressor.stream_reader(data, read_across_frames=True).read(item.limit + 1)
        except zstandard.ZstdError as error:
            raise item.damaged(str(error)) from error
        if len(data) > item.limit:
            raise item.damaged(f"it decompresses to more than {item.limit} bytes")
    return data


def load_tensor(item: Item, kind: StoredKind, data: bytes) -> Tensor:
    """Return the tensor in a `torch.save` container, after checking that it is the one that the manifest describes.

    Raises:
        BlockCorrupt: It is damaged, or not that tensor.
        UnsupportedFormat: It is an object of another type, such as a quantized tensor.
    """
    storage_bytes = _storage_bytes(item, data)
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _no_plain_tensor(item, data) or item.damaged(f"torch.load cannot read it: {error!s:.200}") from error
    except Exception as error:  # torch.load raises various types for damaged bytes
        raise item.damaged(f"torch.load cannot read it: {str(error).partition(chr(10))[0]:.200}") from error
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise item.damaged("it is not a plain tensor")
    if tensor.dtype != kind.dtype or tuple(tensor.shape) not in kind.shapes:
        shapes = " or ".join(str(list(shape)) for shape in kind.shapes)
        held, wanted = f"{tensor.dtype} of shape {list(tensor.shape)}", f"{kind.dtype} of shape {shapes}"
        raise item.damaged(f"it holds a {held}, but the manifest says {wanted}")
    if tensor.untyped_storage().nbytes() > storage_bytes:
        raise item.damaged("its tensor extends beyond the stored bytes")
    return tensor


def _no_plain_tensor(item: Item, data: bytes) -> UnsupportedFormat | None:
    """Return an error that names the types of a tensor that is not stored as a plain one, if they can be found."""
    try:
        types = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception:  # noqa: BLE001 - the types in a damaged pickle may be unreadable
        return None
    if not types:
        return None
    return UnsupportedFormat(
        f"{item.place}: {item.fqn} was stored as an object of types that are not a plain tensor's "
        f"({', '.join(types):.200}); load it with DCP's own reader if you trust it",
        fqn=item.fqn,
    )


def _storage_bytes(item: Item, data: bytes) -> int:
    """Return the size of the only storage in a container; torch trusts the size in the pickle instead."""
    try:
        storages = list(read_container(data, most_records=_MAX_RECORDS).storages.values())
    except ValueError as error:
        raise item.damaged(str(error)) from error
    if len(storages) != 1:
        fault = item.damaged(f"it holds {len(storages)} storages instead of one")
        raise _no_plain_tensor(item, data) or fault
    return storages[0]
