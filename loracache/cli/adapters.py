# SPDX-License-Identifier: Apache-2.0
"""`loracache adapters add | list | show | prioritize | remove | export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loracache.cli.common import JsonOption, SocketOption, client_of, print_json
from loracache.cli.completion import complete_adapter
from loracache.client.answers import Adapter
from loracache.client.client import CacheClient
from loracache.client.requests import Priority
from loracache.errors import Rejected, Unknown, UsageError

__all__ = ["app"]

app = typer.Typer(help="LoRA adapters that the cache knows by name.", no_args_is_help=True)

NameArgument = Annotated[
    str, typer.Argument(help="Name, or digest in hex.", show_default=False, autocompletion=complete_adapter)
]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What requests will call it (model=NAME).", show_default=False)],
    path: Annotated[Path, typer.Argument(help="PEFT folder on the daemon's machine.", show_default=False)],
    priority: Annotated[
        Priority | None, typer.Option(help="Of its weights and KV; without it the one that NAME has.")
    ] = None,
    socket: SocketOption = None,
) -> None:
    """Take a PEFT folder into the cache under NAME. A name that is there already is re-pointed, all at once."""
    with client_of(socket) as client:
        digest = client.add_adapter(str(path.absolute()), name, priority=priority or "")
        client.flush(600.0)
    typer.echo(f"{name} -> {digest}")


@app.command("list")
def list_(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show all adapters that have a name: where they are, and how much KV depends on them."""
    with client_of(socket) as client:
        adapters = list(client.adapters())
    if as_json:
        print_json([asdict(adapter) for adapter in adapters])
        return
    from loracache.cli.tables import print_adapters

    print_adapters(adapters)


@app.command()
def show(name: NameArgument, socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show one adapter: digest, size, tiers (gpu: in an engine's memory), KV that depends on it, configuration."""
    with client_of(socket) as client:
        adapter = _known(client, name)
    if as_json:
        print_json(asdict(adapter))
        return
    from loracache.cli.tables import print_adapter

    print_adapter(adapter)


@app.command()
def prioritize(
    name: Annotated[str, typer.Argument(help="Its name.", show_default=False, autocompletion=complete_adapter)],
    priority: Annotated[Priority, typer.Argument(help="Of its weights and KV.", show_default=False)],
    socket: SocketOption = None,
) -> None:
    """Give NAME a priority: who goes first of what is of the same owners. What a request gave its KV comes first."""
    with client_of(socket) as client:
        if not client.prioritize_adapter(name, priority):
            raise Unknown(f"no adapter is called {name!r}; see: loracache adapters list")
    typer.echo(f"{name}: {priority}")


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="Its name.", show_default=False, autocompletion=complete_adapter)],
    socket: SocketOption = None,
) -> None:
    """Forget NAME. Content that no other name points to leaves all tiers, and the KV that depends on it."""
    with client_of(socket) as client:
        done = client.remove_adapter(name)
    if done is None:
        raise Unknown(f"no adapter is called {name!r}; see: loracache adapters list")
    typer.echo(f"removed {name}: {done[0]} objects ({done[1]} bytes), skipped {done[2]}")


@app.command("export")
def export_(
    name: NameArgument,
    path: Annotated[Path, typer.Argument(help="Folder to make; it must not be there.", show_default=False)],
    socket: SocketOption = None,
) -> None:
    """Write an adapter as a PEFT folder: equal tensors, equal configuration."""
    from loracache.adapters.payload import Packed, export

    with client_of(socket) as client:
        adapter = _known(client, name)
        with client.acquire([bytes.fromhex(adapter.digest)]) as reading:
            slot = reading.slots[0]
            if slot is None:
                raise Rejected(f"{name} is in no tier any more ({reading.causes[0]}); add it again")
            try:
                export(Packed([memoryview(slot.tobytes())]), path, adapter.config)
            except UsageError as error:  # the command was right; the folder is not
                raise Rejected(str(error)) from None
    typer.echo(f"{name} -> {path}")


def _known(client: CacheClient, name: str) -> Adapter:
    adapter = client.show_adapter(name)
    if adapter is None:
        raise Unknown(f"no adapter is called {name!r}; see: loracache adapters list")
    return adapter
