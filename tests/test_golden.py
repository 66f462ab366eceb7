"""Format 1 is frozen: what is committed under fixtures/v1 must be read for ever, by this package and by its README."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
import zstandard
from torch.distributed.checkpoint import CheckpointException

from dcp_storage import AsyncStorageReader, ShardedLoadPlanner
from dcp_storage.errors import UnsupportedFormat
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
    assert set(checkpoint.tensors) == set(expected)
    for fqn, tensor in expected.items():
        flat = tensor.contiguous().view(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        assert checkpoint.tensor(fqn) == raw, fqn
        assert not raw or xxhash.xxh3_128_hexdigest(raw) in checkpoint.digests
    assert checkpoint.entries["nested.lr"][0] == len(checkpoint.entry("nested.lr"))
    assert checkpoint.paths["nested.steps.2.name"] == ["nested", "steps", 2, "name"]
    assert checkpoint.head["tensors"] == len(expected)
    assert checkpoint.head["info"] == {"step": 3}


class ReadmeReader:
    """dcp_storage/format/README.md, sentence by sentence, and nothing of the package."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        rest = (directory / ".metadata").read_bytes()
        text, rest = self.frame(rest)
        self.head = json.loads(text)
        assert (self.head["format"], self.head["version"], self.head["requires"]) == ("dcp_storage", 1, [])
        self.objects, self.tensors, self.entries, self.paths, self.digests = [], {}, {}, {}, []
        for kind, size, digest, first in self.head["frames"]:
            stored, rest = rest[:size], rest[size:]
            assert xxhash.xxh3_128_hexdigest(stored) == digest
            columns = json.loads(self.frame(stored)[0])
            assert columns.get("names", [first])[0] == first or kind == "objects"
            getattr(self, f"take_{kind}")(columns)
        assert rest == b""
        assert self.head["digest"] == "xxh3_128"
        for name, size in self.objects:
            assert (directory / name).stat().st_size == size

    @staticmethod
    def frame(data: bytes) -> tuple[bytes, bytes]:
        stream = zstandard.ZstdDecompressor().decompressobj()
        return stream.decompress(data), stream.unused_data

    def take_objects(self, columns):
        self.objects += zip(columns["names"], columns["sizes"], strict=True)

    def take_paths(self, columns):
        self.paths.update(zip(columns["names"], columns["paths"], strict=True))

    def take_tensors_digests(self, columns):
        self.digests += [columns["digests"][at : at + 32] for at in range(0, len(columns["digests"]), 32)]

    take_entries_digests = take_tensors_digests

    def take_entries(self, columns):
        items = self.items(columns["stored"], len(columns["names"]))
        self.entries.update(zip(columns["names"], zip(columns["sizes"], items, strict=True), strict=True))

    def take_tensors(self, columns):
        rows = zip(columns["dtypes"], columns["sizes"], columns["planes"], columns["layouts"], strict=True)
        cut = [(dtype, size, planes, self.boxes(size, layout)) for dtype, size, planes, layout in rows]
        items = iter(self.items(columns["stored"], sum(len(boxes) for *_, boxes in cut)))
        for name, (dtype, size, planes, boxes) in zip(columns["names"], cut, strict=True):
            self.tensors[name] = (dtype, size, planes, [(box, next(items)) for box in boxes])

    @staticmethod
    def boxes(size, layout):
        if layout is None:
            return [([0] * len(size), size)]
        if isinstance(layout, dict):
            return [(box[: len(size)], box[len(size) :]) for box in layout["boxes"]]
        starts = [list(range(0, n, cut)) if isinstance(cut, int) else cut for cut, n in zip(layout, size, strict=True)]
        edges = [[*each, n] for each, n in zip(starts, size, strict=True)]
        places = itertools.product(*(range(len(each)) for each in starts))
        return [
            ([e[p] for e, p in zip(edges, at, strict=True)], [e[p + 1] - e[p] for e, p in zip(edges, at, strict=True)])
            for at in places
        ]

    def items(self, stored, count):
        """Return the segments of each item: object, offset, lengths and checks."""
        segments = self.column(stored["segments"], count)
        total = sum(segments)
        blocks = self.column(stored["blocks"], total)
        lengths, checks, found = iter(stored["lengths"]), stored["checks"], []
        digits = 8 if self.head["codec"]["compression"] == "zstd" else 16
        for place in zip(self.column(stored["objects"], total), stored["offsets"], blocks, strict=True):
            check, checks = checks[: digits * place[2]], checks[digits * place[2] :]
            found.append((*place[:2], [next(lengths) for _ in range(place[2])], check))
        rest = iter(found)
        return [[next(rest) for _ in range(number)] for number in segments]

    @staticmethod
    def column(value, rows):
        return [value] * rows if isinstance(value, int) else value

    def tensor(self, fqn: str) -> bytes:
        dtype, size, planes, chunks = self.tensors[fqn]
        ((box, segments),) = chunks
        assert box == ([0] * len(size), size)
        raw = b"".join(self.unplaned(block, planes) for block in self.blocks(segments))
        assert len(raw) == getattr(torch, dtype).itemsize * math.prod(size)
        return raw

    def entry(self, fqn: str) -> bytes:
        return b"".join(self.blocks(self.entries[fqn][1]))

    def blocks(self, segments):
        for number, offset, lengths, checks in segments:
            data = (self.directory / self.objects[number][0]).read_bytes()
            digits = len(checks) // len(lengths)
            for index, length in enumerate(lengths):
                stored = data[offset : offset + length]
                yield self.decoded(stored, checks[index * digits : (index + 1) * digits])
                offset += length

    def decoded(self, stored: bytes, check: str) -> bytes:
        if self.head["codec"]["compression"] == "none":
            assert xxhash.xxh3_64_hexdigest(stored) == check
            return stored
        assert stored[-4:].hex() == check
        return zstandard.ZstdDecompressor().decompress(stored)

    @staticmethod
    def unplaned(laid: bytes, planes: int) -> bytes:
        count = len(laid) // planes
        return bytes(laid[plane * count + number] for number in range(count) for plane in range(planes))


def test_manifests_from_before_the_format_was_final_are_refused_by_name():
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"x": torch.ones(1)}, storage_reader=AsyncStorageReader(HERE.parent / "before_v1"))
    (error, _) = caught.value.failures[0]
    assert isinstance(error, UnsupportedFormat)
    assert "0.1.0, before the format was final" in str(error)
