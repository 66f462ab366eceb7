"""Pickled objects, rebuilt by nothing but what is known to be harmless or was listed as trusted."""
