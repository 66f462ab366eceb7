"""Checks committed steps: each rank checks what it wrote, and tells the others when they next communicate."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Literal

from dcp_storage.checkpoint.manifests import read_manifest
from dcp_storage.errors import CheckpointNotFound, ManifestCorrupt, ObjectNotFound, StoreError, UnsupportedFormat
from dcp_storage.format.contents import Contents
from dcp_storage.format.manifest.manifest import Manifest
from dcp_storage.format.names import ObjectName
from dcp_storage.transfer.check import check_runs, runs_of
from dcp_storage.transfer.context import Context
from dcp_storage.transfer.workers import for_each

logger = logging.getLogger(__name__)

How = Literal["sizes", "full"]


class Verdict(Enum):
    """The result of checking a step."""

    SOUND = "sound"
    DAMAGED = "damaged"
    UNCHECKED = "unchecked"


class Verdicts:
    """The verdicts of this rank, and those of all ranks together.

    Attributes:
        pending: Committed steps on which not all ranks have reported yet.
        unchecked: Steps that a rank could not check, or skipped because the next one was already there.
        damaged: Steps that a rank found damaged.
    """

    def __init__(self) -> None:
        self.pending: set[int] = set()
        self.unchecked: set[int] = set()
        self.damaged: set[int] = set()
        self._own: dict[int, Verdict] = {}

    def expect(self, step: int) -> None:
        """Record that a step was committed."""
        self.unchecked.discard(step)
        self.damaged.discard(step)
        self._own.pop(step, None)
        self.pending.add(step)

    def note(self, step: int, verdict: Verdict) -> None:
        """Record the verdict of this rank's check."""
        self._own[step] = verdict

    def told(self) -> dict[int, Verdict]:
        """Return the verdicts to send to the other ranks."""
        return dict(self._own)

    def settle(self, told: Sequence[Mapping[int, Verdict]]) -> None:
        """Merge the verdicts of all ranks, with the same result on each."""
        for step in set(told[0]).intersection(*told):
            verdicts = {each[step] for each in told}
            self._own.pop(step, None)
            self.pending.discard(step)
            if Verdict.DAMAGED in verdicts:
                self.damaged.add(step)
            elif Verdict.UNCHECKED in verdicts:
                self.unchecked.add(step)


async def check_own(context: Context, rank: int, how: How) -> Verdict | None:
    """Check the objects that a rank wrote of the checkpoint in a store, and log faults; `None` if it was replaced."""
    store = context.store
    try:
        manifest = await read_manifest(store)
        faults = await _faults(context, manifest, rank, how)
        if faults and (await read_manifest(store)).identity != manifest.identity:
            return None
    except (CheckpointNotFound, ManifestCorrupt, UnsupportedFormat) as error:
        faults = [str(error)]
    except StoreError as error:
        logger.warning("%s could not be checked after its save: %s", store.url, error)
        return Verdict.UNCHECKED
    if faults:
        logger.error("%s is damaged, though its save was reported done: %s", store.url, "; ".join(faults[:5]))
        return Verdict.DAMAGED
    return Verdict.SOUND


async def _faults(context: Context, manifest: Contents, rank: int, how: How) -> list[str]:
    store = context.store
    if not isinstance(manifest, Manifest):
        return [f"{store.url} is a stock checkpoint: something else wrote there"]
    own = {number: stored for number, stored in enumerate(manifest.objects) if _writer_of(stored.name) == rank}
    faults: list[str] = []

    async def compare(number: int) -> None:
        stored = own[number]
        try:
            size = await store.size(stored.name)
        except ObjectNotFound:
            faults.append(f"{stored.name} is missing")
            return
        if size != stored.size:
            faults.append(f"{stored.name} has {size} bytes, but {stored.size} were written")

    await for_each(context.transfer.concurrency, own, compare)
    if how == "full" and not faults:
        faults += await _block_faults(context, manifest, set(own))
    return faults


async def _block_faults(context: Context, manifest: Manifest, own: set[int]) -> list[str]:
    sizes = [stored.size for stored in manifest.objects]
    items, names = list(manifest.checked_items()), manifest.object_names
    runs = [run for run in runs_of(items, manifest.codec, sizes) if run.object in own]
    threads = max(1, context.transfer.resolve_threads() - 1)  # leave a core to training
    beside_training = replace(context, transfer=replace(context.transfer, threads=threads))
    faults = await check_runs(beside_training, runs, names, manifest.codec, manifest.digest)
    return [f"{names[fault.run.object]} has a damaged block at {fault.run.start}" for fault in faults]


def _writer_of(name: ObjectName) -> int:
    """Return the rank in the name of a data object."""
    return int(name.split("-")[1])
