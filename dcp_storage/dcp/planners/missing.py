"""Entries that a load asks for and that are not in the checkpoint: which may be missing, and the messages."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from dcp_storage.errors import ConfigError, MissingKeys

Skipped = dict[str, list[str]]
"""The missing names that each pattern allows; a name counts for the first pattern that it matches."""


def check_patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns as a tuple.

    Raises:
        ConfigError: They are one string, or not strings.
    """
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f'allow_missing is {patterns!r}; pass a tuple of patterns, such as ("optim.*",)')
    return tuple(patterns)


def skip(missing: Iterable[str], unexpected: Sequence[str], patterns: Sequence[str]) -> Skipped:
    """Return the missing names that each pattern allows.

    Raises:
        MissingKeys: A name is not allowed by any pattern.
    """
    skipped: Skipped = {pattern: [] for pattern in patterns}
    refused: list[str] = []
    for fqn in missing:
        pattern = next((pattern for pattern in patterns if fnmatchcase(fqn, pattern)), None)
        (refused if pattern is None else skipped[pattern]).append(fqn)
    if refused:
        raise MissingKeys(_missing(refused, unexpected), fqns=refused)
    return skipped


def _missing(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    total = f" ({len(missing)} in all)" if len(missing) > 1 else ""
    there = f"; it has {_unasked(unexpected)}{_renamed(missing, unexpected)}" if unexpected else ""
    stop = "" if there.endswith("?") else "."
    first = missing[0].partition(".")[0]
    pattern = f"{first}.*" if all(fqn.startswith(f"{first}.") for fqn in missing) else missing[0]
    return (
        f"Missing key in checkpoint state_dict: {some(missing)}{total}{there}{stop} Load without them, or skip them: "
        f"allow_missing=({pattern!r},), or allow_partial_load=True for anything that is missing"
    )


_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "model.")
"""Prefixes that module wrappers add to the names of parameters."""


def _renamed(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Return a hint at the name that a missing entry seems to have in the checkpoint, if there is one."""
    there = {_unwrapped(fqn): fqn for fqn in unexpected}
    alike = [(fqn, there[_unwrapped(fqn)]) for fqn in missing if _unwrapped(fqn) in there]
    if alike:
        here, stored = alike[0]
        return (
            f". {len(alike)} of the missing names differ only by a wrapper's prefix: {here} is {stored} there. Save "
            "and load the state dict of the same module (get_model_state_dict returns names without prefixes)"
        )
    close = get_close_matches(missing[0], unexpected, 1, 0.8)
    return f". Is {missing[0]} called {close[0]} there?" if close else ""


def _unwrapped(fqn: str) -> str:
    for prefix in _WRAPPERS:
        fqn = fqn.replace(prefix, "")
    return fqn


def tell_skipped(
    skipped: Skipped, asked: Sequence[str], unexpected: Sequence[str], empty: Mapping[str, int]
) -> str | None:
    """Return the warning of a load that skips something, or `None` if it loads everything that it asks for.

    Args:
        skipped: See `skip`.
        asked: The names that it asks for.
        unexpected: The names in the checkpoint that it does not ask for.
        empty: Empty dicts of the state, with the number of entries below each in the checkpoint.
    """
    count = sum(map(len, skipped.values()))
    sentences = []
    if count and count == len(asked):
        sentences.append(f"Nothing is loaded: none of the {count} entries of this state dict are in the checkpoint")
    elif count:
        by = ", ".join(repr(pattern) for pattern, names in skipped.items() if names)
        names = some([fqn for held in skipped.values() for fqn in held])
        sentences.append(
            f"{count} of {len(asked)} entries are not in the checkpoint and keep their values: {names} ({by})"
        )
    idle = [pattern for pattern in skipped if not any(fnmatchcase(fqn, pattern) for fqn in asked)]
    if idle:
        sentences.append(f"allow_missing has patterns that match no entry of this state dict: {some(idle)}")
    sentences += [
        f"{fqn} is empty here, but the checkpoint has {below} entries below it, which are not loaded"
        for fqn, below in empty.items()
    ]
    if count and unexpected:
        missing = [fqn for held in skipped.values() for fqn in held]
        sentences.append(f"The checkpoint has {_unasked(unexpected)}{_renamed(missing, unexpected)}")
    return ". ".join(sentences) if sentences else None


def _unasked(unexpected: Sequence[str]) -> str:
    return f"{len(unexpected)} that were not asked for: {some(unexpected)}"


def some(names: Sequence[Any], most: int = 5) -> str:
    """Return the first names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
