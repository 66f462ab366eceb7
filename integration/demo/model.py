"""A BERT encoder in plain torch, with the parameter names of the published MiniLM weights."""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """The sizes of the network; the defaults are MiniLM-L6-H384."""

    layers: int = 6
    hidden: int = 384
    heads: int = 12
    inner: int = 1536
    vocabulary: int = 30522
    positions: int = 512
    dropout: float = 0.1


class Output(NamedTuple):
    """What the encoder makes of a batch: one vector a token, one a sentence, and logits of the asked-for tokens."""

    hidden: Tensor
    pooled: Tensor
    logits: Tensor


class MiniLM(nn.Module):
    """Embeddings, transformer layers and the pooler of BERT.

    The token embeddings also serve as output layer, so that a masked-word loss reaches every row of them.
    """

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        shape = shape or Shape()
        self.embeddings = Embeddings(shape)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(shape) for _ in range(shape.layers))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(shape.hidden, shape.hidden)})

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, first to last."""
        return cast("nn.ModuleList", self.encoder["layer"])

    def forward(self, ids: Tensor, wanted: Tensor) -> Output:
        """Encode `ids` (batch x length, 0 is padding); `wanted` marks the tokens whose logits are returned."""
        attend = (ids != 0)[:, None, None, :]
        hidden = self.embeddings(ids)
        for layer in self.layers:
            hidden = layer(hidden, attend)
        pooled = torch.tanh(self.pooler["dense"](hidden[:, 0]))
        logits = functional.linear(hidden[wanted], self.embeddings.word_embeddings.weight)
        return Output(hidden, pooled, logits)


class Embeddings(nn.Module):
    """Token, position and segment embeddings, summed and normalised."""

    position_ids: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(shape.vocabulary, shape.hidden)
        self.position_embeddings = nn.Embedding(shape.positions, shape.hidden)
        self.token_type_embeddings = nn.Embedding(2, shape.hidden)
        self.LayerNorm = _layer_norm(shape)
        self.dropout = nn.Dropout(shape.dropout)
        self.register_buffer("position_ids", torch.arange(shape.positions)[None])

    def forward(self, ids: Tensor) -> Tensor:
        """Embed a batch of single-segment rows."""
        positions = self.position_ids[:, : ids.shape[1]]
        tokens = self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(ids))
        summed = tokens + self.position_embeddings(positions)
        return cast("Tensor", self.dropout(self.LayerNorm(summed)))


class Layer(nn.Module):
    """Self-attention and a two-layer perceptron, each followed by dropout, residual and layer norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        square = {name: nn.Linear(shape.hidden, shape.hidden) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(square), "output": _output(shape.hidden, shape)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(shape.hidden, shape.inner)})
        self.output = _output(shape.inner, shape)
        self.heads = shape.heads
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, hidden: Tensor, attend: Tensor) -> Tensor:
        """Apply the layer; `attend` is False where a token is padding."""
        hidden = self._add(cast("nn.ModuleDict", self.attention["output"]), self._attend(hidden, attend), hidden)
        inner = functional.gelu(self.intermediate["dense"](hidden))
        return self._add(self.output, inner, hidden)

    def _attend(self, hidden: Tensor, attend: Tensor) -> Tensor:
        parts = cast("nn.ModuleDict", self.attention["self"])
        query, key, value = (
            parts[name](hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
        )
        rate = self.dropout.p if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=attend, dropout_p=rate)
        return mixed.transpose(1, 2).flatten(-2)

    def _add(self, parts: nn.ModuleDict, inner: Tensor, residual: Tensor) -> Tensor:
        return cast("Tensor", parts["LayerNorm"](self.dropout(parts["dense"](inner)) + residual))


def _output(inner: int, shape: Shape) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inner, shape.hidden), "LayerNorm": _layer_norm(shape)})


def _layer_norm(shape: Shape) -> nn.LayerNorm:
    return nn.LayerNorm(shape.hidden, eps=1e-12)
