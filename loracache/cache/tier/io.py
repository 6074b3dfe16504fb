# SPDX-License-Identifier: Apache-2.0
"""Runs one storage backend on threads of its own and posts results to the cache's thread.

Stores and deletes share one thread, so that they happen in the order they were asked for: a child enters a tier with or
after its parent, and a deletion that makes room precedes the store it makes room for. Loads have their own threads, and
so have questions, so that neither waits behind bulk writes; what takes minutes has one of its own.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from loracache.backoff import Backoff
from loracache.cache.state.counters import Counters
from loracache.cache.state.events import Events
from loracache.cache.tier.questions import Question, Questions
from loracache.cache.tier.workers import Workers
from loracache.errors import ConfigError, Unavailable
from loracache.storage_backends.base import Outcome, Purge, Purpose, Result, Standing, StorageBackend, Tended, Transfer
from loracache.tiers import Tier
from loracache.tracing import span
from loracache.transfer_times import TransferTimes

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

    standing: what the backend can do as far as known. used: bytes of its own budget, as far as known. asks: round trips
    of questions that may be under way. load_times: what loads take, of those that came whole.
    """

    def __init__(
        self, tier: Tier, backend: StorageBackend, post: Post, counters: Counters, events: Events, asks: int = 1
    ) -> None:
        self.tier = tier
        self._events = events
        self.backend = backend
        self._post = post
        self._counters = counters
        label = tier.label
        self._writes = Workers(1, f"{label}-write")
        self._loads = Workers(2, f"{label}-load")
        self._asks = Workers(asks, f"{label}-ask")
        self._questions = Questions(self._ask, asks, time.monotonic)
        self._care = Workers(1, f"{label}-care")  # what takes minutes, and whom nobody else waits for
        self._paused_until = 0.0
        self._pauses = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self.standing = Standing()
        self.load_times = TransferTimes()
        self._trouble = ""
        self._looking = False
        self._next_look = 0.0
        self._closing = False
        self._tending = False
        self._said_unproven = False
        self._purges = 0  # which what is done in the background makes way for
        self.used: int | None = None

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
            _log.warning(f"{label}: %s: %s", does, standing.reason)
        elif before.reason and not standing.reason:
            _log.info("%s: in full use again", label)
        if standing.reads and not before.reads:
            self._paused_until = 0.0
        if not standing.reason and self.available:
            self._trouble = ""

    def tick(self) -> None:
        """Have done what is due, and look again at a backend that cannot do all that it should."""
        if self.available and not self._tending and self.backend.due:
            self._tending = True
            self._care.submit(self._tend)
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

    def _tend(self) -> None:
        try:
            did = self.backend.tend(lambda: not self._closing and not self._purges)
        except Exception as error:  # noqa: BLE001 - top of a thread: it must be tended again
            _log.exception("%s: tending failed", self.tier.label)
            did = Tended(error=repr(error))
        self._post(lambda: self._tended(did))

    def _tended(self, did: Tended) -> None:
        self._tending = False
        label = self.tier.label
        self._counters.add(f"evict.{label}.budget", did.objects)
        self._counters.add(f"evicted_bytes.{label}.budget", did.nbytes)
        self._counters.add(f"swept.{label}.orphans", did.orphans)
        self.used = did.used if did.used is not None else self.used
        if did.error:
            _log.debug("%s: not tended to the end: %s", label, did.error)

    def _look(self) -> Standing:
        try:
            return self.backend.check()
        except ConfigError as error:  # the daemon serves: what it lacks is shown
            return Standing(reads=False, writes=False, reason=str(error))
        except Exception as error:  # noqa: BLE001 - top of a thread: it must be looked at again
            return Standing(reads=False, writes=False, reason=f"its check failed: {error!r}")

    def asked_too_long(self, limit_s: float) -> bool:
        """Whether a round trip takes longer than `limit_s`: the tier hangs, and asking more is of no use."""
        return self._questions.stuck(limit_s)

    def contains(self, keys: Sequence[bytes], done: Done, *, leading: bool = False) -> Question:
        """Ask which keys the tier holds. leading: as far as the first that it does not hold."""
        question = Question(keys, leading, done)

        def refused(results: list[Result]) -> None:
            question.answered(results)

        if self.available:
            self._questions.put(question)
        else:
            self._ask(list(keys), refused)  # at once
        return question

    def _ask(self, keys: list[bytes], done: Done) -> None:
        self._run(self._asks, "lookup", len(keys), lambda: self.backend.contains(keys), done)

    def load(self, transfers: Sequence[Transfer], done: Done) -> None:
        """Read objects into their buffers."""
        nbytes = sum(transfer.info.size for transfer in transfers)
        self._run(self._loads, "load", len(transfers), lambda: self.backend.load(transfers), done, nbytes)

    def store(self, transfers: Sequence[Transfer], done: Done) -> None:
        """Write objects from their buffers, after all writes and deletions asked for before."""
        self._run(self._writes, "store", len(transfers), lambda: self.backend.store(transfers), done)

    def delete(self, keys: Sequence[bytes], done: Done = lambda results: None) -> None:
        """Remove objects, after all writes and deletions asked for before."""
        self._run(self._writes, "delete", len(keys), lambda: self.backend.delete(keys), done)

    def when_written(self, done: Callable[[], None]) -> None:
        """Call `done` after all writes and deletions asked for before."""
        self._run(self._writes, "wait", 0, list, lambda results: done())

    def consult(self, look: Callable[[dict[bytes, bytes]], bool], done: Callable[[bool], None]) -> None:
        """What `look`, called on a thread, says of what the backend has been told of its namespaces; False where it
        cannot be asked."""

        def ask() -> None:
            try:
                found = look(self.backend.descriptors())
            except Exception as error:  # noqa: BLE001 - top of a thread: somebody waits for the answer
                _log.warning("%s: descriptors: %s", self.tier.label, error)
                found = False
            self._post(lambda: done(found))

        self._asks.submit(ask)

    def purge(
        self,
        choose: Callable[[dict[bytes, bytes]], Purpose],
        over: Callable[[Purge], Collection[bytes]],
        did: Purge,
        go_on: Callable[[], bool],
        done: Callable[[None], None],
    ) -> None:
        """Remove what only the backend knows of, after all writes and deletions asked for before. All but `done` is
        called on a thread: choose(descriptors) says whose, over(did) which descriptors nobody needs any more."""

        def work() -> None:
            try:
                self.backend.purge(choose(self.backend.descriptors()), did, lambda: go_on() and not self._closing)
                self.backend.forget(over(did))
            except Unavailable as error:
                did.fail(str(error))
            except Exception as error:  # noqa: BLE001 - top of a thread: somebody waits for its end
                _log.exception("%s: a purge failed", self.tier.label)
                did.fail(repr(error))
            self._post(ended)

        def ended() -> None:
            self._purges -= 1
            done(None)

        self._purges += 1
        self.when_written(lambda: self._care.submit(work))

    def end(self) -> None:
        """Take no more work up, and drop what is queued."""
        self._closing = True
        for each in (self._asks, self._loads, self._writes, self._care):
            each.end()

    def close(self, seconds: float = _END_S) -> None:
        """Drop what is queued, wait that long at most for what runs, and close the backend."""
        self.end()
        deadline = time.monotonic() + seconds
        workers = (self._asks, self._loads, self._writes, self._care)
        if all(each.ended(deadline) for each in workers):
            self.backend.close()
        else:
            _log.error("%s: a call hangs; left behind after %.1f s", self.tier.label, seconds)

    @property
    def waiting(self) -> dict[str, int]:
        """Calls that wait for a thread, by kind."""
        return {"write": self._writes.waiting, "load": self._loads.waiting, "lookup": len(self._questions)}

    def _run(
        self, workers: Workers, what: str, count: int, call: Callable[[], list[Result]], done: Done, loads: int = 0
    ) -> None:
        """loads: bytes."""

        def finish(results: list[Result], seconds: float) -> None:
            self._account(what, results)
            if loads and all(result.outcome is Outcome.OK for result in results):
                self.load_times.add(loads, seconds)
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
            elif result.outcome is Outcome.UNPROVEN:
                self._say_unproven(result.detail)
            elif result.outcome is not Outcome.MISS:
                _log.warning(f"{label}: {what}: {result.outcome.value}: %s", result.detail)  # each a kind of its own
            if result.outcome is not Outcome.MISS or what == "load":
                self._counters.add(f"failure.{label}.{result.outcome.value}")
                causes[result.outcome.value] += 1
        for cause, count in causes.items():
            self._events.fail(self.tier, cause, count)
        if not unavailable:
            if results:
                self._pauses.reset()
                if not any(result.outcome is Outcome.UNAVAILABLE for result in results):
                    self._trouble = ""
        elif self.available:
            pause = self._pauses.next()
            _log.warning(f"{label}: unavailable (%s); left alone for %.1f s", results[-1].detail, pause)
            self._paused_until = time.monotonic() + pause

    def _say_unproven(self, detail: str) -> None:
        """Once that there is some in Redis, where others may store; the disk's tier says it of the disk's."""
        if self.tier is Tier.REDIS and not self._said_unproven:
            self._said_unproven = True
            _log.warning(
                "redis: objects that another release, or another integrity_key, wrote (%s) are left alone and not "
                "served; they go when they are stored anew, by redis_ttl and redis_max_bytes, or with: loracache clear "
                "--tier redis",
                detail,
            )
