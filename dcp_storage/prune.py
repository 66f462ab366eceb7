"""`prune` removes what dead saves left in a checkpoint's directory. No torch."""

from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any

from dcp_storage.checkpoint.place import Location
from dcp_storage.checkpoint.pruning import A_DAY, Pruning, prune_store
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
    """Remove the objects of this package that no manifest names, and temporary files of commits that died.

    ```python
    print(prune("s3://bucket/run/step-100", dry_run=True).removed)
    ```

    A save's objects are removed only if its last write is at least `older_than` ago, by the store's times and this
    machine's clock: no manifest names the objects of a save under way either. What the manifest names is never removed,
    and no foreign file is. Where nothing was committed, what a dead first save left is removed too.

    Raises:
        CheckpointNotFound: Nothing of this package is there: neither a checkpoint nor what a save left.
        ManifestCorrupt: The manifest is damaged, so that nothing says what may be removed. Nothing was.
        UnsupportedFormat: It is of a later format, or a pickle that names what no stock checkpoint does.
        StoreError: The store failed, or does not tell when objects were written.
        ConfigError: An argument is impossible.
    """
    if older_than < timedelta(0):
        raise ConfigError(f"older_than is {older_than}; it must not be negative")

    how = partial(prune_store, older_than=older_than, dry_run=dry_run)
    return Location.of(path, storage_options).run(how)
