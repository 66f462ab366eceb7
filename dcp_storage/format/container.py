"""The zip containers that `torch.save` writes: a pickle, and a record for each storage."""

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

T = TypeVar("T")

_LOCAL_HEADER = struct.Struct("<26xHH")
"""The header before a record; it ends with the lengths of the name and the extra field, which follow it."""
_SCRIPT = "constants.pkl"
"""Marks a TorchScript archive, which `torch.load` would run."""


class Container(NamedTuple):
    """The contents of a container.

    Attributes:
        pickled: Its pickle.
        storages: The size of each storage in bytes, by its key.
        read: Returns a storage by its key.
        byteorder: Returns the byte order of the storages' elements, `b"little"` or `b"big"`.
    """

    pickled: bytes
    storages: Mapping[str, int]
    read: Callable[[str], bytes]
    byteorder: Callable[[], bytes]


def read_container(data: bytes, *, most_records: int = 1 << 20) -> Container:
    """Return the contents of a container, none of whose records may be compressed.

    Raises:
        ValueError: It is not a container that `torch.save` writes; the message says why.
    """
    return _typed(lambda: _read(data, most_records))


def _typed(read: Callable[[], T]) -> T:
    try:
        return read()
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        EOFError,
        RuntimeError,
        OSError,
        OverflowError,
        KeyError,
        struct.error,
    ) as error:
        raise ValueError(f"it is not a container of torch.save: {error}") from error


def _read(data: bytes, most_records: int) -> Container:
    archive = zipfile.ZipFile(io.BytesIO(data))
    records = archive.infolist()
    if len(records) > most_records or not all(_is_stored(record, len(data)) for record in records):
        raise ValueError("it is not a container that torch.save made")
    # By the name below the archive's top-level folder, which is named after the file.
    named = {record.filename.partition("/")[2]: record for record in records}
    if "data.pkl" not in named or _SCRIPT in named or len(named) != len(records):
        raise ValueError("it is not a container that torch.save made")
    storages = {name.removeprefix("data/"): record.file_size for name, record in named.items() if name[:5] == "data/"}

    def read(name: str) -> bytes:
        return _typed(lambda: _content(archive, named[name], data))

    return Container(
        _content(archive, named["data.pkl"], data),
        storages,
        read=lambda key: read(f"data/{key}"),
        byteorder=lambda: read("byteorder") if "byteorder" in named else b"little",
    )


def _is_stored(record: zipfile.ZipInfo, available: int) -> bool:
    """Return whether a record is uncompressed: torch would inflate a compressed one to any size."""
    plain = record.compress_type == zipfile.ZIP_STORED and record.file_size == record.compress_size
    return plain and 0 <= record.header_offset <= available - record.file_size


def _content(archive: zipfile.ZipFile, record: zipfile.ZipInfo, data: bytes) -> bytes:
    if record.CRC:
        return archive.read(record)
    # torch.serialization.set_crc32_options(False) stores no checksums, without which zipfile reads nothing.
    header = data[record.header_offset : record.header_offset + _LOCAL_HEADER.size]
    start = record.header_offset + len(header) + sum(_LOCAL_HEADER.unpack(header))
    return data[start : start + record.file_size]
