"""Pins, small objects that protect a step from being pruned; and tombstones, which prevent races between the two.

A prune puts a tombstone, looks for pins, and deletes; a pin puts its object, and looks for a tombstone. Whichever comes
first, at least one of them sees the other. A tombstone lists what is to be deleted, so that the next prune can finish
an interrupted one, even if the step is saved again meanwhile.
"""

import json
import re
from collections.abc import Awaitable, Callable, Mapping

from dcp_storage.checkpoint.manifests import is_committed, replaced_objects
from dcp_storage.errors import CheckpointNotFound, ConfigError, ObjectNotFound
from dcp_storage.format.names import (
    MANIFEST,
    ObjectName,
    is_data_object,
    is_stock_object,
    new_token,
    parse_part_manifest,
)
from dcp_storage.store.base import Store

ALIVE_S = 3600
"""A pin that was not refreshed for so long has expired, by the store's clock; so has a tombstone."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_TOMBSTONE = re.compile(r"\.removing-[0-9a-f]{16}", re.ASCII)
_PIN = re.compile(r"\.pin-[A-Za-z0-9_.-]{1,64}-[0-9a-f]{16}", re.ASCII)


def new_pin(name: str) -> ObjectName:
    """Return the name of an object that no other pin has.

    Raises:
        ConfigError: The name is not valid in every store.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"the pin's name is {name!r}; use up to 64 letters, digits, dots, dashes and underscores")
    return ObjectName(f".pin-{name}-{new_token()}")


def is_pin(name: str) -> bool:
    """Return whether a name is that of a pin."""
    return _PIN.fullmatch(name) is not None


def is_tombstone(name: str) -> bool:
    """Return whether a name is that of a tombstone."""
    return _TOMBSTONE.fullmatch(name) is not None


async def put_pin(step: Store, pin: ObjectName) -> None:
    """Pin a committed step.

    Raises:
        CheckpointNotFound: It does not exist, or is being removed.
        StoreError: The store failed, or does not report times.
    """
    if not await is_committed(step, parts=True):  # else the pin would create its directory
        raise _gone(step)
    await refresh_pin(step, pin)
    times = await step.modified()
    # A prune that has removed the step has removed the pin, too.
    buried = [name for name, at in times.items() if is_tombstone(name) and pin in times and times[pin] - at < ALIVE_S]
    if buried or pin not in times or not await is_committed(step, parts=True):
        await remove_pin(step, pin)
        raise _gone(step)


async def refresh_pin(step: Store, pin: ObjectName) -> None:
    """Renew a pin."""
    await step.commit(pin, b"{}")


async def remove_pin(step: Store, pin: ObjectName) -> None:
    """Remove a pin."""
    await step.delete([pin])


def held_pins(times: Mapping[ObjectName, float], now: float) -> list[ObjectName]:
    """Return the pins of a step that have not expired, by the times when they were written."""
    return [name for name, at in times.items() if is_pin(name) and now - at < ALIVE_S]


async def bury(step: Store, is_same: Callable[[], Awaitable[bool]]) -> str | None:
    """Delete a step's manifest, unless the step is pinned or no longer the same; return the reason if so.

    The tombstone that remains lists the step's objects, for `unearth`.
    """
    parts = filter(parse_part_manifest, await step.list())  # including unreadable ones
    named = list(dict.fromkeys([*await replaced_objects(step), *parts]))
    tombstone = ObjectName(f".removing-{new_token()}")
    await step.commit(tombstone, json.dumps(named).encode())
    times = await step.modified()
    if tombstone not in times:  # another prune has removed the step, and the tombstone with it
        return None
    why_not = "pinned" if held_pins(times, times[tombstone]) else None if await is_same() else "saved again"
    await step.delete([tombstone] if why_not else [MANIFEST, *filter(parse_part_manifest, named)])
    return why_not


async def unearth(step: Store) -> None:
    """Delete the objects that the tombstones of a step list, unless the current manifest names them.

    Such a step was saved again, and the prune that buried it may still withdraw because of a pin.
    """
    there = await step.list()
    buried = {tombstone: await _named(step, tombstone) for tombstone in sorted(filter(is_tombstone, there))}
    if not buried:
        return
    standing = set(await replaced_objects(step))  # read after the tombstones: what they list was not saved since
    done = [tombstone for tombstone, named in buried.items() if standing.isdisjoint(named)]
    pins = [] if standing else filter(is_pin, there)
    await step.delete([*dict.fromkeys(name for tombstone in done for name in buried[tombstone]), *pins])
    await step.delete(done)  # last: they show that there is more to do


async def _named(step: Store, tombstone: ObjectName) -> list[ObjectName]:
    """Return the names in a tombstone that have the form of a save's objects."""
    try:
        named = json.loads(await step.get(tombstone))
    except (ObjectNotFound, ValueError):  # another prune finished it; or it is incomplete, and deletes nothing
        return []
    texts = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return [
        ObjectName(name) for name in texts if is_data_object(name) or is_stock_object(name) or parse_part_manifest(name)
    ]


def _gone(step: Store) -> CheckpointNotFound:
    return CheckpointNotFound(f"{step.url} is not a committed step, or is being removed", url=step.url)
