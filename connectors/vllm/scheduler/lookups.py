# SPDX-License-Identifier: Apache-2.0
"""The question that each request asks the daemon: sent early, answered late, waited for as long as that pays, and the
lease on what it found. Threading: the scheduler's loop.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from loracache.connectors.vllm.common.stats import Tally
from loracache.connectors.vllm.link.parted_lookup import Found
from loracache.connectors.vllm.link.scheduler import SchedulerLink
from loracache.connectors.vllm.scheduler.patience import Patience

if TYPE_CHECKING:
    from loracache.connectors.vllm.scheduler.adapters import ServedAdapters
    from loracache.connectors.vllm.scheduler.chunks import Chunks
    from loracache.connectors.vllm.scheduler.load_or_compute import LoadChoice
    from loracache.connectors.vllm.scheduler.namespace import EngineNamespace
    from loracache.connectors.vllm.scheduler.requests import RequestState
    from loracache.connectors.vllm.scheduler.tier_events import TierEvents

__all__ = ["LEASE_TTL_S", "Lookups"]

LEASE_TTL_S = 30.0
_STALE_S = 10.0  # an answer older than this is asked for again


class Lookups:
    """Questions of one engine's requests. chunks: set once the workers' facts are known."""

    def __init__(
        self,
        link: SchedulerLink,
        namespace: EngineNamespace,
        adapters: ServedAdapters,
        patience: Patience,
        choice: LoadChoice,
        tally: Tally,
        events: TierEvents,
    ) -> None:
        self._events = events
        self._link = link
        self._tally = tally
        self._namespace = namespace
        self._adapters = adapters
        self._patience = patience
        self._choice = choice
        self.chunks: Chunks | None = None

    def advance(self, state: RequestState) -> bool:
        """Take the request's question one step further; True once its answer is there."""
        if self.chunks is None or not state.cacheable:
            return False
        self._link.begin()  # while its media are hashed: a daemon that is not there is not waited for
        if not self._namespace.settle(state):
            return False
        if state.answered_at is not None and time.monotonic() - state.answered_at > _STALE_S:
            state.answered_at = None
        state.extend_keys(self.chunks.tokens)
        if state.answered_at is not None:
            return True
        if not state.reads:
            return False
        if not state.question:
            if not state.chunk_keys:
                state.answer(())
                return True
            state.question = self._ask(state, self.chunks)
            state.leased = bool(state.question)
            if not state.question:
                return False
            state.asked_at = time.monotonic()
            self._tally.add("lookups")
        found = self._link.answer_lookup(state.question)
        if found is None:
            return False
        self._take(state, found)
        return True

    def comes(self, state: RequestState) -> bool:
        """Wait a moment for the answer to a question that was just sent; True where it is there then."""
        if self.chunks is None or not state.question or not self._link.answering():
            return False
        now = time.monotonic()
        seconds = self._patience.allowance(now, state.asked_at, self._at_stake(state))
        if not seconds:
            return False
        found = self._link.wait_lookup(state.question, seconds)
        after = time.monotonic()
        self._tally.add("loop_wait_seconds", after - now)
        if found is None:
            self._patience.answers.missed(after, after - now)
            return False
        self._patience.answers.answered(after - state.asked_at, after - now)
        self._take(state, found)
        return True

    def parked(self, state: RequestState) -> bool:
        """Whether a request without an answer is to be asked about again in a moment; else it goes without."""
        now = time.monotonic()
        state.parked_since = state.parked_since or now
        patience = self._patience.parked(self._at_stake(state)) if self._awaits(state) else self._patience.least
        if self._link.answering() and now - state.parked_since < patience:
            return True
        if not state.late:  # vLLM asks in every step while it has no room for the request
            state.late = True
            self._link.count("lookup.late" if self._link.answering() else "lookup.unavailable", 1)
            self._tally.add("lookups_late")
        return False

    def weigh(self, state: RequestState) -> None:
        """Leave out, once, what is computed sooner than it is loaded: it is neither loaded nor held."""
        assert self.chunks is not None
        if state.weighed:
            return
        state.weighed = True
        chunks, found = self.chunks, state.hits
        if chunks.chain is not None:
            local = state.local_tokens // chunks.tokens
            worth = self._choice.leading(found, local, chunks.tokens, chunks.chain.nbytes)
            state.pass_over(chunks.resumable(state, worth))
        if chunks.beside or "cpu" in found[len(state.hits) :]:
            # What is not in memory is not held anyway; a lease ends as a whole.
            self.drop_lease(state)
            held = chunks.hit_keys(state, "cpu")
            if held:
                self._link.prefetch(state.lease, held, LEASE_TTL_S)
                state.leased = True

    def mark_junction(self, state: RequestState) -> None:
        """Have vLLM end a step where a request's prompt leaves what others have in common with it, so that its state
        there can be stored. vLLM forgets it whenever it looks into its own prefix cache, before it asks us."""
        assert self.chunks is not None
        junction, request = self.chunks.junction(state), state.request
        if junction > getattr(request, "shared_prefix_boundary", junction):
            request.shared_prefix_boundary = junction

    def drop_lease(self, state: RequestState) -> None:
        """End the hold on what was found."""
        if state.leased:
            state.leased = False
            self._link.release(state.lease)

    def forget(self, state: RequestState) -> None:
        """End it, and want no answer any more."""
        self.drop_lease(state)
        self._link.forget(state.question)

    def _ask(self, state: RequestState, chunks: Chunks) -> int:
        keys, beside = chunks.chain_keys(state.chunk_keys), chunks.beside_keys(state.chunk_keys)
        group = len(chunks.chain.shards) if chunks.chain is not None else 1
        return self._link.ask_lookup(state.lease, keys, group, LEASE_TTL_S, beside)

    def _take(self, state: RequestState, found: Found) -> None:
        assert self.chunks is not None
        if state.parked_since is not None:
            self._tally.add("parked_seconds", time.monotonic() - state.parked_since)
        self.chunks.found(state, *found)
        self._events.learn(state, self.chunks)

    def _awaits(self, state: RequestState) -> bool:
        """Whether an answer is on its way: to its question, or to what the content of its adapter or media is."""
        if state.question or (state.media is not None and not state.media.done()):
            return True
        adapter = state.request.lora_request
        return adapter is not None and self._adapters.asked(adapter.lora_int_id)

    def _at_stake(self, state: RequestState) -> int:
        """Tokens that need not be computed if all of a request's whole chunks are held."""
        assert self.chunks is not None
        return int(state.request.num_tokens) // self.chunks.tokens * self.chunks.tokens - state.local_tokens
