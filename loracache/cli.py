"""The command line: every operation of a daemon as `loracache VERB`. Here is the table of contents.

cli_objects.py looks, cli_operations.py changes, cli_top.py watches; cli_selector.py has the options that say which
objects, cli_common.py the exit codes. What a command alone needs is imported when it runs: starting is most of what a
script waits for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loracache import __version__, cli_adapters, cli_objects, cli_operations, cli_tokens, cli_top
from loracache.cli_common import EXIT_CODES, Commands, JsonOption, SocketOption, client_of, expanded, number, print_json
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

_LOOK, _CHANGE, _MANAGE = "Look", "Change", "Manage"
VERBS = (
    ("lookup", cli_objects.lookup, _LOOK),
    ("objects", cli_objects.objects, _LOOK),
    ("tree", cli_objects.tree, _LOOK),
    ("events", cli_objects.events, _LOOK),
    ("top", cli_top.top, _LOOK),
    ("config", cli_objects.config, _LOOK),
    ("admit", cli_operations.admit, _CHANGE),
    ("evict", cli_operations.evict, _CHANGE),
    ("pin", cli_operations.pin, _CHANGE),
    ("unpin", cli_operations.unpin, _CHANGE),
    ("move", cli_operations.move, _CHANGE),
    ("compress", cli_operations.compress, _CHANGE),
    ("decompress", cli_operations.decompress, _CHANGE),
    ("clear", cli_operations.clear, _CHANGE),
)

app.add_typer(cli_adapters.app, name="adapters", rich_help_panel=_MANAGE)
app.add_typer(cli_operations.app, name="operations", rich_help_panel=_MANAGE)
app.add_typer(cli_tokens.app, name="tokens", rich_help_panel=_MANAGE)


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
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.", show_default="text")] = None,
) -> None:
    """Run the cache daemon in the foreground until SIGTERM."""
    import asyncio

    import uvloop

    from loracache.config import load_config
    from loracache.logs import set_up_logging
    from loracache.server.daemon import Daemon

    flags: dict[str, Any] = {
        "socket": socket, "memory": memory, "disk_path": disk_path, "disk": disk, "redis": redis,
        "redis_password_file": redis_password_file, "http": http, "page_size": page_size,
        "disk_sync": disk_sync or None, "drain": drain, "private": private or None, "log_level": log_level,
        "log_format": log_format,
        "http_hosts": http_hosts, "tls_cert": tls_cert, "tls_key": tls_key,
    }  # fmt: skip
    settings = load_config(flags, config)
    set_up_logging(settings.log_level, settings.log_format)

    async def main_task() -> None:
        await Daemon(settings).run()

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
    from loracache.tables import print_status

    print_status(answer)


@app.command(rich_help_panel=_CHANGE)
def flush(
    socket: SocketOption = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", parser=number, help="Seconds to wait.")] = 60.0,
) -> None:
    """Wait until everything committed by now is written to disk and Redis."""
    if not 0 < timeout <= 86_400:
        raise ConfigError(f"--timeout {timeout} must be seconds, more than 0 and at most 86400")
    with client_of(socket) as client:
        client.flush(timeout)


for _name, _command, _panel in VERBS:
    app.command(_name, rich_help_panel=_panel)(expanded(_command))


def main() -> None:
    """Entry point of the `loracache` command."""
    app(prog_name="loracache")
