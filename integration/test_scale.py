"""The benchmark of many ranks measures what it says, of few."""

import pytest

from dcp_storage import Codec
from integration.scale import exponent, rows


@pytest.mark.filterwarnings("ignore")
def test_a_table_of_few_ranks():
    table = list(rows([2, 4], 5, Codec()))
    steps = [
        "plan on one rank",
        "global plan",
        "commit",
        "read the manifest",
        "plan a load on one rank",
        "manifest, MB",
    ]
    assert len(table) == 2 * len(steps)
    for row, step in zip(table, steps * 2, strict=True):
        assert step in row
        assert row.count("|") == 5


def test_exponents():
    assert exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
