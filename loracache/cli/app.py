# SPDX-License-Identifier: Apache-2.0
"""The command line: every operation of a daemon as `loracache VERB`. Here is the table of contents.

objects.py looks, jobs.py changes, top.py watches, simulate.py replays; selector.py has the options that say which
objects, common.py the exit codes. What a command alone needs is imported when it runs: starting is most of what a
script waits for.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from loracache import __version__
from loracache.cli import adapters, batch, check, jobs, objects, quota, simulate, tokens, top
from loracache.cli.common import (
    EXIT_CODES,
    PARTLY,
    REFUSED,
    Commands,
    JsonOption,
    SocketOption,
    client_of,
    discard_output,
    expanded,
    number,
    open_closed_streams,
    print_json,
    tell,
)
from loracache.cli.selector import SelectionOptions
from loracache.errors import ConfigError

__all__ = ["main"]

app = typer.Typer(
    name="loracache",
    cls=Commands,
    help="One cache for everything an LLM server reads again.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_SWITCH_S = 0.001  # after which a tier's thread that computes lets the loop go on; by default five times as long, each
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)  # of a write to standard output
_LOOK, _CHANGE, _MANAGE = "Look", "Change", "Manage"
VERBS = (
    ("lookup", objects.lookup, _LOOK),
    ("objects", objects.objects, _LOOK),
    ("tree", objects.tree, _LOOK),
    ("events", objects.events, _LOOK),
    ("top", top.top, _LOOK),
    ("config", objects.config, _LOOK),
    ("admit", jobs.admit, _CHANGE),
    ("evict", jobs.evict, _CHANGE),
    ("pin", jobs.pin, _CHANGE),
    ("unpin", jobs.unpin, _CHANGE),
    ("move", jobs.move, _CHANGE),
    ("compress", jobs.compress, _CHANGE),
    ("decompress", jobs.decompress, _CHANGE),
    ("clear", jobs.clear, _CHANGE),
)

app.add_typer(adapters.app, name="adapters", rich_help_panel=_MANAGE)
app.add_typer(batch.app, name="batch", rich_help_panel=_MANAGE)
app.add_typer(jobs.app, name="operations", rich_help_panel=_MANAGE)
app.add_typer(quota.app, name="quota", rich_help_panel=_MANAGE)
app.add_typer(tokens.app, name="tokens", rich_help_panel=_MANAGE)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"loracache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What `loracache` takes without a verb."""


@app.command(rich_help_panel=_MANAGE)
def serve(
    socket: SocketOption = None,
    memory: Annotated[str | None, typer.Option(help="Arena, tier cpu, e.g. 4GiB.", show_default="4GiB")] = None,
    hugepages: Annotated[
        str | None, typer.Option(help="Huge pages for it: transparent or reserved.", show_default=False)
    ] = None,
    disk_path: Annotated[Path | None, typer.Option(help="Folder of tier disk.", show_default=False)] = None,
    disk: Annotated[str | None, typer.Option(help="Most bytes tier disk may take.", show_default="20GiB")] = None,
    redis: Annotated[str | None, typer.Option(help="URL of tier redis.", show_default=False)] = None,
    redis_password_file: Annotated[
        Path | None, typer.Option(help="File with its password.", show_default=False)
    ] = None,
    http: Annotated[str | None, typer.Option(help="HOST:PORT of REST.", show_default=False)] = None,
    http_hosts: Annotated[str | None, typer.Option(help="Names it is called by, with commas.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Its certificate chain, PEM.", show_default=False)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key, PEM.", show_default=False)] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; flags win over it.")] = None,
    page_size: Annotated[str | None, typer.Option(help="Page of the arena.", show_default="64KiB")] = None,
    disk_sync: Annotated[bool | None, typer.Option("--disk-sync", help="fdatasync before a write counts.")] = None,
    drain: Annotated[float | None, typer.Option(help="Seconds to write what is queued at the end.")] = None,
    private: Annotated[bool | None, typer.Option("--private", help="End with the last client.")] = None,
    audit_log: Annotated[Path | None, typer.Option(help="File of what operators changed.", show_default=False)] = None,
    record: Annotated[Path | None, typer.Option(help="File of a trace of what is asked.", show_default=False)] = None,
    traces: Annotated[str | None, typer.Option(help="OTLP/HTTP collector of spans.", show_default=False)] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.", show_default="text")] = None,
) -> None:
    """Run the cache daemon in the foreground until SIGTERM."""
    import asyncio

    import uvloop

    from loracache.config import load_config
    from loracache.daemon.daemon import Daemon
    from loracache.logs import set_up_logging

    flags: dict[str, Any] = {
        "socket": socket, "memory": memory, "disk_path": disk_path, "disk": disk, "redis": redis,
        "redis_password_file": redis_password_file, "http": http, "page_size": page_size,
        "disk_sync": disk_sync or None, "drain": drain, "private": private or None, "log_level": log_level,
        "log_format": log_format, "audit_log": audit_log, "traces": traces,
        "http_hosts": http_hosts, "tls_cert": tls_cert, "tls_key": tls_key, "record": record, "hugepages": hugepages,
    }  # fmt: skip
    settings = load_config(flags, config)
    set_up_logging(settings.log_level, settings.log_format)

    async def main_task() -> None:
        await Daemon(settings, give_up=os._exit).run()

    sys.setswitchinterval(_SWITCH_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main_task())


@app.command(rich_help_panel=_LOOK)
def status(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show tiers, bytes, objects, hits, misses and failures by cause."""
    with client_of(socket) as client:
        answer = client.status()
    if as_json:
        print_json(answer)
        return
    from loracache.cli.tables import print_status

    print_status(answer)


def flush(
    options: SelectionOptions,
    socket: SocketOption = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", parser=number, help="Seconds to wait.")] = 60.0,
) -> None:
    """Wait until everything committed by now is written to disk and Redis, as far as admission wants it there; or have
    just what is selected written, whatever admission says. 4 where something was given up."""
    if not 0 < timeout <= 86_400:
        raise ConfigError(f"--timeout {timeout} must be seconds, more than 0 and at most 86400")
    selection = options.selection() if options.given else None
    with client_of(socket) as client:
        flushed = client.flush(timeout, selection)
    since = "since the last flush" if selection is None else "of what was selected"
    for tier, durable in flushed.durable.items():
        typer.echo(f"{tier}: {durable} objects durable, {flushed.given_up[tier]} given up {since}")
    if not flushed.durable:
        typer.echo("there is no tier below memory: nothing is durable")
    if not flushed.complete:
        raise typer.Exit(PARTLY)


app.command("flush", rich_help_panel=_CHANGE)(expanded(flush))
app.command("check", rich_help_panel=_MANAGE)(check.check)
app.command("simulate", rich_help_panel=_LOOK)(expanded(simulate.simulate))
for _name, _command, _panel in VERBS:
    app.command(_name, rich_help_panel=_panel)(expanded(_command))


def main() -> None:
    """Entry point of the `loracache` command."""
    open_closed_streams()
    try:
        app(prog_name="loracache")
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        discard_output()
        tell(f"loracache: the output cannot be written: {error.strerror}")
        sys.exit(REFUSED)
