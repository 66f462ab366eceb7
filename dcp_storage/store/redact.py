"""Keeps credentials out of messages and logs."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

_SECRET_OPTION = re.compile(
    r"key|secret|token|passw|passphrase|credential|conn.*str|sas|auth|signature|sig$", re.IGNORECASE
)
_USERINFO = re.compile(r"(?<=://)([^/\s]*)@")
_PARAMETER = re.compile(r"(?<=[?&])([^=&#\s]+)=([^&#\s]+)")
_MASK = "***"
_LONG = 8  # characters


def strip_userinfo(url: str) -> str:
    """Return a URL (or a text that contains URLs) without `user:password@` and the values of secret parameters."""
    return _PARAMETER.sub(_mask_parameter, _USERINFO.sub("", url))


def _mask_parameter(match: re.Match[str]) -> str:
    return f"{match[1]}={_MASK}" if _SECRET_OPTION.search(match[1]) else match[0]


def secrets_in(url: str, options: Mapping[str, Any]) -> frozenset[str]:
    """Return every string in a URL or in storage options, at any depth, that must never be shown."""
    return frozenset(filter(None, (*_url_secrets(url), *_option_secrets(options))))


def mask(text: str, secrets: Iterable[str]) -> str:
    """Return the text with every secret masked, also in the forms of `repr` and URLs; the longest first.

    A single character is not a secret: it would mask letters in every message.
    """
    secrets = [secret for secret in secrets if len(secret) > 1]
    shown = {form for secret in secrets for form in (secret, repr(secret)[1:-1], quote(secret), quote(secret, safe=""))}
    for form in sorted(shown, key=len, reverse=True):
        # A short one might be part of any word.
        text = text.replace(form, _MASK) if _is_long(form) else re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", _MASK, text)
    return strip_userinfo(text)


def _url_secrets(text: str) -> Iterator[str]:
    for userinfo in _USERINFO.findall(text):
        password = userinfo.partition(":")[2]
        yield from (userinfo, password, unquote(password))
    for name, value in _PARAMETER.findall(text):
        if _SECRET_OPTION.search(name):
            yield from (value, unquote(value))


def _option_secrets(options: Any, *, secret: bool = False) -> Iterator[str]:
    """Yield the strings of options whose name, or that of an enclosing option, marks them as secret."""
    if isinstance(options, Mapping):
        for name, value in options.items():
            yield from _option_secrets(value, secret=secret or bool(_SECRET_OPTION.search(str(name))))
    elif isinstance(options, bytes):
        yield from _option_secrets(options.decode(errors="replace"), secret=secret)
    elif isinstance(options, str):
        yield from (options, *filter(_is_long, options.split())) if secret else _url_secrets(options)
    elif isinstance(options, Sequence):
        for value in options:
            yield from _option_secrets(value, secret=secret)


def _is_long(word: str) -> bool:
    """Return whether a word of a secret (a header, a PEM file) is a secret by itself."""
    return len(word) >= _LONG
