"""The requirements for every store's commit: all or nothing, and only over the expected version."""

import asyncio

import pytest

from dcp_storage.errors import ObjectExists
from dcp_storage.format.names import MANIFEST
from dcp_storage.store.base import ABSENT, Store
from dcp_storage.testing.place import Place, run, sizes


class CommitSuite:
    """Conformance of a store's commits; part of `StoreSuite`."""

    creates_at_once = False
    """Whether exactly one of several commits that create an object at the same time succeeds."""

    @pytest.fixture
    def place(self) -> Place:
        """Return an empty prefix."""
        raise NotImplementedError

    def test_create_makes_what_is_not_there_and_replaces_nothing(self, place: Place) -> None:
        async def use(store: Store) -> None:
            await store.commit(MANIFEST, b"first", over=ABSENT)
            for data in (b"second", b""):
                with pytest.raises(ObjectExists, match=r"cannot commit .*/\.metadata: it already exists") as caught:
                    await store.commit(MANIFEST, data, over=ABSENT)
                assert caught.value.url == store.url
            assert await store.get(MANIFEST) == b"first"
            assert set(await store.list()) == {MANIFEST}
            await store.commit(MANIFEST, b"third")
            assert await store.get(MANIFEST) == b"third"
            await store.delete([MANIFEST])
            await store.commit(MANIFEST, b"fourth", over=ABSENT)
            assert await store.get(MANIFEST) == b"fourth"

        run(place, use)

    def test_of_several_that_create_one_succeeds(self, place: Place) -> None:
        """If the store creates objects atomically; otherwise the object is that of one commit, whole."""

        async def use(store: Store) -> None:
            made = [bytes([65 + n]) * 50_000 for n in range(6)]
            results = await asyncio.gather(
                *(store.commit(MANIFEST, data, over=ABSENT) for data in made), return_exceptions=True
            )
            assert all(result is None or isinstance(result, ObjectExists) for result in results), results
            winners = [data for data, result in zip(made, results, strict=True) if result is None]
            assert await store.get(MANIFEST) in winners
            assert not self.creates_at_once or len(winners) == 1

        run(place, use)

    def test_commit_creates_and_replaces(self, place: Place) -> None:
        async def use(store: Store) -> None:
            for data in (b"first, and longer", b"second", b""):
                await store.commit(MANIFEST, data)
                assert await store.get(MANIFEST) == data
            assert await sizes(store) == {MANIFEST: 0}

        run(place, use)

    def test_reader_sees_whole_commits_only(self, place: Place) -> None:
        versions = [bytes([n]) * (40_000 + n) for n in range(8)]

        async def use(store: Store) -> None:
            await store.commit(MANIFEST, versions[0])

            async def read() -> None:
                for _ in range(20):
                    assert await store.get(MANIFEST) in versions

            async with asyncio.TaskGroup() as group:
                group.create_task(read())
                for version in versions:
                    await store.commit(MANIFEST, version)

        run(place, use)
