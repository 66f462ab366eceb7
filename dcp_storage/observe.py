"""What a save or a load tells of itself while it runs. No user interface: `progress.py` is one observer of many."""

from typing import Literal, Protocol

Operation = Literal["save", "load", "verify"]


class Observer(Protocol):
    """Told of one rank's transfers, on the thread that runs them: every method must return at once."""

    def start(self, operation: Operation, url: str, raw_bytes: int) -> None:
        """Begin a transfer of this rank that will move `raw_bytes` of tensors and objects, before compression."""

    def advance(self, raw_bytes: int, stored_bytes: int) -> None:
        """Count blocks done since the last call: their size in memory, and in the store."""

    def finish(self, error: BaseException | None) -> None:
        """End the transfer; `error` is what failed it."""


class Silent:
    """The observer that tells nobody."""

    def start(self, operation: Operation, url: str, raw_bytes: int) -> None:
        """Do nothing."""

    def advance(self, raw_bytes: int, stored_bytes: int) -> None:
        """Do nothing."""

    def finish(self, error: BaseException | None) -> None:
        """Do nothing."""
