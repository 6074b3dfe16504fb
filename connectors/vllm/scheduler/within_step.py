# SPDX-License-Identifier: Apache-2.0
"""Loads within the step that computes upon them (`layer_by_layer`): which ones there are, and what becomes of all that
such a step computes.

vLLM takes the blocks of such a load, and what is computed upon them, into its prefix cache when it plans the step,
before a byte is there. They are taken out of it again at once, so that nobody else can find them, and vLLM puts them
back itself when it plans the next step. By then it is known how this one went: each worker has said of each such load
whether it came whole. Where one did not, vLLM takes the request back to before the first wrong block (its token is not
given out), and of what the step computed, for whomever, nothing is stored, and nothing is left in the prefix cache.
Whoever is not heard of has failed.

So it needs an engine that plans no step before the last one's result is there (common/synchronous.py). Threading: the
scheduler's loop.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from loracache.backoff import Backoff

if TYPE_CHECKING:
    from loracache.connectors.vllm.common.messages import Load, StepPlan
    from loracache.connectors.vllm.common.stats import Tally
    from loracache.connectors.vllm.scheduler.chunks import Chunks
    from loracache.connectors.vllm.scheduler.load_or_compute import LoadTimes
    from loracache.connectors.vllm.scheduler.requests import RequestState

__all__ = ["PrefixCache", "StepResult", "WithinStep"]

_ARENA_SHARE = 4  # of the arena is what the loads of a step hold at most, all at a time
_MOST_CHUNKS = 4096
_STEPS = 9  # whose length is remembered
_STEP_S = 0.01  # of a step, before any was seen,
_BANDWIDTH = 5e9  # and bytes a second of a load, before some were
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 600.0  # after a load that failed: it held up a whole step for nothing
_NEVER = 1 << 40  # blocks that vLLM believes to have in its prefix cache already


class PrefixCache:
    """vLLM's, of an engine with one KV cache group. manager: its KVCacheManager. Raises AttributeError where that is
    not as we know it."""

    def __init__(self, manager: Any) -> None:
        self._on = bool(manager.enable_caching)
        self._evict = manager.evict_blocks
        self._counts: dict[str, int] = manager.coordinator.single_type_managers[0].num_cached_block

    def take_out(self, blocks: Collection[int]) -> None:
        """Nobody finds these blocks any more."""
        if self._on:
            self._evict(set(blocks))

    def put_back_from(self, request_id: str, block: int) -> None:
        """When vLLM plans the next step of a request it puts in those from its `block`th on, as far as they are
        computed by then."""
        if self._on and request_id in self._counts:
            self._counts[request_id] = block

    def put_in_no_more(self, request_id: str) -> None:
        """Nothing of a request is put in any more, unless it is preempted and computed anew."""
        self.put_back_from(request_id, _NEVER)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step whose result is to come. starts, tables: of all its requests the token with which it begins, and their
    blocks. loads: requests that load within it."""

    number: int
    starts: Mapping[str, int]
    tables: Mapping[str, Sequence[int]]
    loads: Sequence[str]


@dataclass(frozen=True, slots=True)
class StepResult:
    """loads: requests whose load within a step is over. spoilt: requests of which nothing that the step computed may be
    kept."""

    loads: Sequence[str]
    spoilt: frozenset[str] = frozenset()


class WithinStep:
    """Of one engine. prefix_cache: set where there are such loads."""

    def __init__(self, times: LoadTimes, tally: Tally) -> None:
        self.prefix_cache: PrefixCache | None = None
        self._times = times
        self._tally = tally
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._began = 0.0
        self._planned = 0  # bytes that the next step's loads hold
        self._open: _Step | None = None
        self._came: Counter[int] = Counter()  # workers, by step
        self._pauses = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._not_before = 0.0

    # -- planning ----------

    def tokens(self, state: RequestState, chunks: Chunks, tokens: int, arena_bytes: int) -> int:
        """How many of the `tokens` that can be loaded behind a request's local ones are loaded within the step that
        computes it: whole blocks, and not its last token. 0: the load is one of its own, ahead of the step."""
        state.within_step = False
        first, block = state.local_tokens, chunks.block_tokens
        tokens = min(tokens, int(state.request.num_tokens) - 1 - first) // block * block
        if self.prefix_cache is None or tokens <= 0 or state.request.mm_features or not _is_plain(chunks):
            return 0
        tiers = state.hits[first // chunks.tokens : -(-(first + tokens) // chunks.tokens)]
        nbytes = len(tiers) * chunks.nbytes
        in_memory = all(tier == "cpu" for tier in tiers) and len(tiers) <= _MOST_CHUNKS
        fits = self._planned + nbytes <= arena_bytes // _ARENA_SHARE
        if not (in_memory and fits) or time.monotonic() < self._not_before or not self._pays(nbytes):
            return 0
        state.within_step = True
        return tokens

    def planned(self, state: RequestState, chunks: Chunks, load: Load) -> Load:
        """vLLM has made room for a load within the next step, and has its blocks in its prefix cache. Answers it."""
        assert self.prefix_cache is not None
        self._planned += len(load.chunks) * chunks.nbytes
        self._tally.add("loads_by_layer")
        local = state.local_tokens // chunks.block_tokens
        self.prefix_cache.take_out(state.blocks[0][local:])
        self.prefix_cache.put_back_from(state.request.request_id, local)
        return replace(load, within_step=True)

    def begin_step(self, plan: StepPlan, scheduled: Collection[str], states: Mapping[str, RequestState]) -> None:
        """A step is planned, of these requests."""
        self._began = time.monotonic() if scheduled else 0.0
        self._planned = 0
        within = [load.request_id for load in plan.loads if load.within_step]
        if not within:
            return
        known = {request_id: states[request_id] for request_id in scheduled if request_id in states}
        self._open = _Step(
            plan.step,
            {request_id: int(state.request.num_computed_tokens) for request_id, state in known.items()},
            {request_id: tuple(state.blocks[0]) for request_id, state in known.items() if state.blocks},
            within,
        )

    # -- what came of it ----------

    def take_news(self, came: Mapping[int, int]) -> None:
        """On so many workers all loads within these steps came whole."""
        self._came.update(came)

    def end_step(self, states: Mapping[str, RequestState], chunks: Chunks | None, workers: int) -> StepResult | None:
        """A step's result is there, or none will come. None where it loaded nothing."""
        if self._began:
            self._steps.append(time.monotonic() - self._began)
            self._began = 0.0
        step, self._open = self._open, None
        if step is None or chunks is None:
            return None
        came, self._came = self._came, Counter()
        if came[step.number] >= workers:
            self._pauses.reset()
            return StepResult(step.loads)
        self._not_before = time.monotonic() + self._pauses.next()
        self._spoil(step, states, chunks.block_tokens)
        return StepResult(step.loads, frozenset(step.starts))

    def _spoil(self, step: _Step, states: Mapping[str, RequestState], block_tokens: int) -> None:
        """What a failed step computed leaves the prefix cache and is not stored, nor by others that found it there when
        the step was planned. Of a request that vLLM has not taken back no more enters that cache."""
        assert self.prefix_cache is not None
        computed = {
            block
            for request_id, start in step.starts.items()
            for block in step.tables.get(request_id, ())[start // block_tokens :]
        }
        self.prefix_cache.take_out(computed)
        for request_id, start in step.starts.items():
            state, table = states.get(request_id), step.tables.get(request_id, ())
            if state is not None and int(state.request.num_computed_tokens) > start:
                sound = next((at for at, block in enumerate(table) if block in computed), 0)
                state.sound_tokens = min(state.sound_tokens, sound * block_tokens)
                self.prefix_cache.put_in_no_more(request_id)

    def _pays(self, nbytes: int) -> bool:
        """A load shorter than a step is hidden behind one of others, and holds up nobody."""
        seconds = self._times.seconds({"cpu": nbytes}) or nbytes / _BANDWIDTH
        return seconds > (median(self._steps) if self._steps else _STEP_S)


def _is_plain(chunks: Chunks) -> bool:
    """Whether vLLM can tell whose a block is, and no draft writes into what was loaded."""
    chain = chunks.chain
    if chain is None or chunks.beside or chunks.drops_last_block:
        return False
    return not chain.group.name and len(chain.group.members) == 1
