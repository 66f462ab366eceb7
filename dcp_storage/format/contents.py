"""What a checkpoint holds, whatever wrote it: the one interface through which it is read."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from dcp_storage.format.manifest.boxes import Boxes
from dcp_storage.format.manifest.frames import StoredCodec
from dcp_storage.format.manifest.schema import Segment

METADATA_VERSION = "1.0.0"
"""What DCP's own writers call the version of `Metadata` by whose conventions checkpoints name their entries."""


class TensorContents(Protocol):
    """A tensor: its dtype (torch's name) and the boxes of it that are stored."""

    @property
    def dtype(self) -> str:
        """Torch's name of it."""

    @property
    def boxes(self) -> Boxes:
        """They tile it, unless the checkpoint is one rank's part."""


class HeldObject(NamedTuple):
    """A data object as a manifest describes it.

    Attributes:
        size: In bytes; at least, unless `exact`.
        fqns: The entries that lie in it.
    """

    name: str
    size: int
    exact: bool
    fqns: tuple[str, ...]


class CheckedItem(NamedTuple):
    """An item whose blocks can be checked: its name, raw size, byte planes, segments, and the digests of these."""

    fqn: str
    raw_bytes: int
    planes: int
    segments: Sequence[Segment]
    digests: Sequence[str]


class Contents(Protocol):
    """What a checkpoint holds. `Manifest` is this package's, `StockManifest` that of DCP's own writers.

    Whoever reads, verifies or prunes a checkpoint knows no more of it; how its bytes become tensors is `dcp.loads`.
    """

    @property
    def stock(self) -> bool:
        """Whether DCP's own writers made it."""

    @property
    def identity(self) -> str:
        """Unique to it."""

    @property
    def save_id(self) -> str | None:
        """Unique to its save, if it is known."""

    @property
    def version(self) -> str | None:
        """What DCP calls the version of its names; `None` before it had versions."""

    @property
    def info(self) -> Mapping[str, Any]:
        """What the caller said of the save."""

    @property
    def part(self) -> tuple[int, int] | None:
        """The rank whose part it is, and of how many, where one rank saved it alone."""

    @property
    def attempt(self) -> str | None:
        """What the parts of its save share, where ranks committed by themselves."""

    @property
    def tensors(self) -> Mapping[str, TensorContents]:
        """Its tensors, by fully qualified name."""

    @property
    def bytes(self) -> Collection[str]:
        """The names of its entries that are not tensors."""

    @property
    def planner_data(self) -> Mapping[str, tuple[str | int, ...]] | None:
        """For each name its path in the nested state dict, or `None` where the planner did not flatten."""

    @property
    def codec(self) -> StoredCodec | None:
        """How its blocks are encoded, or `None` where it has none."""

    @property
    def digest(self) -> str | None:
        """The algorithm of its digests, if it has any."""

    @property
    def proof(self) -> str | None:
        """The number that proves all of it, if there is one."""

    @property
    def object_names(self) -> Sequence[str]:
        """The names of its data objects, by their numbers."""

    def check_whole(self) -> None:
        """Decode and check all of it.

        Raises:
            ManifestCorrupt: Something in it cannot be.
        """

    def check_names(self) -> None:
        """Decode and check the names of all tensors and entries.

        Raises:
            ManifestCorrupt: They cannot be.
        """

    def objects_held(self) -> list[HeldObject]:
        """Return its data objects and what lies in each."""

    def checked_items(self) -> Iterator[CheckedItem]:
        """Yield the items whose blocks carry checks."""

    def deletable(self) -> list[str]:
        """Return those of its objects that are of its writer's form: a manifest must not name somebody else's file."""
