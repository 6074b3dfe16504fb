# SPDX-License-Identifier: Apache-2.0
"""What each admission has written to disk, and what is found with that, beside `admission: all`, at several sizes.

    python benchmarks/admission.py TRACE --memory 5 --disk 10,25,50,100

TRACE is in the format of Mooncake or Azure (docs/policy.md). The whole of it is replayed with `lru`, and its second
half is counted: a daemon that runs for long knows what comes again. With --half that half is replayed alone, from empty
tiers. Sizes are percentages of all distinct blocks.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loracache.cache.policy import ADMISSIONS
from loracache.simulator.store import Sizes, Store, Way
from loracache.simulator.trace import Request, read_trace

TOKEN, BLOCK_TOKENS = 128 << 10, 512


def replay(requests: Sequence[Request], begin: int, sizes: Sizes, admission: str) -> tuple[float, int]:
    """Leading tokens found by tokens asked, and bytes written to disk, from request `begin` on."""
    store = Store(sizes, Way.parse("lru", admission=admission))
    found = asked = before = 0
    for number, request in enumerate(requests):
        if number == begin:
            found = asked = 0
            before = store.counts["disk_written"]
        hits = store.serve(request)
        found += hits.cpu + hits.disk
        asked += request.tokens
    return found / asked, store.counts["disk_written"] - before


def main() -> None:
    """Replay the trace once for each admission and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--half", type=int, choices=(1, 2))
    parser.add_argument("--memory", default="5")
    parser.add_argument("--disk", default="10,25,50,100")
    given = parser.parse_args()
    requests = read_trace(given.trace)
    middle = len(requests) // 2
    begin = middle if given.half is None else 0
    if given.half is not None:
        requests = requests[:middle] if given.half == 1 else requests[middle:]
    total = len({block for request in requests for block in request.blocks}) * BLOCK_TOKENS * TOKEN
    gc.disable()  # millions of nodes, no circles among them
    others = [name for name in ADMISSIONS if name != "all"]
    table = Table("memory", "disk", "all: hits", "written", *(f"{name}: of its hits, bytes" for name in others))
    for memory in map(float, given.memory.split(",")):
        for disk in map(float, given.disk.split(",")):
            sizes = Sizes(int(total * memory / 100), int(total * disk / 100), TOKEN)
            hits, written = replay(requests, begin, sizes, "all")
            cells = [f"{memory:g} %", f"{disk:g} %", f"{hits:.4f}", f"{written / 2**40:.2f} TiB"]
            for name in others:
                other, wrote = replay(requests, begin, sizes, name)
                cells.append(f"{other / hits if hits else 1:.3f}, {wrote / max(1, written):.2f}")
            table.add_row(*cells)
            Console(width=120).print(*cells, sep=" | ")  # the whole takes long
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
