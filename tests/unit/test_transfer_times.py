# SPDX-License-Identifier: Apache-2.0
"""What a transfer will take, from the last few that were seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracache.transfer_times import TransferTimes

MB = 1_000_000


def seen(*transfers: tuple[int, float]) -> TransferTimes:
    times = TransferTimes()
    for nbytes, seconds in transfers:
        times.add(nbytes, seconds)
    return times


def test_nothing_follows_from_one_or_two() -> None:
    times = seen((MB, 60.0), (MB, 60.0))
    assert not times.known
    assert times.seconds(100 * MB) == 0.0
    times.add(MB, 0.01)
    assert times.known
    assert times.seconds(MB) > 0.0


def test_latency_and_bandwidth_are_told_apart() -> None:
    times = seen(*((size * MB, 0.02 + size / 100) for size in (1, 2, 8, 30)))  # 20 ms, 100 MB/s
    assert times.latency == pytest.approx(0.02)
    assert times.bandwidth == pytest.approx(100 * MB)
    assert times.seconds(500 * MB) == pytest.approx(5.02)


def test_two_slow_ones_of_five_change_little() -> None:
    times = seen((4 * MB, 30.0), (8 * MB, 0.08), (2 * MB, 0.02), (4 * MB, 0.04), (16 * MB, 99.0))
    assert times.seconds(10 * MB) == pytest.approx(0.1, rel=0.5)


def test_a_slow_first_one_is_forgotten() -> None:
    times = seen((MB, 60.0), *[(MB, 0.01)] * 2)
    assert times.seconds(MB) == pytest.approx(0.01)


def test_what_was_seen_of_one_size_alone_may_all_be_latency() -> None:
    times = seen(*[(10 * MB, 0.5)] * 4)
    assert times.seconds(10 * MB) == times.seconds(1000 * MB) == pytest.approx(0.5)
    assert times.seconds(5 * MB) == pytest.approx(0.25)
    times.add(100 * MB, 5.0)
    assert times.seconds(1000 * MB) == pytest.approx(50.0)


def test_latency_that_was_once_told_apart_is_remembered() -> None:
    times = seen((MB, 0.11), (10 * MB, 0.2), (100 * MB, 1.1), *[(10 * MB, 0.2)] * 5)
    assert times.seconds(1000 * MB) == pytest.approx(10.1)


def test_where_size_makes_no_difference_it_is_all_latency() -> None:
    times = seen((MB, 0.5), (10 * MB, 0.4), (100 * MB, 0.5), (MB, 0.5))
    assert times.seconds(1000 * MB) == pytest.approx(0.5, rel=0.2)


@given(
    st.lists(st.tuples(st.integers(1, 1 << 40), st.floats(1e-6, 1e4)), max_size=9),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 40),
)
def test_more_bytes_never_take_less(transfers: list[tuple[int, float]], some: int, more: int) -> None:
    times = seen(*transfers)
    least, most = times.seconds(min(some, more)), times.seconds(max(some, more))
    assert 0.0 <= least <= most
