"""The conformance suite on fsspec's file systems for Azure and Google, and on another class for `s3://`."""

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import cloudpathlib
import fsspec
import obstore.fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from upath import UPath

from dcp_storage import AsyncStorageReader, AsyncStorageWriter
from dcp_storage.errors import StoreError
from dcp_storage.testing.place import NAME, Place, put, run
from dcp_storage.testing.suite import StoreSuite
from integration.servers import S3Server, azurite, gcs_emulator

# gcsfs asks Google by gRPC what kind a bucket is, which the emulator does not answer.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

# adlfs and gcsfs hand over bytes, of which aiohttp says so.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly with raw bytes:ResourceWarning")

_numbers = count()


@pytest.fixture(scope="module")
def azure() -> Iterator[dict[str, str]]:
    with azurite() as options:
        yield options


@pytest.fixture(scope="module")
def google_options() -> Iterator[dict[str, str]]:
    with gcs_emulator() as options:
        yield options


@pytest.fixture(scope="class")
def obstore_for_s3() -> Iterator[None]:
    before = fsspec.get_filesystem_class("s3")
    obstore.fsspec.register("s3")
    yield
    fsspec.register_implementation("s3", before, clobber=True)


class TestAzure(StoreSuite):
    @pytest.fixture
    def place(self, azure: dict[str, str]) -> Place:
        return Place(f"abfs://box/{next(_numbers)}/runs/step-1", dict(azure))


class TestGoogle(StoreSuite):
    @pytest.fixture
    def place(self, google_options: dict[str, str], request: pytest.FixtureRequest) -> Place:
        if "[a;b" in request.node.name:
            pytest.skip("the emulator takes what follows a semicolon for something else")
        return Place(f"gs://box/{next(_numbers)}/runs/step-1", dict(google_options))


class TestObstore(StoreSuite):
    remembers_directories = True  # as SeaweedFS does

    @pytest.fixture
    def place(self, seaweedfs_server: S3Server, obstore_for_s3: None) -> Place:
        options = seaweedfs_server.storage_options
        names = {"endpoint": "endpoint_url", "access_key_id": "key", "secret_access_key": "secret"}
        config = {name: options[ours] for name, ours in names.items()} | {"region": "us-east-1"}
        return Place(seaweedfs_server.new_prefix(), {"config": config, "client_options": {"allow_http": True}})

    def test_times_of_the_last_write(self, place: Place):
        """obstore's file system does not tell them, so `prune` cannot tell a dead save from one that is under way."""
        run(place, lambda store: put(store, NAME, b"1"))
        with pytest.raises(StoreError, match="does not report write times"):
            run(place, lambda store: store.modified())


def test_google_is_asked_once_for_credentials(google_options: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    import google.auth
    from google.auth.credentials import AnonymousCredentials

    asked = []

    def default(**_: object) -> tuple[AnonymousCredentials, str]:
        asked.append(True)
        return AnonymousCredentials(), "tests"

    monkeypatch.setattr(google.auth, "default", default)
    options = {"endpoint_url": google_options["endpoint_url"], "token": "google_default"}
    for number in range(3):
        place = Place(f"gs://box/{next(_numbers)}", options)
        run(place, lambda store, number=number: put(store, f"aa-0-{number}.distcp", b"1"))
    assert len(asked) == 1


STATE = {"w": torch.arange(9)}


def test_path_objects_that_stand_for_urls(seaweedfs_server: S3Server, tmp_path: Path):
    options, url = seaweedfs_server.storage_options, seaweedfs_server.new_prefix()
    universal = UPath(url, **options)
    bucket_client = {
        "aws_access_key_id": options["key"],
        "aws_secret_access_key": options["secret"],
        "endpoint_url": options["endpoint_url"],
        "local_cache_dir": tmp_path,
    }
    cached = cloudpathlib.S3Path(url, client=cloudpathlib.S3Client(**bucket_client))
    dcp.save(STATE, storage_writer=AsyncStorageWriter(universal), no_dist=True)
    for reader in (AsyncStorageReader(universal), AsyncStorageReader(cached, storage_options=options)):
        found = {"w": torch.zeros_like(STATE["w"])}
        dcp.load(found, storage_reader=reader, no_dist=True)
        assert torch.equal(found["w"], STATE["w"])
    assert (cached / ".metadata").exists()
