"""Torch's dtypes and their names in the format."""

import torch

from dcp_storage.config import Codec
from dcp_storage.errors import UnsupportedFormat, UnsupportedTensor
from dcp_storage.format.codecs.blocks import CODECS
from dcp_storage.format.dtypes import ITEM_BYTES, number_bytes

_DTYPES = {name: dtype for name in ITEM_BYTES if isinstance(dtype := getattr(torch, name, None), torch.dtype)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_name(dtype: torch.dtype, fqn: str) -> str:
    """Return the format's name of a dtype.

    Raises:
        UnsupportedTensor: The format has no such dtype (quantized, sub-byte, bits).
    """
    if dtype not in _NAMES:
        raise UnsupportedTensor(
            f"{fqn} has dtype {dtype}, which cannot be stored: save its integer representation or a dequantized copy",
            fqn=fqn,
        )
    return _NAMES[dtype]


def check_text(fqn: str) -> None:
    """Refuse a name that cannot be encoded in the manifest's UTF-8.

    Raises:
        UnsupportedTensor: It contains a lone surrogate.
    """
    try:
        fqn.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedTensor(f"the name {fqn!a} is not valid UTF-8: rename the entry") from error


def dtype_from_name(name: str) -> torch.dtype:
    """Return torch's dtype with this name.

    Raises:
        UnsupportedFormat: This torch has no such dtype.
    """
    if name not in _DTYPES:
        raise UnsupportedFormat(
            f"torch {torch.__version__} has no dtype {name!r}, which the checkpoint uses: update torch"
        )
    return _DTYPES[name]


def planes_of(dtype: str, codec: Codec) -> int:
    """Return the number of byte planes for elements of this dtype; 1 is none."""
    return CODECS[codec.compression].planes(number_bytes(dtype)) if codec.byte_planes else 1
