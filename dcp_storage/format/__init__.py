"""Bytes only: blocks, the manifest, stock metadata. No torch, no fsspec, no async. README.md is the format."""
