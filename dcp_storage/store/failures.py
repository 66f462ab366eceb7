"""The one place that turns the errors of storage systems into `StoreError`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dcp_storage.errors import AccessDenied, DcpStorageError, StoreError
from dcp_storage.store.redact import mask, strip_userinfo

_RANGE_NOT_SATISFIABLE = {416, "416", "InvalidRange"}
_DENIED = {401, 403, "401", "403", "AccessDenied", "Forbidden"}


class Failures:
    """Maps the errors of one store.

    Args:
        url: The store's URL; shown without userinfo.
        secrets: Strings that no message and no printed cause may contain.
    """

    def __init__(self, url: str, secrets: frozenset[str] = frozenset()) -> None:
        self.url = strip_userinfo(url)
        self._secrets = secrets

    def mapped(self, operation: str, name: str = "", *, absent: type[StoreError] = StoreError) -> "Mapped":
        """Return a context manager that turns errors into `StoreError`, and a `FileNotFoundError` into `absent`.

        Only calls into the storage system belong in its block: everything that they raise is a failure of storage.
        Errors of this package and cancellations pass unchanged. A missing permission becomes `AccessDenied`.
        """
        return Mapped(self, operation, name, absent)

    def error(self, operation: str, name: str, reason: str, kind: type[StoreError] = StoreError) -> StoreError:
        """Return the error for an operation on an object (or on the whole prefix if `name` is empty)."""
        where = f"{self.url.rstrip('/')}/{name}" if name else self.url
        return kind(f"cannot {operation} {where}: {mask(reason, self._secrets)}", url=self.url, object_name=name)

    def leaks(self, error: BaseException) -> bool:
        """Return whether an error, or one in its chain, shows a secret."""
        texts = [f"{link} {link!r}" for link in chain(error)]
        return any(mask(text, self._secrets) != text for text in texts)


@dataclass(frozen=True)
class Mapped:
    """The context manager of one operation.

    It is not a generator and has no variable for the error that it raises: either would form a reference cycle with
    the traceback, which keeps the frames of all callers, and the state that they save, alive until garbage collection.
    """

    failures: Failures
    operation: str
    name: str
    absent: type[StoreError]

    def __enter__(self) -> None:
        """Begin the operation."""

    def __exit__(self, _type: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, DcpStorageError):
            return
        kind = self.absent if isinstance(error, FileNotFoundError) else StoreError
        if is_denied(error):
            kind = AccessDenied
        # A printed traceback shows the cause too, so a cause that contains a secret is left out.
        cause = None if self.failures.leaks(error) else error
        raise self.failures.error(self.operation, self.name, describe(error), kind) from cause


def describe(error: BaseException) -> str:
    """Return an error's type and text."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all errors in its chain of causes and contexts."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        link = waiting.pop()
        if id(link) not in seen:
            seen.add(id(link))
            yield link
            waiting += [behind for behind in (link.__cause__, link.__context__) if behind is not None]


def is_range_beyond_end(error: BaseException) -> bool:
    """Return whether a server responded with 416: the object ends before the range starts."""
    return any(not _RANGE_NOT_SATISFIABLE.isdisjoint(_codes(link)) for link in chain(error))


def is_denied(error: BaseException) -> bool:
    """Return whether an operation was denied."""
    if code := error_code(error):
        return code in _DENIED
    return isinstance(error, PermissionError) or any(not _DENIED.isdisjoint(_codes(link)) for link in chain(error))


def answer_of(error: BaseException) -> Mapping[str, Any]:
    """Return the S3 response behind an error, as parsed by botocore, or an empty dict."""
    answers = (getattr(link, "response", None) for link in chain(error))
    return next((answer for answer in answers if isinstance(answer, dict)), {})


def error_code(error: BaseException) -> str:
    """Return the code in the S3 response behind an error (`NoSuchBucket`, `SlowDown`), or an empty string."""
    return str(answer_of(error).get("Error", {}).get("Code", ""))


def http_status(error: BaseException) -> int:
    """Return the HTTP status of the S3 response behind an error, or 0."""
    return int(answer_of(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _codes(error: BaseException) -> set[int | str]:
    """Return the status that a client gives an error: botocore's code, aiohttp's `status`, gcsfs's `code`, Azure's."""
    # Only the first that exists: reading aiohttp's `code` emits a warning.
    kept = next((getattr(error, name) for name in ("status", "status_code", "code") if name in dir(error)), None)
    return {code for code in (kept, error_code(error)) if isinstance(code, int | str)}
