# SPDX-License-Identifier: Apache-2.0
"""Adapters and KV in one pool beside two pools of fixed sizes, at the pressure where the pools of fixed sizes give in.

    python benchmarks/pressure.py TRACE --adapters 200 --percent 2,10 --half 2 --policy lru,cost,adaptive
    python benchmarks/pressure.py chats --adapters 200 --percent 10

TRACE is in a format that `loracache simulate` reads; a memory is a percentage of its working set, KV and adapters.
"chats" are made up after FASTLIBRA's setting: the pool is an engine's own memory and everything else is in the next
tier, host memory behind PCIe; short prompts and answers, as many as LMSYS-Chat-1M has on average; each adapter's
sessions come in bursts.

The pressure: `peak` is the highest load at which the mean time to first token is within a bound: 5 times what an
average prompt takes when nothing is found and nobody waits, or 0.5 s for chats, as in FASTLIBRA. A load is what arrives
by what the engines can compute if nothing is found. All policies are compared at shares of the peak of the best split.

A part of a policy is switched off by "-" and its name, as in `cost-visits`; "tree" is one of each policy's.
`printed_count` and `printed_cost` are `cost` with a term as FASTLIBRA's paper prints it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
from bisect import bisect_left
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loracache.cache.policy import POLICIES
from loracache.cache.policy.cost import Cost
from loracache.cache.policy.worth import Speeds
from loracache.cache.state.index import Node
from loracache.simulator.clock import Hardware
from loracache.simulator.replay import Replay
from loracache.simulator.store import Sizes, Way
from loracache.simulator.trace import Request, read_trace, with_adapters

TOKEN, RANK_BYTES = 128 << 10, 5 << 20
SPLITS = [f"static:{percent}" for percent in range(10, 100, 10)]
SHARES = (0.5, 0.8, 0.95, 1.0)
BOUND, CHATS_BOUND = 5.0, 0.5
CHATS_HARDWARE = Hardware(cpu=1e15, below=Speeds(disk=20e9, disk_latency=0.0001))
TURNS, PROMPT, ANSWER, BURST = 2.0, 70, 215, 6  # means: turns of a session, tokens of each, sessions of a burst


class PrintedCount(Cost):
    """FASTLIBRA's model with LoRA_Eval as it is printed: adapters are worth less where too few are there."""

    def lora_eval(self, needed: float, held: int) -> float:
        """See Cost."""
        return min(1.0, held / needed) if needed else 1.0


class PrintedCost(Cost):
    """FASTLIBRA's model with cost as it is printed: not by the size of what would go."""

    def worth(self, node: Node) -> float:
        """See Cost."""
        return self.speeds.seconds(node, self._tier)


def chats(adapters: int, sessions: int = 10_000, zipf: float = 1.0, seed: int = 0) -> list[Request]:
    """Sessions of `adapters`, the n-th as often as n ** -zipf, in bursts. Turns are 30 s apart, on average."""
    chance = random.Random(seed)
    weights = list(itertools.accumulate((number + 1) ** -zipf for number in range(adapters)))
    fresh = itertools.count()
    requests = []
    begun = 0.0
    for _ in range(int(sessions / BURST)):
        begun += chance.expovariate(1 / BURST)
        adapter = bisect_left(weights, chance.random() * weights[-1])
        for _ in range(1 + int(chance.expovariate(1 / (BURST - 0.5)))):
            time, tokens = begun + chance.expovariate(1 / 60), 0
            blocks: list[int] = []
            while True:
                tokens += 1 + int(chance.expovariate(1 / PROMPT))
                blocks += itertools.islice(fresh, -(-tokens // 16) - len(blocks))
                requests.append(Request(time, tokens, tuple(blocks), adapter, block_tokens=16))
                if chance.random() < 1 / TURNS:
                    break
                if tokens % 16:
                    blocks.pop()  # its end was the end of a prompt
                time += chance.expovariate(1 / 30)
                tokens += 1 + int(chance.expovariate(1 / ANSWER))
    requests.sort(key=lambda request: request.time)
    return requests


def half_of(requests: list[Request], half: int) -> list[Request]:
    """One half, or with 0 all of them."""
    middle = len(requests) // 2
    part = requests if not half else requests[:middle] if half == 1 else requests[middle:]
    return [replace(each, time=each.time - part[0].time) for each in part]


def peak(replay: Replay, bound: float) -> float:
    """The highest load at which the mean time to first token is within `bound` seconds."""
    low, high = 0.0, 64.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if replay.queue(load=middle).mean <= bound else (low, middle)
    return low


def compare(
    requests: list[Request], sizes: Sizes, policies: list[str], hardware: Hardware, bound: float, title: str
) -> None:
    """One table: each policy at shares of the peak of the best of the splits among them."""
    replays = {name: Replay(requests, sizes, Way.parse(name), hardware) for name in policies}
    peaks = {name: peak(each, bound) for name, each in replays.items()}
    best = max((name for name in policies if name in SPLITS), key=peaks.__getitem__)
    table = Table(
        "policy",
        "hit rate",
        "loads",
        "invalid KV",
        "peak",
        *(f"TTFT at {share:.0%}" for share in SHARES),
        f"by {best}",
        "by static:20",
        title=title,
    )
    at_peak = {name: each.queue(load=peaks[best]).mean for name, each in replays.items()}
    for name, each in replays.items():
        run = each.run()
        ttft = (f"{each.queue(load=peaks[best] * share).mean:.3f}" for share in SHARES)
        against = (
            f"{at_peak[name] / at_peak[other] - 1:+.1%}" if other in at_peak else "" for other in (best, "static:20")
        )
        table.add_row(
            *(name, f"{run.hit_rate_cpu:.4f}", str(run.adapters_loaded), f"{run.invalid_kv_cpu:.3f}"),
            *(f"{peaks[name]:.3f}", *ttft, *against),
        )
    Console(width=150).print(table)


def main() -> None:
    """A table for each number of adapters and size of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", help="or: chats")
    parser.add_argument("--half", type=int, choices=(0, 1, 2), default=0)
    parser.add_argument("--adapters", default="200")
    parser.add_argument("--ranks", default="", help="default: 8,16,32,64; of chats 32,64")
    parser.add_argument("--percent", default="2,10")
    parser.add_argument("--policy", default="lru,cost,gdsf,adaptive")
    given = parser.parse_args()
    made_up = given.trace == "chats"
    ranks = [int(rank) for rank in (given.ranks or ("32,64" if made_up else "8,16,32,64")).split(",")]
    hardware = CHATS_HARDWARE if made_up else Hardware()
    gc.disable()  # millions of nodes, no circles among them
    POLICIES.update(printed_count=PrintedCount, printed_cost=PrintedCost)
    for adapters in map(int, given.adapters.split(",")):
        requests = chats(adapters) if made_up else with_adapters(read_trace(Path(given.trace)), adapters, 1.0)
        requests = half_of(requests, given.half)
        each = [ranks[number % len(ranks)] * RANK_BYTES for number in range(adapters)]
        kv = {
            (request.adapter, block): request.tokens_of(at)
            for request in requests
            for at, block in enumerate(request.blocks)
        }
        asked = {request.adapter for request in requests}
        working = TOKEN * sum(kv.values()) + sum(each[adapter] for adapter in asked)
        mean = sum(request.tokens for request in requests) / len(requests) / hardware.prefill
        for percent in map(float, given.percent.split(",")):
            memory = int(working * percent / 100)
            title = f"{adapters} adapters of {sum(each) >> 30} GiB, memory {percent:g} % of {working >> 30} GiB"
            sizes = Sizes(memory, working * 2 if made_up else 0, TOKEN, each)
            compare(
                requests,
                sizes,
                [*SPLITS, *given.policy.split(",")],
                hardware,
                CHATS_BOUND if made_up else BOUND * mean,
                title,
            )


if __name__ == "__main__":
    main()
