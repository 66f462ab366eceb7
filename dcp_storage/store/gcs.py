"""Google Cloud Storage through gcsfs, which requests credentials and a bucket's layout whenever it is opened."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dcp_storage.store.remote import RemoteStore


@dataclass
class _Found:
    """A process's cache for one set of options: credentials that refresh themselves, layouts that never change."""

    credentials: Any = None
    layouts: dict[str, Any] = field(default_factory=dict)


_found: dict[str, _Found] = {}
os.register_at_fork(after_in_child=_found.clear)


class GcsStore(RemoteStore):
    """A prefix in a bucket."""

    def __init__(self, url: str, fs_class: Any, storage_options: Mapping[str, Any]) -> None:
        super().__init__(url, fs_class, storage_options)
        environment = sorted(
            item for item in os.environ.items() if item[0].startswith(("GOOGLE_", "GCE_", "CLOUDSDK_"))
        )
        self._key = repr((sorted(self._options.items(), key=repr), environment))

    def _make_fs(self) -> Any:
        found = _found.setdefault(self._key, _Found())
        if found.credentials is not None:
            self._options = {**self._options, "token": found.credentials}
        fs = super()._make_fs()
        found.credentials = getattr(getattr(fs, "credentials", None), "credentials", None)
        if hasattr(fs, "_storage_layout_cache"):
            fs._storage_layout_cache = found.layouts  # noqa: SLF001
        return fs
