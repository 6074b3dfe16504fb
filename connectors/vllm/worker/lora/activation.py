# SPDX-License-Identifier: Apache-2.0
"""The thread that copies adapters onto pages: from the arena, or from their folder where no daemon has them.

The worker's main thread hands orders over and collects what is done; the engine's step never waits. An adapter is
resident only after the bytes on its pages agreed with their checksum, or, where they were cast or cut on the way, those
of the arena did and the lease they were read under held to the end. Pages and payload are let go of, whatever comes of
a copy, only when nothing that was submitted is under way any more.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from loracache.adapters.payload import Packed, Packing
from loracache.adapters.peft import PeftFolder
from loracache.client import requests
from loracache.connectors.vllm.common.cores import leave_pinned_core
from loracache.connectors.vllm.common.recent import Recent
from loracache.connectors.vllm.link.worker import WorkerLink
from loracache.connectors.vllm.lora.paths import digest_in
from loracache.connectors.vllm.worker.lora.filling import fill_pages
from loracache.connectors.vllm.worker.lora.pool import PagedAdapter
from loracache.connectors.vllm.worker.lora.recipe import Recipe, Recipes, copy_plain
from loracache.errors import LoRACacheError, Unavailable, UsageError
from loracache.keys import checksum
from loracache.results import Cause

__all__ = ["Activator", "Order"]

_log = logging.getLogger(__name__)
_LEASE_S = 60.0
_FETCHED_S = 10.0  # in the arena at least, after it was fetched ahead
_END_S = 2.0
_MOST_FAILED = 64
_UNFIT = {Cause.NONE, Cause.POOL_FULL, Cause.EVICTED, Cause.BUG}  # where the folder would fare no better


class _DeviceError(Exception):
    """The GPU refused or failed a copy."""


@dataclass(frozen=True, slots=True)
class Order:
    """Copy an adapter in. digest: hex. path: its folder, for when no daemon answers, or "". after: a CUDA event: nobody
    reads what was on the pages before any more once it has happened.
    """

    number: int
    digest: str
    path: str
    after: Any = None


class Activator:
    """finished(number, cause, why) is called on this thread once an order; no cause means that the adapter is resident,
    and why is in words where nothing will help. timeout: seconds to wait for an answer of the daemon.
    """

    def __init__(
        self,
        server: str,
        ensure: Callable[[], None],
        manager: Any,
        finished: Callable[[int, str, str], None],
        timeout: float,
    ) -> None:
        self._manager = manager
        self._pool = manager.pool
        self._recipes = Recipes(manager)
        self._finished = finished
        self._timeout = timeout
        self._link = WorkerLink(server, "vllm-adapters", ensure, self._pool.pages.device.type)
        self._stream = torch.cuda.Stream() if self._pool.pages.device.type == "cuda" else None
        self._failed: Recent[str, str] = Recent()  # digest -> the bug that its last copy failed of
        self._orders: queue.SimpleQueue[Order | str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="loracache-adapters", daemon=True)
        self._thread.start()

    def submit(self, order: Order) -> None:
        """Start to copy an adapter in; returns at once."""
        self._orders.put(order)

    def fetch(self, path: str) -> None:
        """Have the daemon take a folder in, or raise what a path names by its digest, before anybody asks for it."""
        self._orders.put(path)

    def close(self) -> None:
        """End the thread; what is queued is dropped."""
        self._orders.put(None)
        self._thread.join(timeout=_END_S)

    def _run(self) -> None:
        leave_pinned_core()
        while (order := self._orders.get()) is not None:
            if isinstance(order, str):
                self._fetch(order)
            else:
                self._finished(order.number, *self._carry_out(order))
        self._link.connection.close()

    def _carry_out(self, order: Order) -> tuple[str, str]:
        """Why the adapter is not resident: the cause, or "", and words where nothing will help."""
        try:
            cause = self._load(order)
        except UsageError as error:
            _log.error("adapter %s cannot be served: %s", order.digest[:12], error)
            return Cause.UNUSABLE, str(error)
        except (LoRACacheError, OSError) as error:
            _log.warning("adapter %s was not loaded: %s", order.digest[:12], error)
            return Cause.UNAVAILABLE, ""
        except _DeviceError as error:
            _log.warning("adapter %s was not copied: %s", order.digest[:12], error)
            return Cause.COPY_FAILED, ""
        except Exception as error:  # noqa: BLE001 - top of the thread: a request that waits for ever helps nobody
            if self._failed.get(order.digest) != repr(error):  # it will be tried again
                _log.exception("adapter %s was not loaded", order.digest[:12])
            self._failed[order.digest] = repr(error)
            self._failed.drop_oldest(most=_MOST_FAILED)
            return Cause.BUG, ""
        if not cause:
            self._failed.pop(order.digest, None)
        return cause, ""

    def _fetch(self, path: str) -> None:
        digest, connection = digest_in(path), self._link.connection
        try:
            if not self._link.ready():
                return
            if digest is None:
                connection.forget(connection.send(requests.AdapterAdd(path, "", "")))
            else:
                lease, key = os.urandom(requests.LEASE_BYTES), bytes.fromhex(digest)
                connection.send(requests.Prefetch(lease, key, _FETCHED_S), answer=False)
        except LoRACacheError as error:  # the first request will ask for it, and say what is wrong
            _log.info("adapter %s is not fetched ahead: %s", path, error)
        except Exception:  # noqa: BLE001 - top of the thread, which others wait for
            _log.exception("adapter %s is not fetched ahead", path)

    def _load(self, order: Order) -> str:
        if self._pool.get(order.digest) is not None:
            return Cause.NONE
        try:
            cause = self._from_arena(order)
        except Unavailable:
            if not order.path:
                raise
            cause = Cause.UNAVAILABLE
        if cause not in _UNFIT and order.path:
            cause = self._from_folder(order)
        return cause

    def _from_arena(self, order: Order) -> str:
        if not self._link.ready():
            raise Unavailable("no daemon answers")
        connection = self._link.connection
        lease, key = os.urandom(requests.LEASE_BYTES), bytes.fromhex(order.digest)
        bad, released = b"", False

        def held() -> bool:
            """Whether the lease held until now: only then the bytes were the adapter's throughout."""
            nonlocal released
            released = True
            return bool(connection.call(requests.Release(lease, b""), self._timeout).payload[0])

        try:
            reply = connection.call(requests.Acquire(lease, key, _LEASE_S), self._timeout)
            (_, *found), *_ = reply.payload
            if len(found) == 1:
                return str(found[0])
            size, expected, extents = found
            payload = connection.buffers(extents, size)
            try:
                cause = self._fill(order, payload, expected, held)
            except UsageError:  # of what its header says, or of what became of that
                if checksum(payload) == expected:
                    raise
                cause = Cause.CHECKSUM
            if cause == Cause.CHECKSUM:
                bad = key
            return cause
        finally:
            if not released:
                connection.send(requests.Release(lease, bad), answer=False)

    def _from_folder(self, order: Order) -> str:
        with PeftFolder(order.path) as folder:
            packing = Packing(folder)
            payload = [memoryview(bytearray(packing.size))]
            if packing.write(payload) != order.digest:
                return Cause.CHANGED
        return self._fill(order, payload, checksum(payload), lambda: True)

    def _fill(self, order: Order, payload: list[memoryview], expected: int, held: Callable[[], bool]) -> str:
        recipe = self._recipes.of(payload)
        resident = self._pool.reserve(recipe.placement, recipe.scales)
        if resident is None:
            return Cause.POOL_FULL
        cause = Cause.BUG
        try:
            total, proven = self._copy(order, resident, recipe, payload)
            if total != expected:
                cause = Cause.CHECKSUM
            elif not proven and not held():
                cause = Cause.LEASE_LOST
            else:
                cause = Cause.NONE
        finally:
            if cause:
                self._pool.give_back(resident)
        if cause:
            return cause
        return Cause.NONE if self._pool.settle(order.digest, resident) else Cause.EVICTED

    def _copy(
        self, order: Order, resident: PagedAdapter, recipe: Recipe, payload: list[memoryview]
    ) -> tuple[int, bool]:
        """Copies; answers a checksum, and whether it is of what is on the pages rather than of the payload."""
        if self._stream is not None:
            return self._copy_by_device(self._stream, order, resident, recipe, payload), False
        if recipe.plain is not None and len(payload) == 1:
            return copy_plain(self._pool, resident, recipe, payload[0]), True
        total = checksum(payload)
        fill_pages(self._pool, resident, Packed(payload), recipe.parts, self._manager.layers)
        return total, False

    def _copy_by_device(
        self, stream: Any, order: Order, resident: PagedAdapter, recipe: Recipe, payload: list[memoryview]
    ) -> int:
        """The payload's checksum, which is computed while it is copied. Raises _DeviceError."""
        try:
            try:
                with torch.cuda.stream(stream):
                    if order.after is not None:
                        stream.wait_event(order.after)
                    fill_pages(self._pool, resident, Packed(payload), recipe.parts, self._manager.layers)
                return checksum(payload)
            finally:
                stream.synchronize()
        except RuntimeError as error:
            raise _DeviceError(str(error)) from error
