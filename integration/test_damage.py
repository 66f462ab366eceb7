"""Hundreds of damages: none is silent, none raises what is not typed, and `verify` finds each that a load finds."""

import os

import pytest

from integration.damage import OURS, STOCK, run
from tests.damages import DAMAGES

MUTATIONS = int(os.environ.get("DAMAGES", "500"))


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # torch warns of what it finds in damaged stock checkpoints
def test_no_damage_is_silent(tmp_path):
    tally = run(MUTATIONS, tmp_path)
    assert not tally.failures
    found = tally.total(OURS)
    assert found.total() == MUTATIONS
    assert found["named"] > MUTATIONS / 2
    assert {damage for damage, who in tally.counts if who == OURS} == set(DAMAGES)
    # What this is for: the same damage goes unnoticed by stock DCP.
    assert tally.total(STOCK)["SILENT"] > 0
