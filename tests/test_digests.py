"""Digests of raw bytes: in frames of their own, checked by `verify` alone, and one number that proves a checkpoint."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
import zstandard

from dcp_storage import AsyncStorageReader, AsyncStorageWriter, Codec, ShardedLoadPlanner, ShardedSavePlanner
from dcp_storage.cli import main
from dcp_storage.errors import ConfigError, ManifestCorrupt, UnsupportedFormat
from dcp_storage.format.codecs.blocks import CODECS as BLOCK_CODECS
from dcp_storage.format.codecs.blocks import ItemEncoder
from dcp_storage.format.manifest.manifest import decode
from dcp_storage.verify import verify
from tests import documents
from tests.states import assert_same, blank_like

MAKERS = {"xxh3_128": xxhash.xxh3_128_hexdigest, "sha256": lambda raw: hashlib.sha256(raw).hexdigest()}
CODECS = [("zstd", True), ("zstd", False), ("none", True)]
several_codecs = pytest.mark.parametrize(("compression", "planes"), CODECS)
both = pytest.mark.parametrize("algorithm", MAKERS)


def state():
    generator = torch.Generator().manual_seed(1)
    return {
        "large": torch.randn(3_000_000, generator=generator),
        "half": torch.randn(100, 7, generator=generator).bfloat16(),
        "empty": torch.empty(0, 3),
        "step": 7,
    }


def save(path, codec):
    dcp.save(state(), storage_writer=AsyncStorageWriter(path, codec=codec), planner=ShardedSavePlanner(), no_dist=True)
    return decode((path / ".metadata").read_bytes(), "here")


def raw_of(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@both
@several_codecs
def test_digests_are_those_of_the_raw_bytes_of_segments(tmp_path: Path, algorithm, compression, planes):
    manifest = save(tmp_path, Codec(compression, byte_planes=planes, digest=algorithm))
    assert manifest.head.digest == algorithm
    for name in ("large", "half", "empty"):
        raw, found = raw_of(state()[name]), []
        for segment in manifest.tensors[name].segments(0):
            size = len(segment.lengths) << 20
            found.append(MAKERS[algorithm](raw[:size]))
            raw = raw[size:]
        assert raw == b""
        assert manifest.tensors[name].digests(0) == found
    assert len(manifest.tensors["large"].digests(0)) > 1
    [digest] = manifest.bytes["step"].digests
    assert len(digest) == len(MAKERS[algorithm](b""))
    assert verify(tmp_path).sound


def test_none(tmp_path: Path):
    manifest = save(tmp_path, Codec(digest=None))
    assert manifest.head.digest is None
    assert manifest.tensors["large"].digests(0) == []
    assert not [frame for frame in manifest.head.frames if frame.kind.endswith("_digests")]
    assert verify(tmp_path).sound


@pytest.mark.parametrize("wrong", ["md5", "", 3, "XXH3_128"])
def test_algorithms_that_are_none(wrong):
    with pytest.raises(ConfigError, match=r"Codec\.digest"):
        Codec(digest=wrong)


def rewrite(path, change):
    file = path / ".metadata"
    document = documents.unpack(file.read_bytes())
    change(document)
    file.write_bytes(documents.pack(document))


def flip_digest(document):
    text = document["tensors_digests"]["digests"]
    document["tensors_digests"]["digests"] = ("1" if text[0] == "0" else "0") + text[1:]


def test_a_digest_of_other_bytes_is_damage_that_loads_do_not_look_for(tmp_path: Path):
    save(tmp_path, Codec())
    rewrite(tmp_path, flip_digest)
    found = verify(tmp_path)
    assert [(fault.fqns, "digest" in fault.what) for fault in found.damage] == [(("half",), True)]
    loaded = blank_like(state())
    dcp.load(loaded, storage_reader=AsyncStorageReader(tmp_path), planner=ShardedLoadPlanner(), no_dist=True)
    assert_same(loaded, state())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda document: document["tensors_digests"].update(digests="00"), "wrong number of digests"),
        (lambda document: document["tensors_digests"].update(digests="x" * 96), "wrong number of digests"),
        (lambda document: document.pop("tensors_digests"), "are missing"),
        (lambda document: document["tensors_digests"].pop("digests"), "schema"),
    ],
)
def test_digest_frames_that_cannot_be(tmp_path: Path, change, says):
    save(tmp_path, Codec())
    rewrite(tmp_path, change)
    with pytest.raises(ManifestCorrupt, match=says):
        verify(tmp_path)


def test_an_algorithm_of_later_is_refused_by_name(tmp_path: Path):
    save(tmp_path, Codec())
    rewrite(tmp_path, lambda document: document["head"].update(digest="blake9"))
    with pytest.raises(UnsupportedFormat, match="blake9"):
        verify(tmp_path)


def forge(path):
    """Change a tensor and every check that is not a cryptographic one."""
    file = path / ".metadata"
    document = documents.unpack(file.read_bytes())
    stored = document["tensors"]["stored"]
    assert document["tensors"]["names"] == ["empty", "half", "large"], "so that its segment is the first"
    name = document["objects"]["names"][stored["objects"][0]]
    data = bytearray((path / name).read_bytes())
    offset, length = stored["offsets"][0], stored["lengths"][0]
    forged = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(1400))
    data[offset : offset + length] = forged + bytes(length - len(forged))
    stored["lengths"][0] = len(forged)
    stored["checks"] = forged[-4:].hex() + stored["checks"][8:]
    (path / name).write_bytes(data)
    return document


def test_one_number_proves_a_checkpoint(tmp_path: Path, capsys):
    save(tmp_path, Codec(digest="sha256"))
    proof = verify(tmp_path).sha256
    frame_size = len((tmp_path / ".metadata").read_bytes()) - sum(
        frame.size for frame in decode((tmp_path / ".metadata").read_bytes(), "here").head.frames
    )
    assert proof == hashlib.sha256((tmp_path / ".metadata").read_bytes()[:frame_size]).hexdigest()
    assert verify(tmp_path, expect=proof).sound
    assert verify(tmp_path, expect=proof.upper()).sound
    [fault] = verify(tmp_path, expect="0" * 64).damage
    assert (fault.object_name, "not the expected one" in fault.what) == (".metadata", True)
    assert main(["verify", str(tmp_path), "--expect", proof]) == 0
    assert f"SHA-256 {proof}" in capsys.readouterr().out
    assert main(["verify", str(tmp_path), "--expect", "1" * 64, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["sha256"] == proof


def test_what_was_forged_and_checked_anew_is_found_out(tmp_path: Path):
    save(tmp_path, Codec(digest="sha256"))
    document = forge(tmp_path)
    (tmp_path / ".metadata").write_bytes(_pack_with_sha256(document))
    assert [fault.fqns for fault in verify(tmp_path).damage] == [("half",)]


def _pack_with_sha256(document):
    stored, listed = [], []
    for kind in documents.KINDS:
        if kind in document:
            stored.append(documents.frame(document[kind]))
            first = (
                listed[-1][3] if kind.endswith("_digests") else document[kind]["names"][0] if kind != "objects" else ""
            )
            listed.append([kind, len(stored[-1]), hashlib.sha256(stored[-1]).hexdigest(), first])
    return b"".join([documents.frame({**document["head"], "frames": listed}), *stored])


@pytest.mark.parametrize("expect", ["", "abc", "g" * 64, "0" * 63])
def test_numbers_that_are_none(tmp_path: Path, expect):
    save(tmp_path, Codec(digest="sha256"))
    with pytest.raises(ConfigError, match="not a SHA-256"):
        verify(tmp_path, expect=expect)


def test_a_checkpoint_that_has_no_such_number(tmp_path: Path):
    save(tmp_path, Codec())
    assert verify(tmp_path).sha256 is None
    with pytest.raises(ConfigError, match="has no SHA-256 digests"):
        verify(tmp_path, expect="0" * 64)


@both
def test_units_of_several_blocks_have_one_digest(algorithm):
    codec = Codec(block_bytes=4096, digest=algorithm)
    raw = bytes(range(256)) * 40
    out = memoryview(bytearray(BLOCK_CODECS["zstd"].limit(len(raw), 3)))
    assert ItemEncoder(codec).encode(raw, 4, out).digest == MAKERS[algorithm](raw)
