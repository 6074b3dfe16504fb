# SPDX-License-Identifier: Apache-2.0
"""How long it pays to wait for an answer. Pure: whoever asks brings the time (seconds of one monotonic clock).

Two waits. The engine's loop itself waits a moment for a lookup that was just sent, because without its answer the
request loses a whole step: no longer than answers take, a few milliseconds a step at most, and not at all for a while
where one did not come in that time. And a request may be parked, while the engine runs others, for as long as half of
what computing its tokens would take, which is learnt from the engine's own steps.

The token at position p takes token_s * (1 + p / even): the weights, and the attention to p tokens before it. That is
2 N + 4 n_layer d p operations, with N = 12 n_layer d^2 parameters and d the model's width (Kaplan et al.,
arXiv:2001.08361, table 1, which has 2 n_layer d n_ctx as the mean over a causal mask): both are even at p = 6 d.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING, Any

from loracache.connectors.vllm.common.answer_times import AnswerTimes

if TYPE_CHECKING:
    from loracache.connectors.vllm.scheduler.requests import RequestState

__all__ = ["Patience", "StepTimes", "even_position"]

_GAIN_SHARE = 0.5
_TOKEN_S = 50e-6  # to compute a token, before any step was seen
_MANY_TOKENS = 64  # that make a step one of prefill
_STEP_WEIGHT = 1 / 4
_STEPS = 8  # planned and not done at most: more have been lost sight of


class StepTimes:
    """What computing a token takes, learnt from steps that compute many. Steps may be planned ahead of those before
    them being done. even: the position whose attention takes as long as the weights."""

    def __init__(self, even: float = inf) -> None:
        self.token_s = _TOKEN_S
        self.seen = False
        self._even = even
        self._planned: deque[tuple[float, int, float]] = deque()
        self._last_done = 0.0

    def seconds(self, first: int, end: int) -> float:
        """To compute a request's tokens from position `first` to `end`."""
        return self.token_s * (end - first) * (1 + (first + end) / 2 / self._even)

    def rate(self, token_bytes: float) -> int:
        """Bytes of KV computed a second, where a token has so many; 0 before any step was seen."""
        return int(token_bytes / self.token_s) if self.seen and self.token_s else 0

    def planned(self, now: float, tokens: int, positions: float = 0.0) -> None:
        """A step of `tokens` tokens begins, as soon as those before it are done. positions: the sum of theirs."""
        if len(self._planned) >= _STEPS:
            self._planned.clear()
        self._planned.append((now, tokens, tokens + positions / self._even))

    def done(self, now: float) -> None:
        """The oldest step that is not done is."""
        if not self._planned:
            return
        began, tokens, work = self._planned.popleft()
        if tokens >= _MANY_TOKENS:
            took = (now - max(began, self._last_done)) / work
            weight = _STEP_WEIGHT if self.seen else 1.0
            self.token_s += weight * (took - self.token_s)
            self.seen = True
        self._last_done = now


class Patience:
    """One engine's. least: seconds for which any request may be parked; most: for which one may be that has much to
    gain. even: as of StepTimes."""

    def __init__(self, least: float, most: float, even: float = inf) -> None:
        self.least = least
        self._most = max(least, most)
        self.answers = AnswerTimes()
        self.steps = StepTimes(even)

    def step_planned(self, now: float, scheduled: Mapping[str, int], requests: Mapping[str, RequestState]) -> None:
        """A step computes so many tokens, by request. Only one that is mostly of prompts says how fast those are."""
        self.answers.begin_step()
        prompts = {request_id: count for request_id, count in scheduled.items() if count > 1}
        tokens, positions = sum(scheduled.values()), 0.0
        if 2 * sum(prompts.values()) < tokens:
            tokens = 0
        for request_id, count in prompts.items():
            state = requests.get(request_id)
            if state is not None:
                positions += count * (state.request.num_computed_tokens + count / 2)
        self.steps.planned(now, tokens, positions)

    def gain(self, tokens: int) -> float:
        """Seconds that are saved where `tokens` tokens need not be computed."""
        return self.steps.seconds(0, max(0, tokens))

    def parked(self, tokens: int) -> float:
        """Seconds for which a request may be parked for an answer about `tokens` tokens."""
        return min(max(self.least, _GAIN_SHARE * self.gain(tokens)), self._most)

    def allowance(self, now: float, asked: float, tokens: int) -> float:
        """Seconds for which the loop may wait for it; 0 where that pays for nothing."""
        seconds = self.answers.allowance(now, asked)
        return seconds if self.gain(tokens) > seconds else 0.0


def even_position(config: Any) -> float:
    """Of an engine's model, as its width says; inf where nobody knows that."""
    return 6 * getattr(getattr(config.model_config, "hf_text_config", None), "hidden_size", 0) or inf
