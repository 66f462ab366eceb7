"""A pin that is held while a block runs."""

import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from dcp_storage.checkpoint.place import Location
from dcp_storage.errors import StoreError
from dcp_storage.format.names import ObjectName
from dcp_storage.steps.names import directory_of
from dcp_storage.steps.pins import ALIVE_S, new_pin, put_pin, refresh_pin, remove_pin
from dcp_storage.store.base import Store

logger = logging.getLogger(__name__)

_REFRESH_S = ALIVE_S / 12


@contextmanager
def hold_pin(root: Location, step: int, name: str) -> Iterator[None]:
    """Pin a step, refresh the pin regularly, and remove it at the end.

    Raises:
        CheckpointNotFound: The step does not exist, or is being removed.
        ConfigError: The name is invalid.
        StoreError: The store failed.
    """
    directory, pin = directory_of(step), new_pin(name)
    root.run(lambda store: put_pin(store.child(directory), pin))
    ended = threading.Event()
    thread = threading.Thread(target=_refresh, args=(root, directory, pin, ended), name="dcp_storage_pin", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _try(root, directory, partial(remove_pin, pin=pin), "a pin was not removed, and will expire by itself: %s")


def _refresh(root: Location, directory: str, pin: ObjectName, ended: threading.Event) -> None:
    while not ended.wait(_REFRESH_S):
        _try(root, directory, partial(refresh_pin, pin=pin), "a pin could not be refreshed: %s")


def _try(root: Location, directory: str, call: Callable[[Store], Coroutine[Any, Any, None]], says: str) -> None:
    try:
        root.run(lambda store: call(store.child(directory)))
    except StoreError as error:
        logger.warning(says, error)
