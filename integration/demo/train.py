"""Real training of MiniLM with FSDP2 and AdamW: masked words and SimCSE-like pairs made by dropout."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from integration.demo.model import MiniLM, Shape
from integration.demo.sentences import SENTENCES
from integration.demo.wordpiece import Tokenizer

BATCH = 8
MASKED_SHARE = 0.15
TEMPERATURE = 0.05
LEARNING_RATE = 1e-4


class Trainer:
    """A sharded model and its optimizer on the ranks of the default process group.

    Without weights the model starts with unset memory: all of it must come from a checkpoint.
    """

    def __init__(self, tokenizer: Tokenizer, rank: int, world_size: int, weights: dict[str, Tensor] | None) -> None:
        self.step_number = 0
        self._tokenizer = tokenizer
        self._rank, self._world_size = rank, world_size
        self._random = torch.Generator().manual_seed(rank)
        torch.manual_seed(rank)
        self._model = _shard(_build(weights), world_size)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=LEARNING_RATE)

    def step(self) -> float:
        """Train one step on this rank's share of the text; return the loss, averaged over ranks."""
        self._model.train()
        start = (self.step_number * self._world_size + self._rank) * BATCH
        rows = [SENTENCES[(start + index) % len(SENTENCES)] for index in range(BATCH)]
        loss = self._loss(rows * 2, self._random)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step_number += 1
        return self._average(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the loss on fixed text with fixed masks and no dropout: the same on any number of ranks."""
        self._model.eval()
        fixed = torch.Generator().manual_seed(0)
        return float(self._loss(list(SENTENCES[:BATCH]) * 2, fixed))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: fp32 weights, a bf16 copy of them to ship, AdamW's moments and the step."""
        model, optimizer = get_state_dict(self._model, self._optimizer)
        weights = cast("dict[str, Tensor]", model)
        return {
            "model": weights,
            "model_bf16": {
                name: value.to(torch.bfloat16) for name, value in weights.items() if value.is_floating_point()
            },
            "optim": optimizer,
            "step": self.step_number,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a loaded state."""
        set_state_dict(self._model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        self.step_number = state["step"]

    def _loss(self, sentences: list[str], random: torch.Generator) -> Tensor:
        """Masked-word loss plus contrast: the halves of a batch are the same sentences under different dropout."""
        ids = torch.tensor(self._tokenizer.encode_batch(sentences))
        masked = torch.rand(ids.shape, generator=random).lt(MASKED_SHARE).logical_and(ids != 0)
        masked[:, 1] = True  # at least one a row, and the same shape of loss for every batch
        output = self._model(ids.masked_fill(masked, self._tokenizer.mask_id), masked)
        first, second = functional.normalize(output.pooled, dim=-1).chunk(2)
        contrast = functional.cross_entropy(first @ second.T / TEMPERATURE, torch.arange(len(first)))
        return functional.cross_entropy(output.logits, ids[masked]) + contrast

    def _average(self, loss: Tensor) -> float:
        torch.distributed.all_reduce(loss)
        return float(loss) / self._world_size


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the published weights."""
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = load_file(path)
    return weights


def describe(weights: dict[str, Tensor]) -> dict[str, int]:
    """Return how many tensors, values and bytes there are."""
    return {
        "tensors": len(weights),
        "values": sum(value.numel() for value in weights.values()),
        "bytes": sum(value.nbytes for value in weights.values()),
    }


def _build(weights: dict[str, Tensor] | None) -> MiniLM:
    with torch.device("meta"):
        model = MiniLM(Shape())
    if weights is not None:
        model.load_state_dict(weights, strict=True, assign=True)
    return model


def _shard(model: MiniLM, world_size: int) -> MiniLM:
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if any(value.is_meta for value in model.state_dict().values()):
        model.to_empty(device="cpu")
    return model
