import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dcp_storage.config import Codec
from dcp_storage.errors import BlockCorrupt
from dcp_storage.format.blocks import CHECK_CHARS, BlockDecoder, BlockEncoder, encoded_limit, plane_count

BLOCK = 8192
CODECS = [Codec(block_bytes=BLOCK), Codec("none", block_bytes=BLOCK), Codec(level=5, block_bytes=BLOCK)]
codecs = st.sampled_from(CODECS)
planes = st.sampled_from([1, 2, 4, 8])


def encode(codec, raw, plane):
    """Encode one block into just enough memory."""
    out = memoryview(bytearray(encoded_limit(len(raw), "zstd")))
    blocks = BlockEncoder(codec).encode(raw, plane, out)
    (size,) = blocks.lengths
    return bytes(out[:size]), blocks.checks


def decoded(codec, stored, check, plane, size):
    out = bytearray(size)
    BlockDecoder(codec.compression, BLOCK).decode_into(stored, check, plane, memoryview(out))
    return bytes(out)


@given(codecs, planes, st.binary(max_size=BLOCK // 8))
def test_blocks_come_back_as_they_were(codec, plane, seed):
    raw = seed * 8
    if not raw:
        return
    stored, check = encode(codec, raw, plane)
    assert len(check) == CHECK_CHARS[codec.compression]
    assert len(stored) <= encoded_limit(len(raw), codec.compression)
    assert decoded(codec, stored, check, plane, len(raw)) == raw


def test_one_encoder_serves_blocks_of_any_size_and_planes():
    encoder, decoder = BlockEncoder(CODECS[0]), BlockDecoder("zstd", BLOCK)
    memory = memoryview(bytearray(encoded_limit(BLOCK, "zstd")))
    for size, plane in [(8, 8), (BLOCK, 2), (16, 4), (BLOCK, 1), (24, 8), (BLOCK, 4)]:
        raw = np.random.default_rng(size).bytes(size)
        out = bytearray(size)
        blocks = encoder.encode(raw, plane, memory)
        decoder.decode_into(memory[: blocks.lengths[0]], blocks.checks, plane, memoryview(out))
        assert out == raw


@given(codecs, planes, st.integers(1, 9), st.integers(0, 2**32))
def test_many_blocks_at_once_are_those_of_one_at_a_time(codec, plane, count, seed):
    raw = np.random.default_rng(seed).bytes(count * BLOCK - 8 * (seed % 1024))
    cut = [raw[start : start + BLOCK] for start in range(0, len(raw), BLOCK)]
    one_by_one = [encode(codec, block, plane) for block in cut]
    out = memoryview(bytearray(encoded_limit(len(raw), codec.compression, len(cut))))
    blocks = BlockEncoder(codec).encode(raw, plane, out)
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
    with pytest.raises(BlockCorrupt, match="another size"):
        decoded(CODECS[0], bomb, bomb[-4:].hex(), 1, 64)


@pytest.mark.parametrize(("itemsize", "expected"), [(1, 1), (2, 2), (4, 4), (8, 8), (16, 1)])
def test_plane_count(itemsize, expected):
    assert plane_count(itemsize, byte_planes=True) == expected
    assert plane_count(itemsize, byte_planes=False) == 1


@pytest.mark.parametrize("plane", [1, 2, 4])
def test_a_block_that_does_not_fit_is_never_cut_short(plane):
    raw = np.random.default_rng(0).bytes(1 << 20)
    with pytest.raises((BufferError, ValueError)):
        BlockEncoder(Codec()).encode(raw, plane, memoryview(bytearray(1 << 18)))
