"""`verify` reads and checks every block of a checkpoint without loading it. Does not import torch."""

import re
from collections.abc import Mapping
from typing import Any

from dcp_storage.checkpoint.place import Location
from dcp_storage.checkpoint.verification import Damage, Verification, verify_store
from dcp_storage.config import Transfer, require_type
from dcp_storage.errors import ConfigError
from dcp_storage.observe import Observer
from dcp_storage.progress import choose_observer
from dcp_storage.store.urls import Address
from dcp_storage.transfer.context import Context

__all__ = ["Damage", "Verification", "verify"]


def verify(
    path: Address | Location,
    *,
    storage_options: Mapping[str, Any] | None = None,
    transfer: Transfer = Transfer(),
    observer: Observer | None = None,
    expect: str | None = None,
) -> Verification:
    """Read and check every block of a checkpoint, and find everything that is damaged, missing or left over.

    ```python
    found = verify("s3://bucket/run/step-100")
    print(found.sound, found.damage)
    ```

    With `expect`, the `sha256` that an earlier `verify` reported, the checkpoint has to be that same one, without a
    single bit changed. It must have been saved with `Codec(digest="sha256")`.

    Memory in flight is at most `transfer.concurrency` reads, of 16 MiB each or less, plus one block per thread.

    Raises:
        CheckpointNotFound: There is no checkpoint at this path.
        ManifestCorrupt: Its manifest is damaged, so it is unknown what the checkpoint should contain.
        UnsupportedFormat: The manifest has a newer format, or is a pickle that names globals no stock checkpoint uses.
        StoreError: It could not be read, or another save replaced it meanwhile.
        ConfigError: The path or the options are invalid; `expect` is not a SHA-256, or the checkpoint has none.
    """
    if expect is not None and not re.fullmatch("[0-9a-fA-F]{64}", expect):
        raise ConfigError(f"expect is {expect!r:.80}, which is not a SHA-256: 64 hexadecimal digits")
    require_type("transfer", transfer, Transfer)
    observer = choose_observer(observer, progress=False)
    return Location.of(path, storage_options).run(
        lambda store: verify_store(Context(store, transfer, observer), expect)
    )
