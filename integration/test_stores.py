"""The conformance suite, and what only a real server shows, on S3 servers that are not moto."""

import asyncio
import os

import pytest

from dcp_storage.errors import ObjectNotFound, StoreError
from dcp_storage.store.base import Store
from dcp_storage.testing.place import NAME, Place, batches_of, put, run, sizes
from dcp_storage.testing.suite import StoreSuite
from integration.servers import S3Server


@pytest.fixture
def place(s3_server: S3Server) -> Place:
    return Place(f"{s3_server.new_prefix()}/runs/step-1", s3_server.storage_options)


class TestStores(StoreSuite):
    remembers_directories = True  # as SeaweedFS does

    @pytest.fixture
    def place(self, s3_server: S3Server) -> Place:
        return Place(f"{s3_server.new_prefix()}/runs/step-1", s3_server.storage_options)

    def test_reader_sees_whole_commits_only(self, place: Place, request: pytest.FixtureRequest):
        if "rclone" in request.node.name:
            pytest.skip("about one in ten times rclone's server lets a reader see a file that it is replacing")
        super().test_reader_sees_whole_commits_only(place)


def test_more_objects_than_one_answer_lists(place: Place):
    names = [f"aa-0-{n}.distcp.zst" for n in range(1003)]

    async def use(store: Store):
        limit = asyncio.Semaphore(16)

        async def one(name: str):
            async with limit:
                await put(store, name, b"1")

        await asyncio.gather(*map(one, names))
        assert await sizes(store) == dict.fromkeys(names, 1)
        await store.delete(names)
        assert await sizes(store) == {}

    run(place, use)


def test_large_object(place: Place):
    block = os.urandom(1 << 20)
    batches = [block, memoryview(block)[7:]] * 55
    expected = b"".join(batches)

    async def use(store: Store):
        assert await store.put(NAME, batches_of(*batches)) == len(expected)
        assert await store.size(NAME) == len(expected)
        assert await store.get_range(NAME, 60 << 20, 93 << 20) == expected[60 << 20 : 93 << 20]
        assert await store.get(NAME) == expected

    run(place, use)


def test_missing_bucket(s3_server: S3Server):
    place = Place("s3://no-such-bucket/step-1", s3_server.storage_options)
    with pytest.raises(StoreError, match="s3://no-such-bucket/step-1") as caught:
        run(place, lambda store: put(store, NAME, b"x"))
    assert not isinstance(caught.value, ObjectNotFound)
    with pytest.raises(ObjectNotFound, match="s3://no-such-bucket/step-1"):
        run(place, lambda store: store.get(".metadata"))


def test_wrong_secret(place: Place):
    wrong = place.beside(place.url, secret="not-the-secret-key")
    for use in (lambda s: put(s, NAME, b"x"), lambda s: s.get(NAME), lambda s: s.size(NAME), lambda s: s.list()):
        with pytest.raises(StoreError, match=place.url) as caught:
            run(wrong, use)
        assert not isinstance(caught.value, ObjectNotFound)
        assert "not-the-secret-key" not in str(caught.value)
    assert run(place, sizes) == {}
