"""Damage is only believed if a second read shows it, too: memory, a cable or a proxy may have damaged the first."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

J = TypeVar("J")
F = TypeVar("F")


async def read_twice(jobs: Sequence[J], read: Callable[[Sequence[J]], Awaitable[Sequence[tuple[J, F]]]]) -> list[F]:
    """Read jobs together, then each that failed once more, alone; return the failures of the second reads.

    `read` returns the jobs that failed, each with its failure.
    """
    return [fault for job, _ in await read(jobs) for _, fault in await read([job])]
