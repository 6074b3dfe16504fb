# SPDX-License-Identifier: Apache-2.0
"""What the cache is told while a batch runs: a group's prefix is pinned from its first answer to its last, and what no
other request of the batch wants is not stored.

What cannot be pinned (an adapter that the daemon does not know by that name, KV that was not stored) is counted, and
runs as it would without.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from loracache.batch.bodies import adapter_of, salt_of
from loracache.batch.engine import By, Engine, ask_one
from loracache.batch.job import Job
from loracache.batch.lines import Line
from loracache.batch.tree import NOTHING
from loracache.client.client import CacheClient
from loracache.client.control import Selection
from loracache.errors import LoRACacheError

__all__ = ["Pins"]

_TTL_S = 3600.0  # if the run is killed meanwhile


class Pins:
    """Of the groups of `job`, in the daemon at `server` ("unix://...") that its engines share. base: the base model's
    served name."""

    def __init__(self, server: str, engines: Sequence[Engine], base: str, job: Job) -> None:
        self._server, self._engines, self._base, self._job = server, engines, base, job
        self._left = Counter(group for group in job.plan.group.tolist() if group != NOTHING)
        self._shared = job.plan.shared()
        self._held: dict[int, Selection] = {}
        self._tried: set[int] = set()
        self.objects = 0
        """That were pinned."""
        self.failures = 0

    def body(self, request: int, line: Line) -> dict[str, Any]:
        """What is sent: of each request only that is stored which others share, unless it says itself what is to be."""
        if "kv_transfer_params" in line.body or line.path == "/v1/embeddings":
            return line.body
        shared = int(self._shared[request])
        if shared and any(each.by is By.TEXT for each in self._engines):  # whose tokens are not the engine's
            return line.body
        return line.body | {"kv_transfer_params": {"store": shared or False}}

    async def answered(self, request: int, line: Line) -> None:
        """A request is done, and its group's prefix computed."""
        group = int(self._job.plan.group[request])
        if group == NOTHING:
            return
        self._left[group] -= 1
        if self._left[group] and group not in self._tried:
            self._tried.add(group)
            await self._pin(group, line)
        if not self._left[group] and (selection := self._held.pop(group, None)) is not None:
            await self._ask(lambda client: client.unpin(selection))

    async def _pin(self, group: int, line: Line) -> None:
        adapter = adapter_of(line)
        try:
            found = await ask_one(self._engines, lambda engine: engine.tokens(line))
            tokens = found[: self._job.plan.prefix(group)]
        except LoRACacheError:
            self.failures += 1
            return
        named = "" if adapter in ("", self._base) else adapter
        selection = Selection(model="*", tokens=tokens, adapter=named, salt=salt_of(line) or None)
        count = await self._ask(lambda client: client.pin(selection, ttl=_TTL_S))
        if count:
            self.objects += count
            self._held[group] = selection

    async def _ask(self, call: Callable[[CacheClient], int]) -> int:
        def asked() -> int:
            with CacheClient(self._server, name="batch") as client:
                return call(client)

        try:
            return await asyncio.to_thread(asked)
        except LoRACacheError:
            self.failures += 1
            return 0
