# SPDX-License-Identifier: Apache-2.0
"""`loracache simulate`: what a policy and sizes would have done with a trace, without a daemon."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracache.cli.common import JsonOption, integer, print_json
from loracache.errors import ConfigError

if TYPE_CHECKING:
    from loracache.simulator.replay import Run

__all__ = ["simulate"]

_RANK_BYTES = 5 << 20  # of one rank of an adapter for all linear layers of a model of 8B parameters, 16 bits
_ranked = Annotated[str, typer.Option(help="Ranks of the adapters, in turn; 5 MiB a rank.")]
_prefetched = Annotated[
    str, typer.Option(help="With commas: none, timer, hints:P (percent of returns announced), timer+hints:P.")
]


def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="Mooncake's JSONL or Azure's CSV.")],
    policy: Annotated[
        str, typer.Option(help="Policies with commas; static:P is LRU in two pools, P % of memory for adapters.")
    ] = "lru",
    memory: Annotated[str, typer.Option(help="Size of tier cpu.")] = "64GiB",
    disk: Annotated[str, typer.Option(help="Size of tier disk; 0: there is none.")] = "0",
    disk_policy: Annotated[str | None, typer.Option(help="Policy of the disk.", show_default="as --policy")] = None,
    admission: Annotated[str, typer.Option(help="What is written to disk: all or second_touch.")] = "all",
    kv_bytes_per_token: Annotated[str, typer.Option(help="KV of one token.")] = "128KiB",
    adapters: Annotated[
        int, typer.Option(metavar="N", parser=integer(0, 100_000), help="How many; 0: none.", show_default="0")
    ] = 0,
    ranks: _ranked = "8,16,32,64",
    zipf: Annotated[float, typer.Option(help="The n-th adapter is asked for as often as n ** -zipf.")] = 1.0,
    engines: Annotated[
        int,
        typer.Option(
            metavar="N", parser=integer(0, 100_000), help="That serve the trace.", show_default="load 0.8 without hits"
        ),
    ] = 0,
    prefetch: _prefetched = "none",
    restart: Annotated[float, typer.Option(metavar="SECONDS", help="Memory is empty again once, then.")] = 0.0,
    seed: Annotated[
        int, typer.Option(metavar="N", parser=integer(0, 2**31), help="Of the adapters' order.", show_default="0")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Replay a trace against the cache's own index and policies on a clock of its own, beside Belady's bound."""
    import gc

    from loracache.config import parse_size
    from loracache.simulator.belady import belady_hit_rate
    from loracache.simulator.replay import replay
    from loracache.simulator.store import Sizes, Way
    from loracache.simulator.swapping import checked
    from loracache.simulator.trace import read_trace, with_adapters

    try:
        cpu, lower, token = (parse_size(each) for each in (memory, disk, kv_bytes_per_token))
        steps = [int(each) for each in ranks.split(",")]
    except ValueError as error:
        raise ConfigError(f"--memory, --disk, --kv-bytes-per-token, --ranks: {error}") from None
    if token < 1 or min(steps) < 1 or not 0 <= zipf <= 10:
        raise ConfigError(f"--kv-bytes-per-token {token} and --ranks {ranks} must be 1 or more, --zipf {zipf} 0 to 10")
    ways = [Way.parse(each, disk_policy, admission) for each in policy.split(",")]
    requests = with_adapters(read_trace(trace), adapters, zipf, seed)
    each_adapter = [steps[number % len(steps)] * _RANK_BYTES for number in range(adapters)]
    gc.disable()  # millions of nodes, no circles among them
    given = Sizes(cpu, lower, token, each_adapter)
    how = [checked(each) for each in prefetch.split(",")]
    runs = [
        replay(requests, given, way, engines=engines, prefetch=each, restart=restart) for way in ways for each in how
    ]
    bound = belady_hit_rate(requests, cpu + lower, token, each_adapter)
    if as_json:
        asked = {"requests": len(requests), "tokens": sum(each.tokens for each in requests)}
        print_json({"trace": str(trace), **asked, "runs": [run.as_dict() for run in runs], "belady": bound})
    else:
        _print(runs, bound)


def _print(runs: list[Run], bound: float) -> None:
    from loracache.cli.tables import print_table, size_text

    rows: list[tuple[Any, ...]] = [
        (
            run.policy, f"{run.hit_rate:.4f}", f"{run.hit_rate_cpu:.4f}", f"{run.hit_rate_disk:.4f}",
            f"{run.invalid_kv:.3f}", f"{run.ttft_mean:.3f}", f"{run.ttft_p99:.3f}",
            size_text(run.bytes_disk_written), run.adapters_loaded, f"{run.choice_us:.1f}", run.prefetch,
        )
        for run in runs
    ]  # fmt: skip
    columns = [
        "policy", ">hit rate", ">of cpu", ">of disk", ">invalid KV", ">TTFT mean s", ">p99 s", ">to disk",
        ">adapters", ">us/victim", "prefetch",
    ]  # fmt: skip
    print_table(columns, rows)
    typer.echo(f"belady: {bound:.4f}")
