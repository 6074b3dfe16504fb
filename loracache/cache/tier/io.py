# SPDX-License-Identifier: Apache-2.0
"""Runs one storage backend on threads of its own and posts results to the cache's thread.

Stores and deletes share one thread, so that they happen in the order they were asked for: a child enters a tier with or
after its parent, and a deletion that makes room precedes the store it makes room for. Loads have their own threads, and
so has the one question a lookup may ask, so that neither waits behind bulk writes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from loracache.cache.state.counters import Counters
from loracache.cache.state.events import Events
from loracache.cache.tier.workers import Workers
from loracache.errors import ConfigError
from loracache.storage_backends.base import Outcome, Result, Standing, StorageBackend, Transfer
from loracache.tiers import Tier
from loracache.tracing import span

__all__ = ["Post", "TierIO"]

Post = Callable[[Callable[[], None]], object]
Done = Callable[[list[Result]], None]

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_LOOK_AGAIN_S = 2.0  # at a backend that cannot do all it should
_END_S = 5.0  # what a call that runs is waited for at the end


class TierIO:
    """One tier's backend, its threads, its failure counters, and whether it is worth asking now.

    After an UNAVAILABLE answer that is not about a part of it the tier is left alone for a pause that doubles up to
    15 s; whatever is asked meanwhile is answered UNAVAILABLE at once. What the backend says that it cannot do is not
    asked of it either, until it says that it can: `tick` looks. All methods belong to the cache's thread; `post` hands
    a callable over to it.

    standing: what the backend can do as far as known.
    """

    def __init__(self, tier: Tier, backend: StorageBackend, post: Post, counters: Counters, events: Events) -> None:
        self.tier = tier
        self._events = events
        self.backend = backend
        self._post = post
        self._counters = counters
        label = tier.label
        self._writes = Workers(1, f"{label}-write")
        self._loads = Workers(2, f"{label}-load")
        self._asks = Workers(1, f"{label}-ask")
        self._paused_until = 0.0
        self._pause = _FIRST_PAUSE_S
        self._asked_at: list[float] = []
        self.standing = Standing()
        self._trouble = ""
        self._looking = False
        self._next_look = 0.0

    @property
    def available(self) -> bool:
        """Whether the tier can be read, and is not being left alone after a failure."""
        return self.standing.reads and time.monotonic() >= self._paused_until

    @property
    def writable(self) -> bool:
        """Whether the tier takes anything now."""
        return self.standing.writes and self.available

    @property
    def reason(self) -> str:
        """Why the tier does less than it should, or ""."""
        return self.standing.reason or self._trouble

    def stand(self, standing: Standing) -> None:
        """Take note of what the backend can do, and say so once."""
        before, self.standing = self.standing, standing
        label = self.tier.label
        if standing.reason and standing.reason != before.reason:
            does = (
                "in use, but" if standing.writes else "is read, and takes nothing" if standing.reads else "not in use"
            )
            _log.warning("%s: %s: %s", label, does, standing.reason)
        elif before.reason and not standing.reason:
            _log.info("%s: in full use again", label)
        if standing.reads and not before.reads:
            self._paused_until = 0.0
        if not standing.reason and self.available:
            self._trouble = ""

    def tick(self) -> None:
        """Look again at a backend that cannot do all that it should."""
        now = time.monotonic()
        if not self.reason or self._looking or now < self._next_look:
            return
        self._looking = True

        def look() -> None:
            standing = self._look()
            self._post(lambda: looked(standing))

        def looked(standing: Standing) -> None:
            self._looking = False
            self._next_look = time.monotonic() + _LOOK_AGAIN_S
            self.stand(standing)

        self._asks.submit(look)

    def _look(self) -> Standing:
        try:
            return self.backend.check()
        except ConfigError as error:  # the daemon serves: what it lacks is shown
            return Standing(reads=False, writes=False, reason=str(error))
        except Exception as error:  # noqa: BLE001 - top of a thread: it must be looked at again
            return Standing(reads=False, writes=False, reason=f"its check failed: {error!r}")

    def asked_too_long(self, limit_s: float) -> bool:
        """Whether a question is still unanswered after `limit_s`: asking more would only queue behind it."""
        return bool(self._asked_at) and time.monotonic() - self._asked_at[0] > limit_s

    def contains(self, keys: Sequence[bytes], done: Done) -> None:
        """Ask which keys the tier holds."""
        asked = time.monotonic()
        self._asked_at.append(asked)

        def answered(results: list[Result]) -> None:
            self._asked_at.remove(asked)
            done(results)

        self._run(self._asks, "lookup", len(keys), lambda: self.backend.contains(keys), answered)

    def load(self, transfers: Sequence[Transfer], done: Done) -> None:
        """Read objects into their buffers."""
        self._run(self._loads, "load", len(transfers), lambda: self.backend.load(transfers), done)

    def store(self, transfers: Sequence[Transfer], done: Done) -> None:
        """Write objects from their buffers, after all writes and deletions asked for before."""
        self._run(self._writes, "store", len(transfers), lambda: self.backend.store(transfers), done)

    def delete(self, keys: Sequence[bytes], done: Done = lambda results: None) -> None:
        """Remove objects, after all writes and deletions asked for before."""
        self._run(self._writes, "delete", len(keys), lambda: self.backend.delete(keys), done)

    def when_written(self, done: Callable[[], None]) -> None:
        """Call `done` after all writes and deletions asked for before."""
        self._run(self._writes, "wait", 0, list, lambda results: done())

    def close(self) -> None:
        """Wait for what runs, a few seconds at most, drop what is queued, close the backend."""
        deadline = time.monotonic() + _END_S
        workers = (self._asks, self._loads, self._writes)
        for each in workers:
            each.end()
        if all(each.ended(deadline) for each in workers):
            self.backend.close()
        else:
            _log.error("%s: a call hangs; left behind after %g s", self.tier.label, _END_S)

    @property
    def waiting(self) -> dict[str, int]:
        """Calls that wait for a thread, by kind."""
        return {"write": self._writes.waiting, "load": self._loads.waiting, "lookup": self._asks.waiting}

    def _run(self, workers: Workers, what: str, count: int, call: Callable[[], list[Result]], done: Done) -> None:
        def finish(results: list[Result], seconds: float) -> None:
            self._account(what, results)
            if count:
                self._counters.add(f"busy_us.{self.tier.label}.{what}", int(seconds * 1e6))
            done(results)

        if not self.available or (count and workers is self._writes and not self.standing.writes):
            refused = Result(Outcome.UNAVAILABLE, detail=self.reason or "left alone after a failure")
            self._counters.add(f"failure.{self.tier.label}.{refused.outcome.value}", count)
            self._post(lambda: done([refused] * count))
            return

        def work() -> None:
            started = time.monotonic()
            try:
                with span(f"{self.tier.label} {what}", **{"loracache.objects": count}):
                    results = call()
            except Exception as error:  # noqa: BLE001 - top of a thread: a backend's bug must not lose the waiting request
                _log.exception("%s: %s failed", self.tier.label, what)
                results = [Result(Outcome.FAILED, detail=repr(error))] * count
            seconds = time.monotonic() - started
            self._post(lambda: finish(results, seconds))

        workers.submit(work)

    def _account(self, what: str, results: list[Result]) -> None:
        label = self.tier.label
        unavailable = 0
        causes: Counter[str] = Counter()
        for result in results:
            if result.outcome is Outcome.OK:
                continue
            if result.outcome is Outcome.UNAVAILABLE:
                unavailable += not result.partial
                self._trouble = result.detail or "no answer"
            elif result.outcome not in (Outcome.MISS, Outcome.UNPROVEN):  # of which the tier says once that there are
                _log.warning("%s: %s: %s: %s", label, what, result.outcome.value, result.detail)
            if result.outcome is not Outcome.MISS or what == "load":
                self._counters.add(f"failure.{label}.{result.outcome.value}")
                causes[result.outcome.value] += 1
        for cause, count in causes.items():
            self._events.fail(self.tier, cause, count)
        if not unavailable:
            if results:
                self._pause = _FIRST_PAUSE_S
                if not any(result.outcome is Outcome.UNAVAILABLE for result in results):
                    self._trouble = ""
        elif self.available:
            _log.warning("%s: unavailable (%s); left alone for %.1f s", label, results[-1].detail, self._pause)
            self._paused_until = time.monotonic() + self._pause
            self._pause = min(self._pause * 2, _LONGEST_PAUSE_S)
