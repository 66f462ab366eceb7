"""The contents of a checkpoint, whatever wrote it: the one interface through which it is read."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from dcp_storage.format.manifest.boxes import Boxes
from dcp_storage.format.manifest.frames import StoredCodec
from dcp_storage.format.manifest.schema import Segment
from dcp_storage.format.names import ObjectName

METADATA_VERSION = "1.0.0"
"""The version that DCP's own writers give `Metadata` with these naming conventions of entries."""


class TensorContents(Protocol):
    """A tensor: its dtype (torch's name) and the boxes of it that are stored."""

    @property
    def dtype(self) -> str:
        """Torch's name of the dtype."""

    @property
    def boxes(self) -> Boxes:
        """The stored boxes; they tile the tensor, unless the checkpoint is one rank's part."""


class HeldObject(NamedTuple):
    """A data object as a manifest describes it.

    Attributes:
        size: Size in bytes; a lower bound unless `exact`.
        fqns: The entries stored in it.
    """

    name: ObjectName
    size: int
    exact: bool
    fqns: tuple[str, ...]


class CheckedItem(NamedTuple):
    """An item whose blocks can be checked: its name, raw size, byte planes, segments and their digests."""

    fqn: str
    raw_bytes: int
    planes: int
    segments: Sequence[Segment]
    digests: Sequence[str]


class Contents(Protocol):
    """The contents of a checkpoint: `Manifest` for this package's, `StockManifest` for those of DCP's own writers.

    Code that reads, verifies or prunes a checkpoint uses nothing else; `dcp.loads` turns the bytes into tensors.
    """

    @property
    def stock(self) -> bool:
        """Whether DCP's own writers wrote it."""

    @property
    def identity(self) -> str:
        """Unique to this checkpoint."""

    @property
    def save_id(self) -> str | None:
        """Unique to its save, if known."""

    @property
    def version(self) -> str | None:
        """The version of DCP's naming conventions; `None` if it was written before there were versions."""

    @property
    def info(self) -> Mapping[str, Any]:
        """The `info` that the caller of the save gave."""

    @property
    def part(self) -> tuple[int, int] | None:
        """The rank and the world size, if it is the part of one rank that saved it alone."""

    @property
    def attempt(self) -> str | None:
        """The id that the parts of its save share, if each rank committed its own."""

    @property
    def tensors(self) -> Mapping[str, TensorContents]:
        """Its tensors, by fully qualified name."""

    @property
    def bytes(self) -> Collection[str]:
        """The names of its entries that are not tensors."""

    @property
    def planner_data(self) -> Mapping[str, tuple[str | int, ...]] | None:
        """The path of each name in the nested state dict, or `None` if the planner did not flatten."""

    @property
    def codec(self) -> StoredCodec | None:
        """How its blocks are encoded, or `None` if it has no blocks."""

    @property
    def digest(self) -> str | None:
        """The algorithm of its digests, if it has any."""

    @property
    def proof(self) -> str | None:
        """The digest that covers the whole checkpoint, if there is one."""

    @property
    def object_names(self) -> Sequence[ObjectName]:
        """The names of its data objects, by number."""

    def check_whole(self) -> None:
        """Decode and check everything.

        Raises:
            ManifestCorrupt: Something in it is invalid.
        """

    def check_names(self) -> None:
        """Decode and check the names of all tensors and entries.

        Raises:
            ManifestCorrupt: They are invalid.
        """

    def objects_held(self) -> list[HeldObject]:
        """Return its data objects and the entries stored in each."""

    def checked_items(self) -> Iterator[CheckedItem]:
        """Yield the items whose blocks have check values."""

    def deletable(self) -> list[ObjectName]:
        """Return its objects that its writer may have named: a manifest must not get a foreign file deleted."""
