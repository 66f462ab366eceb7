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
"""Requests for one operation, where neither the storage options nor the environment or profile say."""
_READ_TIMEOUTS = 20
"""How many times `read_timeout` an operation may take, with all its requests: 5 minutes, where nothing else is said."""

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
    """Return how many requests an operation may take, by botocore's rules on who says so."""
    if "total_max_attempts" in settings:
        return settings["total_max_attempts"]
    if "max_attempts" in settings:  # those after the first
        return settings["max_attempts"] + 1
    return session.get_config_variable("max_attempts") or _ATTEMPTS


def retries_of(settings: Mapping[str, int], session: Any, read_timeout: float | None) -> Retries:
    """Return how often operations are tried, and for how long.

    Args:
        settings: botocore's `retries`.
        session: Where else to look for them.
        read_timeout: Seconds without a byte after which a request fails, or `None` for any.
    """
    limit_s = None if read_timeout is None else _READ_TIMEOUTS * read_timeout
    return Retries(_attempts(settings, session), limit_s, is_transient, is_timeout)


def is_timeout(error: Exception) -> bool:
    """Tell whether a server did not answer at all."""
    return isinstance(error, ConnectTimeoutError | ReadTimeoutError)


def is_transient(error: Exception) -> bool:
    """Tell whether the same request may succeed later."""
    if isinstance(error, _BROKEN):
        return not isinstance(error, SSLError)
    status = http_status(error)
    busy = status in _BUSY_STATUS or (status >= _SERVER_ERROR and status != _NOT_IMPLEMENTED)
    return busy or error_code(error) in _BUSY_CODES
