"""What is stored is standard zstd: the command-line tool checks every data object and prints the manifest."""

import json
import shutil
import subprocess

import pytest
import torch.distributed.checkpoint as dcp

from dcp_storage import AsyncStorageWriter, Codec, ShardedSavePlanner
from tests.states import every_dtype

pytestmark = [
    pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the zstd command-line tool"),
]


def zstd(*arguments):
    return subprocess.run(["zstd", *arguments], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("codec", [Codec(), Codec(byte_planes=False, block_bytes=4096), Codec(level=9)])
def test_the_tool_checks_every_data_object_and_prints_the_manifest(tmp_path, codec):
    dcp.save(every_dtype(), storage_writer=AsyncStorageWriter(tmp_path, codec=codec), planner=ShardedSavePlanner())
    objects = sorted(tmp_path.glob("*.distcp.zst"))
    assert objects
    zstd("-t", *objects)
    zstd("-t", tmp_path / ".metadata")
    head, *frames = map(json.loads, zstd("-dc", tmp_path / ".metadata").stdout.splitlines())
    body = {kind: frame for (kind, *_), frame in zip(head["frames"], frames, strict=True)}
    assert sorted(body["objects"]["names"]) == [file.name for file in objects]
    assert dict(zip(body["tensors"]["names"], body["tensors"]["dtypes"], strict=True))["bfloat16"] == "bfloat16"


def test_the_tool_finds_a_flipped_bit(tmp_path):
    dcp.save(every_dtype(), storage_writer=AsyncStorageWriter(tmp_path))
    [damaged, *_] = tmp_path.glob("*.distcp.zst")
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    with pytest.raises(subprocess.CalledProcessError):
        zstd("-t", damaged)
