"""The version of this package, also where it was not installed but copied."""

__version__ = "0.1.0"
