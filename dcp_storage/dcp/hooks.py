"""The decorator of every hook that DCP calls."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from dcp_storage.errors import DcpStorageError

P = ParamSpec("P")
R = TypeVar("R")


def hook(function: Callable[P, R]) -> Callable[P, R]:
    """Drop this package's frames from the traceback of a typed error, whose message is more useful.

    DCP sends the traceback to all ranks, and prints it once per rank. The cause of the error keeps its traceback.
    """

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except DcpStorageError as error:
            raise error.with_traceback(None)  # noqa: B904

    return called
