"""Blocks: how the bytes of an item are encoded, checked and decoded."""
