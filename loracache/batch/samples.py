# SPDX-License-Identifier: Apache-2.0
"""How a run goes over time, in a bounded number of samples: when there are too many, every second one goes, and those
to come are twice as far apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Samples"]

_MOST = 512


@dataclass(slots=True)
class Samples:
    """Columns, one item a sample. Counts are of this run alone, since its beginning."""

    interval: float = 0.1
    """Seconds from one to the next."""
    seconds: list[float] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    """Requests."""
    prompt_tokens: list[int] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    """Requests under way."""

    def add(self, seconds: float, answered: int, prompt_tokens: int, cached_tokens: int, running: int) -> None:
        """One more."""
        self.seconds.append(round(seconds, 3))
        self.answered.append(answered)
        self.prompt_tokens.append(prompt_tokens)
        self.cached_tokens.append(cached_tokens)
        self.running.append(running)
        if len(self.seconds) > _MOST:
            self.interval *= 2
            for column in (self.seconds, self.answered, self.prompt_tokens, self.cached_tokens, self.running):
                del column[1::2]
