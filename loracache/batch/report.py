# SPDX-License-Identifier: Apache-2.0
"""What came of a batch: counts and tokens, as they are while it runs and at its end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from loracache.batch.samples import Samples

__all__ = ["EngineReport", "Report"]

_MOST_TOKENS = 1 << 40  # that an engine may say; more is no count


@dataclass(slots=True)
class EngineReport:
    """What one engine did of a run. url: without /v1."""

    url: str
    answered: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    taken_over: int = 0
    """Requests that other engines would have had."""
    lost: int = 0
    """How often it was gone for longer than the patience."""


@dataclass(slots=True)
class Report:
    """Lines and tokens of one run. Tokens are those that the engines say, of this run alone."""

    requests: int = 0
    """Lines that are not blank."""
    resumed: int = 0
    """Of those, answered by earlier runs."""
    answered: int = 0
    errors: int = 0
    """Requests that were refused or given up, and lines that are no request; of earlier runs, too."""
    retries: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of them, not computed, as far as the engines say (vLLM: --enable-prompt-tokens-details)."""
    says_cached: bool = False
    """Whether an engine has said so of any answer."""
    completion_tokens: int = 0
    pinned: int = 0
    """Objects that were kept in the cache while their groups ran."""
    pin_failures: int = 0
    planned_seconds: float = 0.0
    """Of those, until the plan stood."""
    samples: Samples = field(default_factory=Samples)
    engines: list[EngineReport] = field(default_factory=list)
    plan: dict[str, int] = field(default_factory=dict)
    """Of the requests that were left to answer: see Figures."""

    @property
    def done(self) -> int:
        """Lines that have their line in the output."""
        return self.resumed + self.answered + self.errors

    def count(self, body: Any, engine: EngineReport) -> int:
        """Take in the usage of an answer that `engine` gave; tokens that it has."""
        usage = body.get("usage") if isinstance(body, dict) else None
        usage = usage if isinstance(usage, dict) else {}
        details = usage.get("prompt_tokens_details")
        cached = _whole(details.get("cached_tokens") if isinstance(details, dict) else 0)
        self.says_cached |= isinstance(details, dict)
        completion = _whole(usage.get("completion_tokens"))
        engine.answered += 1
        for each in (self, engine):
            each.prompt_tokens += _whole(usage.get("prompt_tokens"))
            each.cached_tokens += cached
            each.completion_tokens += completion
        return completion

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _whole(value: object) -> int:
    return value if type(value) is int and 0 <= value <= _MOST_TOKENS else 0
