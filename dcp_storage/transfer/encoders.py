"""Where a save encodes: in threads or, beside training, in processes of its own."""

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
"""Less is encoded before a process has started."""

PROCESS_UNIT_BYTES = 16 * MIB
"""Raw bytes that a process encodes at a time. Each time takes Python's lock from training more than once."""


class Encoder(Protocol):
    """What encodes for one thread."""

    def encode_items(self, items: Sequence[tuple[Raw, int]], out: memoryview) -> list[Encoded]:
        """Encode slices of items, each with its number of byte planes, one behind the other into `out`."""


def is_worth_a_process(nbytes: int) -> bool:
    """Tell whether so many bytes are worth a process. The memory that it shares is Linux's."""
    return nbytes >= _LEAST_BYTES and sys.platform == "linux"


@contextmanager
def encoder_in_thread(codec: Codec) -> Iterator[Encoder]:
    """Lend an encoder that works in the calling thread."""
    yield ItemEncoder(codec)


@contextmanager
def encoder_in_process(codec: Codec) -> Iterator[Encoder]:
    """Lend an encoder that works in a process, which ends with the `with` block, and leaves Python's lock to training.

    Where no process can be had, or it dies, the calling thread encodes, and a warning says so: the bytes are the same.
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
    """Say so once: what is so for one thread is so for all of them and in every save."""
    logger.warning("no process to encode in (%s): a thread encodes, which slows training down", reason)
