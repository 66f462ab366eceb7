"""What is saved: states like those that training has, and ones that are hard in one way each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from dcp_storage.config import GIB, KIB, MIB
from integration.demo.machine import find_model

State = dict[str, Tensor]
_POISON = 0xA5
_MOMENT = 1e-3


@dataclass(frozen=True)
class Sizes:
    """How large the states are: raw bytes, and a number of tensors."""

    training: int = GIB
    huge: int = 2 * GIB
    small_tensors: int = 20_000


QUICK = Sizes(training=4 * MIB, huge=16 * MIB, small_tensors=200)


def mixed(sizes: Sizes) -> State:
    """Mixed precision training: bf16 weights and fp32 Adam moments of transformer layers, normal-like values."""
    hidden = next(width for width in (1024, 512, 128) if sizes.training >= width * width * 300 or width == 128)
    state: State = {}
    for name, shape in _transformer(hidden):
        if raw_bytes(state) >= sizes.training:
            break
        weight = torch.randn(shape, generator=_generator(len(state))).mul_(0.02)
        state |= {f"model.{name}": weight.bfloat16(), **_moments(name, weight, seed=len(state))}
    return state


def minilm(sizes: Sizes) -> State:
    """The published fp32 weights of all-MiniLM-L6-v2 with AdamW moments, repeated until they are large enough."""
    from safetensors.torch import load_file

    weights = load_file(find_model() / "model.safetensors")
    floats = [(name, weight) for name, weight in weights.items() if weight.is_floating_point()]
    state: State = {}
    for copy in count():
        for name, weight in floats:
            if raw_bytes(state) >= sizes.training:
                return state
            full = f"{copy}.{name}"
            state |= {f"model.{full}": weight.clone(), **_moments(full, weight, seed=len(state))}
    raise AssertionError


def small(sizes: Sizes) -> State:
    """Many tensors of 4 KiB."""
    values = torch.randn(sizes.small_tensors, KIB, generator=_generator(0))
    return {f"tensor.{number:05}": row.clone() for number, row in enumerate(values)}


def tiny(sizes: Sizes) -> State:
    """A few small tensors: what is left is what any save and load costs."""
    return {f"tensor.{number}": torch.randn(KIB, generator=_generator(number)) for number in range(4)}


def few(sizes: Sizes) -> State:
    """A model of 4 MB in a hundred tensors."""
    return {f"tensor.{number}": torch.randn(10 * KIB, generator=_generator(number)) for number in range(100)}


def huge(sizes: Sizes) -> State:
    """One fp32 tensor."""
    rows = max(1, sizes.huge // (4 * 4096))
    return {"tensor": torch.randn(rows, 4096, generator=_generator(0))}


def zeros(sizes: Sizes) -> State:
    """Nothing but zeros, in fp32."""
    each = max(1, sizes.training // 16)
    return {f"tensor.{number}": torch.zeros(each // 4) for number in range(16)}


STATES: dict[str, Callable[[Sizes], State]] = {
    each.__name__: each for each in (mixed, minilm, tiny, few, small, huge, zeros)
}


def on(state: State, device: str) -> State:
    """Return a state on a device, with all copies to it done."""
    if device == "cpu":
        return state
    moved = {name: tensor.to(device) for name, tensor in state.items()}
    torch.get_device_module(device).synchronize()
    return moved


def raw_bytes(state: State) -> int:
    """Return the size of all tensors."""
    return sum(tensor.nbytes for tensor in state.values())


def like(state: State) -> State:
    """Return a state of the same shapes whose memory has been touched, to load into."""
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def poison(state: State) -> None:
    """Overwrite everything, so that nothing passes for loaded that was not."""
    for tensor in state.values():
        tensor.view(-1).view(torch.uint8).fill_(_POISON)


def check_equal(found: State, expected: State, what: str) -> None:
    """Compare bit by bit.

    Raises:
        RuntimeError: Something differs.
    """
    different = [name for name in expected if not torch.equal(_bits(found[name]), _bits(expected[name]))]
    if different:
        raise RuntimeError(f"{what} did not give back what was saved: {different[:3]} and {len(different)} in all")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _moments(name: str, weight: Tensor, *, seed: int) -> State:
    average = torch.randn(weight.shape, generator=_generator(seed + 1)).mul_(_MOMENT)
    return {f"optim.exp_avg.{name}": average, f"optim.exp_avg_sq.{name}": average.square()}


def _transformer(hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the weights of ever more layers."""
    for layer in count():
        for part in ("q", "k", "v", "o"):
            yield f"layers.{layer}.attention.{part}", (hidden, hidden)
        yield f"layers.{layer}.norm", (hidden,)
        yield f"layers.{layer}.mlp.up", (4 * hidden, hidden)
        yield f"layers.{layer}.mlp.down", (hidden, 4 * hidden)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
