# SPDX-License-Identifier: Apache-2.0
"""Which of some keys a tier holds, for all who ask at the same time in as few round trips as that takes.

A round trip of a millisecond each way is longer than the answer: asked one after another, the clients of a busy daemon
would wait for each other until they give up. What waits goes together; each round trip asks a little for everybody, so
that few keys do not wait for many. Threading: the cache's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from loracache.storage_backends.base import Outcome, Result

__all__ = ["Question", "Questions"]

MOST_KEYS = 256  # of one round trip: two milliseconds of reading what comes back
_KEY_S = 20e-6  # a key's share of how long a round trip may take

Done = Callable[[list[Result]], None]


class Question:
    """One client's. leading: no further than the first key that is not held; the answers end with that, and `held`
    counts those before it. results: the answers by now, in the order of its keys."""

    def __init__(self, keys: Sequence[bytes], leading: bool, done: Done) -> None:
        self.results: list[Result] = []
        self.held = 0
        self.cancelled = False
        self._keys = keys
        self._leading = leading
        self._done = done

    def next_keys(self, most: int) -> Sequence[bytes]:
        """What to ask next."""
        start = len(self.results)
        return self._keys[start : start + most]

    def answered(self, results: Sequence[Result]) -> bool:
        """Take the answers to that; whether there is more to ask."""
        self.results += results
        if self.cancelled:
            return False
        held = len(results)
        if self._leading:
            held = next((at for at, result in enumerate(results) if result.outcome is not Outcome.OK), held)
            self.held += held
        if held == len(results) and len(self.results) < len(self._keys):
            return True
        self._done(self.results)
        return False

    def cut(self, count: int) -> None:
        """Nobody wants to know of more than the first `count` keys."""
        asked, self._keys = len(self._keys), self._keys[:count]
        if count <= len(self.results) < asked and not self.cancelled:
            self.cancel()
            self._done(self.results)

    def cancel(self) -> None:
        """Nobody waits for the rest."""
        self.cancelled = True


class Questions:
    """ask(keys, done): one round trip; at_once: how many may be under way; clock(): seconds."""

    def __init__(
        self, ask: Callable[[list[bytes], Done], None], at_once: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._ask = ask
        self._at_once = at_once
        self._waiting: deque[Question] = deque()
        self._under_way: dict[int, tuple[float, int]] = {}  # when each began, and its keys
        self._number = 0
        self._answered_at = float("-inf")

    def __len__(self) -> int:
        """Questions that wait for a round trip."""
        return len(self._waiting)

    def put(self, question: Question) -> None:
        """Have it asked."""
        self._waiting.append(question)
        self._go_on()

    def stuck(self, limit_s: float) -> bool:
        """Whether a round trip takes longer than that, and than its keys explain, and none beside it ends either."""
        now = self._clock()
        return any(
            now - max(began, self._answered_at) > limit_s + _KEY_S * count for began, count in self._under_way.values()
        )

    def _go_on(self) -> None:
        while self._waiting and len(self._under_way) < self._at_once:
            parts: list[tuple[Question, list[int]]] = []
            places: dict[bytes, int] = {}  # clients with the same beginning of a prompt ask for the same keys
            while self._waiting and len(places) < MOST_KEYS:
                question = self._waiting.popleft()
                if not question.cancelled:
                    mine = question.next_keys(MOST_KEYS - len(places))
                    parts.append((question, [places.setdefault(key, len(places)) for key in mine]))
            if parts:
                self._begin(parts, list(places))

    def _begin(self, parts: list[tuple[Question, list[int]]], keys: list[bytes]) -> None:
        self._number += 1
        number = self._number
        self._under_way[number] = self._clock(), len(keys)

        def answered(results: list[Result]) -> None:
            del self._under_way[number]
            self._answered_at = self._clock()
            for question, places in parts:
                if question.answered([results[place] for place in places]):
                    self._waiting.append(question)
            self._go_on()

        self._ask(keys, answered)
