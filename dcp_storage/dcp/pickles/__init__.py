"""Pickled objects, rebuilt only by code that is known to be harmless or was listed as trusted."""
