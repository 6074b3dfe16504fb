# SPDX-License-Identifier: Apache-2.0
"""What a shell offers behind a tab: names that the running daemon knows.

A shell waits for it: whatever goes wrong or takes long, there is just nothing to offer. Threading: a thread asks, and
is left behind where it takes too long.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import typer

from loracache.cli.common import SteeringClient, client_of
from loracache.client.control import ALL_TIERS
from loracache.errors import LoRACacheError
from loracache.results import NodeKind

__all__ = ["complete_adapter", "complete_model", "complete_operation", "complete_tier"]

_PATIENCE_S = 0.7
_MOST = 1000


def complete_adapter(ctx: typer.Context, incomplete: str) -> list[str]:
    """Adapters' names."""
    return _offer(ctx, incomplete, lambda client: (adapter.name for adapter in client.adapters()))


def complete_model(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names that engines serve models under; the identity of one without a name."""

    def models(client: SteeringClient) -> Iterator[str]:
        for space in client.tree(NodeKind.BASE):
            yield from space["names"] or [space["model"]]

    return _offer(ctx, incomplete, models)


def complete_operation(ctx: typer.Context, incomplete: str) -> list[str]:
    """Ids of operations, the latest first."""
    return _offer(ctx, incomplete, lambda client: (operation.id for operation in client.operations()))


def complete_tier(ctx: typer.Context, incomplete: str) -> list[str]:
    """Tiers of the daemon; all that there could be, where it cannot say."""

    def tiers(client: SteeringClient) -> Iterator[str]:
        found = client.status()["tiers"]
        assert isinstance(found, dict)
        yield from found

    return _offer(ctx, incomplete, tiers) or [tier for tier in ALL_TIERS if tier.startswith(incomplete)]


def _offer(ctx: typer.Context, incomplete: str, ask: Callable[[SteeringClient], Iterator[str]]) -> list[str]:
    """The different names that begin with `incomplete`."""
    found: list[str] = []

    def work() -> None:
        try:
            with client_of(ctx.params.get("socket")) as client:
                found.extend(itertools.islice(ask(client), _MOST))
        except (LoRACacheError, OSError, KeyError, TypeError, ValueError):
            found.clear()

    asking = threading.Thread(target=work, daemon=True)
    asking.start()
    asking.join(_PATIENCE_S)
    return [name for name in dict.fromkeys(list(found)) if name.startswith(incomplete)]
