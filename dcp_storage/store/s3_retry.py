"""Which failures of a request to S3 are transient, how often it is retried, and after how long."""

import random
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

_ATTEMPTS = 10
"""Requests for one operation, where neither the storage options nor the environment or profile say."""
MOST_TIMEOUTS = 2
"""The most timeouts of one operation: an endpoint that refuses or drops connections fails in half a minute."""
_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 4

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


def attempts(retries: Mapping[str, int], session: Any) -> int:
    """Return how many requests an operation may take, by botocore's rules on who says so."""
    if "total_max_attempts" in retries:
        return retries["total_max_attempts"]
    if "max_attempts" in retries:  # those after the first
        return retries["max_attempts"] + 1
    return session.get_config_variable("max_attempts") or _ATTEMPTS


def pause(attempt: int) -> float:
    """Return the seconds to wait after an attempt: exponential, with jitter."""
    longest: float = min(_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS)
    return random.uniform(0.5, 1) * longest  # noqa: S311 - no secret


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
