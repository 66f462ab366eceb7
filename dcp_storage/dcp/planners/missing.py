"""What a load asks for and the checkpoint does not hold: which of it may be missing, and what is said of it."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from dcp_storage.errors import ConfigError, MissingKeys

Skipped = dict[str, list[str]]
"""By pattern the names that it allows to be missing; a name counts for the first that it matches."""


def check_patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns as a tuple.

    Raises:
        ConfigError: They are one string, or not strings.
    """
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f'allow_missing is {patterns!r}; give a tuple of patterns, such as ("optim.*",)')
    return tuple(patterns)


def skip(missing: Iterable[str], unexpected: Sequence[str], patterns: Sequence[str]) -> Skipped:
    """Return what of the missing names each pattern allows.

    Raises:
        MissingKeys: No pattern allows one.
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
    there = f"; it holds {_unasked(unexpected)}{_renamed(missing, unexpected)}" if unexpected else ""
    first = missing[0].partition(".")[0]
    pattern = f"{first}.*" if all(fqn.startswith(f"{first}.") for fqn in missing) else missing[0]
    return (
        f"Missing key in checkpoint state_dict: {some(missing)}{total}{there}. Load without them, or skip them: "
        f"allow_missing=({pattern!r},), or allow_partial_load=True for whatever is missing"
    )


_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "model.")
"""What wrappers of modules put into the names of their parameters."""


def _renamed(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Return what a missing name seems to be called in the checkpoint, if that can be told."""
    there = {_unwrapped(fqn): fqn for fqn in unexpected}
    alike = [(fqn, there[_unwrapped(fqn)]) for fqn in missing if _unwrapped(fqn) in there]
    if alike:
        here, stored = alike[0]
        return (
            f". {len(alike)} of the missing names differ by a wrapper's prefix only: {here} is {stored} there. Save "
            "and load the state dict of the same module (get_model_state_dict gives names without prefixes)"
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
    """Return what a load that leaves something alone should say, or `None` if it loads all that it asks for.

    Args:
        skipped: See `skip`.
        asked: The names that it asks for.
        unexpected: The names that the checkpoint holds and it does not ask for.
        empty: Dicts of the state that are empty, with how many entries the checkpoint holds below each.
    """
    count = sum(map(len, skipped.values()))
    sentences = []
    if count and count == len(asked):
        sentences.append(f"Nothing is loaded: the checkpoint holds none of the {count} entries of this state dict")
    elif count:
        by = ", ".join(repr(pattern) for pattern, names in skipped.items() if names)
        names = some([fqn for held in skipped.values() for fqn in held])
        sentences.append(
            f"{count} of {len(asked)} entries are not in the checkpoint and stay as they are: {names} ({by})"
        )
    idle = [pattern for pattern in skipped if not any(fnmatchcase(fqn, pattern) for fqn in asked)]
    if idle:
        sentences.append(f"allow_missing has patterns that match no entry of this state dict: {some(idle)}")
    sentences += [
        f"{fqn} is empty here, and the checkpoint holds {below} entries below it, which are not loaded"
        for fqn, below in empty.items()
    ]
    if count and unexpected:
        missing = [fqn for held in skipped.values() for fqn in held]
        sentences.append(f"The checkpoint holds {_unasked(unexpected)}{_renamed(missing, unexpected)}")
    return ". ".join(sentences) if sentences else None


def _unasked(unexpected: Sequence[str]) -> str:
    return f"{len(unexpected)} that were not asked for: {some(unexpected)}"


def some(names: Sequence[Any], most: int = 5) -> str:
    """Return the first names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
