# SPDX-License-Identifier: Apache-2.0
"""How long the engine's loop may wait for the answer to a question that was just sent: as long as answers take, a few
milliseconds a step at most, and not at all for a while where one did not come in that time. Pure: whoever asks brings
the time (seconds of one monotonic clock).
"""

from __future__ import annotations

from loracache.backoff import Backoff

__all__ = ["AnswerTimes"]

_MOST_S = 0.003  # of a step that its waits take together
_LEAST_S = 0.001  # the finest wait there is
_FIRST_S = 0.001  # for an answer, before any was seen
_WEIGHT = 1 / 8  # of a new answer's time; of its distance from the mean twice that, as TCP has it
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0


class AnswerTimes:
    """What answers took, and how long the loop may wait for the next."""

    def __init__(self) -> None:
        self._mean, self._distance = _FIRST_S, _FIRST_S / 2
        self._pauses = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._not_before = 0.0
        self._left = _MOST_S

    def begin_step(self) -> None:
        """A step was planned: the next has all of its time."""
        self._left = _MOST_S

    def allowance(self, now: float, asked: float) -> float:
        """Seconds for which the loop may wait for the answer to a question of `asked`; 0: not at all."""
        if now < self._not_before or self._left < _LEAST_S:
            return 0.0
        until = asked + min(max(self._mean + 4 * self._distance, _LEAST_S), _MOST_S)
        return min(until - now, self._left) if until - now > 0 else 0.0

    def answered(self, took: float, waited: float) -> None:
        """An answer came while the loop waited: `took` seconds after its question."""
        self._left -= waited
        self._pauses.reset()
        self._distance += 2 * _WEIGHT * (abs(took - self._mean) - self._distance)
        self._mean += _WEIGHT * (took - self._mean)

    def missed(self, now: float, waited: float) -> None:
        """None came in time: the daemon is silent, or slow. The next ones are not waited for, each time for longer."""
        self._left -= waited
        self._not_before = now + self._pauses.next()
