"""The version of this package, also available in copies that are not installed."""

__version__ = "0.1.0"
