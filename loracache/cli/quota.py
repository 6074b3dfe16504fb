# SPDX-License-Identifier: Apache-2.0
"""`loracache quota list | set | remove`: what tenants, adapters and models may have of memory and disk."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from loracache.cli.common import JsonOption, SocketOption, client_of, print_json
from loracache.cli.completion import complete_adapter, complete_model
from loracache.errors import ConfigError, Unknown
from loracache.keys import salt_digest

__all__ = ["app"]

app = typer.Typer(help="Quotas of tenants, adapters and models.", no_args_is_help=True)

TierOption = Annotated[str, typer.Option(help="cpu or disk.")]
SaltOption = Annotated[
    str | None,
    typer.Option(
        help="A tenant, by its cache_salt; -: from stdin, where no process list shows it.",
        metavar="TEXT",
        show_default=False,
    ),
]
TenantOption = Annotated[
    str | None, typer.Option(help="A tenant, by its salt's digest; *: all.", metavar="HEX", show_default=False)
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        help="An adapter, by name or digest; *: all.",
        metavar="NAME",
        show_default=False,
        autocompletion=complete_adapter,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="A model, by served name or identity; *: all.",
        metavar="NAME",
        show_default=False,
        autocompletion=complete_model,
    ),
]


@app.command("list")
def list_(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show all quotas, and what is used of them."""
    with client_of(socket) as client:
        quotas = client.quotas()
    if as_json:
        print_json(quotas)
        return
    from loracache.cli.tables import print_quotas

    print_quotas(quotas)


@app.command("set")
def set_(
    salt: SaltOption = None,
    tenant: TenantOption = None,
    adapter: AdapterOption = None,
    model: ModelOption = None,
    tier: TierOption = "cpu",
    soft: Annotated[str, typer.Option(help="Its share, e.g. 4GiB: nobody else pushes it below.")] = "0",
    hard: Annotated[
        str | None, typer.Option(help="Its limit: a store beyond it is refused.", show_default=False)
    ] = None,
    socket: SocketOption = None,
) -> None:
    """Give one a quota in a tier, in the place of an earlier one; it outlives a restart."""
    kind, name = _subject(salt, tenant, adapter, model)
    sizes = _size("--soft", soft), _size("--hard", hard) if hard is not None else None
    with client_of(socket) as client:
        given = client.set_quota(kind, name, tier=tier, soft=sizes[0], hard=sizes[1])
    limit = f", at most {given['hard']}" if given["hard"] is not None else ""
    typer.echo(f"{kind} {given['name']}: {given['soft']} bytes of {tier}{limit}; {given['bytes']} used")


@app.command()
def remove(
    salt: SaltOption = None,
    tenant: TenantOption = None,
    adapter: AdapterOption = None,
    model: ModelOption = None,
    tier: TierOption = "cpu",
    socket: SocketOption = None,
) -> None:
    """End a quota; a default, where there is one, counts from then on."""
    kind, name = _subject(salt, tenant, adapter, model)
    with client_of(socket) as client:
        if not client.remove_quota(kind, name, tier=tier):
            raise Unknown(f"{kind} {name!r} has no quota in {tier}; see: loracache quota list")
    typer.echo(f"removed the quota of {kind} {name} in {tier}")


def _subject(salt: str | None, tenant: str | None, adapter: str | None, model: str | None) -> tuple[str, str]:
    if salt == "-":
        salt = sys.stdin.read().removesuffix("\n")
    if salt == "":
        raise ConfigError("the salt is empty; what has none has no quota but its adapter's and its model's")
    named = {"tenant": tenant if salt is None else salt_digest(salt), "adapter": adapter, "model": model}
    given = [(kind, name) for kind, name in named.items() if name is not None]
    if len(given) != 1 or (salt is not None and tenant is not None):
        raise ConfigError("a quota is of one: give --salt, --tenant, --adapter or --model")
    return given[0]


def _size(option: str, value: str) -> int:
    from loracache.config import parse_size

    try:
        return parse_size(value)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
