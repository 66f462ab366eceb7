"""`prune` removes what interrupted saves left in a checkpoint's directory. Does not import torch."""

from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any

from dcp_storage.checkpoint.place import Location
from dcp_storage.checkpoint.pruning import A_DAY, Pruning, prune_store
from dcp_storage.config import require_type
from dcp_storage.errors import ConfigError
from dcp_storage.store.urls import Address

__all__ = ["A_DAY", "Pruning", "prune"]


def prune(
    path: Address | Location,
    *,
    older_than: timedelta = A_DAY,
    storage_options: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> Pruning:
    """Remove objects of this package that no manifest names, and temporary files of interrupted commits.

    ```python
    print(prune("s3://bucket/run/step-100", dry_run=True).removed)
    ```

    A save's objects are removed only if its last write is at least `older_than` ago, by the store's timestamps and the
    local clock: no manifest names the objects of a running save either. Objects that the manifest names are never
    removed, nor are foreign files. If nothing was committed, what an interrupted first save left is removed too.

    Raises:
        CheckpointNotFound: There is neither a checkpoint nor anything that a save left.
        ManifestCorrupt: The manifest is damaged, so it is unknown what may be removed. Nothing was removed.
        UnsupportedFormat: The manifest has a newer format, or is a pickle that names globals no stock checkpoint uses.
        StoreError: The store failed, or does not report when objects were written.
        ConfigError: An argument is invalid.
    """
    require_type("older_than", older_than, timedelta)
    if older_than < timedelta(0):
        raise ConfigError(f"older_than is {older_than}; it must not be negative")
    how = partial(prune_store, older_than=older_than, dry_run=dry_run)
    return Location.of(path, storage_options).run(how)
