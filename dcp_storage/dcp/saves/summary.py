"""The log message of a completed save."""

import logging
import time
from collections.abc import Sequence
from statistics import median

from rich.filesize import decimal

from dcp_storage.dcp.saves.results import Results
from dcp_storage.dcp.saves.save import Save
from dcp_storage.format.manifest.draft import Draft
from dcp_storage.words import counted, transfer_text

logger = logging.getLogger(__name__)


_MUCH_LONGER, _MUCH_LONGER_S = 2, 1.0
"""A rank is reported if it took this many times as long as the median rank, and this many seconds longer."""


def log_saved(save: Save, draft: Draft, results: Sequence[Results]) -> None:
    """Log where a save went, how much, how fast, and how long training waited; and which rank was slow, if one was."""
    if not logger.isEnabledFor(logging.INFO):
        return
    stored_bytes = sum(stored.size for stored in draft.objects)
    moved = transfer_text(draft.raw_bytes, stored_bytes, time.monotonic() - save.begun)
    waited = "" if save.blocked_s is None else f"; training waited {save.blocked_s:.2f} s"
    logger.info("saved %s from %s: %s%s", save.url, counted(draft.world_size, "rank"), moved, waited)
    if slow := slowest(results):
        logger.info("%s: %s", save.url, slow)


def slowest(results: Sequence[Results]) -> str | None:
    """Return a line about the rank whose data took much longer to put than that of the others, if any."""
    spent = [(told.seconds, rank) for rank, told in enumerate(results)]
    seconds, rank = max(spent)
    usual = median(each for each, _ in spent)
    if seconds < _MUCH_LONGER * usual or seconds < usual + _MUCH_LONGER_S:
        return None
    nbytes = [told.nbytes for told in results]
    return (
        f"rank {rank} wrote its {decimal(nbytes[rank])} in {seconds:.1f} s, while half of the ranks took at most "
        f"{usual:.1f} s for {decimal(int(median(nbytes)))}"
    )
