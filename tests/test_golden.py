"""Format 1 is frozen: what is committed under fixtures/v1 must be read for ever, by this package and by its README."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
import zstandard

from dcp_storage import AsyncStorageReader, ShardedLoadPlanner
from tests.fixtures.make_v1 import CODECS, HERE, golden_state
from tests.states import assert_same, blank_like


@pytest.mark.parametrize("codec", CODECS)
def test_golden_checkpoints_load_bit_for_bit(codec):
    state = blank_like(golden_state())
    dcp.load(state, storage_reader=AsyncStorageReader(HERE / codec), planner=ShardedLoadPlanner())
    assert_same(state, golden_state())


@pytest.mark.parametrize("codec", CODECS)
def test_a_reader_written_from_the_format_s_readme_agrees(codec):
    checkpoint = ReadmeReader(HERE / codec)
    expected = {fqn: value for fqn, value in golden_state().items() if isinstance(value, torch.Tensor)}
    assert set(checkpoint.manifest["tensors"]) == set(expected)
    for fqn, tensor in expected.items():
        flat = tensor.contiguous().view(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        assert checkpoint.chunk(fqn, 0) == raw, fqn
    steps = checkpoint.manifest["bytes"]
    assert steps["nested.lr"]["size"] == len(checkpoint.entry("nested.lr"))
    assert checkpoint.manifest["planner_data"]["nested.steps.2.name"] == ["nested", "steps", 2, "name"]


class ReadmeReader:
    """dcp_storage/format/README.md, sentence by sentence, and nothing of the package."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = json.loads(zstandard.ZstdDecompressor().decompress((directory / ".metadata").read_bytes()))
        assert (self.manifest["format"], self.manifest["version"]) == ("dcp_storage", 1)
        for name, size in self.manifest["objects"]:
            assert (directory / name).stat().st_size == size

    def chunk(self, fqn: str, number: int) -> bytes:
        tensor = self.manifest["tensors"][fqn]
        chunk = tensor["chunks"][number]
        size = getattr(torch, tensor["dtype"]).itemsize * math.prod(chunk["sizes"])
        raw = b"".join(self.unplaned(block, tensor["planes"]) for block in self.blocks(chunk["segments"]))
        assert len(raw) == size
        return raw

    def entry(self, fqn: str) -> bytes:
        return b"".join(self.blocks(self.manifest["bytes"][fqn]["segments"]))

    def blocks(self, segments):
        for number, offset, lengths, checks in segments:
            data = (self.directory / self.manifest["objects"][number][0]).read_bytes()
            digits = len(checks) // len(lengths)
            for index, length in enumerate(lengths):
                stored = data[offset : offset + length]
                yield self.decoded(stored, checks[index * digits : (index + 1) * digits])
                offset += length

    def decoded(self, stored: bytes, check: str) -> bytes:
        if self.manifest["codec"]["compression"] == "none":
            assert xxhash.xxh3_64_hexdigest(stored) == check
            return stored
        assert stored[-4:].hex() == check
        return zstandard.ZstdDecompressor().decompress(stored)

    @staticmethod
    def unplaned(laid: bytes, planes: int) -> bytes:
        count = len(laid) // planes
        return bytes(laid[plane * count + number] for number in range(count) for plane in range(planes))
