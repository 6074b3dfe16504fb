# SPDX-License-Identifier: Apache-2.0
"""`loracache top`: a daemon at work, drawn anew every few seconds.

`Sample` is what was asked of the daemon, `rates` what two of them say of the time between, `_frame` draws them. The
daemon may go and come back meanwhile. Threading: one thread; keys are read where it would sleep.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracache.cli.common import SocketOption, SteeringClient, client_of, number
from loracache.client.control import OperationReport
from loracache.errors import ConfigError, ProtocolError, Unavailable
from loracache.results import OperationState

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

__all__ = ["Throughput", "Sample", "rates", "top"]

_PATIENCE_S = 2.0
_BAR = 20
_FAILURES = 5
_OPERATIONS = 50
_PLAIN_WIDTH = 160


@dataclass(frozen=True, slots=True)
class Sample:
    """What the daemon said, and when."""

    at: float
    """Seconds of this process's clock."""
    instance: bytes
    """Of the daemon's run: another after a restart."""
    status: dict[str, Any]
    operations: list[OperationReport]


@dataclass(frozen=True, slots=True)
class Throughput:
    """What happened between two samples, a second."""

    read: dict[str, float]
    """Bytes by tier."""
    written: dict[str, float]
    """Bytes by tier; of cpu: what engines stored."""
    evicted: dict[str, float]
    """Objects by tier."""
    hits: float
    misses: float

    @property
    def hit_rate(self) -> float | None:
        """Hits of all keys that were looked up; None where none was."""
        total = self.hits + self.misses
        return self.hits / total if total else None


def rates(before: Sample | None, now: Sample) -> Throughput:
    """Of the time between; of the daemon's whole life where there is no sample before it, or of another process."""
    status = now.status
    old: dict[str, int] = {}
    seconds = max(float(status["uptime_s"]), 1e-3)
    if before is not None and before.instance == now.instance:
        old = before.status["counters"]
        seconds = max(now.at - before.at, 1e-3)
    grown: dict[str, float] = {name: (total - old.get(name, 0)) / seconds for name, total in status["counters"].items()}

    def of(prefix: str) -> float:
        return sum(value for name, value in grown.items() if name.startswith(prefix))

    tiers = list(status["tiers"])
    return Throughput(
        read={tier: grown.get(f"load.{tier}.bytes", 0.0) for tier in tiers if tier != "cpu"},
        written={tier: grown.get("store.bytes" if tier == "cpu" else f"write.{tier}.bytes", 0.0) for tier in tiers},
        evicted={tier: of(f"evict.{tier}.") for tier in tiers},
        hits=of("hit."),
        misses=of("miss."),
    )


def top(
    socket: SocketOption = None,
    interval: Annotated[float, typer.Option(metavar="SECONDS", parser=number, help="Between two frames.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, of one interval, and end.")] = False,
) -> None:
    """Watch tiers, hits, throughput, evictions, leases, operations and failures. q or Ctrl-C ends it."""
    if not 0.1 <= interval <= 3600:
        raise ConfigError(f"--interval {interval} must be seconds from 0.1 to 3600")
    with client_of(socket, _PATIENCE_S) as client:
        before = _read(client)
        if once or not sys.stdout.isatty():
            time.sleep(interval)
            _print_plain(before, _read(client))
            return
        with contextlib.suppress(KeyboardInterrupt):
            _watch(client, before, interval)


def _watch(client: SteeringClient, before: Sample, interval: float) -> None:
    from rich.live import Live

    shown: Sample | None = None
    with _keys() as stop, Live(_frame(None, before, ""), screen=True, auto_refresh=False) as live:
        live.refresh()
        while not stop(interval):
            gone = ""
            try:
                shown, before = before, _read(client)
            except (Unavailable, ProtocolError) as error:
                gone = f"gone for {time.monotonic() - before.at:.0f} s, waiting for it to come back: {error}"
            live.update(_frame(shown, before, gone), refresh=True)


def _read(client: SteeringClient) -> Sample:
    status: dict[str, Any] = client.status()
    operations = client.operations(_OPERATIONS)
    return Sample(time.monotonic(), client.connection.instance, status, operations)


def _print_plain(before: Sample, now: Sample) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    Console(width=width, highlight=False).print(_frame(before, now, "", plain=width is not None))


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """stop(seconds) waits so long for a q on the terminal, and answers whether it came."""

    def sleep(seconds: float) -> bool:
        time.sleep(seconds)
        return False

    if not sys.stdin.isatty():
        yield sleep
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    kept = termios.tcgetattr(descriptor)

    def stop(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([descriptor], [], [], left)[0]:
                return False
            pressed = os.read(descriptor, 64)
            if not pressed or b"q" in pressed.lower():
                return True
        return False

    try:
        tty.setcbreak(descriptor)
        yield stop
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, kept)


# -- drawing -----------------------------------------------------------------------------------------------------------


def _frame(before: Sample | None, now: Sample, gone: str, plain: bool = False) -> Group:
    """Everything, as rich draws it. plain: without boxes, for files and pipes."""
    from rich.console import Group
    from rich.text import Text

    from loracache.cli.tables import shown

    status, happened = now.status, rates(before, now)
    hit_rate, whole = happened.hit_rate, rates(None, now).hit_rate
    head = (
        f"LoRACache {status['version']}  pid {status['pid']}  up {status['uptime_s']:.0f} s  "
        f"{status['connections']} connections  {status['leases']} leases of {status['leased_objects']} objects  "
        f"{status['socket']}"
    )
    hits = (
        f"hit rate {_percent(hit_rate)} now, {_percent(whole)} since the start  "
        f"{happened.hits:.0f} hits/s  {happened.misses:.0f} misses/s"
    )
    parts: list[Any] = [Text(shown(gone), style="bold red")] if gone else []
    parts += [Text(shown(head)), Text(hits), _tiers_table(now, happened, plain)]
    running = [each for each in now.operations if each.state is OperationState.RUNNING]
    parts.append(_operations_table(running, plain) if running else Text("no operations running"))
    failures = status["recent_failures"][-_FAILURES:]
    parts.append(Text("recent failures:" if failures else "no recent failures"))
    for each in reversed(failures):
        when = time.strftime("%H:%M:%S", time.localtime(each["time"]))
        parts.append(Text(shown(f"  {when}  {each['tier']}  {each['cause']}  x{each['count']}"), style="red"))
    return Group(*parts)


def _tiers_table(now: Sample, happened: Throughput, plain: bool) -> Table:
    from rich.text import Text

    from loracache.cli.tables import size_text
    from loracache.tiers import tier_state

    table = _table(plain)
    for name in ("tier", "fill", "used of limit", "objects", "in/s", "out/s", "evicted/s", "queued", "state"):
        table.add_column(name, justify="left" if name in ("tier", "fill", "state") else "right", no_wrap=True)
    for name, tier in now.status["tiers"].items():
        limit = tier.get("limit_bytes", 0)
        used = f"{size_text(tier['used_bytes'])} of {size_text(limit)}" if limit else "-"
        cells = (
            name,
            _bar(tier["used_bytes"] / limit) if limit else "-",
            used,
            tier.get("objects", "-"),
            size_text(happened.written[name]),
            size_text(happened.read[name]) if name in happened.read else "-",
            f"{happened.evicted[name]:.1f}",
            tier.get("queued_writes", 0) + sum(tier.get("waiting", {}).values()),
            tier_state(tier),
        )
        table.add_row(*(Text(str(cell)) for cell in cells))
    return table


def _operations_table(running: list[OperationReport], plain: bool) -> Table:
    from loracache.cli.tables import size_text

    table = _table(plain)
    for name in ("operation", "verb", "done", "bytes", "skipped", "seconds"):
        table.add_column(name, justify="left" if name in ("operation", "verb") else "right", no_wrap=True)
    for each in running:
        done = f"{each.objects}" if each.total is None else f"{each.objects} of {each.total}"
        table.add_row(each.id, each.verb, done, size_text(each.bytes), str(each.skipped), f"{each.seconds:.0f}")
    return table


def _table(plain: bool) -> Table:
    from rich.table import Table

    return Table(box=None, pad_edge=False) if plain else Table()


def _bar(share: float) -> str:
    filled = round(min(max(share, 0.0), 1.0) * _BAR)
    return f"[{'#' * filled}{'.' * (_BAR - filled)}] {100 * share:3.0f} %"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
