"""On real ranks: any layout loads into any other, at any number of ranks, or the error says why not."""

from collections import Counter

import pytest

from integration.resharding import worlds
from integration.resharding.matrix import RIGHT, Matrix, run_matrices
from integration.resharding.worlds import Job, run_jobs

pytestmark = pytest.mark.timeout(280)


def not_right(outcomes):
    return {case: outcome for case, outcome in outcomes.items() if outcome != RIGHT}


def test_every_layout_loads_into_every_other_on_four_ranks(tmp_path):
    kinds = [
        *(("ours", dims, meta) for dims in (1, 2, 3) for meta in (False, True)),
        *(("ours, no compression", dims, False) for dims in (1, 2, 3)),
    ]
    matrices = [Matrix(contestant, dims, tmp_path, meta=meta) for contestant, dims, meta in kinds]
    results = run_matrices(matrices)
    assert [not_right(outcomes) for outcomes in results] == [{}] * len(kinds)
    assert min(map(len, results)) > 1000


def test_dcp_s_own_planners_load_what_they_can_express_and_are_refused_where_they_are_wrong(tmp_path):
    matrices = [
        Matrix(contestant, 2, tmp_path, only_upstream=True)
        for contestant in ("default planners", "default planners, no compression")
    ]
    for outcomes in run_matrices(matrices):
        apart = "mesh 2x2: _S(0, 2),R"
        refused = not_right(outcomes)
        assert {case for case in outcomes if apart in case} == set(refused)
        assert Counter(outcome.split(":")[0] for outcome in refused.values()) == {
            "raised at save": 19,  # by DCP itself: the boxes that it takes the rows for overlap
            "raised at load": 18,
        }
        loads = [outcome for outcome in refused.values() if outcome.startswith("raised at load")]
        assert all("CoverageError" in outcome and "load with ShardedLoadPlanner" in outcome for outcome in loads)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """One checkpoint by each number of ranks, with collectives and without, and by both kinds of async_save."""
    root = tmp_path_factory.mktemp("worlds")
    ways = {1: ["sync", "alone"], 2: ["sync", "alone", "process"], 3: ["sync", "alone"], 4: ["sync", "alone", "thread"]}
    for world, hows in ways.items():
        run_jobs(world, [Job("save", root / f"{how}-{world}", how) for how in hows])
    return [root / f"{how}-{world}" for world, hows in ways.items() for how in hows]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_what_any_number_of_ranks_saved_loads_on_any_other(places, world):
    jobs = [Job("load", place, first=number, step=len(places)) for number, place in enumerate(places)]
    faults = run_jobs(world, jobs)
    assert dict(zip(places, faults, strict=True)) == {place: {} for place in places}
    assert len(places) == 10


def test_a_missing_part_of_a_save_without_collectives_is_refused_by_name(tmp_path):
    run_jobs(3, [Job("save", tmp_path, "alone")])
    [part] = [path for path in tmp_path.iterdir() if path.name.startswith("__1-")]
    part.unlink()
    [refused] = run_jobs(2, [Job("load refused", tmp_path)])
    assert len(refused) == 2
    assert all("ManifestCorrupt" in message and "did not commit: [1]" in message for message in refused.values())


def test_what_one_rank_has_wrong_every_rank_is_told_and_nothing_hangs(tmp_path):
    [told] = run_jobs(3, [Job("nonsense", tmp_path)], limit_s=60)
    by_case = {case.partition(": ")[2]: message for case, message in told.items()}
    assert all(told[f"rank {rank}: {case}"] == message for case, message in by_case.items() for rank in range(3))
    assert by_case.pop("afterwards") == RIGHT
    assert len(by_case) == 12
    assert not (tmp_path / "never").exists() or not (tmp_path / "never" / ".metadata").exists()
    for case, message in by_case.items():
        kind = "DtypeMismatch" if "dtype" in case else "CoverageError"
        assert message.startswith(f"{kind}: "), case
        assert "m.t" in message, case


def test_the_layouts_are_those_that_are_meant():
    names = {layout.name for layout in worlds.layouts(4, 2)}
    assert len(names) == len(worlds.layouts(4, 2)) == 49
