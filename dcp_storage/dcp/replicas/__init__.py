"""Checks whether ranks hold the same data under one name, since only one rank's copy is saved."""
