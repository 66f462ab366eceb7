"""A benchmark of this package against stock DCP and the other savers: `python -m integration.bench --help`.

Contestants take turns in every round, in another order each round, and are compared within a round: what disturbs the
machine for a minute disturbs all of them. All of them live in one environment and one process; what is measured of a
process (memory, stall, growth) is measured in a fresh one.
"""
