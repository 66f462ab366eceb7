"""Measuring a process from inside: each measurement runs in a fresh one."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from dcp_storage.config import KIB

T = TypeVar("T")


def in_fresh_process(function: Callable[..., T], *args: object) -> T:
    """Return what a function of a module makes of arguments that pickle, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def rss_bytes() -> int:
    """Return the memory that this process holds."""
    return _status("VmRSS")


def start_peak() -> int:
    """Forget the most memory that this process ever held, and return what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return rss_bytes()


def peak_bytes() -> int:
    """Return the most memory that this process held since `start_peak`."""
    return _status("VmHWM")


def bytes_read() -> int:
    """Return how many bytes this process has ever got from `read` calls, from the page cache too."""
    return _number(Path("/proc/self/io"), "rchar")


def pin_torch_threads() -> None:
    """Leave one thread to torch, and the other cores to what runs beside it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _status(name: str) -> int:
    return _number(Path("/proc/self/status"), name) * KIB


def _number(path: Path, name: str) -> int:
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return next(int(value.split()[0]) for key, _, value in lines if key == name)
