# SPDX-License-Identifier: Apache-2.0
"""What begins in any stretch of time, and what is under way at once, is bounded."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from loracache.cache.swap.pace import Pace


@given(st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 300), st.booleans()), max_size=60))
@settings(max_examples=200, deadline=None)
def test_a_pace_is_kept_over_every_stretch_of_time(steps: list[tuple[float, int, bool]]) -> None:
    now = [0.0]
    pace = Pace(100.0, 250, lambda: now[0])
    begun: list[tuple[float, int]] = []
    going: list[int] = []
    for wait, nbytes, ends in steps:
        now[0] += wait
        if ends and going:
            pace.end(going.pop())
        if pace.allows(nbytes):
            pace.begin(nbytes)
            going.append(nbytes)
            begun.append((now[0], nbytes))
        assert pace.in_flight == sum(going)
        assert len(going) < 2 or pace.in_flight <= 250
    for at, (start, _) in enumerate(begun):
        for until in range(at, len(begun)):
            spent = sum(nbytes for _, nbytes in begun[at:until])  # all but the last: it may be one object more
            assert spent <= 100.0 * (begun[until][0] - start + 0.1) + 1e-6
