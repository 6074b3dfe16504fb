# SPDX-License-Identifier: Apache-2.0
"""The Redis tier on a cluster: each node does its part of a batch, all at the same time.

A key that a node says has moved is asked for once more where it is said to be; the map of slots (slots.py) is
asked for again before the next call. While a slot is on its way from one node to another, those of its keys that have
left are UNAVAILABLE. A node that is lost fails its own keys and is then left alone for a pause that doubles up to 15 s.

Threading: any number of threads; the parts of a call run on its own thread and a few that all calls share.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

from loracache.backoff import Backoff
from loracache.storage_backends.base import Outcome, Result
from loracache.storage_backends.redis.connections import Connections
from loracache.storage_backends.redis.resp import Wire
from loracache.storage_backends.redis.servers import Call, Servers, finished
from loracache.storage_backends.redis.slots import SLOTS, SlotMap, slot_of
from loracache.storage_backends.redis.urls import Address, Lost, Target

__all__ = ["Cluster"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_HELPERS = 32

_log = logging.getLogger(__name__)


class _Node:
    """One node: its connections, and whether it is worth talking to."""

    def __init__(self, target: Target, address: Address, on_lost: Callable[[], None]) -> None:
        self.address = address
        self._on_lost = on_lost
        self._place = target.place
        self._connections = Connections(target, address)
        self._lock = threading.Lock()
        self._pauses = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._paused_until = 0.0
        self._lost = Lost("")

    @property
    def available(self) -> bool:
        return time.monotonic() >= self._paused_until

    def talk(self, work: Callable[[Wire], object], nbytes: int) -> Lost | None:
        """As `Connections.talk`; at once where the node is being left alone."""
        if not self.available:
            self._on_lost()  # its replica may have its slots by now
            return self._lost
        lost = self._connections.talk(work, nbytes)
        with self._lock:
            if lost is None:
                self._pauses.reset()
            elif self.available:
                lost = self._lost = replace(lost, text=f"{self.address}: {lost.text}")
                pause = self._pauses.next()
                _log.warning("redis %s: %s; left alone for %.1f s", self._place, lost.text, pause)
                self._paused_until = time.monotonic() + pause
                self._on_lost()
        return lost

    def close(self) -> None:
        self._connections.close()


class _Part:
    """A node's part of a call: the numbers of its keys, their results, and which slots it says have moved."""

    def __init__(self, node: _Node, numbers: list[int], call: Call) -> None:
        self.node = node
        self.numbers = numbers
        self.moved: list[str] = []
        self.results: list[Result] = []
        self._call = call

    def run(self) -> None:
        self.results = finished(self._call, self.node.talk(self._work, self._call.nbytes))

    def _work(self, wire: Wire) -> None:
        self._call.run(wire)
        self.moved = [error.text for error in wire.errors if error.code == "MOVED"]


class Cluster(Servers):
    """The cluster at `target`."""

    def __init__(self, target: Target) -> None:
        self.place = target.place
        self._target = target
        self._slots = SlotMap(target, self._seems_alive)
        self._nodes: dict[Address, _Node] = {}
        self._lock = threading.Lock()
        self._helpers = ThreadPoolExecutor(_HELPERS, "redis-node")

    def run(self, keys: Sequence[bytes], call: Callable[[Sequence[int]], Call]) -> list[Result]:
        results: list[Result | None] = [None] * len(keys)
        numbers: Sequence[int] = range(len(keys))
        for _ in range(2):
            parts = self._split(keys, numbers, call)
            self._run_all(parts)
            for part in parts:
                for number, result in zip(part.numbers, part.results, strict=True):
                    results[number] = result
                if part.moved:
                    self._slots.moved(part.moved, part.node.address)
            numbers = [
                number
                for part in parts
                if part.moved
                for number, result in zip(part.numbers, part.results, strict=True)
                if result.outcome is Outcome.UNAVAILABLE
            ]
            if not numbers:
                break
        return self._judged(results)

    def everywhere(self, work: Callable[[Wire], object], nbytes: int = 0) -> Lost | None:
        every = range(SLOTS)
        before = self._slots.owners(every)
        lost = self._slots.lost
        for address in self._slots.nodes:
            lost = self._node(address).talk(work, nbytes) or lost
        if lost is None and nbytes:  # it was to see everything
            self._slots.doubt()
            if None in before or self._slots.owners(every) != before:
                return Lost("some slots have no node, or have moved meanwhile")
        return lost

    def close(self) -> None:
        self._helpers.shutdown()
        for node in self._nodes.values():
            node.close()

    def _split(
        self, keys: Sequence[bytes], numbers: Sequence[int], call: Callable[[Sequence[int]], Call]
    ) -> list[_Part]:
        """One part for each node that has any of the keys; keys that no node has are in none."""
        owners = self._slots.owners([slot_of(keys[number].hex().encode()) for number in numbers])
        shares: dict[Address, list[int]] = {}
        for number, owner in zip(numbers, owners, strict=True):
            if owner is not None:
                shares.setdefault(owner, []).append(number)
        self._forget_others()
        return [_Part(self._node(address), share, call(share)) for address, share in shares.items()]

    def _run_all(self, parts: Sequence[_Part]) -> None:
        """Runs every part and returns when all have ended: the buffers are their caller's again then."""
        helped = [self._helpers.submit(part.run) for part in parts[1:]]
        try:
            if parts:
                parts[0].run()
        finally:
            wait(helped)
        for each in helped:
            each.result()

    def _judged(self, results: Sequence[Result | None]) -> list[Result]:
        """All results; what is UNAVAILABLE is so for its own keys alone where any node can still be talked to."""
        lost = self._slots.lost
        nobody = Result(Outcome.UNAVAILABLE, detail=lost.text if lost else "no node has the slot")
        partial = any(self._seems_alive(address) for address in self._slots.nodes)
        return [
            replace(result, partial=partial) if result.outcome is Outcome.UNAVAILABLE else result
            for result in (result or nobody for result in results)
        ]

    def _node(self, address: Address) -> _Node:
        with self._lock:
            if address not in self._nodes:
                self._nodes[address] = _Node(self._target, address, self._slots.doubt)
            return self._nodes[address]

    def _seems_alive(self, address: Address) -> bool:
        node = self._nodes.get(address)
        return node is None or node.available

    def _forget_others(self) -> None:
        """Closes nodes that have left."""
        if len(self._nodes) <= len(self._slots.nodes):
            return
        with self._lock:
            gone = [self._nodes.pop(address) for address in self._nodes.keys() - set(self._slots.nodes)]
        for node in gone:
            node.close()
