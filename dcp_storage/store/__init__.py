"""Stores of objects. The only layer that uses fsspec and aiofiles."""
