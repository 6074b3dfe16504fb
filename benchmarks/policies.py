# SPDX-License-Identifier: Apache-2.0
"""What each policy finds of a trace, at several sizes of the memory, and what a cache that knows the future would.

    python benchmarks/policies.py TRACE --half 2 --percent 1,2,5,10,20,50 --adapters 200 --hints 0.5
    python benchmarks/policies.py --objects 1000000

TRACE is in the format of Mooncake (its repository has some, in FAST25-release/traces). A size is a percentage of all
distinct blocks of that half, or of the whole trace. "twice" is `adaptive` held at the way where what came once always
goes first. With hints there is one column more: `adaptive` with that share of returning sessions that say so.

The second line measures what a choice of a victim takes in a tier of so many objects, in microseconds.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loracache.cache import policy
from loracache.cache.policy.shadow import WAYS
from loracache.simulator.belady import belady_hit_rate
from loracache.simulator.hints import with_hints
from loracache.simulator.replay import replay
from loracache.simulator.store import Sizes, Store, Way
from loracache.simulator.trace import Request, read_trace, with_adapters
from loracache.tiers import Tier

TOKEN, BLOCK_TOKENS = 128 << 10, 512
RANKS = (8, 16, 32, 64)
RANK_BYTES = 5 << 20
POLICIES = ("lru", "s3fifo", "twice", "adaptive")
CHAIN = 32  # blocks of a prompt
MEASURED = 5_000  # prompts


def main() -> None:
    """Replay once for each policy and size, or measure what choices take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, nargs="?")
    parser.add_argument("--half", type=int, choices=(0, 1, 2), default=2, help="0: the whole trace")
    parser.add_argument("--percent", default="1,2,5,10,20,50")
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--hints", type=float, default=0.0)
    parser.add_argument("--objects", type=int)
    given = parser.parse_args()
    gc.disable()  # millions of nodes, no circles among them
    policy.POLICIES["twice"] = partial(policy.Adaptive, ways=WAYS[-1:])
    if given.objects:
        Console().print(costs(given.objects))
    elif given.trace is None:
        parser.error("a trace, or --objects")
    else:
        requests = read_trace(given.trace)
        middle = len(requests) // 2
        requests = (requests, requests[:middle], requests[middle:])[given.half]
        percents = [float(each) for each in given.percent.split(",")]
        Console().print(rates(requests, percents, given.adapters, given.hints))


def rates(requests: Sequence[Request], percents: Sequence[float], adapters: int, hints: float) -> Table:
    """Hit rates by size and policy."""
    distinct = len({block for request in requests for block in request.blocks})
    requests = with_adapters(requests, adapters, 1.0)
    each = [RANKS[number % len(RANKS)] * RANK_BYTES for number in range(adapters)]
    told = with_hints(requests, hints)
    table = Table("memory", *POLICIES, "adaptive / best", "Belady", *(["with hints", "of the gap"] if hints else []))
    for percent in percents:
        sizes = Sizes(int(distinct * BLOCK_TOKENS * TOKEN * percent / 100), 0, TOKEN, each)
        found = [replay(requests, sizes, Way.parse(name)).hit_rate for name in POLICIES]
        bound = belady_hit_rate(requests, sizes.memory, TOKEN, each)
        row = [*(f"{rate:.4f}" for rate in found), f"{found[-1] / max(found[:-1]):.3f}", f"{bound:.4f}"]
        if hints:
            rate = replay(told, sizes, Way.parse("adaptive")).hit_rate
            row += [f"{rate:.4f}", f"{(rate - found[0]) / (bound - found[0]):.0%}"]
        table.add_row(f"{percent:g} %", *row)
    return table


def costs(objects: int) -> Table:
    """Microseconds by victim, in a full tier, of prompts of which three in ten come again."""
    table = Table("policy", "objects", "us by victim")
    for name in list(policy.POLICIES):
        store = Store(Sizes(objects * BLOCK_TOKENS, 0, 1), Way.parse(name))
        prompts = _prompts()
        while store.counts["evicted"] == 0:
            store.serve(next(prompts))
        chosen, evicted = store.choosing, store.counts["evicted"]
        for _ in range(MEASURED):
            store.serve(next(prompts))
        taken = (store.choosing - chosen) / (store.counts["evicted"] - evicted)
        table.add_row(name, f"{store.index.objects[Tier.CPU]:,}", f"{1e6 * taken:.1f}")
        del store
        gc.collect()
    return table


def _prompts() -> Iterator[Request]:
    chance = random.Random(0)
    last = 0
    while True:
        session = chance.randrange(last) if last and chance.random() < 0.3 else last
        last = max(last, session + 1)
        yield Request(0.0, CHAIN * BLOCK_TOKENS, tuple(range(CHAIN * session, CHAIN * (session + 1))))


if __name__ == "__main__":
    main()
