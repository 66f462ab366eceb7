"""The benchmark of many ranks measures what it says, of few."""

import pytest

from dcp_storage import Codec
from integration.scale import exponent, rows
from integration.steps_scale import measure, opened


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


@pytest.mark.parametrize("store", ["local", "s3"])
def test_steps_are_counted_listed_and_resumed_from(store):
    with opened(store) as place:
        assert [count for count, spent in measure(place, [1, 12]) if all(spent)] == [1, 12]
