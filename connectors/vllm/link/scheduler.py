# SPDX-License-Identifier: Apache-2.0
"""The scheduler's connection: questions that are sent and not waited for, but where `wait_lookup` is told for how long.

A daemon that is gone is tried again once a second. One that is there but silent costs requests the scheduler's
patience until a question has waited as long as any request would; then it is asked nothing more until it has answered.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from loracache.client import requests
from loracache.client.link import Link
from loracache.connectors.vllm.link.parted_lookup import Found, PartedLookup
from loracache.errors import LoRACacheError, ProtocolError, Rejected
from loracache.tiers import Tier

__all__ = ["SchedulerLink"]

_log = logging.getLogger(__name__)
_REPORT_S = 1.0
_SILENT_AFTER_S = 0.5
_EVENTS_PAGE, _EVENTS_WAIT_S = 500, 30.0


class SchedulerLink(Link):
    """Non-blocking questions to a daemon. A question's number is 0 where it could not be sent. patience: seconds for
    which requests may be parked for an answer; half a second at least, a daemon is not called silent before."""

    def __init__(self, server: str, patience: float = 0.0) -> None:
        super().__init__(server, name="vllm-scheduler", log=_log)
        self._silent_after = max(_SILENT_AFTER_S, patience)
        self._counts: Counter[str] = Counter()
        self._next_report = self._next_counts = 0.0
        self._lookups: dict[int, PartedLookup] = {}  # by the number of the first part
        self._asked: dict[int, float] = {}  # lookups without an answer, oldest first
        self._events_asked = self._events_last = 0  # the question that waits, and the last event that was told
        self._events_gone = False
        self._unwanted: set[int] = set()
        self._early: dict[int, list[Any] | None] = {}  # answers that came while nobody looked
        self._hot_asked = 0  # the report whose answer is waited for
        self._hot: list[bytes] = []
        self._resident: set[bytes] = set()  # what the daemon was told that we hold

    def answering(self) -> bool:
        """Whether the daemon is there and answers; collects what it has said, and sends on what the socket did not take
        at once."""
        if self.connection.unsent:
            try:
                self.connection.poll()
            except LoRACacheError as error:
                self.outage.goes_on(error)
        return self.connection.connected and not self._silent()

    @property
    def arena_bytes(self) -> int:
        """Of the daemon's memory; 0 where it is not there."""
        arena = self.connection.map
        return len(arena) if arena is not None else 0

    @property
    def instance(self) -> bytes:
        """Which run of the daemon that was, or is."""
        return self.connection.instance

    def ask_lookup(
        self, lease: bytes, keys: Sequence[bytes], group: int, ttl: float, beside: Sequence[bytes] = ()
    ) -> int:
        """Ask for the leading run of `keys`, holding it under `lease`; in parts, as far as they are held. group: keys
        of one chunk. beside: keys of the same chunks, as many for each, of which each is looked for and none held; all
        of them where there are no `keys`."""
        lookup = PartedLookup(lease, keys, group, ttl, beside)
        if self._ask_part(lookup):
            self._lookups[lookup.number] = lookup
        return lookup.number

    def answer_lookup(self, number: int) -> Found | None:
        """What was found, or None while there is no answer. A question that failed is a miss, and so is what is no
        answer: vLLM's loop would end with an error."""
        lookup = self._lookups.get(number)
        if lookup is None:  # of a connection that ended
            return Found((), ())
        while True:
            done, payload = self._answer(lookup.number)
            if not done:
                return None
            try:
                lookup.take(payload)
            except (LookupError, TypeError, ValueError):
                self._malformed()
            if not self._ask_part(lookup):
                self._lookups.pop(number, None)
                return lookup.found

    def wait_lookup(self, number: int, seconds: float) -> Found | None:
        """As `answer_lookup`, waiting up to `seconds` for the answer."""
        deadline = time.monotonic() + seconds
        while (found := self.answer_lookup(number)) is None:
            if not self._wait_until(deadline):
                return None
        return found

    def _malformed(self) -> None:
        self.connection.close()
        self.outage.goes_on(ProtocolError("the daemon's answer is malformed"))

    def _ask_part(self, lookup: PartedLookup) -> bool:
        request = lookup.next()
        lookup.number = self._ask(request) if request is not None else 0
        return bool(lookup.number)

    def ask_adapter(self, path: str) -> int | None:
        """Ask for an adapter's digest; None where it could not be asked."""
        return self._ask(requests.AdapterDigest(path)) or None

    def answer_adapter(self, number: int) -> tuple[bool, str | None]:
        """(answered, hex digest or None where it has none)."""
        done, payload = self._answer(number)
        return done, str(payload[0]) if payload else None

    def ask_adapter_add(self, path: str) -> int:
        """Ask for a folder to be taken into the cache."""
        return self._ask(requests.AdapterAdd(path, "", ""))

    def ask_acquire(self, lease: bytes, key: bytes, ttl: float) -> int:
        """Ask for an object to be raised into the arena and held there."""
        return self._ask(requests.Acquire(lease, key, ttl))

    def answer(self, number: int) -> tuple[bool, list[Any] | str | None]:
        """(answered, its payload; in words why it was refused; None where the question failed)."""
        try:
            self.connection.poll()
            reply = self.connection.take(number)
        except Rejected as error:
            return True, str(error)
        except LoRACacheError as error:
            self.outage.goes_on(error)
            return True, None
        return reply is not None, reply.payload if reply is not None else None

    def wait_answer(self, number: int, seconds: float) -> tuple[bool, list[Any] | str | None]:
        """As `answer`, waiting up to `seconds` for it."""
        deadline = time.monotonic() + seconds
        while not (answered := self.answer(number))[0]:
            if not self._wait_until(deadline):
                break
        return answered

    def _wait_until(self, deadline: float) -> bool:
        """Wait for the connection to move (monotonic seconds); False where there is no time left, or no connection."""
        left = deadline - time.monotonic()
        if left <= 0 or not self.connection.connected:
            return False
        ready = select.poll()
        ready.register(self.connection.fileno(), select.POLLIN | (select.POLLOUT if self.connection.unsent else 0))
        ready.poll(left * 1000)
        return True

    def buffers(self, extents: list[int], size: int) -> list[memoryview]:
        """Views of an object's bytes in the mapped arena."""
        return self.connection.buffers(extents, size)

    def resident(self, keys: set[bytes]) -> None:
        """Tell which adapters the engine's own memory holds now, unless the daemon has heard so on this connection."""
        if keys != self._resident:
            self._resident = keys
            self.connection.send(requests.Resident(requests.join_keys(list(keys))), answer=False)

    def prefetch(self, lease: bytes, keys: list[bytes], ttl: float) -> None:
        """Have slow tiers start raising `keys`."""
        self.connection.send(requests.Prefetch(lease, requests.join_keys(keys), ttl), answer=False)

    def pin(self, keys: Sequence[bytes], ttl: float) -> None:
        """Keep objects in the daemon's memory for `ttl` seconds."""
        for part in requests.lookup_parts(keys, 1):
            pin = requests.Pin("", "", {"keys": requests.join_keys(part)}, Tier.CPU.label, ttl, 0.0)
            self.connection.send(pin, answer=False)

    def keep(self, keys: Sequence[bytes], ttl: float, priority: str) -> None:
        """Have objects kept for `ttl` seconds since their last use (0: not at all), and their priority set."""
        for part in requests.lookup_parts(keys, 1):
            self.connection.send(requests.Keep(requests.join_keys(part), ttl, priority), answer=False)

    def announce(self, keys: Sequence[bytes], seconds: float, hold: float) -> None:
        """A chain is asked for again in about so many seconds: have it in memory then, for `hold` seconds."""
        name = os.urandom(requests.LEASE_BYTES)
        for part in requests.lookup_parts(keys, 1):
            prefetch = requests.Prefetch(name, requests.join_keys(part), hold, seconds)
            self.connection.send(prefetch, answer=False)

    def demote(self, keys: Sequence[bytes], tier: str) -> None:
        """Have objects leave the daemon's memory for a slower tier."""
        for part in requests.lookup_parts(keys, 1):
            selector = {"keys": requests.join_keys(part)}
            move = requests.Move("", "", selector, Tier.CPU.label, tier, False, 0.0)
            self.connection.send(move, answer=False)

    def take_events(self) -> tuple[bool, list[tuple[str, str, bytes]]] | None:
        """(whether some are lost, the next events as (what, tier, key)), or None where there are none. The daemon is
        asked for them, and asked again when it has told some."""
        gone, self._events_gone = self._events_gone, False
        if gone:
            return True, []
        if not self._events_asked:
            wait = _EVENTS_WAIT_S
            self._events_asked = self._ask(requests.EventList("", "", self._events_last, _EVENTS_PAGE, wait))
            if not self._events_asked:
                return None
        done, payload = self._answer(self._events_asked)
        if not done:
            return None
        self._events_asked = 0
        if payload is None:
            return None
        try:
            last, lost, *events = payload
            told = [(each["event"], each["tier"], bytes.fromhex(each["key"])) for each in events]
        except (ValueError, TypeError, LookupError):
            self._malformed()
            return None
        self._events_last = last
        return bool(lost), told

    def release(self, lease: bytes) -> None:
        """End a request's lease."""
        self.connection.send(requests.Release(lease, b""), answer=False)

    def forget(self, number: int) -> None:
        """An answer nobody wants any more; it still counts as a sign of life."""
        lookup = self._lookups.pop(number, None)
        number = lookup.number if lookup is not None else number
        self._early.pop(number, None)
        if number in self._asked:
            self._unwanted.add(number)

    def abandon(self, number: int) -> None:
        """As `forget`, of a question about an adapter, which is no sign of life."""
        self.connection.forget(number)

    def count(self, cause: str, amount: int) -> None:
        """Count a failure seen in the engine; the daemon's status shows it."""
        if amount:
            self._counts[cause] += amount

    def flush(self, *, now: bool = False) -> None:
        """Send on what the socket did not take at once, and the counts, at most once a second. now: whenever they were
        sent last, for no step may follow."""
        if self.connection.unsent:
            try:
                self.connection.poll()
            except LoRACacheError as error:
                self.outage.goes_on(error)
        due = now or time.monotonic() >= self._next_counts
        if self._counts and due and self.connection.connected:
            self._report(requests.Report(dict(self._counts)), answer=False)

    def reports_now(self) -> bool:
        """Whether it is time to tell the daemon of requests again."""
        return time.monotonic() >= self._next_report and self.connection.connected

    def report(
        self, running: int, waiting: int, adapters: Sequence[bytes], prefill: int = 0, wanted: Sequence[bytes] = ()
    ) -> None:
        """Tell how many requests run and wait, the adapters of those that have arrived since the last report, the bytes
        of KV that the engine computes a second (0: it is not known), the adapters of those that wait (`wanted`), and
        the counts."""
        asks, (arrived, awaited) = not self._hot_asked, map(requests.join_keys, (adapters, wanted))
        self._next_report = time.monotonic() + _REPORT_S
        told = requests.Report(dict(self._counts), running, waiting, arrived, prefill, awaited)
        number = self._report(told, answer=asks)
        self._hot_asked = number if asks else self._hot_asked

    def hot_adapters(self) -> list[bytes]:
        """Keys of the adapters in the daemon's memory that all its engines' requests ask for most, as last told."""
        if self._hot_asked:
            done, payload = self._answer(self._hot_asked)
            if done:
                self._hot_asked = 0
                with contextlib.suppress(LookupError, TypeError, ValueError):  # what is no answer says nothing
                    self._hot = requests.split_keys((payload or [b""])[0])
        return self._hot

    def _report(self, report: requests.Report, *, answer: bool) -> int:
        """Send a report that has the counts, which are kept where that fails."""
        number = self.connection.send(report, answer=answer)
        if self._counts:
            self._next_counts = time.monotonic() + _REPORT_S
        self._counts.clear()
        return number

    def close(self) -> None:
        """Close the connection; its leases end."""
        self.flush()
        self.connection.close()

    def _ask(self, request: requests.Request) -> int:
        if not self.begin() or self._silent():
            return 0
        try:
            number = self.connection.send(request)
        except LoRACacheError as error:
            self.outage.goes_on(error)
            return 0
        if isinstance(request, requests.Lookup):
            self._asked[number] = time.monotonic()
        return number

    def _answer(self, number: int) -> tuple[bool, list[Any] | None]:
        """(answered, payload); no payload where the question failed."""
        if number in self._early:
            return True, self._early.pop(number)
        try:
            self.connection.poll()
            reply = self.connection.take(number)
        except LoRACacheError as error:
            if not isinstance(error, Rejected):
                self.outage.goes_on(error)
            self._asked.pop(number, None)
            return True, None
        if reply is None:
            return False, None
        self._asked.pop(number, None)
        return True, reply.payload

    def _lost(self) -> None:
        self._lookups.clear()
        self._events_gone = self._events_gone or bool(self._events_asked or self._events_last)
        self._events_asked = self._events_last = 0
        self._asked.clear()
        self._unwanted.clear()
        self._early.clear()
        self._hot_asked, self._hot = 0, []

    def _made(self) -> None:
        self._resident = set()

    def _silent(self) -> bool:
        """Whether the oldest question has waited so long that more of them would be pointless. Its request may run
        without the answer and not look for it again: then the answer is collected here.
        """
        while self._asked:
            number, since = next(iter(self._asked.items()))
            answered, payload = self._answer(number)
            if not answered:
                return time.monotonic() - since > self._silent_after
            if number in self._unwanted:
                self._unwanted.discard(number)
            else:
                self._early[number] = payload
        return False
