"""State dicts for tests: made, blanked, and compared bit for bit."""

from typing import Any

import torch
from torch import Tensor

from dcp_storage.format.dtypes import ITEM_BYTES

DTYPES = tuple(name for name in ITEM_BYTES if hasattr(torch, name))
"""Those that this torch has."""


def every_dtype() -> dict[str, Any]:
    """Tensors of every dtype that can be stored, and of every awkward shape and stride, and objects that are none."""
    torch.manual_seed(0)
    state: dict[str, Any] = {name: random_bits(getattr(torch, name), (77, 33)) for name in DTYPES}
    wide = torch.randn(100, 100)
    state["strided"] = {
        "transposed": torch.randn(30, 20).t(),
        "view": wide[::2, 10:20],
        "permuted": torch.randn(3, 4, 5).permute(2, 0, 1),
        "expanded": torch.randn(1, 7).expand(5, 7),
        "conjugate": torch.randn(4, 4, dtype=torch.complex64).conj(),
        "negative": torch.randn(4, 4, dtype=torch.complex64).conj().imag,
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "kernel of one": torch.randn(16, 8, 1, 1).to(memory_format=torch.channels_last),
        "a column": torch.randn(1, 4).t(),
        "one element": torch.randn(9).as_strided((1,), (5,)),
        "any stride": torch.randn(99).as_strided((1, 5, 1), (77, 1, 13)),
        "zeros": torch._efficientzerotensor(3, 4),
    }
    state["shapes"] = {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "one": torch.ones(1, 1, 1)}
    state["parameter"] = torch.nn.Parameter(torch.randn(5, 5))
    state["objects"] = {
        "lr": 0.1,
        "list": [1, "two", {"three": 3}],
        "none": None,
        "text": "Grüße",
        "size": torch.Size([2]),
    }
    return state


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor whose bits are random, so that NaNs, infinities and denormals are among its elements."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.bool)
    count = dtype.itemsize * torch.Size(shape).numel()
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).view(shape)


def blank_like(value: Any) -> Any:
    """The same structure with tensors of zeros and objects that are all `None`."""
    if isinstance(value, Tensor):
        return torch.zeros(value.numel() * value.dtype.itemsize, dtype=torch.uint8).view(value.dtype).view(value.shape)
    if isinstance(value, dict):
        return {key: blank_like(item) for key, item in value.items()}
    if isinstance(value, list):
        return [blank_like(item) for item in value]
    return None


def bits(tensor: Tensor) -> Tensor:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8) if flat.numel() else flat


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Compare two state dicts, tensors bit for bit."""
    if isinstance(expected, Tensor):
        assert found.shape == expected.shape, path
        assert found.dtype == expected.dtype, path
        assert torch.equal(bits(found), bits(expected)), path
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for number, item in enumerate(expected):
            assert_same(found[number], item, f"{path}.{number}")
    else:
        assert found == expected, path
