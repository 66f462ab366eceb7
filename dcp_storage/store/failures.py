"""The one place where what a storage system raises becomes a `StoreError`."""

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
        url: Where the store is; shown without userinfo.
        secrets: Strings that no message and no printed cause may contain.
    """

    def __init__(self, url: str, secrets: frozenset[str] = frozenset()) -> None:
        self.url = strip_userinfo(url)
        self._secrets = secrets

    def mapped(self, operation: str, name: str = "", *, absent: type[StoreError] = StoreError) -> "Mapped":
        """Return a context that raises what fails in it as `StoreError`, or as `absent` for a `FileNotFoundError`.

        Only calls into the storage system belong in it: everything they raise is a failure of storage. Errors of this
        package pass as they are, and so does a cancellation. What may not be done is `AccessDenied`.
        """
        return Mapped(self, operation, name, absent)

    def error(self, operation: str, name: str, reason: str, kind: type[StoreError] = StoreError) -> StoreError:
        """Return the error for an operation on an object (or on the whole prefix where `name` is empty)."""
        where = f"{self.url.rstrip('/')}/{name}" if name else self.url
        return kind(f"cannot {operation} {where}: {mask(reason, self._secrets)}", url=self.url, object_name=name)

    def leaks(self, error: BaseException) -> bool:
        """Tell whether an error, or what is behind it, shows a secret."""
        texts = [f"{link} {link!r}" for link in chain(error)]
        return any(mask(text, self._secrets) != text for text in texts)


@dataclass(frozen=True)
class Mapped:
    """The context of one operation.

    No generator, and no name for what is raised: either would be a circle with the traceback, which holds the frames of
    all callers, and with them the state that they save, until the garbage collector comes.
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
        # A printed traceback shows the cause too, so a cause that holds a secret is left out of it.
        cause = None if self.failures.leaks(error) else error
        raise self.failures.error(self.operation, self.name, describe(error), kind) from cause


def describe(error: BaseException) -> str:
    """Return an error's type and text."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and every cause or context behind it."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        link = waiting.pop()
        if id(link) not in seen:
            seen.add(id(link))
            yield link
            waiting += [behind for behind in (link.__cause__, link.__context__) if behind is not None]


def is_range_beyond_end(error: BaseException) -> bool:
    """Tell whether a server answered 416: the object ends before the range starts."""
    return any(not _RANGE_NOT_SATISFIABLE.isdisjoint(_codes(link)) for link in chain(error))


def is_denied(error: BaseException) -> bool:
    """Tell whether an operation was denied."""
    if code := error_code(error):
        return code in _DENIED
    return isinstance(error, PermissionError) or any(not _DENIED.isdisjoint(_codes(link)) for link in chain(error))


def answer_of(error: BaseException) -> Mapping[str, Any]:
    """Return the S3 answer behind an error, as botocore parsed it, or nothing."""
    answers = (getattr(link, "response", None) for link in chain(error))
    return next((answer for answer in answers if isinstance(answer, dict)), {})


def error_code(error: BaseException) -> str:
    """Return the code in the S3 answer behind an error (`NoSuchBucket`, `SlowDown`), or an empty string."""
    return str(answer_of(error).get("Error", {}).get("Code", ""))


def http_status(error: BaseException) -> int:
    """Return the HTTP status of the S3 answer behind an error, or 0."""
    return int(answer_of(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _codes(error: BaseException) -> set[int | str]:
    """Return what a client keeps as status: botocore's code, aiohttp's `status`, gcsfs's `code`, azure's."""
    # The first there is: aiohttp warns whoever reads its `code`.
    kept = next((getattr(error, name) for name in ("status", "status_code", "code") if name in dir(error)), None)
    return {code for code in (kept, error_code(error)) if isinstance(code, int | str)}
