# SPDX-License-Identifier: Apache-2.0
"""Plans of offline batches: time and memory for 10,000 to 1,000,000 prompts of 1,000 tokens on one core, and prompt
tokens computed in the file's order, in a plain walk down the tree and in the plan's, beside the bound of a cache
without end, with a KV cache of 5 % of the distinct tokens and 64 requests at once. MOONCAKE_TRACE names a trace of that
format; without it made-up conversations stand for it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from batch_sets import Item, agents, conversations, documents, few_shot, from_trace
from common import Row, row

from loracache.batch.plan import Plan, make_plan
from loracache.batch.prompts import PromptHasher
from loracache.batch.replay import computed_at_least

BLOCK_TOKENS = 16
RUNNING = 64
KV_SHARE = 0.05
_MEASURE = """
import itertools, json, resource, sys, time
from batch_sets import large
from loracache.batch.plan import make_plan
from loracache.batch.prompts import PromptHasher
count = int(sys.argv[1])
hasher, source, spent = PromptHasher(), large(count), 0.0
while some := list(itertools.islice(source, 1000)):
    began = time.perf_counter()
    for prompt, adapter, decode in some:
        hasher.add(prompt, adapter=adapter, decode=decode)
    spent += time.perf_counter() - began
began = time.perf_counter()
plan = make_plan(hasher.prompts())
spent += time.perf_counter() - began
assert len(plan.order) == count
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": spent, "GiB": peak / 2**20}))
"""


def run(quick: bool) -> list[Row]:
    """See the module's docstring. Quick: no 1,000,000."""
    return [*_scale((1000, 10_000) if quick else (10_000, 100_000, 1_000_000)), *_sets()]


def _scale(counts: tuple[int, ...]) -> Iterator[Row]:
    seconds = {}
    core = str(min(os.sched_getaffinity(0)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    for count in counts:
        command = ["taskset", "-c", core, sys.executable, "-c", _MEASURE, str(count)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        seconds[count] = found["seconds"]
        asked = count == 1_000_000
        what = f"plan of {count:,} prompts of 1,000 tokens"
        yield row(what, "s", [found["seconds"]], at_most=60.0 if asked else None)
        yield row("  memory of the process at most", "GiB", [found["GiB"]], at_most=4.0 if asked else None)
    for few, many in itertools.pairwise(counts):
        grown = seconds[many] / seconds[few] / (many * math.log(many) / (few * math.log(few)))
        yield row(f"  growth from {few:,} to {many:,} / that of n log n", "x", [grown], at_most=1.2)


def _sets() -> Iterator[Row]:
    trace = os.environ.get("MOONCAKE_TRACE")
    sets = {
        "documents with questions": documents(),
        "few-shot evaluation, shuffled": few_shot(),
        "a tree of agents' turns": agents(),
        "Mooncake's trace" if trace else "conversations": from_trace(Path(trace)) if trace else conversations(),
    }
    for name, items in sets.items():
        plan = planned(items)
        distinct = computed_at_least(plan.prompts, plan.tree)
        found = plan.figures(int(KV_SHARE * distinct), RUNNING)
        note = f"{found.requests:,} requests, {found.tokens:,} tokens"
        yield row(f"{name}: computed / bound, planned", "x", [found.planned / found.bound], at_most=1.02, note=note)
        yield row("  in a plain walk down the tree", "x", [found.depth_first / found.bound])
        yield row("  in the file's order", "x", [found.first_come / found.bound], at_least=1.5)
        yield row("  one level of prefixes alone", "x", [(found.tokens - found.saved_by_groups) / found.bound])


def planned(items: list[Item]) -> Plan:
    """The plan of a batch of the base model."""
    hasher = PromptHasher(BLOCK_TOKENS)
    for prompt, decode in items:
        hasher.add(prompt, decode=decode)
    return make_plan(hasher.prompts())
