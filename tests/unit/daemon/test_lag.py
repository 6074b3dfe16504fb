# SPDX-License-Identifier: Apache-2.0
"""The metric of the event loop's lag sees what kept the loop."""

from __future__ import annotations

import asyncio
import time

from loracache.daemon.lag import LoopLag


def test_what_keeps_the_loop_is_seen() -> None:
    lag = LoopLag()

    async def stalled() -> None:
        watching = asyncio.create_task(lag.watch())
        await asyncio.sleep(0.03)
        time.sleep(0.1)  # what a stall is
        await asyncio.sleep(0.03)
        watching.cancel()

    asyncio.run(stalled())
    said = lag.describe()
    counts = dict(said["lag_counts"])
    assert 0.08 < said["lag_max_s"] == said["lag_longest_s"] < 1
    assert counts["+Inf"] > counts["0.05"] > 0
    assert said["lag_sum_s"] >= said["lag_max_s"]


def test_the_longest_of_the_last_minute_is_forgotten_after_it() -> None:
    lag = LoopLag()
    lag.note(0.5, 100.0)
    lag.note(0.002, 130.0)
    assert lag.describe()["lag_max_s"] == 0.5
    lag.note(0.001, 161.0)
    assert lag.describe()["lag_max_s"] == 0.002
    lag.note(0.003, 1000.0)
    assert (lag.describe()["lag_max_s"], lag.describe()["lag_longest_s"]) == (0.003, 0.5)
