import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dcp_storage.config import MIB, Codec
from dcp_storage.errors import BlockCorrupt
from dcp_storage.format.codecs import libzstd as zstd
from dcp_storage.format.codecs import planes as planes_module
from dcp_storage.format.codecs.blocks import CODECS as BLOCK_CODECS
from dcp_storage.format.codecs.blocks import ItemEncoder


@pytest.fixture(params=["fast", "plain"], scope="module", autouse=True)
def way(request):
    """By the C libraries of the extra `fast`, and without them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(zstd, "_LIB", None)
            patch.setattr(planes_module, "_blosc2", lambda: None)
        elif zstd._LIB is None or planes_module._blosc2() is None:
            pytest.skip("the extra `fast` is not installed")
        yield request.param


BLOCK = 8192
CODECS = [Codec(block_bytes=BLOCK), Codec("none", block_bytes=BLOCK), Codec(level=5, block_bytes=BLOCK)]
codecs = st.sampled_from(CODECS)
planes = st.sampled_from([1, 2, 4, 8])


def encode(codec, raw, plane):
    """Encode one block into just enough memory."""
    out = memoryview(bytearray(BLOCK_CODECS["zstd"].limit(len(raw))))
    blocks = ItemEncoder(codec).encode(raw, plane, out)
    (size,) = blocks.lengths
    return bytes(out[:size]), blocks.checks


def decoded(codec, stored, check, plane, size):
    out = bytearray(size)
    BLOCK_CODECS[codec.compression].make_decoder(BLOCK).decode(stored, check, plane, memoryview(out))
    return bytes(out)


@given(codecs, planes, st.binary(max_size=BLOCK // 8))
def test_blocks_come_back_as_they_were(codec, plane, seed):
    raw = seed * 8
    if not raw:
        return
    stored, check = encode(codec, raw, plane)
    assert len(check) == BLOCK_CODECS[codec.compression].check_chars
    assert len(stored) <= BLOCK_CODECS[codec.compression].limit(len(raw))
    assert decoded(codec, stored, check, plane, len(raw)) == raw


def test_one_encoder_serves_blocks_of_any_size_and_planes():
    encoder, decoder = ItemEncoder(CODECS[0]), BLOCK_CODECS["zstd"].make_decoder(BLOCK)
    memory = memoryview(bytearray(BLOCK_CODECS["zstd"].limit(BLOCK)))
    for size, plane in [(8, 8), (BLOCK, 2), (16, 4), (BLOCK, 1), (24, 8), (BLOCK, 4)]:
        raw = np.random.default_rng(size).bytes(size)
        out = bytearray(size)
        blocks = encoder.encode(raw, plane, memory)
        decoder.decode(memory[: blocks.lengths[0]], blocks.checks, plane, memoryview(out))
        assert out == raw


@given(codecs, planes, st.integers(1, 9), st.integers(0, 2**32))
def test_many_blocks_at_once_are_those_of_one_at_a_time(codec, plane, count, seed):
    raw = np.random.default_rng(seed).bytes(count * BLOCK - 8 * (seed % 1024))
    cut = [raw[start : start + BLOCK] for start in range(0, len(raw), BLOCK)]
    one_by_one = [encode(codec, block, plane) for block in cut]
    out = memoryview(bytearray(BLOCK_CODECS[codec.compression].limit(len(raw), len(cut))))
    blocks = ItemEncoder(codec).encode(raw, plane, out)
    assert blocks.lengths == tuple(len(stored) for stored, _ in one_by_one)
    assert blocks.checks == "".join(check for _, check in one_by_one)
    assert out[: sum(blocks.lengths)] == b"".join(stored for stored, _ in one_by_one)


@pytest.mark.parametrize("plane", [2, 4, 8])
def test_planes_are_byte_by_byte_transposed(plane):
    raw = bytes(range(5 * plane))
    frame, _ = encode(CODECS[0], raw, plane)
    expected = b"".join(raw[byte::plane] for byte in range(plane))
    assert zstandard.ZstdDecompressor().decompress(frame) == expected


def test_a_frame_is_standard_and_complete():
    raw = np.random.default_rng(0).standard_normal(1024).astype("<f4").tobytes()
    frame, check = encode(CODECS[0], raw, 4)
    header = zstandard.get_frame_parameters(frame)
    assert (header.content_size, header.has_checksum, header.dict_id) == (len(raw), True, 0)
    assert frame[-4:].hex() == check


@pytest.mark.parametrize("count", [1 << 12, 1 << 16, 73_728, 1 << 18])
def test_planes_make_weights_smaller_than_plain_zstd_does(count):
    doubles = np.random.default_rng(0).standard_normal(count)
    weights = doubles.astype("<f4")
    bfloat16 = (weights.view("<u4") >> 16).astype("<u2")
    for values, bound in ((doubles, 0.89), (weights, 0.84), (bfloat16, 0.68)):
        raw = values.tobytes()
        codec = Codec(block_bytes=1 << 21)
        ours = len(encode(codec, raw, values.itemsize)[0])
        plain = len(zstandard.ZstdCompressor().compress(raw))
        assert ours < bound * len(raw)
        assert ours < plain


@pytest.mark.parametrize("codec", CODECS[:2], ids=lambda codec: codec.compression)
def test_every_flipped_bit_is_found(codec):
    raw = np.random.default_rng(1).bytes(96)
    stored, check = encode(codec, raw, 2)
    harmless = []
    for bit in range(8 * len(stored)):
        damaged = bytearray(stored)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert decoded(codec, damaged, check, 2, len(raw)) == raw
        except BlockCorrupt:
            continue
        harmless.append(bit)
    # RFC 8878 has one bit that decoders must ignore: bit 4 of the frame header's descriptor, byte 4.
    assert harmless == ([36] if codec.compression == "zstd" else [])


@pytest.mark.parametrize("codec", CODECS[:2], ids=lambda codec: codec.compression)
def test_truncated_extended_swapped_and_empty_blocks_are_found(codec):
    raw, other = b"a" * 64, b"b" * 64
    stored, check = encode(codec, raw, 1)
    stored = bytes(stored)
    in_wrong_place, _ = encode(codec, other, 1)
    for damaged in (stored[:-1], stored + b"x", stored + stored, b"", stored[:4], bytes(in_wrong_place)):
        with pytest.raises(BlockCorrupt):
            decoded(codec, damaged, check, 1, len(raw))


def test_a_frame_of_another_size_is_refused_before_it_is_decompressed():
    bomb = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(64 << 20))
    with pytest.raises(BlockCorrupt, match="content size differs"):
        decoded(CODECS[0], bomb, bomb[-4:].hex(), 1, 64)


@pytest.mark.parametrize(("itemsize", "expected"), [(1, 1), (2, 2), (4, 4), (8, 8), (16, 1)])
def test_plane_count(itemsize, expected):
    assert BLOCK_CODECS["zstd"].planes(itemsize) == expected
    assert BLOCK_CODECS["none"].planes(itemsize) == 1


@pytest.mark.parametrize("plane", [1, 2, 4])
def test_a_block_that_does_not_fit_is_never_cut_short(plane):
    raw = np.random.default_rng(0).bytes(1 << 20)
    with pytest.raises((BufferError, ValueError, zstandard.ZstdError)):
        ItemEncoder(Codec()).encode(raw, plane, memoryview(bytearray(1 << 18)))


@given(planes.filter(lambda count: count > 1), st.binary(min_size=1, max_size=500), st.integers(0, 64))
def test_planes_are_the_same_by_every_way(count, seed, shift):
    raw = memoryview(bytes(shift) + seed * count)[shift:]
    ways = [planes_module.NumpyPlanes(), planes_module.make_planes()]
    laid = [bytearray(len(raw)) for _ in ways]
    back = [bytearray(len(raw) + shift) for _ in ways]
    for one, out in zip(ways, laid, strict=True):
        one.split(raw, count, memoryview(out))
    assert laid[0] == laid[1] == b"".join(raw[byte::count].tobytes() for byte in range(count))
    for one, out, again in zip(ways, laid, back, strict=True):
        one.merge(memoryview(bytes(out)), count, memoryview(again)[shift:])
    assert back[0][shift:] == back[1][shift:] == raw


@given(codecs, planes, st.binary(min_size=1, max_size=BLOCK // 8))
def test_what_one_way_encodes_the_other_decodes(codec, plane, seed):
    raw = seed * 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zstd, "_LIB", None)
        plainly, decoder = encode(codec, raw, plane), BLOCK_CODECS[codec.compression].make_decoder(BLOCK)
    out = bytearray(len(raw))
    decoder.decode(*encode(codec, raw, plane), plane, memoryview(out))
    assert out == raw
    assert decoded(codec, *plainly, plane, len(raw)) == raw


def states():
    """Planes with and without matches: their elements, and what they may be stored in, of their size."""
    rng = np.random.default_rng(0)
    count = MIB // 4
    normal = rng.normal(0, 0.02, count).astype(np.float32)
    rows = np.where(rng.random((256, 1)) < 0.1, normal.reshape(256, -1), 0).astype(np.float32)
    return {
        "float32": (normal, 0.8351),
        "moments": (normal**2, 0.8312),
        "bfloat16": ((normal.view(np.uint32) >> 16).astype(np.uint16), 0.6704),
        "zeros": (np.zeros(count, np.float32), 0.0001),
        "mask": ((rng.random(count) < 0.1).astype(np.float32), 0.0619),
        "repeated rows": (np.tile(normal[:1024], count // 1024), 0.0036),
        "equal rows": (np.repeat(normal[:64], count // 64), 0.0008),
        "sparse rows": (rows, 0.13),
        "multiples of a row": ((normal[:512] * (1 + 0.01 * rng.random((512, 1)))).astype(np.float32), 0.78),
        "integers": (np.arange(MIB // 8), 0.0014),
        "random integers": (rng.integers(0, 50_000, MIB // 8), 0.251),
        "causal": (np.tril(np.ones((512, 512), np.float32)), 0.0012),
    }


@pytest.mark.parametrize("name", states())
def test_what_a_search_for_matches_would_shrink_is_searched(name):
    """The bounds are what zstd's level 1 with a small table for matches makes of them."""
    elements, most = states()[name]
    raw = elements.tobytes()
    out = memoryview(bytearray(BLOCK_CODECS["zstd"].limit(len(raw))))
    stored = sum(ItemEncoder(Codec()).encode(raw, elements.dtype.itemsize, out).lengths)
    assert stored <= most * len(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zstd, "_LIB", None)
        plainly = sum(ItemEncoder(Codec()).encode(raw, elements.dtype.itemsize, out).lengths)
    assert stored <= 1.001 * plainly + 100


def test_what_lies_behind_a_frame_is_damage():
    stored, check = encode(CODECS[0], b"x" * 64, 1)
    skippable = b"\x50\x2a\x4d\x18\x00\x00\x00\x00"
    for more in (b"\0", stored, skippable, skippable[:5] + check_bytes(check)):
        behind = stored + more
        with pytest.raises(BlockCorrupt):
            decoded(CODECS[0], behind, behind[-4:].hex(), 1, 64)


def check_bytes(check):
    return bytes.fromhex(check)
