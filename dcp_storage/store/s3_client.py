"""For s3fs and botocore: a session with shared credentials, and hooks, which also follow redirects."""

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
_WORDS = 200  # characters of a response that is not S3's

_credentials: dict[object, Any] = {}
"""The process's cache of credentials, which refresh themselves or never change. Looking them up again runs a
program, or sends a request to a service that limits requests."""
os.register_at_fork(after_in_child=_credentials.clear)


def make_session(options: Mapping[str, Any]) -> AioSession:
    """Return a session that shares the process's credentials, and botocore's service descriptions."""
    session = AioSession(**options)
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    session.register_component("credential_provider", Credentials(session, options))
    return session


@cache
def _loader(data_path: str | None) -> Any:
    """Return a loader that keeps botocore's service descriptions: parsing them for every client takes 0.1 s."""
    return create_loader(data_path)


class Credentials:
    """botocore's credential provider, with a cache that is valid until the environment or a file changes."""

    def __init__(self, session: AioSession, options: Mapping[str, Any]) -> None:
        self._resolver = session.get_component("credential_provider")
        files = (session.get_config_variable(name) for name in ("config_file", "credentials_file"))
        environment = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
        self._key = repr((sorted(options.items()), environment, [_stamp(file) for file in files]))

    async def load_credentials(self) -> Any:
        """Return the credentials, or `None` if there are none."""
        if self._key not in _credentials:
            found = await self._resolver.load_credentials()
            if found is None:
                return None
            _credentials[self._key] = found
        use_here(_credentials[self._key])
        return _credentials[self._key]

    def forget(self) -> None:
        """Look them up again the next time: a server refused them."""
        _credentials.pop(self._key, None)


def _stamp(file: str | None) -> tuple[str, int] | None:
    """Return a value that changes when a file does."""
    if not file:
        return None
    path = Path(file).expanduser()
    try:
        return str(path), path.stat().st_mtime_ns
    except OSError:
        return None


def use_here(credentials: Any) -> None:
    """Let credentials refresh themselves in this event loop: their lock may belong to one that has ended."""
    lock = getattr(credentials, "_refresh_lock", None)
    if isinstance(lock, asyncio.Lock) and not lock.locked():
        credentials._refresh_lock = asyncio.Lock()  # noqa: SLF001


def check_certificates(options: Mapping[str, Any], session: AioSession | None = None) -> None:
    """Refuse a certificate bundle that does not exist: every request would fail without naming it.

    Raises:
        ConfigError: The storage options, the environment or the profile name a missing file.
    """
    given = (options.get("client_kwargs") or {}).get("verify")
    if given is None:
        given = session.get_config_variable("ca_bundle") if session else os.environ.get("AWS_CA_BUNDLE")
    if isinstance(given, str) and not Path(given).exists():
        raise ConfigError(
            f"{given}: this certificate bundle does not exist (see AWS_CA_BUNDLE, ca_bundle in the profile, or verify)"
        )


class _Unredirected:
    """aiohttp's session without redirects: the requests that it redirects would lose their signature."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def request(self, *args: Any, **kwargs: Any) -> Any:
        return self._session.request(*args, allow_redirects=False, **kwargs)


class _HttpSession(AIOHTTPSession):  # type: ignore[misc]
    async def _get_session(self, proxy_url: str | None) -> _Unredirected:
        return _Unredirected(await super()._get_session(proxy_url))


def http_options() -> dict[str, Any]:
    """Return the options that make aiobotocore leave redirects to us, if it is new enough for that."""
    takes = "http_session_cls" in inspect.signature(AioConfig.__init__).parameters
    return {"http_session_cls": _HttpSession} if takes and hasattr(AIOHTTPSession, "_get_session") else {}


class MovedError(Exception):
    """A server redirected a request, which is now sent to the new place of its bucket."""


class Redirects:
    """The place that a server redirected a bucket to: later requests go there directly, signed for it."""

    def __init__(self) -> None:
        self._moved: tuple[str, str, str] | None = None
        self._region: str | None = None

    def needs_retry(self, response: Any, request_dict: Mapping[str, Any], **_: Any) -> None:
        """Record a redirect of an object to another place (a hook of botocore, whose own looks up the bucket first).

        Raises:
            MovedError: The response is one.
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
        """Send a request to the place of its bucket (a hook of botocore, called before it signs)."""
        if self._moved is None:
            return
        origin, old, new = self._moved
        url = urlsplit(params["url"])
        if url.path.startswith(old):
            params["url"] = urlunsplit((*urlsplit(origin)[:2], new + url.path[len(old) :], url.query, ""))
        if self._region:
            params.get("context", {}).get("signing", {})["region"] = self._region


def _without_common_end(one: str, other: str) -> tuple[str, str]:
    """Return what precedes the same key in the paths of two servers: a bucket's name, or nothing."""
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return one, other


def hook(client: Any, redirects: Redirects) -> None:
    """Register a store's hooks for the requests of a client."""
    client.meta.events.register("before-call.s3", _expect_nothing)
    client.meta.events.register("before-call.s3", redirects.before_call)
    client.meta.events.register_first("needs-retry.s3", redirects.needs_retry)
    client.meta.events.register("before-parse.s3", _keep_words)


def _expect_nothing(params: dict[str, Any], **_: Any) -> None:
    """Send a body without asking first: aiohttp waits for `100 Continue` without a timeout."""
    params["headers"].pop("Expect", None)


def _keep_words(response_dict: Mapping[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Keep the first words of a response that is not S3's (a proxy's HTML), which botocore would drop."""
    status, body = response_dict["status_code"], response_dict["body"]
    if status < _ERROR_STATUS or not isinstance(body, bytes) or not body.strip() or b"<Code>" in body:
        return
    words = " ".join(re.sub(r"<[^>]*>", " ", body.decode(errors="replace")).split())
    customized_response_dict["Error"] = {"Code": str(status), "Message": f"HTTP {status}: {words[:_WORDS]}"}
