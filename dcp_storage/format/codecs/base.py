"""The interface of a block codec. Encoders and decoders hold memory and contexts: one per thread, never shared."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from dcp_storage.config import Codec
from dcp_storage.raw import Raw


class BlockEncoder(Protocol):
    """Encodes blocks for one thread. Its hot calls release the GIL."""

    def encode(self, block: memoryview, planes: int, out: memoryview, *, first: bool) -> tuple[int, str]:
        """Write a block, laid out in `planes` byte planes, to the start of `out`; return its size and check value.

        `out` has room for `BlockCodec.limit`. `first` marks the first block of an item.
        """


class BlockDecoder(Protocol):
    """Decodes blocks for one thread. Its hot calls release the GIL."""

    def decode(self, stored: Raw, check: str, planes: int, out: memoryview) -> None:
        """Decode a block into `out`, whose length is the block's raw size; never allocate more than that.

        Raises:
            BlockCorrupt: The bytes are not the block that has this `check` value. `out` may be partly written.
        """


class BlockCodec(ABC):
    """How blocks are stored.

    Attributes:
        suffix: Suffix of the names of data objects.
        check_chars: Hexadecimal characters of one block's check value.
        verbatim: Whether a block is stored as its raw bytes, so that it may be read straight into its destination.
    """

    suffix: ClassVar[str]
    check_chars: ClassVar[int]
    verbatim: ClassVar[bool] = False

    def planes(self, itemsize: int) -> int:  # noqa: ARG002 - used by subclasses
        """Return the number of byte planes for elements of `itemsize` bytes; 1 for none."""
        return 1

    @abstractmethod
    def limit(self, raw_bytes: int, blocks: int = 1) -> int:
        """Return the maximum stored size of `blocks` blocks with `raw_bytes` in total."""

    @abstractmethod
    def fits(self, lengths: Any, raw_bytes: Any) -> Any:
        """Return which blocks of these raw sizes may have these stored lengths: arrays with a row for each block."""

    @abstractmethod
    def make_encoder(self, codec: Codec) -> BlockEncoder:
        """Return an encoder for one thread."""

    @abstractmethod
    def make_decoder(self, block_bytes: int) -> BlockDecoder:
        """Return a decoder for one thread."""
