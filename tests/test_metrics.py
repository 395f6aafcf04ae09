"""Sums that neither order nor grouping can change."""

from __future__ import annotations

import json
import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from trainer.metrics import Totals

VALUES = st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=40)


@given(VALUES, st.data())
def test_totals_are_exact_in_any_order_and_grouping(values: list[float], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(values))
    cut = data.draw(st.integers(0, len(values)))
    whole, parts = Totals(), [Totals(), Totals()]
    for value in values:
        whole.count("loss", value, 3.0)
    for number, value in enumerate(shuffled):
        parts[number < cut].count("loss", value, 3.0)
    joined = Totals(json.loads(json.dumps(parts[0].sums)))  # as through a checkpoint
    joined.add(parts[1])
    exact = sum(map(Fraction, values))
    for totals in (whole, joined):
        assert sum(map(Fraction, totals.sums["loss"][0])) == exact
        assert totals.means() == {"loss": float(exact) / (3.0 * len(values))}


def test_means_of_nothing_and_of_what_is_not_finite() -> None:
    totals = Totals()
    totals.count("a", 0.0, 0.0)
    for value in (1.0, math.nan, 2.0):
        totals.count("b", value, 1.0)
    for value in (1.0, math.inf, 2.0):
        totals.count("c", value, 1.0)
    means = totals.means()
    assert math.isnan(means["a"])
    assert math.isnan(means["b"])  # a NaN is not hidden by what follows it
    assert not math.isfinite(means["c"])
