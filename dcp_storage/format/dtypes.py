"""The element types that format 1 supports, by torch's names, with their size in bytes."""

ITEM_BYTES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "complex32": 4,
    "bcomplex32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""One byte for a bool (0 or 1), or for two floats of 4 bits; a complex element is its real, then its imaginary part."""

REAL_PART_BYTES: dict[str, int] = {"complex32": 2, "bcomplex32": 2, "complex64": 4, "complex128": 8}


def number_bytes(dtype: str) -> int:
    """Return the size of a number in bytes: that of the element, or of each part if it is complex."""
    return REAL_PART_BYTES.get(dtype, ITEM_BYTES[dtype])
