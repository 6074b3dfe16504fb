# SPDX-License-Identifier: Apache-2.0
"""Questions of many clients go together, a little for everybody, and no further than somebody needs to know."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from loracache.cache.tier.questions import MOST_KEYS, Question, Questions
from loracache.storage_backends.base import Outcome, Result

OK, MISS = Result(Outcome.OK), Result(Outcome.MISS)
Done = Callable[[list[Result]], None]


class Tier:
    """Holds the keys it is given; each round trip ends when told to."""

    def __init__(self, held: Sequence[bytes] = (), at_once: int = 1) -> None:
        self.trips: deque[tuple[list[bytes], Done]] = deque()
        self.sizes: list[int] = []
        self.questions = Questions(self._ask, at_once)
        self._held = set(held)

    def _ask(self, keys: list[bytes], done: Done) -> None:
        self.trips.append((keys, done))
        self.sizes.append(len(keys))

    def ask(self, keys: Sequence[bytes], *, leading: bool = False) -> list[list[Result]]:
        answers: list[list[Result]] = []
        self.last = Question(keys, leading, answers.append)
        self.questions.put(self.last)
        return answers

    def answer(self) -> None:
        keys, done = self.trips.popleft()
        done([OK if key in self._held else MISS for key in keys])

    def settle(self) -> None:
        while self.trips:
            self.answer()


def names(count: int, start: int = 0) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in range(start, start + count)]


def test_what_waits_goes_in_one_round_trip() -> None:
    tier = Tier(names(1))
    first = tier.ask(names(1))
    others = [tier.ask(names(1) + names(2, 10 + 2 * number)) for number in range(15)]
    assert (tier.sizes, len(tier.questions)) == ([1], 15)
    tier.answer()
    assert first == [[OK]]
    assert tier.sizes == [1, 1 + 15 * 2]  # what many ask for is asked once
    tier.answer()
    assert others == [[[OK, MISS, MISS]]] * 15
    assert len(tier.questions) == 0


def test_as_many_are_under_way_as_may_be() -> None:
    tier = Tier(at_once=3)
    for number in range(10):
        tier.ask(names(1, number))
    assert tier.sizes == [1, 1, 1]
    tier.answer()
    assert tier.sizes == [1, 1, 1, 7]


def test_few_keys_do_not_wait_for_many() -> None:
    tier = Tier(names(10 * MOST_KEYS))
    many = tier.ask(names(10 * MOST_KEYS))
    few = tier.ask(names(2))
    tier.answer()
    tier.answer()
    assert (few, many) == ([[OK, OK]], [])
    tier.settle()
    assert many == [[OK] * 10 * MOST_KEYS]
    assert max(tier.sizes) == MOST_KEYS


def test_a_lookup_asks_no_further_than_its_first_miss() -> None:
    tier = Tier(names(MOST_KEYS + 3))
    lookup = tier.ask(names(10 * MOST_KEYS), leading=True)
    tier.settle()
    assert tier.sizes == [MOST_KEYS, MOST_KEYS]
    (results,) = lookup
    assert results[: MOST_KEYS + 4] == [OK] * (MOST_KEYS + 3) + [MISS]
    every = tier.ask(names(10 * MOST_KEYS))
    tier.settle()
    assert [len(results) for results in every] == [10 * MOST_KEYS]


def test_nobody_asks_for_one_who_has_left() -> None:
    tier = Tier(names(10 * MOST_KEYS))
    gone = tier.ask(names(10 * MOST_KEYS))
    leaving = tier.last
    stays = tier.ask(names(1))
    leaving.cancel()
    tier.settle()
    assert (gone, stays) == ([], [[OK]])
    assert tier.sizes == [MOST_KEYS, 1]
    assert leaving.results == [OK] * MOST_KEYS


def test_a_round_trip_that_hangs_is_noticed_and_one_with_many_keys_may_take_longer() -> None:
    now = [0.0]
    questions = Questions(lambda keys, done: None, 2, lambda: now[0])
    questions.put(Question(names(MOST_KEYS), False, lambda results: None))
    now[0] = 0.012
    assert not questions.stuck(0.01)
    now[0] = 0.02
    assert questions.stuck(0.01)


def test_one_slow_round_trip_is_no_hang_while_others_end() -> None:
    now = [0.0]
    trips: list[Done] = []
    questions = Questions(lambda keys, done: trips.append(done), 2, lambda: now[0])
    for _ in range(2):
        questions.put(Question(names(1), False, lambda results: None))
    now[0] = 0.015
    trips[1]([MISS])
    now[0] = 0.02
    assert not questions.stuck(0.01)
    now[0] = 0.03
    assert questions.stuck(0.01)
