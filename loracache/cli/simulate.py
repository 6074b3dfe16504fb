# SPDX-License-Identifier: Apache-2.0
"""`loracache simulate`: what a policy and sizes would have done with a trace, without a daemon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracache.cli.common import JsonOption, check_plot, integer, print_json
from loracache.errors import ConfigError

if TYPE_CHECKING:
    from loracache.simulator.advice import Advice, Point
    from loracache.simulator.replay import Run
    from loracache.simulator.request import Request
    from loracache.simulator.store import Way

__all__ = ["simulate"]

_RANK_BYTES = 5 << 20  # of one rank of an adapter for all linear layers of a model of 8B parameters, 16 bits
_MOST_RANK = 4096
_MOST_LISTED = 32
_ranked = Annotated[str, typer.Option(help="Ranks of the adapters, in turn; 5 MiB a rank.")]
_prefetched = Annotated[
    str, typer.Option(help="With commas: none, timer, hints:P (percent of returns announced), timer+hints:P.")
]
_count = integer(0, 100_000)


@dataclass(frozen=True, slots=True)
class Model:
    """Options that say what the trace is of."""

    kv_bytes_per_token: Annotated[str, typer.Option(help="KV of one token, where the trace does not say.")] = "128KiB"
    adapters: Annotated[int, typer.Option(metavar="N", parser=_count, help="How many.", show_default="0")] = 0
    ranks: _ranked = "8,16,32,64"
    zipf: Annotated[float, typer.Option(help="The n-th adapter is asked for as often as n ** -zipf.")] = 1.0
    hints: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the sessions that come back, how many say so each time; 0 to 1.")
    ] = 0.0
    seed: Annotated[
        int, typer.Option(metavar="N", parser=integer(0, 2**31), help="Of the adapters' order.", show_default="0")
    ] = 0
    restart: Annotated[float, typer.Option(metavar="SECONDS", help="Memory is empty again once, then.")] = 0.0


@dataclass(frozen=True, slots=True)
class Shown:
    """Options that say what is answered."""

    recommend: Annotated[bool, typer.Option("--recommend", help="Say which memory, disk and policy to take.")] = False
    within: Annotated[float, typer.Option(metavar="PERCENT", help="That --recommend may be worse than the best.")] = 5.0
    prices: Annotated[str, typer.Option(metavar="MEMORY:DISK", help="Of a GiB of each, for --recommend.")] = "30:1"
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw hit rates and TTFT, .png or .svg.", show_default=False)
    ] = None
    as_json: JsonOption = False


def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="What a daemon recorded; or Mooncake's, Azure's, ...")],
    model: Model,
    shown: Shown,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Policies with commas; static:P is LRU in two pools, P % of memory for adapters.",
            show_default="lru; with --recommend lru,adaptive",
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Sizes of tier cpu, with commas.", show_default="64GiB; many with --recommend")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(help="Size of tier disk; 0: none.", show_default="0; three with --recommend")
    ] = None,
    disk_policy: Annotated[str | None, typer.Option(help="Policy of the disk.", show_default="as --policy")] = None,
    admission: Annotated[str, typer.Option(help="What is written to disk: all, second_touch or adaptive.")] = "all",
    engines: Annotated[
        int, typer.Option(metavar="N", parser=_count, help="That serve it.", show_default="load 0.8 without hits")
    ] = 0,
    prefetch: _prefetched = "none",
) -> None:
    """Replay a trace against the cache's own index and policies on a clock of its own, beside Belady's bound."""
    import gc

    from loracache.simulator.store import Way
    from loracache.simulator.swapping import checked

    policies = policy if policy is not None else "lru,adaptive" if shown.recommend else "lru"
    ways = [Way.parse(each, disk_policy, admission) for each in policies.split(",")]
    memories, disks = _sizes("memory", memory), _sizes("disk", disk)
    ahead = [checked(each) for each in prefetch.split(",")]
    if len(disks) > 1 and not shown.recommend:
        raise ConfigError(f"--disk {disk} are several; give one, or --recommend")
    if shown.recommend and ahead != ["none"]:
        raise ConfigError(f"--prefetch {prefetch} does not go with --recommend; leave one out")
    if shown.plot is not None:
        check_plot(shown.plot)
    load = _load(trace, model)
    gc.disable()  # millions of nodes, no circles among them
    if shown.recommend:
        _recommend(trace, load, ways, memories, disks, shown)
    else:
        each_of = [(way, each) for way in ways for each in ahead]
        _replay(trace, load, each_of, memories or [64 << 30], disks[0] if disks else 0, engines, shown)


@dataclass(frozen=True, slots=True)
class _Load:
    """A trace, the bytes of a token and of each adapter, and when memory is emptied (seconds; 0: never)."""

    requests: Sequence[Request]
    token: int
    adapters: Sequence[int]
    restart: float

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        tenants = {each.tenant for each in self.requests if each.tenant >= 0}
        tokens = sum(each.tokens for each in self.requests)
        counts = {"adapters": len(self.adapters), "tenants": len(tenants)}
        return {"requests": len(self.requests), "tokens": tokens} | counts


def _sizes(option: str, text: str | None) -> list[int]:
    """Of an option with sizes. Raises ConfigError."""
    from loracache.config import parse_size

    if text is None:
        return []
    try:
        sizes = [parse_size(each) for each in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--{option}: {error}") from None
    if len(sizes) > _MOST_LISTED:
        raise ConfigError(f"--{option}: {len(sizes)} sizes; give {_MOST_LISTED} at most")
    return list(dict.fromkeys(sizes))


def _load(trace: Path, model: Model) -> _Load:
    """Raises ConfigError."""
    from loracache.config import parse_size
    from loracache.simulator.hints import with_hints
    from loracache.simulator.trace import own_adapters, read_trace, with_adapters

    try:
        token = parse_size(model.kv_bytes_per_token)
        ranks = [int(each) for each in model.ranks.split(",")]
    except ValueError as error:
        raise ConfigError(f"--kv-bytes-per-token, --ranks: {error}") from None
    if not 1 <= token <= 1 << 30 or not all(1 <= rank <= _MOST_RANK for rank in ranks) or not 0 <= model.zipf <= 10:
        raise ConfigError(
            f"--kv-bytes-per-token {token} must be 1 to 1GiB, --ranks {model.ranks} 1 or more, {_MOST_RANK} at most, "
            f"--zipf {model.zipf} 0 to 10"
        )
    if not 0 <= model.hints <= 1:
        raise ConfigError(f"--hints {model.hints} is a share of the sessions, from 0 to 1")
    requests = with_hints(read_trace(trace), model.hints, model.seed)
    if not model.adapters:
        return _Load(requests, token, own_adapters(requests), model.restart)
    if any(request.held is not None for request in requests):
        raise ConfigError(f"--adapters {model.adapters}: {trace} was recorded with what each asked for; leave it out")
    each = [ranks[number % len(ranks)] * _RANK_BYTES for number in range(model.adapters)]
    return _Load(with_adapters(requests, model.adapters, model.zipf, model.seed), token, each, model.restart)


def _replay(
    trace: Path,
    load: _Load,
    ways: Sequence[tuple[Way, str]],
    memories: Sequence[int],
    disk: int,
    engines: int,
    shown: Shown,
) -> None:
    """ways: each with what is prefetched."""
    from loracache.simulator.belady import belady_hit_rate
    from loracache.simulator.plot import Drawn, plot
    from loracache.simulator.replay import replay
    from loracache.simulator.store import Sizes

    requests = load.requests

    def run(memory: int, way: Way, ahead: str) -> Run:
        sizes = Sizes(memory, disk, load.token, load.adapters)
        return replay(requests, sizes, way, engines=engines, prefetch=ahead, restart=load.restart)

    found = [(memory, run(memory, *way)) for memory in memories for way in ways]
    bounds = {memory: belady_hit_rate(requests, memory + disk, load.token, load.adapters) for memory in memories}
    if shown.plot is not None:
        drawn = [Drawn(run.policy, memory, run.hit_rate, run.ttft_mean) for memory, run in found]
        plot(shown.plot, drawn, bounds, trace.name)
    if shown.as_json:
        runs = [run.as_dict() | {"memory": memory, "disk": disk, "belady": bounds[memory]} for memory, run in found]
        one = {"belady": bounds[memories[0]]} if len(memories) == 1 else {}
        print_json({"trace": str(trace)} | load.as_dict() | {"runs": runs} | one)
    else:
        _print(found, bounds)


def _recommend(
    trace: Path, load: _Load, ways: Sequence[Way], memories: Sequence[int], disks: Sequence[int], shown: Shown
) -> None:
    from loracache.simulator.advice import Prices, advise
    from loracache.simulator.plot import Drawn, plot

    if not 0 <= shown.within < 100:
        raise ConfigError(f"--within {shown.within} must be a percentage, 0 or more and less than 100")
    try:
        prices = Prices(*map(float, shown.prices.split(":", 1)))
    except (TypeError, ValueError):
        raise ConfigError(f"--prices {shown.prices!r} is not MEMORY:DISK; write it like 30:1") from None
    if not all(math.isfinite(price) and price >= 0 for price in (prices.memory, prices.disk)):
        raise ConfigError(f"--prices {shown.prices} must be 0 or more")
    advice = advise(load.requests, load.token, load.adapters, ways, memories, disks, prices, shown.within)
    if shown.plot is not None:
        drawn = [Drawn(_named(each), each.memory, each.hit_rate, each.ttft_mean) for each in advice.points]
        plot(shown.plot, drawn, {}, trace.name)
    if shown.as_json:
        print_json({"trace": str(trace)} | load.as_dict() | advice.as_dict())
    else:
        _print_advice(advice, shown)


def _named(point: Point) -> str:
    from loracache.cli.tables import size_text

    return f"{point.policy}, disk {size_text(point.disk)}" if point.disk else point.policy


def _print(found: Sequence[tuple[int, Run]], bounds: dict[int, float]) -> None:
    from loracache.cli.tables import print_table, size_text

    several = len(bounds) > 1
    rows: list[tuple[Any, ...]] = [
        (
            *((size_text(memory),) if several else ()),
            run.policy, f"{run.hit_rate:.4f}", f"{run.hit_rate_cpu:.4f}", f"{run.hit_rate_disk:.4f}",
            f"{run.invalid_kv:.3f}", f"{run.ttft_mean:.3f}", f"{run.ttft_p99:.3f}",
            size_text(run.bytes_disk_written), run.adapters_loaded, f"{run.choice_us:.1f}", run.prefetch,
        )
        for memory, run in found
    ]  # fmt: skip
    columns = [
        *((">memory",) if several else ()),
        "policy", ">hit rate", ">of cpu", ">of disk", ">invalid KV", ">TTFT mean s", ">p99 s", ">to disk", ">adapters",
        ">us/victim", "prefetch",
    ]  # fmt: skip
    print_table(columns, rows)
    told = [f"{size_text(memory)} {bound:.4f}" if several else f"{bound:.4f}" for memory, bound in bounds.items()]
    typer.echo(f"belady: {', '.join(told)}")


def _best_policies(points: Sequence[Point]) -> list[Point]:
    """Of each pair of sizes the point with the policy that is worth most there; JSON has all."""
    best: dict[tuple[int, int], Point] = {}
    for point in points:
        sizes = point.memory, point.disk
        if sizes not in best or point.saved > best[sizes].saved:
            best[sizes] = point
    return list(best.values())


def _print_advice(advice: Advice, shown: Shown) -> None:
    from loracache.cli.tables import print_table, size_text

    rows = [
        (
            size_text(each.memory), size_text(each.disk) if each.disk else "-", each.policy, f"{each.hit_rate:.4f}",
            f"{each.saved:.1%}", f"{each.ttft_mean:.3f}", f"{each.price:.0f}",
            "<- recommended" if each is advice.best else "",
        )
        for each in _best_policies(advice.points)
    ]  # fmt: skip
    columns = [">memory", ">disk", "policy", ">hit rate", ">prefill saved", ">TTFT mean s", ">price", ""]
    print_table(columns, rows)
    of = "" if advice.sample == 1 else f", from a sample of {advice.sample:.1%} of the chains"
    typer.echo(f"working set: {size_text(advice.working_set)}{of}")
    if (best := advice.best) is None:
        typer.echo("recommended: none: nothing is asked for again that would fit")
        return
    disk = f"a disk of {size_text(best.disk)}" if best.disk else "no disk"
    typer.echo(
        f"recommended: memory {size_text(best.memory)}, {disk}, policy {best.policy}: saves {best.saved:.1%} of "
        f"prefill, within {shown.within:g} % of the best of these, for the least money"
    )
