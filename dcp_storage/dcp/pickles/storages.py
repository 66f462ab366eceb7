"""The storages of tensors in a container, as pickles refer to them."""

import sys
from typing import Any

import torch

from dcp_storage.dcp.undocumented import typed_storage
from dcp_storage.format.container import Container
from dcp_storage.format.pickles import Damaged


class Storages:
    """Reads each storage that a pickle refers to once, to the host: tensors that shared a storage still share it."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._loaded: dict[str, torch.UntypedStorage] = {}

    def load(self, reference: Any) -> object:
        """Return a storage.

        Raises:
            Damaged: It is not in the container, or has another size.
        """
        match reference:
            case ("storage", kind, str(key), str(), int(count)) if key in self._container.storages:
                dtype = torch.uint8 if kind is torch.UntypedStorage else getattr(kind, "dtype", None)
                if isinstance(dtype, torch.dtype) and count * dtype.itemsize == self._container.storages[key]:
                    return typed_storage(self._untyped(key, dtype), dtype)
        raise Damaged("it refers to a storage that is not in the container")

    def _untyped(self, key: str, dtype: torch.dtype) -> torch.UntypedStorage:
        if key not in self._loaded:
            data = bytearray(self._container.read(key))
            storage = (
                torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
                if data
                else torch.empty(0).untyped_storage()
            )
            if self._container.byteorder() != sys.byteorder.encode():
                storage.byteswap(dtype)  # type: ignore[no-untyped-call]
            self._loaded[key] = storage
        return self._loaded[key]
