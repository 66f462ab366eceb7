"""Where objects live. The only layer that knows fsspec and aiofiles."""
