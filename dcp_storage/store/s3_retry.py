"""Which failures of a request to S3 are transient, and how often it is tried."""

from collections.abc import Mapping
from typing import Any

from aiohttp import ClientConnectionError, ClientPayloadError
from botocore.exceptions import (
    ConnectionError as NoConnectionError,
)
from botocore.exceptions import (
    ConnectTimeoutError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
    SSLError,
)

from dcp_storage.store.failures import error_code, http_status
from dcp_storage.store.retries import Retries

_ATTEMPTS = 10
"""Requests per operation, unless the storage options, the environment or the profile set the number."""
_READ_TIMEOUTS = 20
"""The limit of an operation with all its requests, as a multiple of `read_timeout`: 5 minutes by default."""

_BROKEN = (NoConnectionError, HTTPClientError, IncompleteReadError, ClientConnectionError, ClientPayloadError)
_SERVER_ERROR = 500
_NOT_IMPLEMENTED = 501
_BUSY_STATUS = {408, 429}
_BUSY_CODES = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestTimeout",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "ConditionalRequestConflict",
    "OperationAborted",
}


def _attempts(settings: Mapping[str, int], session: Any) -> int:
    """Return the maximum number of requests per operation, by botocore's order of precedence."""
    if "total_max_attempts" in settings:
        return settings["total_max_attempts"]
    if "max_attempts" in settings:  # not counting the first
        return settings["max_attempts"] + 1
    return session.get_config_variable("max_attempts") or _ATTEMPTS


def retries_of(settings: Mapping[str, int], session: Any, read_timeout: float | None) -> Retries:
    """Return how often operations are tried, and for how long.

    Args:
        settings: botocore's `retries`.
        session: The session, which has the settings of the environment and the profile.
        read_timeout: Seconds without a byte after which a request fails, or `None` for no limit.
    """
    limit_s = None if read_timeout is None else _READ_TIMEOUTS * read_timeout
    return Retries(_attempts(settings, session), limit_s, is_transient=is_transient, is_timeout=is_timeout)


def is_timeout(error: Exception) -> bool:
    """Return whether a server did not respond at all."""
    return isinstance(error, ConnectTimeoutError | ReadTimeoutError)


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed later."""
    if isinstance(error, _BROKEN):
        return not isinstance(error, SSLError)
    status = http_status(error)
    busy = status in _BUSY_STATUS or (status >= _SERVER_ERROR and status != _NOT_IMPLEMENTED)
    return busy or error_code(error) in _BUSY_CODES
