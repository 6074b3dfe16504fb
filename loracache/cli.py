"""The command line: `loracache serve | status | flush | clear | adapters | tokens`.

Exit codes: 0 done, 1 the daemon is not there or refused, 2 wrong usage or configuration.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from loracache import cli_adapters, cli_tokens
from loracache.cli_common import SocketOption, client_of
from loracache.errors import ConfigError, LoRACacheError
from loracache.operator import ALL_TIERS

__all__ = ["main"]

app = typer.Typer(
    name="loracache",
    help="One cache for everything an LLM server reads again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(cli_adapters.app, name="adapters")
app.add_typer(cli_tokens.app, name="tokens")


@app.command()
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
) -> None:
    """Run the cache daemon in the foreground until SIGTERM."""
    import uvloop

    from loracache.config import load_config
    from loracache.server.daemon import Daemon

    flags: dict[str, Any] = {
        "socket": socket, "memory": memory, "disk_path": disk_path, "disk": disk, "redis": redis,
        "redis_password_file": redis_password_file, "http": http, "page_size": page_size,
        "disk_sync": disk_sync or None, "drain": drain, "private": private or None, "log_level": log_level,
        "http_hosts": http_hosts, "tls_cert": tls_cert, "tls_key": tls_key,
    }  # fmt: skip
    settings = load_config(flags, config)
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname).1s %(name)s: %(message)s", stream=sys.stderr
    )

    async def main_task() -> None:
        await Daemon(settings).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main_task())


@app.command()
def status(
    socket: SocketOption = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show tiers, bytes, objects, hits, misses and failures by cause."""
    with client_of(socket) as client:
        answer = client.status()
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    from loracache.tables import print_status

    print_status(answer)


@app.command()
def flush(socket: SocketOption = None, timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 60.0) -> None:
    """Wait until everything committed by now is written to disk and Redis."""
    with client_of(socket) as client:
        client.flush(timeout)


@app.command()
def clear(
    socket: SocketOption = None,
    tier: Annotated[list[str] | None, typer.Option(help="cpu, disk or redis; may be given more than once.")] = None,
) -> None:
    """Remove everything from the tiers named (all, if none is), but for what is leased or pinned."""
    with client_of(socket) as client:
        objects, nbytes, skipped = client.clear(tiers=tier or ALL_TIERS).counts
    typer.echo(f"removed {objects} objects ({nbytes} bytes), skipped {skipped}")


def main() -> None:
    """Entry point of the `loracache` command."""
    try:
        app()
    except ConfigError as error:
        typer.echo(f"loracache: {error}", err=True)
        sys.exit(2)
    except LoRACacheError as error:
        typer.echo(f"loracache: {error}", err=True)
        sys.exit(1)
