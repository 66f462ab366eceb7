"""Very many tensors; `python -m integration.limits` prints the time and memory of 100,000."""

import os

import pytest

from integration.limits import measure

TENSORS = int(os.environ.get("TENSORS", "30000"))


@pytest.mark.timeout(900)
def test_very_many_tensors(tmp_path):
    found = measure(TENSORS, tmp_path)
    # Some 4 KB a tensor in DCP's plans and this package's; a copy of a plan a tensor would be gigabytes.
    assert all(memory < 100 + TENSORS * 0.02 for _, memory in found.values()), found
