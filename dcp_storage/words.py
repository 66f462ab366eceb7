"""Numbers formatted for people."""

from rich.filesize import decimal


def counted(count: int, what: str, plural: str = "") -> str:
    """Return a number and its noun."""
    return f"{count:,} {what if count == 1 else plural or what + 's'}"


def transfer_text(raw_bytes: int, stored_bytes: int, seconds: float) -> str:
    """Describe what a transfer moved: `318.4 MB as 256.1 MB (0.804) in 0.61 s (522 MB/s)`."""
    ratio = f" ({stored_bytes / raw_bytes:.3f})" if raw_bytes else ""
    rate = f" ({raw_bytes / seconds / 1e6:,.0f} MB/s)" if seconds and raw_bytes else ""
    return f"{decimal(raw_bytes)} as {decimal(stored_bytes)}{ratio} in {seconds:.2f} s{rate}"
