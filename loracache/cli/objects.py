# SPDX-License-Identifier: Apache-2.0
"""Commands that look and change nothing: lookup, objects, tree, events, config."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from loracache.cli.common import NOTHING, JsonOption, SocketOption, SteeringClient, client_of, integer, print_json
from loracache.cli.completion import complete_tier
from loracache.cli.selector import SelectionOptions
from loracache.client.control import ALL_TIERS, Located, Selection
from loracache.errors import ConfigError, Unknown
from loracache.results import NodeKind

__all__ = ["config", "events", "lookup", "objects", "tree"]

_EVENTS_WAIT_S = 10.0
_OLDEST = 1  # behind which everything is that the daemon remembers

LimitOption = Annotated[
    int | None,
    typer.Option(parser=integer(1, 2**31), metavar="COUNT", help="Print so many at most.", show_default="all"),
]


def lookup(options: SelectionOptions, socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show how far a prompt, a chain of keys or an adapter is held, and where; of a model or tenant, how much is.

    Exit code 3: nothing of it is held.
    """
    selection = options.selection()
    with client_of(socket) as client:
        found = client.locate(selection)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        _print_found(found, selection)
    if not found.hits and not any(objects for objects, _ in found.held.values()):
        raise typer.Exit(NOTHING)


def objects(
    options: SelectionOptions,
    socket: SocketOption = None,
    tier: Annotated[
        str,
        typer.Option(metavar="TIER", help="Of cpu or disk alone.", autocompletion=complete_tier, show_default=False),
    ] = "",
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """List objects that cpu or disk hold: all, or those that are selected."""
    if tier not in ("", "cpu", "disk"):
        listed = "redis keeps no list of its own; give cpu or disk" if tier in ALL_TIERS else "give cpu or disk"
        raise ConfigError(f"--tier {tier[:40]!r} cannot be listed: {listed}")
    selection = options.selection() if options.given else None
    with client_of(socket) as client:
        found = itertools.islice(client.objects(selection, tier=tier), limit)
        if as_json:
            print_json(found)
            return
        from loracache.cli.tables import print_table, size_text

        columns = ["key", "kind", ">size", ">stored", "tiers", "pinned", ">leases", ">hits", ">children"]
        rows = (
            (each["key"], each["kind"], size_text(each["size"]), size_text(each["stored"]),
             ",".join(each["tiers"]) or "-", ",".join(each["pinned"]) or "-", each["leases"], each["hits"],
             each["children"], each["parent"] or "-", each["namespace"])
            for each in found
        )  # fmt: skip
        print_table([*columns, "parent", "namespace"], rows)


def tree(
    node: Annotated[
        str, typer.Argument(help="base, adapter:NAME, adapter:DIGEST, space:DIGEST or a key.", show_default="the top")
    ] = "",
    depth: Annotated[int, typer.Option(parser=integer(1, 100_000), metavar="COUNT", help="Levels below it.")] = 2,
    limit: LimitOption = None,
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what depends on what: models and adapters, their namespaces, their chains, chunk by chunk."""
    with client_of(socket) as client:
        found = itertools.islice(_below(client, _node(client, node), depth), limit)
        if as_json:
            print_json({"depth": level} | each for level, each in found)
            return
        from loracache.cli.tables import print_table

        print_table(
            ["node", "what", ">cpu", ">disk", ">hits", ">children"], (_tree_row(level, each) for level, each in found)
        )


def events(
    since: Annotated[
        int | None,
        typer.Option(parser=integer(0, 2**63 - 1), metavar="ID", help="Behind this event.", show_default="now"),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Wait for more, or end with the last.")] = True,
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what happens to objects: admitted, evicted, moved, pinned, unpinned, failed.

    With --no-follow and without --since: all that the daemon remembers. --json: an object a line.
    """
    after = since if since is not None else 0 if follow else _OLDEST
    with client_of(socket) as client:
        while True:
            last, lost, found = client.events(after, wait=_EVENTS_WAIT_S if follow else 0.0)
            if lost and after > _OLDEST:
                typer.echo(f"loracache: {lost} events before these are forgotten", err=True)
            for each in found:
                typer.echo(json.dumps(each) if as_json else _event_line(each))
            sys.stdout.flush()
            if not follow and not found:
                return
            after = last


def config(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show the daemon's settings; of secrets only whether they are set."""
    with client_of(socket) as client:
        settings = client.config()
    if as_json:
        print_json(settings)
        return
    from loracache.cli.tables import print_values

    values = {name: json.dumps(value) if isinstance(value, list | bool) else value for name, value in settings.items()}
    print_values((name, "-" if value is None else value) for name, value in values.items())


def _print_found(found: Located, selection: Selection) -> None:
    from loracache.cli.tables import print_table, print_values, size_text

    if found.held or (selection.tokens is None and not found.asked):
        print_table(
            ["tier", ">objects", ">bytes"],
            ((tier, count, size_text(nbytes)) for tier, (count, nbytes) in found.held.items()),
        )
        return
    lines: list[tuple[str, object]] = [("hits", f"{found.hits} of {found.asked}")]
    if selection.tokens is not None:
        lines.append(("tokens", f"{found.tokens} of {len(selection.tokens)}"))
    lines.append(("tiers", ", ".join(f"{tier} {count}" for tier, count in Counter(found.tiers).items()) or "none"))
    lines += [("namespace", found.namespace)] if found.namespace else []
    lines += [("engines", found.engines)] if found.engines else []
    print_values(lines)


def _node(client: SteeringClient, node: str) -> str:
    """A node's id; an adapter may be given by name."""
    kind, _, name = node.partition(":")
    if kind != NodeKind.ADAPTER or len(name) == 64:
        return node
    digest = client.find_adapter(name)
    if digest is None:
        raise Unknown(f"no adapter is called {name!r}; see: loracache adapters list")
    return f"adapter:{digest}"


def _below(client: SteeringClient, node: str, depth: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(level, node) in the order of reading. A chain is deep, so this does not call itself."""
    levels = [client.tree(node)]
    while levels:
        found = next(levels[-1], None)
        if found is None:
            levels.pop()
            continue
        yield len(levels) - 1, found
        if found["children"] and len(levels) < depth:
            levels.append(client.tree(found["id"]))


def _tree_row(level: int, node: dict[str, Any]) -> tuple[object, ...]:
    from loracache.cli.tables import size_text

    if node["kind"] == NodeKind.CHUNK:
        held = {tier: size_text(node["size"]) for tier in node["tiers"]}
        what = "pinned in " + ",".join(node["pinned"]) if node["pinned"] else "chunk"
    else:
        held = {tier: f"{count} / {size_text(node['bytes'][tier])}" for tier, count in node["objects"].items() if count}
        names = ", ".join(node.get("names", ())) or str(node.get("model", ""))
        tenant = f" of tenant {node['salt'][:12]}" if node.get("salt") else ""
        what = f"{names} {node['kv_dtype']}{tenant}" if node["kind"] == NodeKind.SPACE else names or node["kind"]
    return "  " * level + node["id"], what, held.get("cpu", "-"), held.get("disk", "-"), node["hits"], node["children"]


def _event_line(event: dict[str, Any]) -> str:
    from loracache.cli.tables import shown, size_text

    when = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    count = f"  x{event['count']}" if event["count"] != 1 else ""
    size = size_text(event["bytes"])
    text = f"{event['id']}  {when}  {event['event']:<8}  {event['tier']:<5}  {event['cause']:<12}  {size:>10}  "
    return f"{text}{shown(event['key']) or '-'}{count}"
