# SPDX-License-Identifier: Apache-2.0
"""What goes from the Redis in the background: segments without a header, and, beyond a budget, what was not used for
longest.

A pass looks at every key (walk.py), a little at a time with pauses in between. It asks Redis for what Redis knows best
and all daemons that share it agree on: the memory that a key takes, and when it was used last (under an LFU policy: how
often). Where these commands look, nothing counts as used. One daemon at a time sweeps.

Threading: one thread at a time, but for `wrote` and `due`.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from loracache.errors import Unavailable
from loracache.storage_backends import header
from loracache.storage_backends.base import Outcome, Result, Tended
from loracache.storage_backends.redis.commands import ObjectCommands
from loracache.storage_backends.redis.hashes import RedisHash
from loracache.storage_backends.redis.layout import NotOurs, read_header
from loracache.storage_backends.redis.resp import ErrorReply, Reply, Wire, command
from loracache.storage_backends.redis.servers import Servers
from loracache.storage_backends.redis.walk import ENDLESS, Slice, WalkRefused, walk

__all__ = ["Sweeper"]

ORPHANED_S = 300.0  # between two looks at a segment without a header: longer than any store takes
_EVERY_S = 600.0  # between two passes
_LIMITED_EVERY_S = 60.0  # where others may fill the budget
_AGAIN_S = 5.0  # after one that did not come to its end, or while another daemon sweeps
_SOON_S = 1.0  # while more than the budget is used, and nothing is known that is old
_LOCK_S = 30
_SLICE = 200  # keys looked at between two pauses: a few milliseconds
_SHARE = 0.1  # of a thread's time
_MOST_OLDEST = 20_000
_MOST_ORPHANS = 10_000
_BATCH = 200


class _Interrupted(Exception):
    """The pass is not wanted any more."""


class Sweeper:
    """Sweeps what `objects` lays out on `servers`. lock: a key that the daemons agree by. max_bytes: of Redis's memory
    that all our keys may take; 0: any."""

    def __init__(self, objects: ObjectCommands, servers: Servers, lock: RedisHash, max_bytes: int) -> None:
        self._objects = objects
        self._servers = servers
        self._lock = lock
        self._max_bytes = max_bytes
        self._token = os.urandom(8).hex()
        self._locked_at = 0.0
        self._next_pass = time.monotonic() + (0.0 if max_bytes else _EVERY_S)
        self._last_pass = 0.0
        self._not_before = 0.0
        self._oldest: list[tuple[int, bytes]] = []  # (rank, key) as of the last pass, the oldest last
        self._orphans: dict[bytes, float] = {}  # names of segments without a header, and when they were seen first
        self._used: int | None = None
        self._average = 1  # bytes of an object
        self._written = 0  # in all, by one thread
        self._counted = 0  # of those, what the last pass saw

    def wrote(self, nbytes: int) -> None:
        """Take note of what was stored."""
        self._written += nbytes

    @property
    def used(self) -> int | None:
        """Bytes of Redis's memory that all our keys take, as far as known."""
        return None if self._used is None else self._used + self._written - self._counted

    @property
    def due(self) -> bool:
        """Whether there is something to do."""
        now = time.monotonic()
        if now < self._not_before:
            return False
        soon = bool(self._oldest) or now >= self._last_pass + _SOON_S
        return now >= self._next_pass or (soon and self._excess() > 0)

    def sweep(self, go_on: Callable[[], bool]) -> Tended:
        """Do what is due, as long as `go_on()`."""
        did = Tended()
        try:
            if not self._take_lock():
                self._not_before = time.monotonic() + _AGAIN_S
                return did
            if not (self._oldest and self._excess() > 0):
                self._pass(did, go_on)
            self._evict(did, go_on)
            self._lock.ask(self._give_back)
        except (Unavailable, WalkRefused, _Interrupted) as error:
            self._not_before = time.monotonic() + _AGAIN_S
            did.error = str(error)
        did.used = self.used
        return did

    # -- one pass ----------

    def _pass(self, did: Tended, go_on: Callable[[], bool]) -> None:
        written = self._written
        seen = _Seen()
        failed: list[Exception] = []

        def work(wire: Wire) -> None:
            try:
                for part in walk(wire, self._objects.layout, _SLICE):
                    began = time.monotonic()
                    self._look_at(wire, part, seen, did)
                    self._pause(time.monotonic() - began, go_on)
            except (WalkRefused, Unavailable, _Interrupted) as error:  # the connection is as it was
                failed.append(error)

        lost = self._servers.everywhere(work, ENDLESS)
        if failed:
            raise failed[0]
        if lost is not None:
            raise Unavailable(lost.text)
        self._last_pass = time.monotonic()
        self._next_pass = self._last_pass + (_LIMITED_EVERY_S if self._max_bytes else _EVERY_S)
        self._orphans = {name: since for name, since in self._orphans.items() if name in seen.orphans}
        if self._max_bytes:
            self._oldest = sorted(seen.oldest)
            self._used, self._counted = seen.nbytes, written
            self._average = max(1, seen.nbytes // max(1, seen.objects))

    def _look_at(self, wire: Wire, part: Slice, seen: _Seen, did: Tended) -> None:
        layout = self._objects.layout
        names = [name for found in part.segments.values() for name in found]
        if self._max_bytes:
            everything = [*map(layout.header_key, part.headers), *names]
            seen.nbytes += sum(_sizes(wire, everything))
            seen.objects += len(part.headers)
            for key, rank in zip(part.headers, self._ranks(wire, part.headers), strict=True):
                if rank is not None:
                    seen.add(rank, key)
        keys = list(part.segments)
        gone: list[list[bytes]] = []
        now = time.monotonic()
        for key, there in zip(keys, self._objects.alive(wire, keys), strict=True):
            for name in part.segments[key] if there == 0 else ():
                if len(self._orphans) < _MOST_ORPHANS and now - self._orphans.setdefault(name, now) >= ORPHANED_S:
                    gone.append([name])
                else:
                    seen.orphans.add(name)
        did.orphans += sum(reply == 1 for reply in self._objects.unlink(wire, gone))

    def _pause(self, worked_s: float, go_on: Callable[[], bool]) -> None:
        if not go_on():
            raise _Interrupted("it was interrupted")
        if time.monotonic() - self._locked_at > _LOCK_S / 3 and not self._take_lock():
            raise _Interrupted("another daemon sweeps")
        time.sleep(worked_s * (1 / _SHARE - 1) if self._excess() <= 0 else worked_s)

    def _ranks(self, wire: Wire, keys: Sequence[bytes]) -> list[int | None]:
        """How long each was not used, in seconds; under an LFU policy less than 0, the more the more often it was."""
        names = [self._objects.layout.header_key(key) for key in keys]
        idle = _asked(wire, b"OBJECT IDLETIME", names)
        if any(isinstance(reply, ErrorReply) for reply in idle):
            often = _asked(wire, b"OBJECT FREQ", names)
            return [-reply if isinstance(reply, int) else None for reply in often]
        return [reply if isinstance(reply, int) else None for reply in idle]

    # -- the budget ----------

    def _excess(self) -> int:
        return (self.used or 0) - self._max_bytes if self._max_bytes else 0

    def _evict(self, did: Tended, go_on: Callable[[], bool]) -> None:
        """The oldest of the last pass, as far as nobody has used them since, until the rest fits."""
        while self._oldest and (excess := self._excess()) > 0 and go_on():
            count = min(_BATCH, len(self._oldest), excess // self._average + 1)  # each node frees as much as it may
            part = [self._oldest.pop() for _ in range(count)]
            self._evict_part(part, excess, did)

    def _evict_part(self, part: list[tuple[int, bytes]], most: int, did: Tended) -> None:
        evictions: list[_Eviction] = []

        def call(numbers: Sequence[int]) -> _Eviction:
            evictions.append(_Eviction(self._objects, [part[number] for number in numbers], most, self._ranks))
            return evictions[-1]

        results = self._servers.run([key for _, key in part], call)
        freed = sum(each.freed for each in evictions)
        did.objects += sum(result.outcome is Outcome.OK for result in results)
        did.nbytes += freed
        self._used = (self._used or 0) - freed
        for result in results:
            if result.outcome is Outcome.UNAVAILABLE:
                raise Unavailable(result.detail)

    # -- the lock ----------

    def _take_lock(self) -> bool:
        def take(server: Any) -> bool:
            if server.set(self._lock.key, self._token, nx=True, ex=_LOCK_S):
                return True
            mine = server.get(self._lock.key) == self._token.encode()
            return mine and bool(server.expire(self._lock.key, _LOCK_S))

        taken = self._lock.ask(take)
        self._locked_at = time.monotonic()
        return taken

    def _give_back(self, server: Any) -> None:
        if server.get(self._lock.key) == self._token.encode():
            server.unlink(self._lock.key)


class _Seen:
    """What a pass saw: bytes, the oldest objects, names of segments without a header."""

    def __init__(self) -> None:
        self.objects = 0
        self.nbytes = 0
        self.oldest: list[tuple[int, bytes]] = []  # a heap, the youngest of them first
        self.orphans: set[bytes] = set()

    def add(self, rank: int, key: bytes) -> None:
        if len(self.oldest) < _MOST_OLDEST:
            heapq.heappush(self.oldest, (rank, key))
        else:
            heapq.heappushpop(self.oldest, (rank, key))


class _Eviction:
    """Removes objects that were not used since they had their ranks, until `most` bytes are free. freed: of them."""

    nbytes = 0

    def __init__(
        self,
        objects: ObjectCommands,
        ranked: list[tuple[int, bytes]],
        most: int,
        ranks: Callable[[Wire, Sequence[bytes]], list[int | None]],
    ) -> None:
        self.results: list[Result | None] = [None] * len(ranked)
        self.freed = 0
        self._objects = objects
        self._ranked = ranked
        self._most = most
        self._ranks = ranks

    def run(self, wire: Wire) -> None:
        keys = [key for _, key in self._ranked]
        ranks = zip(self._ranks(wire, keys), self._ranked, strict=True)
        old = [item for item, (now, (then, _)) in enumerate(ranks) if now is not None and now >= then]
        found_names: dict[int, list[bytes]] = {}
        for item, raw in zip(old, self._objects.headers(wire, [keys[item] for item in old]), strict=True):
            found = read_header(keys[item], raw if not isinstance(raw, ErrorReply) else None)
            if isinstance(found, header.Header | NotOurs):  # of that one the segments are left to expire, or to a pass
                segments = self._objects.layout.held(found) if isinstance(found, header.Header) else []
                found_names[item] = [self._objects.layout.header_key(keys[item]), *segments]
        sizes = iter(_sizes(wire, [name for names in found_names.values() for name in names]))
        going: dict[int, list[bytes]] = {}
        for item, names in found_names.items():
            if self.freed < self._most:
                going[item] = names
                self.freed += sum(next(sizes) for _ in names)
        for item, reply in zip(going, self._objects.unlink(wire, list(going.values())), strict=True):
            self.results[item] = Result(Outcome.OK if reply == 1 else Outcome.MISS)
        self.results = [result or Result(Outcome.MISS) for result in self.results]


def _sizes(wire: Wire, names: Sequence[bytes]) -> list[int]:
    """Bytes of Redis's memory that each key takes."""
    return [reply if isinstance(reply, int) else 0 for reply in _asked(wire, b"MEMORY USAGE", names)]


def _asked(wire: Wire, words: bytes, names: Sequence[bytes]) -> list[Reply]:
    if names:
        wire.send([b"".join(command(*words.split(), name) for name in names)])
    return [wire.reply() for _ in names]
