"""Keep credentials out of whatever a person or a log may read."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

_SECRET_OPTION = re.compile(r"key|secret|token|passw|passphrase|credential|conn.*str|sas|auth|signature", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)([^/\s]*)@")
_MASK = "***"


def strip_userinfo(url: str) -> str:
    """Return the URL (or a text with URLs in it) without `user:password@`."""
    return _USERINFO.sub("", url)


def secrets_in(url: str, options: Mapping[str, Any]) -> frozenset[str]:
    """Return every string in a URL's userinfo or in storage options, at any depth, that must never be shown."""
    return frozenset(filter(None, (*_userinfo_secrets(url), *_option_secrets(options))))


def mask(text: str, secrets: Iterable[str]) -> str:
    """Return the text with every secret replaced; the longest first, as one may contain another."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, _MASK)
    return strip_userinfo(text)


def _userinfo_secrets(text: str) -> Iterator[str]:
    for userinfo in _USERINFO.findall(text):
        password = userinfo.partition(":")[2]
        yield from (userinfo, password, unquote(password))


def _option_secrets(options: Any, *, secret: bool = False) -> Iterator[str]:
    """Yield the strings below an option whose own name, or that of one around it, says that it is secret."""
    if isinstance(options, Mapping):
        for name, value in options.items():
            yield from _option_secrets(value, secret=secret or bool(_SECRET_OPTION.search(str(name))))
    elif isinstance(options, str):
        yield from (options,) if secret else _userinfo_secrets(options)
    elif isinstance(options, Sequence) and not isinstance(options, bytes):
        for value in options:
            yield from _option_secrets(value, secret=secret)
