# SPDX-License-Identifier: Apache-2.0
"""Pauses between tries."""

from __future__ import annotations

from loracache.backoff import Backoff


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_success() -> None:
    pauses = Backoff(0.25, 2.0)
    assert [pauses.next() for _ in range(6)] == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0]
    pauses.reset()
    assert pauses.next() == 0.25
