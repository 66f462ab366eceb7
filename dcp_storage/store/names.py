"""Checks object names: a store never leaves its prefix, whatever a manifest says."""

from dcp_storage.errors import ConfigError
from dcp_storage.format.names import ObjectName, is_safe


def check_name(name: str) -> ObjectName:
    """Return an object name, which must stay below its prefix.

    Raises:
        ConfigError: It does not; see `is_safe`.
    """
    if not is_safe(name):
        raise ConfigError(f"{name!r} is not a valid object name; names are flat, without separators")
    return ObjectName(name)
