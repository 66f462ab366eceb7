"""Pins: small objects beside a step that keep it from every prune, and the tombstones that keep pins from crossing one.

A prune puts a tombstone, looks for pins, and deletes; a pin puts its object, and looks for a tombstone. Whichever comes
first, one of them sees the other.
"""

import re

from dcp_storage.errors import CheckpointNotFound, ConfigError
from dcp_storage.format.names import new_token
from dcp_storage.store.base import Store
from dcp_storage.transfer.manifests import is_committed

ALIVE_S = 3600
"""A pin that was not refreshed for so long is dead, by the store's clock; so is a tombstone."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_TOMBSTONE = re.compile(r"\.removing-[0-9a-f]{16}", re.ASCII)
_PIN = re.compile(r"\.pin-[A-Za-z0-9_.-]{1,64}-[0-9a-f]{16}", re.ASCII)


def new_pin(name: str) -> str:
    """Return the name of an object that no other pin has.

    Raises:
        ConfigError: The name is none that every store takes.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"the pin's name is {name!r}; give up to 64 letters, digits, dots, dashes and underscores")
    return f".pin-{name}-{new_token()}"


def is_pin(name: str) -> bool:
    """Return whether a name is that of a pin."""
    return _PIN.fullmatch(name) is not None


def is_tombstone(name: str) -> bool:
    """Return whether a name is that of a tombstone."""
    return _TOMBSTONE.fullmatch(name) is not None


async def put_pin(step: Store, pin: str) -> None:
    """Pin a committed step.

    Raises:
        CheckpointNotFound: It is not there, or is being removed.
        StoreError: The store failed, or does not tell times.
    """
    if not await is_committed(step, parts=True):  # else the pin would make its directory
        raise _gone(step)
    await refresh_pin(step, pin)
    times = await step.modified()
    buried = [name for name, at in times.items() if is_tombstone(name) and times[pin] - at < ALIVE_S]
    if buried or not await is_committed(step, parts=True):
        await remove_pin(step, pin)
        raise _gone(step)


async def refresh_pin(step: Store, pin: str) -> None:
    """Make a pin young again."""
    await step.commit(pin, b"{}")


async def remove_pin(step: Store, pin: str) -> None:
    """Let a step go."""
    await step.delete([pin])


async def bury(step: Store) -> bool:
    """Put a tombstone, which no other prune takes away, unless somebody holds the step; return whether it stands."""
    tombstone = f".removing-{new_token()}"
    await step.commit(tombstone, b"{}")
    times = await step.modified()
    if any(is_pin(name) and times[tombstone] - at < ALIVE_S for name, at in times.items()):
        await step.delete([tombstone])
        return False
    return True


def _gone(step: Store) -> CheckpointNotFound:
    return CheckpointNotFound(f"{step.url} is no committed step, or is being removed", url=step.url)
