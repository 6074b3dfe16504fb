# SPDX-License-Identifier: Apache-2.0
"""`loracache tokens add | list | remove`: who may use REST. Works on the file beside the socket, daemon or not."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from loracache.cli.common import JsonOption, SocketOption, print_json, socket_of
from loracache.errors import ConfigError, Rejected, Unknown
from loracache.keys import salt_digest

__all__ = ["app"]

app = typer.Typer(help="Tokens for REST; a running daemon follows within two seconds.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="What logs call it.", show_default=False)]


@app.command()
def add(
    name: NameArgument,
    role: Annotated[str, typer.Option(help="read, operate or admin.", show_default=False)],
    salt: Annotated[
        str | None,
        typer.Option(
            help="The cache_salt of the only tenant it may reach; -: from stdin, where no process list shows it.",
            show_default=False,
        ),
    ] = None,
    socket: SocketOption = None,
) -> None:
    """Make a token and print it, this once: a hash is all that is kept."""
    from loracache.rest.tokens import add_token, tokens_path

    if salt == "-":
        salt = sys.stdin.read().removesuffix("\n")
    if salt == "":
        raise ConfigError("the salt is empty, which would be a token for all tenants; leave --salt out for that")
    if salt is not None and role == "admin":
        raise ConfigError("an admin's routes are no tenant's; give --role read or operate, or leave --salt out")
    path = tokens_path(socket_of(socket))
    try:
        token = add_token(path, name, role, salt_digest(salt))  # type: ignore[arg-type]
    except OSError as error:
        raise Rejected(f"{path} cannot be changed: {error.strerror}") from None
    typer.echo(token)
    typer.echo(f"{name}: {role}; the token above is shown this once", err=True)


@app.command("list")
def list_(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show names, roles and tenants (digests of their salts); no token can be shown."""
    from loracache.rest.tokens import read_tokens, tokens_path

    path = tokens_path(socket_of(socket))
    try:
        tokens = read_tokens(path)
    except OSError as error:
        raise Rejected(f"{path} cannot be read: {error.strerror}") from None
    if as_json:
        print_json([token.model_dump(exclude={"sha256"}) for token in tokens])
        return
    from loracache.cli.tables import print_table, time_text

    rows = ((token.name, token.role, time_text(token.created), token.tenant or "all tenants") for token in tokens)
    print_table(["name", "role", "made", "tenant"], rows)


@app.command()
def remove(name: NameArgument, socket: SocketOption = None) -> None:
    """Forget a token; within two seconds nobody can use it."""
    from loracache.rest.tokens import remove_token, tokens_path

    path = tokens_path(socket_of(socket))
    try:
        found = remove_token(path, name)
    except OSError as error:
        raise Rejected(f"{path} cannot be changed: {error.strerror}") from None
    if not found:
        raise Unknown(f"no token is called {name!r}; see: loracache tokens list")
    typer.echo(f"removed {name}")
