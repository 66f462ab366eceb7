"""Checkpoints of DCP's own writers, loaded."""
