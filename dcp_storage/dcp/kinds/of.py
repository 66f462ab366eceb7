"""The kind of a value: the first that takes it."""

import torch
from torch import Tensor

from dcp_storage.dcp.kinds.base import Kind
from dcp_storage.dcp.kinds.distributed import Distributed
from dcp_storage.dcp.kinds.hooked import Hooked, Wrapper
from dcp_storage.dcp.kinds.plain import Checkpointable, Plain, Sharded
from dcp_storage.dcp.undocumented import settled

_KINDS: tuple[type[Kind], ...] = (Distributed, Wrapper, Hooked, Checkpointable, Sharded, Plain)
"""In the order of DCP's own rules: hooks before attributes, and attributes before the type."""


def kind_of(fqn: str, value: Tensor) -> Kind:
    """Return the kind of a tensor, by its type, its hooks and its attributes."""
    if type(value) in {Tensor, torch.nn.Parameter} and not value.__dict__:  # by far the most common
        return Plain(fqn, value)
    value = settled(value)
    return next(kind for kind in _KINDS if kind.takes(value))(fqn, value)
