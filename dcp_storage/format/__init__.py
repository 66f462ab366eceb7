"""Bytes only: blocks, the manifest, stock metadata. No torch, no fsspec, no async. README.md specifies the format."""
