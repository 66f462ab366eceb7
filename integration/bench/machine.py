"""What the run was made on."""

import os
import time
from pathlib import Path
from typing import Any

import torch

from dcp_storage.config import GIB, MIB
from integration.demo.machine import describe_machine


def describe(directory: Path) -> dict[str, Any]:
    """Return processor, memory, versions, and the disk that a directory is on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        **describe_machine(),
        **_gpu(),
        "memory": f"{memory / GIB:.1f} GiB",
        "load": os.getloadavg()[0],
        "disk": _mount(directory),
        "disk writes": f"{_disk_bytes_per_second(directory) / 1e9:.2f} GB/s",
    }


def _gpu() -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _mount(directory: Path) -> str:
    """Return device and type of the file system that a directory is on."""
    found = ("?", "", "?")
    for line in Path("/proc/mounts").read_text().splitlines():
        device, point, kind = line.split()[:3]
        if directory.resolve().is_relative_to(point) and len(point) >= len(found[1]):
            found = (device, point, kind)
    return f"{found[0]} ({found[2]})"


def _disk_bytes_per_second(directory: Path) -> float:
    """Return how fast one thread writes and syncs bytes that do not compress."""
    data, path, pieces = os.urandom(32 * MIB), directory / "probe", 8
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(pieces):
            file.write(data)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return pieces * len(data) / seconds
