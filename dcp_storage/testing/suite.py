"""The requirements for every store, whatever is behind it.

In your own test file, a subclass provides the place:

    class TestMyStore(StoreSuite):
        @pytest.fixture
        def place(self) -> Place:
            return Place("my://bucket/an-empty-prefix")
"""

import asyncio
import gc
import itertools
import os
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from dcp_storage.errors import ConfigError, ObjectNotFound, StoreError
from dcp_storage.format.names import MANIFEST, ObjectName, data_object
from dcp_storage.store.base import ABSENT, Batch, Store
from dcp_storage.testing.commits import CommitSuite
from dcp_storage.testing.place import NAME, NAMES, OTHER, Place, batches_of, put, run, sizes


class StoreSuite(CommitSuite):
    """Conformance of one kind of store."""

    server_in_process = False

    remembers_directories = False
    """Whether the server still lists prefixes below which nothing is left."""

    def test_round_trip_in_another_loop(self, place: Place) -> None:
        batches: Sequence[Batch] = [b"one", memoryview(b"-two-")[1:4], b"", b"three"]
        assert run(place, lambda store: store.put(NAME, batches_of(*batches))) == 11
        assert run(place, lambda store: store.get(NAME)) == b"onetwothree"
        assert run(place, lambda store: store.size(NAME)) == 11

    def test_many_batches(self, place: Place) -> None:
        batches = [memoryview(bytearray([n]) * (70_001 + n)) for n in range(40)]
        expected = b"".join(batches)

        async def use(store: Store) -> None:
            assert await store.put(NAME, batches_of(*batches)) == len(expected)
            assert await store.get(NAME) == expected

        run(place, use)

    @pytest.mark.parametrize("batches", [[], [b""], [b"", b""]])
    def test_empty_object(self, place: Place, batches: list[Batch]) -> None:
        async def use(store: Store) -> None:
            assert await store.put(NAME, batches_of(*batches)) == 0
            assert await store.get(NAME) == b""
            assert await store.get_range(NAME, 0, 10) == b""
            assert await store.size(NAME) == 0
            assert await sizes(store) == {NAME: 0}

        run(place, use)

    def test_ranges(self, place: Place) -> None:
        data = bytes(range(256)) * 5

        async def use(store: Store) -> None:
            await put(store, NAME, data)
            size = len(data)
            edges = [(0, 1), (0, size), (0, size + 1), (1, 2), (7, 700), (size - 1, size), (size - 1, size + 99)]
            for start, stop in [*edges, (size, size + 1), (size + 1, size + 2), (10 * size, 11 * size)]:
                assert await store.get_range(NAME, start, stop) == data[start:stop], (start, stop)

        run(place, use)

    def test_concurrent_ranges(self, place: Place) -> None:
        data = bytes(n * 7 % 251 for n in range(100_000))

        async def use(store: Store) -> None:
            await put(store, NAME, data)
            starts = range(0, len(data), 1999)
            parts = await asyncio.gather(*(store.get_range(NAME, start, start + 1999) for start in starts))
            assert b"".join(parts) == data

        run(place, use)

    @pytest.mark.parametrize("sibling", [True, False], ids=["beside-others", "in-nothing"])
    def test_absent_object(self, place: Place, sibling: bool) -> None:
        async def use(store: Store) -> None:
            if sibling:
                await put(store, OTHER, b"x")
            for read in (store.get, lambda name: store.get_range(name, 0, 5), store.size):
                with pytest.raises(ObjectNotFound, match=NAME) as caught:
                    await read(NAME)
                assert caught.value.url == store.url
                assert caught.value.object_name == NAME
            await store.delete([NAME])

        run(place, use)

    def test_errors_pickle(self, place: Place) -> None:
        with pytest.raises(ObjectNotFound) as caught:
            run(place, lambda store: store.get(NAME))
        copy = pickle.loads(pickle.dumps(caught.value))
        assert type(copy) is ObjectNotFound
        assert str(copy) == str(caught.value)
        assert (copy.url, copy.object_name) == (caught.value.url, NAME)
        assert isinstance(copy, FileNotFoundError)

    @pytest.mark.parametrize(
        "part", ["a?b", "a*b", "a[1]b", "a#b", "a b", "100%", "a%20b", "ä", "a;b&c=d", "a'b", "a{b}|c"]
    )
    def test_a_path_is_a_path_whatever_is_in_it(self, place: Place, part: str) -> None:
        inner, beside = (Place(f"{place.url}/{name}", place.storage_options) for name in (part, "aXb"))

        async def use(store: Store) -> None:
            for data in (b"first", b"second"):
                await store.commit(MANIFEST, data)
                assert await store.get(MANIFEST) == data
            await put(store, NAME, b"data")
            assert await store.get_range(NAME, 1, 3) == b"at"
            assert await sizes(store) == {NAME: 4, MANIFEST: 6}

        run(beside, lambda store: store.commit(MANIFEST, b"of another"))
        run(inner, use)
        assert run(beside, sizes) == {MANIFEST: 10}
        run(inner, lambda store: store.delete([NAME, MANIFEST]))
        assert run(inner, sizes) == {}
        assert run(beside, lambda store: store.get(MANIFEST)) == b"of another"

    def test_overlapping_puts(self, place: Place) -> None:
        async def slow(n: int) -> AsyncIterator[Batch]:
            for step in range(5):
                await asyncio.sleep(0.001)
                yield bytes([n, step]) * 1000

        async def use(store: Store) -> None:
            names = [data_object("aa", n, 0, ".distcp.zst") for n in range(12)]
            sizes = await asyncio.gather(*(store.put(name, slow(n)) for n, name in enumerate(names)))
            assert sizes == [10_000] * 12
            for n, name in enumerate(names):
                assert await store.get(name) == b"".join(bytes([n, step]) * 1000 for step in range(5))

        run(place, use)

    def test_list(self, place: Place) -> None:
        async def use(store: Store) -> dict[ObjectName, int]:
            assert await sizes(store) == {}
            for size, name in enumerate(NAMES):
                await put(store, name, b"x" * size)
            return await sizes(store)

        assert run(place, use) == {name: size for size, name in enumerate(NAMES)}
        assert run(place, sizes) == {name: size for size, name in enumerate(NAMES)}

    def test_list_is_flat_and_keeps_to_its_prefix(self, place: Place) -> None:
        for below in ("deeper", "deeper/still"):
            run(place.beside(f"{place.url}/{below}"), lambda store: put(store, OTHER, b"1"))
        run(place.beside(f"{place.url}-2"), lambda store: put(store, OTHER, b"1"))
        assert run(place, sizes) == {}
        run(place, lambda store: put(store, NAME, b"here"))
        assert run(place, sizes) == {NAME: 4}
        assert run(place.beside(f"{place.url}/deeper"), sizes) == {OTHER: 1}

    def test_list_sees_what_other_stores_do(self, place: Place) -> None:
        async def use(store: Store) -> None:
            async with place.open() as other:
                await put(store, NAMES[0], b"1")
                assert await sizes(other) == {NAMES[0]: 1}
                await put(store, NAMES[1], b"22")
                assert await sizes(other) == {NAMES[0]: 1, NAMES[1]: 2}
                await store.delete([NAMES[0]])
                assert await sizes(other) == {NAMES[1]: 2}

        run(place, use)

    def test_times_of_the_last_write(self, place: Place) -> None:
        async def use(store: Store) -> None:
            assert await store.modified() == {}
            before = time.time()
            await put(store, NAME, b"1")
            await store.commit(MANIFEST, b"old")
            first = await store.modified()
            assert set(first) == {NAME, MANIFEST}
            # S3 reports whole seconds.
            assert all(before - 2 <= written <= time.time() + 1 for written in first.values())
            await store.commit(MANIFEST, b"new")
            assert (await store.modified())[MANIFEST] >= first[MANIFEST]

        run(place, use)

    def test_delete(self, place: Place) -> None:
        async def use(store: Store) -> None:
            for name in NAMES:
                await put(store, name, b"x")
            await store.delete([])
            await store.delete([*NAMES[:2], OTHER])
            assert set(await store.list()) == set(NAMES[2:])
            await store.delete(NAMES)
            await store.delete(NAMES)
            assert await sizes(store) == {}

        run(place, use)

    def test_trailing_slash_changes_nothing(self, place: Place) -> None:
        run(place.beside(f"{place.url}/"), lambda store: put(store, NAME, b"data"))
        assert run(place, lambda store: store.get(NAME)) == b"data"

    @pytest.mark.parametrize("prefix", ["with space", "sch\u00f6n \u2713", "a+b=c&d", "100%25", "step-1.0_~!"])
    def test_odd_prefixes(self, place: Place, prefix: str) -> None:
        odd = place.beside(f"{place.url}/{prefix}")

        async def use(store: Store) -> None:
            await put(store, NAME, b"data")
            await store.commit(MANIFEST, b"{}")
            assert await store.get_range(NAME, 1, 3) == b"at"
            assert await sizes(store) == {NAME: 4, MANIFEST: 2}
            await store.delete([NAME, MANIFEST])
            assert await sizes(store) == {}

        run(odd, use)

    @pytest.mark.parametrize("first", [[], [b"some"]], ids=["at-once", "midway"])
    def test_batches_that_fail_leave_nothing(self, place: Place, first: list[Batch]) -> None:
        class BoomError(Exception):
            pass

        async def failing() -> AsyncIterator[Batch]:
            for batch in first:
                yield batch
            raise BoomError

        async def use(store: Store) -> None:
            with pytest.raises(BoomError):
                await store.put(NAME, failing())
            assert await sizes(store) == {}
            await put(store, NAME, b"again")
            assert await store.get(NAME) == b"again"

        run(place, use)

    def test_cancelled_put_leaves_nothing(self, place: Place) -> None:
        async def endless(started: asyncio.Event) -> AsyncIterator[Batch]:
            yield b"x" * 100_000
            started.set()
            await asyncio.sleep(3600)

        async def use(store: Store) -> None:
            started = asyncio.Event()
            task = asyncio.create_task(store.put(NAME, endless(started)))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await sizes(store) == {}

        run(place, use)

    @pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b"])
    def test_names_that_leave_the_prefix(self, place: Place, name: ObjectName) -> None:
        async def use(store: Store) -> None:
            calls: list[Callable[[], Any]] = [
                lambda: store.get(name),
                lambda: store.get_range(name, 0, 1),
                lambda: store.size(name),
                lambda: store.delete([name]),
                lambda: store.commit(name, b""),
                lambda: put(store, name, b""),
            ]
            for call in calls:
                with pytest.raises(ConfigError):
                    await call()

        run(place, use)

    def test_read_of_a_prefix(self, place: Place) -> None:
        run(place.beside(f"{place.url}/deeper"), lambda store: put(store, OTHER, b"1"))
        for read in (lambda s: s.get("deeper"), lambda s: s.size("deeper")):
            with pytest.raises(StoreError, match="deeper"):
                run(place, read)

    def test_enter_twice_and_unused(self, place: Place) -> None:
        async def main() -> None:
            store = place.open()
            async with store:
                pass
            async with store:
                await put(store, NAME, b"x")
            async with store:
                assert await store.get(NAME) == b"x"

        asyncio.run(main())

    def test_a_prefix_below_it(self, place: Place) -> None:
        async def use(store: Store) -> None:
            below = store.child("step-7")
            assert below.url == f"{store.url.rstrip('/')}/step-7"
            assert await store.directories() == []
            assert await sizes(below) == {}
            await put(below, NAME, b"seven")
            await below.commit(MANIFEST, b"{}", ABSENT)
            await put(store, NAME, b"root")
            assert (await below.get(NAME), await store.get(NAME)) == (b"seven", b"root")
            assert await sizes(store.child("step-7")) == {NAME: 5, MANIFEST: 2}
            assert await sizes(store) == {NAME: 4}
            assert await store.directories() == ["step-7"]
            with pytest.raises(ObjectNotFound, match=f"step-7/{OTHER}"):
                await below.get(OTHER)
            await below.remove_directory()
            assert await below.get(NAME) == b"seven"
            await below.delete([NAME, MANIFEST])
            for _ in range(2):
                await below.remove_directory()
            assert await store.directories() == [] or self.remembers_directories
            for name in ("a/b", "..", ""):
                with pytest.raises(ConfigError):
                    store.child(name)

        run(place, use)

    @pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
    def test_nothing_stays_open(self, place: Place, fails: bool) -> None:
        """Count descriptors and threads over 100 calls, without garbage collection; no task may be left."""
        numbers = itertools.count()

        async def use(store: Store) -> None:
            name = data_object("aa", 0, next(numbers), ".distcp.zst")
            await put(store, name, b"data")
            await store.commit(MANIFEST, b"{}")
            assert await store.get(name) == b"data"
            if fails:
                await store.get(OTHER)

        async def main() -> None:
            try:
                async with place.open() as store:
                    await use(store)
            except ObjectNotFound:
                assert fails
            assert asyncio.all_tasks() == {asyncio.current_task()}

        def call() -> tuple[int, int]:
            asyncio.run(main(), debug=False)
            return len(os.listdir("/proc/self/fd")), threading.active_count()

        for _ in range(3):
            call()
        gc.collect()
        gc.disable()
        try:
            first = call()
            for _ in range(100):
                last = call()
        finally:
            gc.enable()
        # A server in this process closes its ends a little later; a leak grows with each call.
        slack = 10 if self.server_in_process else 1
        assert last[0] <= first[0] + slack
        assert last[1] <= first[1] + slack
