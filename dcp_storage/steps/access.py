"""Writes and reads the steps below a root, with one DCP writer or reader per step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dcp_storage.checkpoint.place import Location
from dcp_storage.config import Codec, Transfer
from dcp_storage.dcp.reader import AsyncStorageReader
from dcp_storage.dcp.writer import AsyncStorageWriter
from dcp_storage.observe import Observer
from dcp_storage.steps.names import directory_of


@dataclass(frozen=True)
class Access:
    """A root, and how bytes are written and read."""

    root: Location
    codec: Codec
    transfer: Transfer
    observer: Observer

    def writer(self, step: int, info: Mapping[str, Any], *, overwrite: bool) -> AsyncStorageWriter:
        """Return the writer of a step."""
        return AsyncStorageWriter(
            self.root.child(directory_of(step)),
            codec=self.codec,
            transfer=self.transfer,
            overwrite=overwrite,
            info=info,
            observer=self.observer,
        )

    def reader(self, step: int) -> AsyncStorageReader:
        """Return the reader of a step."""
        return AsyncStorageReader(
            self.root.child(directory_of(step)),
            transfer=self.transfer,
            observer=self.observer,
        )
