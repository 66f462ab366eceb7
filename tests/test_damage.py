"""A few of each kind of damage; `python -m integration.damage` does thousands."""

from functools import partial

import pytest

from tests.damages import CODECS, DAMAGES, check, damaged, load, make_pair, save, some_names
from tests.hooks import flaky

SEEDS = range(2)


@pytest.fixture(scope="module", params=CODECS)
def pair(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), partial(save, codec=CODECS[request.param]))


def test_without_damage_all_is_well(pair):
    outcome = load(pair.path, pair.state, sorted(pair.state))
    assert outcome.verdict == check(pair.path, outcome).verdict == "exact"


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_or_does_no_harm(pair, tmp_path, name):
    for seed in SEEDS:
        case = damaged(pair, tmp_path / "damaged", DAMAGES[name], seed)
        outcome = load(case.path, pair.state, some_names(case, pair.state))
        assert outcome.is_right, (seed, outcome)
        checked = check(case.path, outcome)
        assert checked.is_right, (seed, checked)


@pytest.mark.parametrize(("reads", "verdict"), [(1, "exact"), (2, "named")])
def test_what_only_the_first_read_damages_is_sound(pair, reads, verdict):
    assert load(flaky(pair.path, reads), pair.state, sorted(pair.state)).verdict == verdict
