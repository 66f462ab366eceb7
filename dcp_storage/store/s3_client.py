"""What s3fs and botocore are given: a session with shared credentials, hooks, and no redirects of their own."""

import asyncio
import inspect
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit, urlunsplit

from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.loaders import create_loader

from dcp_storage.errors import ConfigError

_MOVED = {301, 302, 307, 308}
_ERROR_STATUS = 300
_WORDS = 200  # characters of an answer that is not S3's

_credentials: dict[object, Any] = {}
"""What a process has found: credentials that refresh themselves, or never change. Asking again costs a program that
runs, or a request to a service that limits them."""
os.register_at_fork(after_in_child=_credentials.clear)


def make_session(options: Mapping[str, Any]) -> AioSession:
    """Return a session that shares the process's credentials, and botocore's descriptions of services."""
    session = AioSession(**options)
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    session.register_component("credential_provider", Credentials(session, options))
    return session


@cache
def _loader(data_path: str | None) -> Any:
    """Return what holds botocore's descriptions of services: parsing them anew for every client takes 0.1 s."""
    return create_loader(data_path)


class Credentials:
    """botocore's credential provider, which remembers what it found until the environment or a file changes."""

    def __init__(self, session: AioSession, options: Mapping[str, Any]) -> None:
        self._resolver = session.get_component("credential_provider")
        files = (session.get_config_variable(name) for name in ("config_file", "credentials_file"))
        environment = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
        self._key = repr((sorted(options.items()), environment, [_stamp(file) for file in files]))

    async def load_credentials(self) -> Any:
        """Return the credentials, or `None` where there are none."""
        if self._key not in _credentials:
            found = await self._resolver.load_credentials()
            if found is None:
                return None
            _credentials[self._key] = found
        use_here(_credentials[self._key])
        return _credentials[self._key]

    def forget(self) -> None:
        """Ask anew the next time: a server refused them."""
        _credentials.pop(self._key, None)


def _stamp(file: str | None) -> tuple[str, int] | None:
    """Return what changes where a file does."""
    if not file:
        return None
    path = Path(file).expanduser()
    try:
        return str(path), path.stat().st_mtime_ns
    except OSError:
        return None


def use_here(credentials: Any) -> None:
    """Let credentials that refresh themselves do so in this event loop: their lock may belong to one that is over."""
    lock = getattr(credentials, "_refresh_lock", None)
    if isinstance(lock, asyncio.Lock) and not lock.locked():
        credentials._refresh_lock = asyncio.Lock()  # noqa: SLF001


def check_certificates(options: Mapping[str, Any], session: AioSession | None = None) -> None:
    """Refuse a bundle of certificates that is not there: every request would fail without naming it.

    Raises:
        ConfigError: The storage options, the environment or the profile name a missing file.
    """
    given = (options.get("client_kwargs") or {}).get("verify")
    if given is None:
        given = session.get_config_variable("ca_bundle") if session else os.environ.get("AWS_CA_BUNDLE")
    if isinstance(given, str) and not Path(given).exists():
        raise ConfigError(
            f"{given}: no such file with certificates (AWS_CA_BUNDLE, ca_bundle in the profile, or verify)"
        )


class _Unredirected:
    """aiohttp's session, but for redirects: those that it followed would lose their signature."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def request(self, *args: Any, **kwargs: Any) -> Any:
        return self._session.request(*args, allow_redirects=False, **kwargs)


class _HttpSession(AIOHTTPSession):  # type: ignore[misc]
    async def _get_session(self, proxy_url: str | None) -> _Unredirected:
        return _Unredirected(await super()._get_session(proxy_url))


def http_options() -> dict[str, Any]:
    """Return what makes aiobotocore leave redirects to us, where it is new enough for that."""
    takes = "http_session_cls" in inspect.signature(AioConfig.__init__).parameters
    return {"http_session_cls": _HttpSession} if takes and hasattr(AIOHTTPSession, "_get_session") else {}


class MovedError(Exception):
    """A server told where a bucket is; the same request goes there now."""


class Redirects:
    """Where a bucket is, as a server told: requests go there from the start, signed for it."""

    def __init__(self) -> None:
        self._moved: tuple[str, str, str] | None = None
        self._region: str | None = None

    def needs_retry(self, response: Any, request_dict: Mapping[str, Any], **_: Any) -> None:
        """Take a redirect to another place of the same object: a hook of botocore, whose own asks for the bucket first.

        Raises:
            MovedError: It was one.
        """
        headers = response[0].headers if response else {}
        if response is None or response[0].status_code not in _MOVED or "location" not in headers:
            return
        old, new = urlsplit(request_dict["url"]), urlsplit(urljoin(request_dict["url"], headers["location"]))
        if (old.scheme, new.scheme) == ("https", "http"):
            return
        self._moved = (f"{new.scheme}://{new.netloc}", *_without_common_end(old.path, new.path))
        self._region = headers.get("x-amz-bucket-region")
        raise MovedError(f"the server redirects to {urlunsplit((*new[:3], '', ''))}")

    def before_call(self, params: dict[str, Any], **_: Any) -> None:
        """Send a request where its bucket is: a hook of botocore, before it signs."""
        if self._moved is None:
            return
        origin, old, new = self._moved
        url = urlsplit(params["url"])
        if url.path.startswith(old):
            params["url"] = urlunsplit((*urlsplit(origin)[:2], new + url.path[len(old) :], url.query, ""))
        if self._region:
            params.get("context", {}).get("signing", {})["region"] = self._region


def _without_common_end(one: str, other: str) -> tuple[str, str]:
    """Return what stands before one key in the paths of two servers: a bucket's name, or nothing."""
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return one, other


def hook(client: Any, redirects: Redirects) -> None:
    """Register what a store wants to see of each request of a client."""
    client.meta.events.register("before-call.s3", _expect_nothing)
    client.meta.events.register("before-call.s3", redirects.before_call)
    client.meta.events.register_first("needs-retry.s3", redirects.needs_retry)
    client.meta.events.register("before-parse.s3", _keep_words)


def _expect_nothing(params: dict[str, Any], **_: Any) -> None:
    """Send a body without asking first: aiohttp sets no limit to how long it waits for `100 Continue`."""
    params["headers"].pop("Expect", None)


def _keep_words(response_dict: Mapping[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Keep the first words of an answer that is no S3 server's (a proxy's HTML), which botocore would drop."""
    status, body = response_dict["status_code"], response_dict["body"]
    if status < _ERROR_STATUS or not isinstance(body, bytes) or not body.strip() or b"<Code>" in body:
        return
    words = " ".join(re.sub(r"<[^>]*>", " ", body.decode(errors="replace")).split())
    customized_response_dict["Error"] = {"Code": str(status), "Message": f"HTTP {status}: {words[:_WORDS]}"}
