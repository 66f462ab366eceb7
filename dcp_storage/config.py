"""User settings: the codec of new checkpoints, and how bytes move."""

import os
from dataclasses import dataclass
from typing import Literal

from dcp_storage.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Codec:
    """How tensors are encoded on disk. Readers do not need it: the manifest describes each block.

    ```python
    writer = AsyncStorageWriter("s3://bucket/run/step-100", codec=Codec(digest="sha256"))
    ```

    Attributes:
        compression: `"zstd"` (one standard zstd frame per block) or `"none"` (raw bytes).
        level: zstd level, 1 to 22. Level 1 skips the match search in floating-point planes, which finds nothing in
            weights; higher levels do search, cost much more and gain little.
        byte_planes: Store elements of 2, 4 or 8 bytes plane by plane, so that exponents compress apart from mantissas.
        block_bytes: Raw bytes per block, 4 KiB to 64 MiB, a multiple of 16. A block is the smallest unit of reading.
        digest: Digests of raw bytes to keep in the manifest, which show whether two checkpoints have equal contents:
            `"xxh3_128"`; `"sha256"`, with which `verify(expect=...)` checks a whole checkpoint against one digest, but
            which slows saves down; or `None`.

    Raises:
        ConfigError: A value is out of its range.
    """

    compression: Literal["zstd", "none"] = "zstd"
    level: int = 1
    byte_planes: bool = True
    block_bytes: int = MIB
    digest: Literal["xxh3_128", "sha256"] | None = "xxh3_128"

    def __post_init__(self) -> None:
        if self.compression not in {"zstd", "none"}:
            raise ConfigError(f'Codec.compression is {self.compression!r}; choose "zstd" or "none"')
        if self.digest not in {"xxh3_128", "sha256", None}:
            raise ConfigError(f'Codec.digest is {self.digest!r}; choose "xxh3_128", "sha256" or None')
        require_type("Codec.byte_planes", self.byte_planes, bool)
        _check_range("Codec.level", self.level, 1, 22)
        _check_range("Codec.block_bytes", self.block_bytes, 4 * KIB, 64 * MIB)
        if self.block_bytes % 16:
            raise ConfigError(f"Codec.block_bytes is {self.block_bytes}; it must be a multiple of 16")


@dataclass(frozen=True)
class Transfer:
    """How bytes move between memory and the store.

    Memory in flight is at most about `2 * concurrency * object_bytes` on an object store (an object is buffered before
    it is put; 16 MiB each unless `object_bytes` is less), and 8 MiB for each of `concurrency` files on local disk.
    During training it is 16 MiB per file, plus about 80 MiB for each process that encodes.

    ```python
    reader = AsyncStorageReader("s3://bucket/run/step-100", transfer=Transfer(concurrency=32))  # a far store
    ```

    Attributes:
        object_bytes: Maximum raw bytes in a data object and in a single read, 1 MiB to 1 GiB; a store that prefers
            smaller requests uses less. An item may span several objects and an object may hold many items.
        concurrency: Objects or ranges in flight at once on this rank, 1 to 256.
        threads: Threads (during training: processes) that encode and decode on this rank, or `None` for the number of
            cores available to this rank divided by `LOCAL_WORLD_SIZE`, at least 1. Items that average less than 32 KiB
            get one: more would gain nothing.
        keep_staging: Whether to keep the memory that `dcp.async_save` copied a state to for the next save, which then
            need not wait for new pages. `False` frees it when the save ends.
        max_gap_bytes: Two wanted ranges of one object that are at most this far apart are read in one request.

    Raises:
        ConfigError: A value is out of its range.
    """

    object_bytes: int = 64 * MIB
    concurrency: int = 8
    threads: int | None = None
    max_gap_bytes: int = MIB
    keep_staging: bool = True

    def __post_init__(self) -> None:
        require_type("Transfer.keep_staging", self.keep_staging, bool)
        _check_range("Transfer.object_bytes", self.object_bytes, MIB, GIB)
        _check_range("Transfer.concurrency", self.concurrency, 1, 256)
        _check_range("Transfer.max_gap_bytes", self.max_gap_bytes, 0, GIB)
        if self.threads is not None:
            _check_range("Transfer.threads", self.threads, 1, 1024)

    def resolve_threads(self) -> int:
        """Return the number of codec threads for this process, at least 1."""
        if self.threads is not None:
            return self.threads
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return max(1, cores // max(1, ranks_here))


def require_type(name: str, value: object, kind: type) -> None:
    """Refuse an argument of another type now, not when it is first used.

    Raises:
        ConfigError: It has another type.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r:.80}; pass a {kind.__name__}")


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be an int")
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}; it must be from {low} to {high}")
