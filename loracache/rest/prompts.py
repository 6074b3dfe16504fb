# SPDX-License-Identifier: Apache-2.0
"""How far a prompt is held. Its tokens are hashed here: a million of them take a tenth of a second, which the daemon
has for engines.

Threading: the event loop; a part of a prompt at a time is hashed on a thread.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from loracache.groups import continued
from loracache.keys import Namespace, TokenArray, token_array
from loracache.rest.link import DaemonLink
from loracache.rest.models import Selector
from loracache.tiers import Tier
from loracache.wire import control_messages as messages
from loracache.wire.protocol import NOWHERE, join_keys

__all__ = ["locate_tokens"]

_PART = 2048  # keys that are hashed and asked for at a time
_AT_ONCE = 4096  # answers that are put together without a thread
_MOST_SPACES = 1000


async def locate_tokens(link: DaemonLink, by: str, tenant: str, selector: Selector) -> dict[str, Any]:
    """The longest chain of the selector's tokens that any namespace holds, as the daemon's `locate` would answer it."""
    tokens = token_array(selector.tokens or ())
    # Of the base model and, unless a tenant asks, without a salt, where none is given.
    defaults = {"adapter": ""} if tenant else {"adapter": "", "salt": ""}
    fields = defaults | selector.model_copy(update={"tokens": None}).encode()
    best = _told([], 0) | {"held": {"cpu": (0, 0), "disk": (0, 0)}}
    descriptors = await link.call(messages.SpaceList(by, tenant, fields, _MOST_SPACES))
    for number, descriptor in enumerate(reversed(descriptors)):
        here = await _locate(link, by, tenant, Namespace.parse(descriptor), tokens)
        if not number or here["tokens"] > best["tokens"]:
            best = here
    return best


async def _locate(link: DaemonLink, by: str, tenant: str, space: Namespace, tokens: TokenArray) -> dict[str, Any]:
    digest = space.digest()
    parts = space.parts(tokens, max(1, _PART // space.width))
    tiers, beside = b"", bytearray()
    while (part := await asyncio.to_thread(next, parts, None)) is not None:
        keys, others = part
        found, *where = await link.call(messages.LocateChain(by, tenant, digest, join_keys(keys), join_keys(others)))
        tiers += found
        beside += where[0] if where else b""
        if len(found) < len(keys):
            break
    work = partial(_continued, space, tiers, bytes(beside))
    count, slowest = work() if len(tiers) + len(beside) <= _AT_ONCE else await asyncio.to_thread(work)
    return _told(slowest, len(tokens) // space.chunk_tokens) | {
        "hits": count,
        "tokens": count * space.chunk_tokens,
        "namespace": digest.hex(),
    }


def _continued(space: Namespace, tiers: bytes, beside: bytes) -> tuple[int, list[Tier]]:
    held = [None if tier == NOWHERE else tier for tier in beside]
    count, slowest = continued(space.groups, space.chunk_tokens, space.lead, tiers, held)
    return count, [Tier(tier) for tier in slowest]


def _told(tiers: list[Tier], asked: int) -> dict[str, Any]:
    return {
        "hits": len(tiers), "asked": asked, "tiers": [tier.label for tier in tiers], "tokens": 0, "namespace": "",
        "engines": 0, "held": {},
    }  # fmt: skip
