# SPDX-License-Identifier: Apache-2.0
"""Verbs that change objects, each an operation of the daemon, and `loracache operations list | show | cancel`."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from loracache.cli.common import (
    INTERRUPTED,
    NOTHING,
    PARTLY,
    REFUSED,
    JsonOption,
    SocketOption,
    SteeringClient,
    client_of,
    expanded,
    integer,
    number,
    print_json,
)
from loracache.cli.completion import complete_operation, complete_tier
from loracache.cli.selector import SelectionOptions, is_whole
from loracache.client.control import ALL_TIERS, OperationReport
from loracache.errors import ConfigError, Rejected
from loracache.results import Cause, OperationState
from loracache.wire import control_messages as messages
from loracache.wire.protocol import MAX_TTL_S, Request

__all__ = ["admit", "app", "clear", "compress", "decompress", "evict", "move", "pin", "unpin"]

app = typer.Typer(help="What the daemon was asked to do, and how far it is.", no_args_is_help=True)

_LOOK_S = 0.5  # between two looks at an operation
_DONE = {
    "admit": "admitted", "evict": "removed", "clear": "removed", "pin": "pinned", "unpin": "unpinned", "move": "moved",
    "compress": "compressed", "decompress": "decompressed",
}  # fmt: skip
_ALL_THERE_IS = (Cause.ALREADY, Cause.INCOMPRESSIBLE)  # skipped, and more cannot be wanted
_LOCAL, _STORED = ("cpu", "disk"), ("disk", "redis")


def _tier(about: str) -> typer.models.OptionInfo:
    return typer.Option("--tier", help=about, metavar="TIER", autocompletion=complete_tier)  # type: ignore[no-any-return]


TiersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tier",
        "--tiers",
        metavar="TIER",
        help="cpu, disk or redis; may be repeated. All, if none is given.",
        autocompletion=complete_tier,
        show_default=False,
    ),
]
LocalOption = Annotated[str, _tier("cpu or disk.")]
StoredOption = Annotated[str, _tier("disk or redis.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", autocompletion=complete_operation, show_default=False)]


@dataclass(frozen=True, slots=True)
class Waiting:
    """Where the daemon is, how long to wait for an operation's end, and how to say what came of it."""

    socket: SocketOption = None
    wait: Annotated[
        float | None,
        typer.Option(
            "--wait", metavar="SECONDS", parser=number, help="Wait so long at most.", show_default="to the end"
        ),
    ] = None
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the operation's id at once.")] = False
    as_json: JsonOption = False

    def seconds(self) -> float | None:
        """How long to wait; None: to the end. Raises ConfigError."""
        if self.wait is not None and not 0 <= self.wait < float("inf"):
            raise ConfigError(f"--wait {self.wait} must be seconds, 0 or more; leave it out to wait until the end")
        if self.wait and self.no_wait:
            raise ConfigError(f"--wait {self.wait:g} and --no-wait contradict each other; leave one out")
        return 0.0 if self.no_wait else self.wait


# -- the verbs ---------------------------------------------------------------------------------------------------------


def evict(options: SelectionOptions, waiting: Waiting, tier: TiersOption = None, yes: YesOption = False) -> None:
    """Remove objects, and what depends on them, from tiers; what is leased, pinned or named stays."""
    tiers = _tiers(tier)
    waiting.seconds()
    selection = options.selection()
    if is_whole(selection):
        named = {"model": selection.model, "adapter": selection.adapter}
        whose = ", ".join([f"{what} {name}" for what, name in named.items() if name] or ["this tenant"])
        whose += " (one tenant's)" if selection.model and selection.salt is not None else ""
        _confirm(f"Remove everything of {whose} from {', '.join(tiers)}?", yes, must=True)
    _run(waiting, lambda: messages.Evict("", "", selection.encode(), tiers, 0.0))


def clear(waiting: Waiting, tier: TiersOption = None, yes: YesOption = False) -> None:
    """Remove everything from the tiers named (all, if none is), but for what is leased, pinned or named."""
    tiers = _tiers(tier)
    waiting.seconds()
    _confirm(f"Remove everything from {', '.join(tiers)}?", yes, must=False)
    _run(waiting, lambda: messages.Clear("", "", tiers, 0.0))


def admit(
    options: SelectionOptions,
    waiting: Waiting,
    tier: Annotated[str, _tier("Where to: cpu, disk or redis.")] = "cpu",
    ttl: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", parser=number, help="Hold them in cpu so long.", show_default="not held"),
    ] = None,
) -> None:
    """Bring objects to a tier ahead of need, from wherever they are."""
    _one_of("--tier", tier, ALL_TIERS)
    _check_ttl(ttl, "leave it out to hold nothing")
    _run(waiting, lambda: messages.Admit("", "", options.selection().encode(), tier, 0.0, ttl or 0.0))


def _check_ttl(ttl: float | None, otherwise: str) -> None:
    if ttl is not None and not 0 < ttl <= MAX_TTL_S:
        raise ConfigError(f"--ttl {ttl} must be seconds, more than 0 and at most {MAX_TTL_S:.0f}; {otherwise}")


def pin(
    options: SelectionOptions,
    waiting: Waiting,
    tier: LocalOption = "cpu",
    ttl: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", parser=number, help="For how long.", show_default="until unpinned"),
    ] = None,
) -> None:
    """Keep objects in a tier, and what they depend on with them."""
    _one_of("--tier", tier, _LOCAL)
    _check_ttl(ttl, "leave it out to pin until unpinned")
    _run(waiting, lambda: messages.Pin("", "", options.selection().encode(), tier, ttl or 0.0, 0.0))


def unpin(options: SelectionOptions, waiting: Waiting, tier: LocalOption = "cpu") -> None:
    """End pins."""
    _one_of("--tier", tier, _LOCAL)
    _run(waiting, lambda: messages.Unpin("", "", options.selection().encode(), tier, 0.0))


def move(
    source: Annotated[str, typer.Argument(help="Tier where they are.", autocompletion=complete_tier)],
    target: Annotated[str, typer.Argument(help="Tier where they shall be.", autocompletion=complete_tier)],
    options: SelectionOptions,
    waiting: Waiting,
    keep: Annotated[bool, typer.Option("--keep", help="Copy: leave them at the source too.")] = False,
) -> None:
    """Bring objects from one tier to another."""
    _one_of("SOURCE", source, ALL_TIERS)
    _one_of("TARGET", target, ALL_TIERS)
    if source == target:
        raise ConfigError(f"SOURCE and TARGET are both {source}; give two tiers")
    _run(waiting, lambda: messages.Move("", "", options.selection().encode(), source, target, keep, 0.0))


def compress(options: SelectionOptions, waiting: Waiting, tier: StoredOption = "disk") -> None:
    """Keep objects of a tier compressed, losslessly, where that makes them smaller; loading undoes it."""
    _one_of("--tier", tier, _STORED)
    _run(waiting, lambda: messages.Compress("", "", options.selection().encode(), tier, 0.0))


def decompress(options: SelectionOptions, waiting: Waiting, tier: StoredOption = "disk") -> None:
    """Keep objects of a tier as they are again."""
    _one_of("--tier", tier, _STORED)
    _run(waiting, lambda: messages.Decompress("", "", options.selection().encode(), tier, 0.0))


# -- loracache operations ----------------------------------------------------------------------------------------------


def list_(
    socket: SocketOption = None,
    as_json: JsonOption = False,
    limit: Annotated[int, typer.Option(parser=integer(1, 10_000), metavar="COUNT", help="Most operations.")] = 100,
) -> None:
    """Show the operations begun last, the latest first; those that ended are remembered for an hour."""
    with client_of(socket) as client:
        reports = client.operations(limit)
    if as_json:
        print_json([dataclasses.asdict(report) for report in reports])
        return
    from loracache.cli.tables import causes_text, print_table, size_text, time_text

    columns = ["id", "verb", "state", "started", ">seconds", ">objects", ">total", ">bytes", ">skipped", "causes"]
    rows = (
        (each.id, each.verb, each.state, time_text(each.started), f"{each.seconds:.1f}", each.objects,
         "-" if each.total is None else each.total, size_text(each.bytes), each.skipped, causes_text(each.causes))
        for each in reports
    )  # fmt: skip
    print_table(columns, rows)


def show(
    id_: IdArgument,
    socket: SocketOption = None,
    as_json: JsonOption = False,
    wait: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", parser=number, help="Wait for its end so long; exit as its verb would."),
    ] = None,
) -> None:
    """Show how far an operation is."""
    seconds = Waiting(wait=wait).seconds()
    with client_of(socket) as client:
        report = client.operation(id_)
        if wait is not None:
            report = _follow(client, report, seconds)
    _print_report(report, as_json)
    if wait is not None:
        _exit(report)


def cancel(id_: IdArgument, socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Have an operation end before its next step; what is done stays done."""
    with client_of(socket) as client:
        report = client.cancel(id_)
    _print_report(report, as_json)


for _name, _command in (("list", list_), ("show", show), ("cancel", cancel)):
    app.command(_name)(expanded(_command))


# -- inside ------------------------------------------------------------------------------------------------------------


def _run(waiting: Waiting, request: Callable[[], Request]) -> None:
    """Begin an operation, follow it as long as was asked for, say what came of it, and exit with what that means."""
    seconds = waiting.seconds()
    asked = request()
    with client_of(waiting.socket) as client:
        report = client.begin(asked)
        if seconds == 0:
            if waiting.as_json:
                print_json(dataclasses.asdict(report))
            else:
                typer.echo(report.id)
            return
        report = _follow(client, report, seconds)
    if waiting.as_json:
        print_json(dataclasses.asdict(report))
    else:
        _print_outcome(report)
    _exit(report)


def _follow(client: SteeringClient, report: OperationReport, seconds: float | None) -> OperationReport:
    """The operation's last report within `seconds`, with a line of progress on a terminal."""
    deadline = None if seconds is None else time.monotonic() + seconds
    progress = _Progress()
    try:
        while report.state is OperationState.RUNNING:
            left = _LOOK_S if deadline is None else min(_LOOK_S, deadline - time.monotonic())
            if left <= 0:
                break
            report = client.operation(report.id, wait=left)
            progress.show(report)
    except KeyboardInterrupt:
        progress.end()
        typer.echo(
            f"operation {report.id} goes on; see: loracache operations show {report.id}; "
            f"end it: loracache operations cancel {report.id}",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    finally:
        progress.end()
    return report


class _Progress:
    """One line on standard error, where that is a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._width = 0

    def show(self, report: OperationReport) -> None:
        """Draw it anew."""
        if not sys.stderr.isatty() or report.state is not OperationState.RUNNING:
            return
        from loracache.cli.tables import size_text

        # An eviction takes along what depends on the objects that were named.
        named = report.total is not None and report.verb != messages.Evict.operation
        of = f" of {report.total} ({_percent(report)} %)" if named else ""
        line = f"{report.verb} {report.id}: {report.objects}{of} objects, {size_text(report.bytes)}"
        line += f", {report.skipped} skipped, {report.seconds:.0f} s"
        line = line[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)

    def end(self) -> None:
        """Take it away."""
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
            self._width = 0


def _percent(report: OperationReport) -> int:
    return 100 * min(report.objects + report.skipped, report.total or 1) // (report.total or 1)


def _print_outcome(report: OperationReport) -> None:
    from loracache.cli.tables import causes_text, size_text

    text = f"{_DONE[report.verb]} {report.objects} objects"
    if report.verb not in (messages.Pin.operation, messages.Unpin.operation):  # which move no bytes
        text += f" ({size_text(report.bytes)})"
    text += f", skipped {report.skipped}"
    text += f" ({causes_text(report.causes)})" if report.causes else ""
    text += f", saved {size_text(report.saved)}" if report.verb == messages.Compress.operation else ""
    if report.state is not OperationState.DONE:
        text += f"; {report.state}, see: loracache operations show {report.id}"
    typer.echo(text)


def _print_report(report: OperationReport, as_json: bool) -> None:
    fields = dataclasses.asdict(report)
    if as_json:
        print_json(fields)
        return
    from loracache.cli.tables import causes_text, print_values, size_text, time_text

    fields |= {"started": time_text(report.started), "bytes": size_text(report.bytes), "saved": size_text(report.saved)}
    fields |= {"causes": causes_text(report.causes), "total": "-" if report.total is None else report.total}
    print_values((name, value) for name, value in fields.items() if name != "error" or value)


def _exit(report: OperationReport) -> None:
    """Raise Exit with what a report means, where that is not 0."""
    if report.state is OperationState.FAILED:
        raise Rejected(f"operation {report.id} failed: {report.error or 'see the log of the daemon'}")
    left = {cause for cause, count in report.causes.items() if count and cause not in _ALL_THERE_IS}
    if report.state is OperationState.DONE and left == {Cause.ABSENT} and not report.objects:
        raise typer.Exit(NOTHING)
    if report.state is not OperationState.DONE or left:
        raise typer.Exit(PARTLY)


def _one_of(name: str, tier: str, known: Sequence[str]) -> None:
    if tier not in known:
        raise ConfigError(f"{name} {tier[:40]!r} is not a tier for this; give {' or '.join(known)}")


def _tiers(given: Iterable[str] | None) -> list[str]:
    """Those named; all, where none is. Each may hold several, with commas."""
    tiers = list(itertools.chain.from_iterable(each.split(",") for each in given or ALL_TIERS))
    for tier in tiers:
        _one_of("--tier", tier, ALL_TIERS)
    return list(dict.fromkeys(tiers))


def _confirm(question: str, yes: bool, *, must: bool) -> None:
    """Ask a person. must: where nobody can be asked, --yes has to be given."""
    if yes:
        return
    if not sys.stdin.isatty():
        if must:
            raise ConfigError(f"{question} Nobody can be asked here; give --yes")
        return
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        typer.echo(err=True)
        raise typer.Exit(INTERRUPTED) from None
    if not agreed:
        typer.echo("nothing was removed", err=True)
        raise typer.Exit(REFUSED)
