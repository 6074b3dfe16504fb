# SPDX-License-Identifier: Apache-2.0
"""What each policy finds of half a trace, at several sizes of the memory, and what a cache that knows the future would.

    python benchmarks/policies.py TRACE --half 2 --percent 1,2,5,10,20,50

TRACE is in the format of Mooncake (its repository has some, in FAST25-release/traces). A size is a percentage of all
distinct blocks of that half. "twice" is `adaptive` held at the way where what came once always goes first.
"""

from __future__ import annotations

import argparse
import gc
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loracache.cache import policy
from loracache.cache.policy.shadow import WAYS
from loracache.simulator.belady import belady_hit_rate
from loracache.simulator.replay import replay
from loracache.simulator.store import Sizes, Way
from loracache.simulator.trace import read_trace

TOKEN, BLOCK_TOKENS = 128 << 10, 512
POLICIES = ("lru", "s3fifo", "twice", "adaptive")


def main() -> None:
    """Replay the half once for each policy and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--half", type=int, choices=(1, 2), default=2)
    parser.add_argument("--percent", default="1,2,5,10,20,50")
    given = parser.parse_args()
    requests = read_trace(given.trace)
    middle = len(requests) // 2
    requests = requests[:middle] if given.half == 1 else requests[middle:]
    distinct = len({block for request in requests for block in request.blocks})
    gc.disable()  # millions of nodes, no circles among them
    policy.POLICIES["twice"] = partial(policy.Adaptive, ways=WAYS[-1:])
    table = Table("memory", *POLICIES, "adaptive / best", "Belady")
    for percent in map(float, given.percent.split(",")):
        memory = int(distinct * BLOCK_TOKENS * TOKEN * percent / 100)
        sizes = Sizes(memory, 0, TOKEN, [])
        rates = [replay(requests, sizes, Way.parse(name)).hit_rate for name in POLICIES]
        bound = belady_hit_rate(requests, memory, TOKEN, [])
        against = rates[-1] / max(rates[:-1])
        table.add_row(f"{percent:g} %", *(f"{rate:.4f}" for rate in rates), f"{against:.3f}", f"{bound:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
