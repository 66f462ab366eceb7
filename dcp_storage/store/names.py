"""A store never leaves its prefix, whatever a manifest says."""

from dcp_storage.errors import ConfigError
from dcp_storage.format.names import is_safe


def check_name(name: str) -> str:
    """Return an object name that stays below its prefix.

    Raises:
        ConfigError: It does not: `is_safe` says what does.
    """
    if not is_safe(name):
        raise ConfigError(f"{name!r} is not an object name; names are flat, without separators")
    return name
