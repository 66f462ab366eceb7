"""Numbers as people read them."""


def size_text(count: int) -> str:
    """Return a number of bytes as people read it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return counted(count, "byte")


def counted(count: int, what: str, plural: str = "") -> str:
    """Return a number and its noun."""
    return f"{count:,} {what if count == 1 else plural or what + 's'}"


def transfer_text(raw_bytes: int, stored_bytes: int, seconds: float) -> str:
    """Return what a transfer moved: `318.4 MB as 256.1 MB (0.804) in 0.61 s (522 MB/s)`."""
    ratio = f" ({stored_bytes / raw_bytes:.3f})" if raw_bytes else ""
    rate = f" ({raw_bytes / seconds / 1e6:,.0f} MB/s)" if seconds and raw_bytes else ""
    return f"{size_text(raw_bytes)} as {size_text(stored_bytes)}{ratio} in {seconds:.2f} s{rate}"
