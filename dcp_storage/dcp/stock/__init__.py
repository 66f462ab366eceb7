"""Loads checkpoints of DCP's own writers."""
