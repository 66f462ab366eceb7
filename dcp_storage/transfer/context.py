"""What a pipeline moves bytes with."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from dcp_storage.config import Transfer
from dcp_storage.observe import Advance, Observer, Operation, observed, silent
from dcp_storage.store.base import Store


@dataclass(frozen=True)
class Context:
    """A call's open store, its limits, and its observer."""

    store: Store
    transfer: Transfer
    observer: Observer = silent

    def observed(self, operation: Operation, raw_bytes: int) -> AbstractContextManager[Advance]:
        """Tell the observer of a transfer that moves so many bytes in memory, for the length of the block."""
        return observed(self.observer, operation, self.store.url, raw_bytes)
