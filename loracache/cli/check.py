# SPDX-License-Identifier: Apache-2.0
"""`loracache check`: whether a disk folder, a Redis and the index of a daemon hold what they say."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loracache.cli.common import FAULTS, JsonOption, print_json, socket_of

__all__ = ["check"]


def check(
    socket: Annotated[
        Path | None, typer.Option("--socket", help="Unix socket of a running daemon to check.", show_default=False)
    ] = None,
    disk_path: Annotated[Path | None, typer.Option(help="Folder of tier disk.", show_default=False)] = None,
    redis: Annotated[str | None, typer.Option(help="URL of tier redis.", show_default=False)] = None,
    redis_password_file: Annotated[
        Path | None, typer.Option(help="File with its password.", show_default=False)
    ] = None,
    redis_prefix: Annotated[str | None, typer.Option(help="What its keys start with.", show_default=False)] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the daemon's settings.", show_default=False)] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what is safe to mend; the rest is left.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare files, manifest, names, Redis, and the index of the daemon that uses them, byte by byte."""
    from loracache.audit.check import check as run
    from loracache.audit.running import check_running
    from loracache.config import load_config

    flags = {
        "disk_path": disk_path, "redis": redis, "redis_password_file": redis_password_file,
        "redis_prefix": redis_prefix, "socket": os.devnull,  # which a daemon's settings must have
    }  # fmt: skip
    settings = load_config(flags, config)
    if socket is None and settings.disk_path is None and settings.redis is None and os.environ.get("LORACACHE_SOCKET"):
        socket = socket_of(None)
    if socket is not None:
        report = check_running(f"unix://{socket.absolute()}", settings, fix=fix)
    else:
        report = run(settings, fix=fix)
    for note in report.notes:
        typer.echo(f"loracache: {note}", err=True)
    if as_json:
        findings = [asdict(each) | {"fault": each.fault.value} for each in report.findings]
        print_json({"checked": report.checked, "left": report.left, "findings": findings})
    else:
        from loracache.cli.tables import print_table, size_text

        for place, count in report.checked.items():
            typer.echo(f"{place}: {count} objects are {'named' if place == 'index' else 'whole'}")
        if report.findings:
            print_table(
                ("where", "fault", ">count", ">fixed", ">bytes", "for example"),
                (
                    (each.place, each.fault.value, each.count, each.fixed, size_text(each.bytes), each.examples[0])
                    for each in report.findings
                ),
            )
        typer.echo(f"faults left: {report.left}")
    if report.left:
        raise typer.Exit(FAULTS)
