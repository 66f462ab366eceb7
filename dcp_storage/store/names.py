"""Object names are flat; a store never leaves its prefix, whatever a manifest says."""

from dcp_storage.errors import ConfigError


def check_name(name: str) -> str:
    """Return an object name that stays below its prefix.

    Raises:
        ConfigError: The name is empty, is `.` or `..`, or contains a separator or NUL.
    """
    if name in {"", ".", ".."} or any(char in name for char in "/\\\0"):
        raise ConfigError(f"{name!r} is no object name; names are flat, without separators")
    return name
