"""Models as they are trained: what resumes is what was saved, under any parallelism."""

import pytest

from integration.resharding.tables import run_tables
from integration.resharding.training import Leg, run_legs

pytestmark = pytest.mark.timeout(200)


def test_fsdp_to_tp_x_fsdp_to_one_rank(tmp_path):
    a, b, c, unused = (tmp_path / name for name in "abcd")
    first, again, two, two_again = run_legs(
        4,
        [
            Leg("fsdp", None, a),
            Leg("fsdp", a, unused),
            Leg("tp x fsdp", a, b),
            Leg("tp x fsdp", b, unused),
        ],
    )
    one, one_again = run_legs(1, [Leg("one", b, c), Leg("one", c, unused)])
    for told in (again, two, two_again, one, one_again):
        assert told.different == []
        assert told.compared > 30
    # The same parallelism goes on bit for bit as if it had never stopped.
    assert again.before == first.after
    assert two_again.before == two.after
    assert one_again.before == one.after
    # Another one adds the same products in another order, so only the state is the same bit for bit.
    assert two.before == pytest.approx(first.after, rel=1e-5)
    assert one.before == pytest.approx(two.after, rel=1e-5)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_an_embedding_collection_moves_between_sharding_plans_and_numbers_of_ranks(tmp_path, compression):
    for wrap in ("bare", "wrapped"):
        place = tmp_path / wrap
        assert run_tables(4, "save", wrap, place, compression) == []
        for world in (4, 3, 1, 2):
            assert run_tables(world, "load", wrap, place, compression) == []
