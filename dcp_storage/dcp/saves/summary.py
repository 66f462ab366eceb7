"""What the log says of a save that is done."""

import logging
import time

from dcp_storage.dcp.saves.save import Save
from dcp_storage.format.manifest import Manifest
from dcp_storage.words import counted, transfer_text

logger = logging.getLogger(__name__)


def log_saved(save: Save, manifest: Manifest) -> None:
    """Log one line of a save: where, how much, how fast, and how long training waited."""
    if not logger.isEnabledFor(logging.INFO):
        return
    raw_bytes = sum(entry.size for entry in manifest.bytes.values())
    raw_bytes += sum(tensor.chunk_bytes(chunk) for tensor in manifest.tensors.values() for chunk in tensor.chunks)
    stored_bytes = sum(stored.size for stored in manifest.objects)
    moved = transfer_text(raw_bytes, stored_bytes, time.monotonic() - save.begun)
    waited = "" if save.blocked_s is None else f"; training waited {save.blocked_s:.2f} s"
    logger.info("saved %s from %s: %s%s", save.url, counted(manifest.world_size, "rank"), moved, waited)
