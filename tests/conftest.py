"""What more than one test module needs.

Hypothesis has no deadline here: a loaded machine would miss it.
"""

import itertools
from collections.abc import Iterator
from datetime import timedelta

import boto3
import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from moto.server import ThreadedMotoServer

from dcp_storage.testing.place import Place

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_ACCESS_KEY = "AKIATESTACCESSKEY"
_SECRET_KEY = "moto-secret-access-key"
_numbers = itertools.count()


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """The URL of an S3 server in this process."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def moto_options(moto_endpoint: str) -> dict[str, str]:
    return {"key": _ACCESS_KEY, "secret": _SECRET_KEY, "endpoint_url": moto_endpoint}


@pytest.fixture
def moto_bucket(moto_endpoint: str) -> str:
    """The name of a fresh bucket."""
    bucket = f"bucket-{next(_numbers)}"
    client = boto3.client(
        "s3",
        endpoint_url=moto_endpoint,
        aws_access_key_id=_ACCESS_KEY,
        aws_secret_access_key=_SECRET_KEY,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=bucket)
    client.close()
    return bucket


@pytest.fixture
def moto_s3(moto_bucket: str, moto_options: dict[str, str]) -> Place:
    """An empty prefix in a fresh bucket: `url` and `storage_options`."""
    return Place(f"s3://{moto_bucket}/runs/step-1", dict(moto_options))


@pytest.fixture
def as_rank():
    """Pose as a rank of a process group that is not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def pose(rank, world):
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    yield pose
    torch.distributed.destroy_process_group()


@pytest.fixture
def process_group(monkeypatch):
    """This process alone, which the PROCESS executor needs."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()
