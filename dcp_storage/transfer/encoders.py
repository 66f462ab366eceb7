"""Where a save encodes: in threads or, during training, in separate processes."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from typing import Protocol

from dcp_storage.config import MIB, Codec
from dcp_storage.format.codecs.blocks import Encoded, ItemEncoder
from dcp_storage.raw import Raw
from dcp_storage.transfer.encoder_process import EncoderProcess

logger = logging.getLogger(__name__)

_LEAST_BYTES = 64 * MIB
"""A thread encodes less than this before a process has started."""

PROCESS_UNIT_BYTES = 16 * MIB
"""Raw bytes that a process encodes at a time. Each time takes the GIL from training more than once."""


class Encoder(Protocol):
    """An encoder for one thread."""

    def encode_items(self, items: Sequence[tuple[Raw, int]], out: memoryview) -> list[Encoded]:
        """Encode slices of items, each with its number of byte planes, one after another into `out`."""


def is_worth_a_process(nbytes: int) -> bool:
    """Return whether this many bytes are worth a process, whose shared memory needs Linux."""
    return nbytes >= _LEAST_BYTES and sys.platform == "linux"


@contextmanager
def encoder_in_thread(codec: Codec) -> Iterator[Encoder]:
    """Lend an encoder that works in the calling thread."""
    yield ItemEncoder(codec)


@contextmanager
def encoder_in_process(codec: Codec) -> Iterator[Encoder]:
    """Lend an encoder in a separate process, which ends with the `with` block, and leaves the GIL to training.

    If the process cannot be started, or dies, the calling thread encodes to the same bytes, and a warning says so.
    """
    try:
        process = EncoderProcess(codec)
    except OSError as error:
        _warn(str(error))
        yield ItemEncoder(codec)
        return
    with closing(process):
        yield _ProcessEncoder(process, codec)


class _ProcessEncoder:
    def __init__(self, process: EncoderProcess, codec: Codec) -> None:
        self._codec = codec
        self._encoder: Encoder = process

    def encode_items(self, items: Sequence[tuple[Raw, int]], out: memoryview) -> list[Encoded]:
        try:
            return self._encoder.encode_items(items, out)
        except (EOFError, OSError) as error:  # the process died
            _warn(str(error) or "it died")
            self._encoder = ItemEncoder(self._codec)
            return self._encoder.encode_items(items, out)


@cache
def _warn(reason: str) -> None:
    """Warn once: the reason is the same for all threads and saves."""
    logger.warning("cannot encode in a separate process (%s): a thread encodes, which slows training down", reason)
