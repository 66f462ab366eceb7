"""The context of a pipeline."""

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
        """Report a transfer of this many bytes, as in memory, to the observer until the `with` block ends."""
        return observed(self.observer, operation, self.store.url, raw_bytes)
