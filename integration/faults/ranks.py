"""Several ranks in one process: DCP's own code in one thread a rank, with collectives that need no process group.

The ranks take turns, from one collective to the next, in the order of their numbers: every run is the same run.
"""

import asyncio
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.utils import _DistWrapper

from dcp_storage.dcp.saves import order
from integration.faults.faults import Injector

LIMIT_S = 20


class Hang(Exception):
    """A rank waited for another one that never came."""


class Group:
    """A process group of threads."""

    def __init__(self, world: int, injector: Injector) -> None:
        self.world = world
        self.injector = injector
        self._turn = 0
        self._round: dict[int, bytes] = {}
        self._results: list[bytes] = []
        self._rounds_done = 0
        self._gone: set[int] = set()
        self._changed = threading.Condition()

    def begin(self, rank: int) -> None:
        self.injector.here.rank = rank
        with self._changed:
            self._wait_for_turn(rank)

    def leave(self, rank: int) -> None:
        with self._changed:
            self._gone.add(rank)
            if self._turn == rank:
                self._pass_on(rank)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Return what every rank gave. Fails, as a connection does, when one of them is no more."""
        self.injector.check_alive(rank)
        with self._changed:
            number = self._rounds_done
            self._round[rank] = pickle.dumps(value)
            if len(self._round) == self.world:
                self._results = [self._round[each] for each in range(self.world)]
                self._round = {}
                self._rounds_done += 1
            self._pass_on(rank)
            self._wait_for_turn(rank)
            if self._rounds_done == number:
                raise RuntimeError(f"connection closed by ranks {sorted(self._gone)}")
            return [pickle.loads(result) for result in self._results]

    def _wait_for_turn(self, rank: int) -> None:
        if not self._changed.wait_for(lambda: self._turn == rank, LIMIT_S):
            raise Hang(f"rank {rank} waited for {LIMIT_S} s")

    def _pass_on(self, rank: int) -> None:
        others = [(rank + step) % self.world for step in range(1, self.world + 1)]
        self._turn = next((other for other in others if other not in self._gone), -1)
        self._changed.notify_all()


class Member:
    """A rank's process group, for `process_group=`."""

    def __init__(self, group: Group, rank: int) -> None:
        self.group, self.rank = group, rank


class _ThreadDist(_DistWrapper):
    def __init__(self, member: Member) -> None:
        super().__init__(None, use_dist=False, coordinator_rank=0)
        self._member = member
        self.rank = member.rank
        self.is_coordinator = member.rank == 0
        member.group.begin(member.rank)

    def _exchange(self, value: Any) -> list[Any]:
        return self._member.group.exchange(self.rank, value)

    def get_world_size(self) -> int:
        return self._member.group.world

    def broadcast_object(self, object: Any) -> Any:  # noqa: A002 - DCP's name
        return self._exchange(object)[0]

    def gather_object(self, object: Any) -> list[Any] | None:  # noqa: A002
        values = self._exchange(object)
        return values if self.is_coordinator else None

    def scatter_object(self, object_list: list[Any] | None) -> Any:
        return self._exchange(object_list)[0][self.rank]


@contextmanager
def ranks_are_threads() -> Iterator[None]:
    """Have DCP talk through `Member`s, and event loops do in their own thread what they give to others."""

    def make(group: Any, use_dist: bool, coordinator_rank: int) -> _DistWrapper:
        return _ThreadDist(group) if isinstance(group, Member) else _DistWrapper(group, use_dist, coordinator_rank)

    with (
        mock.patch.object(state_dict_saver, "_DistWrapper", make),
        mock.patch.object(asyncio.base_events.BaseEventLoop, "run_in_executor", _run_here),
        # A save waits for those that began before it in its process, which here are the other ranks'.
        mock.patch.object(order, "_earlier", return_value=[]),
    ):
        yield


def _run_here(loop: asyncio.AbstractEventLoop, executor: Any, call: Callable[..., Any], *args: Any) -> Any:
    future = loop.create_future()
    try:
        future.set_result(call(*args))
    except BaseException as error:  # noqa: BLE001 - handed on
        future.set_exception(error)
    return future


def save_on_ranks(
    states: list[dict[str, Any]],
    make_writer: Callable[[], Any],
    make_planner: Callable[[], Any],
    injector: Injector,
    *,
    asynchronous: bool,
    limit_s: float = LIMIT_S,
) -> list[BaseException | None]:
    """Save one state a rank; return what each rank's call raised, or `None` where it said that all is well."""
    group = Group(len(states), injector)
    outcomes: list[BaseException | None] = [Hang(f"a rank did not end within {limit_s} s")] * len(states)

    def run(rank: int) -> None:
        options = {"storage_writer": make_writer(), "planner": make_planner(), "process_group": Member(group, rank)}
        try:
            if asynchronous:
                dcp.async_save(states[rank], **options).result(limit_s)
            else:
                dcp.save(states[rank], **options)
            outcomes[rank] = None
        except BaseException as error:  # noqa: BLE001 - it is the outcome
            outcomes[rank] = error
        group.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(states))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * limit_s)
    return outcomes
