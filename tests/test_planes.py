"""Which way lays out byte planes; that all give the same bytes is in `test_blocks.py`."""

import pytest

from dcp_storage.format.codecs import planes


@pytest.mark.parametrize("error", [OSError("too many open files"), AttributeError("no blosc2_shuffle")])
def test_a_library_of_planes_that_cannot_be_used_is_told_and_done_without(monkeypatch, caplog, error):
    def refuse():
        raise error

    monkeypatch.setattr(planes, "_load_blosc2", refuse)
    planes._blosc2.cache_clear()
    try:
        for _ in range(2):
            assert isinstance(planes.make_planes(), planes.NumpyPlanes)
    finally:
        planes._blosc2.cache_clear()
    assert caplog.text.count(f"cannot use blosc2's library ({error})") == 1
