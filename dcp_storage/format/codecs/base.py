"""What a codec of blocks is. Coders hold memory and contexts: one for each thread, never shared."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from dcp_storage.config import Codec
from dcp_storage.raw import Raw


class BlockEncoder(Protocol):
    """Encodes blocks for one thread. Its hot calls release the GIL."""

    def encode(self, block: memoryview, planes: int, out: memoryview, *, first: bool) -> tuple[int, str]:
        """Write a block, laid out in so many byte planes, to the beginning of `out`; return its size and check value.

        `out` has room for `BlockCodec.limit`. `first` says that no earlier block is of the same item.
        """


class BlockDecoder(Protocol):
    """Decodes blocks for one thread. Its hot calls release the GIL."""

    def decode(self, stored: Raw, check: str, planes: int, out: memoryview) -> None:
        """Decode a block into `out`, whose length is the block's raw size; never allocate more than that.

        Raises:
            BlockCorrupt: The bytes are not the block that `check` was taken of. `out` may be partly written.
        """


class BlockCodec(ABC):
    """How blocks are stored.

    Attributes:
        suffix: Of the names of data objects.
        check_chars: Hexadecimal characters of one block's check value.
        verbatim: Whether a block is stored as its raw bytes, so that it may be read to where it belongs.
    """

    suffix: ClassVar[str]
    check_chars: ClassVar[int]
    verbatim: ClassVar[bool] = False

    def planes(self, itemsize: int) -> int:  # noqa: ARG002 - where planes are laid
        """Return how many byte planes elements of `itemsize` bytes are laid out in, if any are; 1 is none."""
        return 1

    @abstractmethod
    def limit(self, raw_bytes: int, blocks: int = 1) -> int:
        """Return the most bytes that so many blocks, of `raw_bytes` together, may be stored in."""

    @abstractmethod
    def fits(self, lengths: Any, raw_bytes: Any) -> Any:
        """Return which blocks, of these raw sizes, may be stored in these lengths: arrays, a row for each block."""

    @abstractmethod
    def make_encoder(self, codec: Codec) -> BlockEncoder:
        """Return an encoder for one thread."""

    @abstractmethod
    def make_decoder(self, block_bytes: int) -> BlockDecoder:
        """Return a decoder for one thread."""
