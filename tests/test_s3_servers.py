"""S3 servers as people have them: some refuse checksums, some redirect, some answer in HTML, most grant few rights."""

import asyncio
import json
import os
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.distributed.checkpoint as dcp
from aiobotocore.credentials import AioRefreshableCredentials
from aiobotocore.session import AioSession

from dcp_storage import AsyncStorageReader, AsyncStorageWriter
from dcp_storage.errors import AccessDenied, ConfigError, StoreError
from dcp_storage.prune import prune
from dcp_storage.store import retries, s3_client
from dcp_storage.store.base import Store
from dcp_storage.store.open import open_store
from dcp_storage.testing.place import NAME, Place, put, run
from dcp_storage.verify import verify
from tests.faulty_s3 import FaultyS3, faulty_s3

URL = "s3://bucket/run/step-1"
KEY = f"bucket/run/step-1/{NAME}"
SAVED = {"w": torch.arange(6.0), "step": 7}


@pytest.fixture
def server(monkeypatch) -> Iterator[FaultyS3]:
    monkeypatch.setattr(retries, "_PAUSE_SECONDS", 0.001)
    s3_client._credentials.clear()
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with faulty_s3() as state:
        yield state


def without_key(server: FaultyS3, **options) -> dict:
    rest = {name: value for name, value in server.storage_options().items() if name not in {"key", "secret"}}
    return rest | options


def save(options: dict, url: str = URL) -> None:
    dcp.save(SAVED, storage_writer=AsyncStorageWriter(url, storage_options=options))


def load(options: dict, url: str = URL) -> None:
    state = {"w": torch.zeros(6), "step": 0}
    dcp.load(state, storage_reader=AsyncStorageReader(url, storage_options=options))
    assert state["step"] == 7
    assert torch.equal(state["w"], SAVED["w"])


def signers(server: FaultyS3) -> set[str]:
    """Return the access keys that signed the requests."""
    return {re.search(r"Credential=([^/]+)/", headers["authorization"])[1] for headers in server.headers}


def expiring(seconds: float, key: str) -> dict[str, str]:
    expiry = datetime.now(UTC) + timedelta(seconds=seconds)
    return {"access_key": key, "secret_key": "s", "token": "t", "expiry_time": expiry.isoformat()}


class TestSessions:
    def test_a_session_signs_and_not_the_environment(self, server: FaultyS3, monkeypatch):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "WRONG")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        session = AioSession()
        session.set_credentials("MINE", "secret")
        options = without_key(server, session=session)
        save(options)
        load(options)
        assert signers(server) == {"MINE"}

    def test_refreshable_credentials_refresh_in_every_loop(self, server: FaultyS3):
        refreshed = []

        async def refresh():
            refreshed.append(True)
            return expiring(3600 if len(refreshed) > 3 else 1, f"KEY{len(refreshed)}")

        session = AioSession()
        session._credentials = AioRefreshableCredentials.create_from_metadata(expiring(1, "KEY0"), refresh, "test")
        options = without_key(server, session=session)
        for _ in range(5):
            save(options)
        load(options)
        assert len(refreshed) == 4
        assert "KEY4" in signers(server)

    def test_several_requests_that_wait_for_one_refresh_in_several_loops(self, server: FaultyS3):
        async def refresh():
            await asyncio.sleep(0.01)
            return expiring(1, "KEY")

        async def use(store: Store):
            await asyncio.gather(*(store.get(NAME) for _ in range(8)))

        server.objects[KEY] = b"data"
        session = AioSession()
        session._credentials = AioRefreshableCredentials.create_from_metadata(expiring(1, "KEY"), refresh, "test")
        for _ in range(3):
            run(Place(URL, without_key(server, session=session)), use)

    def test_a_session_is_not_closed_and_serves_again(self, server: FaultyS3):
        session = AioSession()
        session.set_credentials("MINE", "secret")
        for _ in range(3):
            run(Place(URL, without_key(server, session=session)), lambda store: store.commit(".metadata", b"{}"))
        assert signers(server) == {"MINE"}


STS_ANSWER = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{key}</AccessKeyId><SecretAccessKey>s</SecretAccessKey>
<SessionToken>t</SessionToken><Expiration>{expiry}</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""


class TestCredentials:
    @pytest.fixture
    def ran(self, server: FaultyS3, tmp_path: Path, monkeypatch) -> Path:
        """A file with a line for each time that a `credential_process` ran."""
        ran, program, config = tmp_path / "ran", tmp_path / "credentials.py", tmp_path / "config"
        answer = {"Version": 1, "AccessKeyId": "PROCESS", "SecretAccessKey": "s"}
        program.write_text(f"open({str(ran)!r}, 'a').write('ran\\n')\nprint({json.dumps(answer)!r})\n")
        config.write_text(f"[default]\ncredential_process = {sys.executable} {program}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        return ran

    def test_a_process_asks_once(self, server: FaultyS3, ran: Path):
        for _ in range(3):
            save(without_key(server))
            load(without_key(server))
        assert ran.read_text().count("ran") == 1
        assert signers(server) == {"PROCESS"}

    @pytest.mark.parametrize("kind", ["container", "web identity"])
    def test_a_service_is_asked_until_what_it_gave_expires(
        self, server: FaultyS3, monkeypatch, tmp_path: Path, kind: str
    ):
        asked, lifetime = [], [3600]

        def answer(method: str, name: str, headers: dict[str, str]):
            asked.append(name)
            expiry = (datetime.now(UTC) + timedelta(seconds=lifetime[0])).strftime("%Y-%m-%dT%H:%M:%SZ")
            key = f"KEY{len(asked)}"
            if kind == "container":
                given = {"AccessKeyId": key, "SecretAccessKey": "s", "Token": "t", "Expiration": expiry}
                return 200, {"Content-Type": "application/json"}, json.dumps(given).encode()
            return 200, {"Content-Type": "text/xml"}, STS_ANSWER.format(key=key, expiry=expiry).encode()

        with faulty_s3() as service:
            service.instead = answer
            if kind == "container":
                monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{service.endpoint_url}/credentials")
            else:
                (tmp_path / "token").write_text("a token")
                monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
                monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/training")
                monkeypatch.setenv("AWS_ENDPOINT_URL_STS", service.endpoint_url)
                monkeypatch.setenv("AWS_REGION", "us-east-1")
                monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            for _ in range(3):
                save(without_key(server))
                load(without_key(server))
            assert len(asked) == 1
            s3_client._credentials.clear()
            lifetime[0] = 60
            save(without_key(server))
            assert len(asked) > 2, "they refresh in mid-save"
        assert "KEY1" in signers(server)

    def test_a_changed_file_is_read(self, server: FaultyS3, ran: Path, monkeypatch, tmp_path: Path):
        save(without_key(server))
        Path(os.environ["AWS_CONFIG_FILE"]).write_text("[default]\naws_access_key_id=FILE\naws_secret_access_key=s\n")
        save(without_key(server))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVIRONMENT")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        save(without_key(server))
        assert signers(server) == {"PROCESS", "FILE", "ENVIRONMENT"}
        assert ran.read_text().count("ran") == 1

    def test_credentials_that_a_server_refused_are_asked_for_again(self, server: FaultyS3, ran: Path):
        save(without_key(server))
        expired = b"<Error><Code>ExpiredToken</Code><Message>expired</Message></Error>"
        server.instead = lambda *_: (400, {}, expired)
        with pytest.raises(StoreError, match="expired"):
            run(Place(URL, without_key(server)), lambda store: store.get(NAME))
        server.instead = lambda *_: None
        load(without_key(server))
        assert ran.read_text().count("ran") == 2

    def test_a_fork_asks_for_its_own(self):
        s3_client._credentials["key"] = object()
        pid = os.fork()
        if not pid:
            os._exit(len(s3_client._credentials))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        s3_client._credentials.clear()


class TestChecksums:
    @pytest.mark.parametrize("how", ["option", "environment", "profile"])
    def test_when_required_sends_none(self, server: FaultyS3, monkeypatch, tmp_path: Path, how: str):
        options = server.storage_options()
        if how == "option":
            options = server.storage_options(request_checksum_calculation="when_required")
        elif how == "environment":
            monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        else:
            (tmp_path / "config").write_text("[profile plain]\nrequest_checksum_calculation = when_required\n")
            monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
            options["profile"] = "plain"
        save(options)
        load(options)
        assert not [name for headers in server.headers for name in headers if "checksum" in name or "crc32" in name]

    def test_a_checksum_is_sent_otherwise(self, server: FaultyS3):
        save(server.storage_options())
        sent = [
            headers for (method, _), headers in zip(server.requests, server.headers, strict=True) if method == "PUT"
        ]
        assert sent
        assert all("x-amz-checksum-crc32" in headers for headers in sent)

    @pytest.mark.parametrize(
        ("status", "code", "message"),
        [
            (400, "InvalidArgument", "Unsupported header 'x-amz-checksum-crc32' received for this API call."),
            (501, "NotImplemented", "A header you provided implies functionality that is not implemented"),
            (400, "InvalidRequest", "x-amz-checksum-crc32 is not supported"),
        ],
    )
    def test_a_server_that_refuses_them_is_told_apart(self, server: FaultyS3, status: int, code: str, message: str):
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        server.instead = lambda method, name, headers: (status, {}, body) if "x-amz-checksum-crc32" in headers else None
        for use in (lambda store: put(store, NAME, b"data"), lambda store: store.commit(".metadata", b"{}", "")):
            with pytest.raises(StoreError, match="AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
                run(Place(URL, server.storage_options()), use)
        assert not server.objects
        options = server.storage_options(request_checksum_calculation="when_required")
        save(options)
        load(options)

    def test_other_refusals_give_no_such_advice(self, server: FaultyS3):
        server.instead = lambda *_: (400, {}, b"<Error><Code>InvalidArgument</Code><Message>bucket</Message></Error>")
        with pytest.raises(StoreError) as caught:
            run(Place(URL, server.storage_options()), lambda store: put(store, NAME, b"data"))
        assert "CHECKSUM" not in str(caught.value)


RETRIED = [408, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529, 530, 599]
NOT_RETRIED = [400, 401, 403, 405, 413, 501]


class TestAnswers:
    @pytest.mark.parametrize("body", [b"", b"<html><h1>later</h1></html>", b"not XML"], ids=["empty", "html", "text"])
    @pytest.mark.parametrize("status", RETRIED)
    def test_statuses_that_pass_are_tried_again(self, server: FaultyS3, status: int, body: bytes):
        server.objects[KEY] = b"data"
        left = [(status, {}, body)] * 2
        server.instead = lambda *_: left.pop() if left else None
        assert run(Place(URL, server.storage_options()), lambda store: store.get(NAME)) == b"data"
        assert len(server.requests) == 3

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
    @pytest.mark.parametrize("status", NOT_RETRIED)
    def test_statuses_that_do_not_are_not(self, server: FaultyS3, status: int, method: str):
        server.instead = lambda *_: (status, {}, b"")
        uses = {"GET": lambda s: s.get(NAME), "PUT": lambda s: put(s, NAME, b"x"), "DELETE": lambda s: s.delete([NAME])}
        with pytest.raises(StoreError):
            run(Place(URL, server.storage_options()), uses[method])
        assert len(server.requests) == 1

    @pytest.mark.parametrize(
        "code",
        [
            "OperationAborted",
            "ConditionalRequestConflict",
            "SlowDown",
            "RequestTimeout",
            "IncompleteBody",
            "Throttling",
        ],
    )
    def test_codes_that_pass_are_tried_again(self, server: FaultyS3, code: str):
        status = 409 if code in {"OperationAborted", "ConditionalRequestConflict"} else 400
        left = [(status, {}, f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode())] * 2
        server.instead = lambda *_: left.pop() if left else None
        run(Place(URL, server.storage_options()), lambda store: put(store, NAME, b"data"))
        assert server.objects == {KEY: b"data"}

    @pytest.mark.parametrize(
        "body",
        [
            b"<html><head><title>413 Request Entity Too Large</title></head><body>nginx</body></html>",
            b"<html><body><p>Request Entity Too Large<br>nginx</body>",
            b"Request Entity Too Large",
            "Request Entity Too Large — ".encode() * 300,
        ],
        ids=["html", "not XML", "text", "long"],
    )
    def test_a_proxy_s_answer_is_quoted(self, server: FaultyS3, body: bytes):
        server.instead = lambda *_: (413, {"Content-Type": "text/html"}, body)
        with pytest.raises(StoreError, match=r"HTTP 413: .*Request Entity Too Large") as caught:
            run(Place(URL, server.storage_options()), lambda store: put(store, NAME, b"data"))
        assert len(str(caught.value)) < 500


class TestRedirects:
    @pytest.mark.parametrize("status", [301, 302, 307, 308])
    @pytest.mark.parametrize("region", [None, "eu-west-1"])
    def test_a_redirect_is_followed_and_signed_for_where_it_leads(self, server: FaultyS3, status: int, region):
        with faulty_s3() as other:

            def elsewhere(method: str, name: str, headers: dict[str, str]):
                location = f"{other.endpoint_url}/bucket/run/step-1/{name}"
                extra = {"x-amz-bucket-region": region} if region else {}
                return status, {"Location": location, **extra}, b"<Error><Code>TemporaryRedirect</Code></Error>"

            server.instead = elsewhere
            options = server.storage_options()
            save(options)
            load(options)
            assert not server.objects
            assert {name.rpartition("/")[0] for name in other.objects} == {"bucket/run/step-1"}
            host = other.endpoint_url.removeprefix("http://")
            assert {headers["host"] for headers in other.headers} == {host}
            assert all("authorization" in headers for headers in other.headers)
            if region:
                assert all(f"/{region}/s3/" in headers["authorization"] for headers in other.headers)

    def test_one_that_names_the_bucket_in_its_host_only(self, server: FaultyS3):
        with faulty_s3() as other:
            other.objects[f"run/step-1/{NAME}"] = b"data"
            server.instead = lambda *_: (307, {"Location": f"{other.endpoint_url}/run/step-1/{NAME}"}, b"")
            assert run(Place(URL, server.storage_options()), lambda store: store.get(NAME)) == b"data"

    def test_one_that_leads_nowhere_ends(self, server: FaultyS3):
        server.instead = lambda method, name, headers: (307, {"Location": f"{server.endpoint_url}/{KEY}"}, b"")
        with pytest.raises(StoreError):
            run(Place(URL, server.storage_options()), lambda store: store.get(NAME))
        assert len(server.requests) <= 10


class TestCertificates:
    @pytest.mark.parametrize("how", ["environment", "option"])
    def test_a_bundle_that_is_missing_is_refused_by_the_constructor(self, server: FaultyS3, monkeypatch, how: str):
        options = server.storage_options()
        if how == "environment":
            monkeypatch.setenv("AWS_CA_BUNDLE", "/nonexistent/ca.pem")
        else:
            options["client_kwargs"] = {"verify": "/nonexistent/ca.pem"}
        with pytest.raises(ConfigError, match=r"/nonexistent/ca\.pem"):
            AsyncStorageWriter(URL, storage_options=options)

    def test_one_in_the_profile_is_refused_at_once(self, server: FaultyS3, monkeypatch, tmp_path: Path):
        (tmp_path / "config").write_text("[default]\nca_bundle = /nonexistent/ca.pem\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        with pytest.raises(ConfigError, match=r"/nonexistent/ca\.pem"):
            run(Place(URL, server.storage_options()), lambda store: store.get(NAME))
        assert not server.requests


class TestKeys:
    @pytest.mark.parametrize("prefix", ["a?b=c", "a#b", "a%3Fb", "x?versionid", "versionId=3", "a&b", "?", "a?"])
    def test_every_key_is_the_prefix_and_the_name(self, server: FaultyS3, prefix: str):
        stranger = {f"bucket/{part}": b"a stranger's" for part in ("a", "x", prefix)}
        server.objects.update(stranger)
        options = server.storage_options()
        save(options, f"s3://bucket/{prefix}")
        load(options, f"s3://bucket/{prefix}")
        ours = server.objects.keys() - stranger.keys()
        assert all(key.startswith(f"bucket/{prefix}/") for key in ours)
        assert len(ours) == 2
        assert {key: server.objects[key] for key in stranger} == stranger

    @pytest.mark.parametrize("url", ["s3://b/m?versionId=3", "s3://b/m?x=1&versionId=3/step", "abfs://b/m?versionid=3"])
    def test_a_version_is_refused(self, url: str):
        with pytest.raises(ConfigError, match="names one version"):
            open_store(url)


class TestRights:
    """What the README's table says each thing needs."""

    def allow(self, server: FaultyS3, *actions: str) -> dict:
        server.rights = frozenset(f"s3:{action}" for action in actions)
        server.requests.clear()
        return server.storage_options()

    @pytest.mark.parametrize("overwrite", [True, False])
    @pytest.mark.parametrize("rights", [("PutObject",), ("PutObject", "GetObject")], ids="+".join)
    def test_a_first_save(self, server: FaultyS3, caplog, rights, overwrite: bool):
        options = self.allow(server, *rights)
        dcp.save(SAVED, storage_writer=AsyncStorageWriter(URL, storage_options=options, overwrite=overwrite))
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        load(self.allow(server, "GetObject"))

    def test_a_save_over_another(self, server: FaultyS3, caplog):
        options = self.allow(server, "PutObject", "GetObject", "DeleteObject")
        for _ in range(3):
            save(options)
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        assert len(server.objects) == 2
        load(self.allow(server, "GetObject"))

    def test_one_that_may_not_delete_stands_and_warns(self, server: FaultyS3, caplog):
        options = self.allow(server, "PutObject", "GetObject")
        save(options)
        assert "were not all" not in caplog.text
        save(options)
        assert "not all objects of the replaced checkpoint were deleted" in caplog.text
        load(options)

    def test_verify_and_prune(self, server: FaultyS3):
        save(server.storage_options())
        assert verify(URL, storage_options=self.allow(server, "GetObject", "ListBucket")).sound
        server.objects["bucket/run/step-1/0123456789abcdef-0-0.distcp.zst"] = b"of a dead save"
        options = self.allow(server, "GetObject", "DeleteObject", "ListBucket")
        assert len(prune(URL, storage_options=options, older_than=timedelta()).removed) == 1
        assert len(server.objects) == 2

    def test_nothing_is_put_where_a_put_is_denied(self, server: FaultyS3):
        with pytest.raises(dcp.CheckpointException, match="AccessDenied"):
            save(self.allow(server, "GetObject", "ListBucket"))

    def test_what_may_not_be_read_is_not_replaced(self, server: FaultyS3):
        save(server.storage_options())
        standing = dict(server.objects)
        with pytest.raises(dcp.CheckpointException, match="not replaced"):
            save(self.allow(server, "PutObject", "DeleteObject"))
        assert server.objects.items() >= standing.items()
        load(self.allow(server, "GetObject"))

    def test_a_load_of_what_is_absent_says_what_may_be_missing(self, server: FaultyS3):
        with pytest.raises(dcp.CheckpointException) as caught:
            load(self.allow(server, "GetObject"))
        (cause, _), *_ = caught.value.failures.values()
        assert isinstance(cause, AccessDenied)
        assert "s3:ListBucket" in str(cause)

    def test_a_wrong_key_is_no_right_that_is_missing(self, server: FaultyS3):
        server.instead = lambda *_: (
            403,
            {},
            b"<Error><Code>InvalidAccessKeyId</Code><Message>no such</Message></Error>",
        )
        with pytest.raises(dcp.CheckpointException):
            save(server.storage_options())
        assert not [method for method, _ in server.requests if method == "PUT"], "told before the data moved"


class Silent(BaseHTTPRequestHandler):
    """An HTTP server that does not say how long its files are."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"data")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


def test_http_without_a_length():
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        place = Place(f"http://127.0.0.1:{server.server_port}/run")
        assert run(place, lambda store: store.get(NAME)) == b"data"
        with pytest.raises(StoreError, match="Content-Length"):
            run(place, lambda store: store.size(NAME))
        server.shutdown()
        thread.join()
