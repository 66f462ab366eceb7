"""The id that the parts of one save without collectives share, and those of two saves never do."""

import os
from hashlib import sha256

from dcp_storage.dcp.saves.save import Save
from dcp_storage.dcp.undocumented import first_to_say
from dcp_storage.errors import ConfigError
from dcp_storage.format.names import new_token

_RUN, _RESTARTS = "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"


def name_attempt(save: Save, world_size: int) -> str:
    """Return 16 hexadecimal digits: the same on all ranks, and different for every save.

    The first rank to arrive chooses them, in the store of the process group, so that no rank waits for another. If the
    group has no store, they are derived from the run and restart that `torchrun` sets in the environment.

    Raises:
        ConfigError: There is neither, and several ranks take part in the save.
    """
    if world_size == 1:
        return new_token()
    which = f"{save.number}-{save.url}"
    if agreed := first_to_say(f"dcp_storage/{_digest(which)}", new_token()):
        return agreed
    if _RUN in os.environ and _RESTARTS in os.environ:
        return _digest(f"{os.environ[_RUN]}-{os.environ[_RESTARTS]}-{which}")
    raise ConfigError(
        "use_collectives=False needs a process group with a store, or torchrun: without either, the ranks cannot agree "
        "on which of their parts belong together"
    )


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]
