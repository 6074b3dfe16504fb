# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's side remembers of one request."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import Future
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import numpy as np

from loracache.connectors.vllm.common.wishes import Wishes
from loracache.keys import Media, Namespace, chunk_keys

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from loracache.connectors.vllm.common.messages import AdapterBinding

__all__ = ["RequestState", "Stage", "is_cacheable", "uses_draft_kv", "wants_reading"]


class Stage(Enum):
    """How far a request's KV has come in the engine."""

    WAITING = auto()
    """Nothing of it is in the engine's blocks, or all of it was and is gone: it was preempted."""
    LOADING = auto()
    """vLLM waits for its load. Preemption changes nothing about that."""
    LOADED = auto()
    """Its load is done, and it has not computed since."""
    RUNNING = auto()
    """It has computed."""


class RequestState:
    """One request from its arrival to its end.

    cacheable: its KV may be stored and loaded. reads: and is wanted to be loaded. chunk_keys: keys of its whole chunks,
    grown as tokens are confirmed. asked_at: when its question left (monotonic seconds). hits: tiers of its leading
    chunks, as last answered: a hit that the engine can go on behind. chain: how many the chain alone is held. beside:
    for each group beside the chain, each chunk's tier, "" where it is nowhere. blocks: the engine's blocks, in order,
    for each of its groups. kept: by chunk and group, blocks that are kept for the store of what is beside the chain.
    stored: chunks offered to the store so far; the next are offered after store_after (monotonic seconds).
    local_tokens: what the engine's own prefix cache held. content: which of its adapter's contents that is of
    (blocks.py). media: what its images and the like are (media.py). stage: how far it has come. wishes: what it asks
    for itself. told: leading chunks that the engine's KV events know of. weighed: it is settled how many of its hits
    are loaded. passed_over: chunks that were found and are computed, not counted yet. late: it was counted that no
    answer came in time. within_step: it is loaded within the step that computes it. sound_tokens: tokens whose KV was
    computed beside or upon nothing wrong; no more is stored.
    """

    __slots__ = (
        "adapter", "answered_at", "asked_at", "beside", "blocks", "cacheable", "chain", "chunk_keys", "content",
        "first_step", "has_stored", "hits", "kept", "late", "lease", "leased", "load_tiers", "local_tokens",
        "media", "namespace", "parked_since", "passed_over", "question", "reads", "request", "sound_tokens", "stage",
        "store_after", "stored", "told", "weighed", "wishes", "within_step",
    )  # fmt: skip

    def __init__(self, request: Request, *, cacheable: bool, reads: bool, wishes: Wishes) -> None:
        self.request = request
        self.cacheable = cacheable
        self.reads = reads and wishes.load
        self.wishes = wishes
        self.told = 0
        self.lease = os.urandom(16)
        self.leased = False
        self.namespace: Namespace | None = None
        self.adapter: AdapterBinding | None = None
        self.chunk_keys: list[bytes] = []
        self.question = 0
        self.answered_at: float | None = None
        self.asked_at = 0.0
        self.parked_since: float | None = None
        self.late = False
        self.hits: tuple[str, ...] = ()
        self.chain = 0
        self.beside: tuple[tuple[str, ...], ...] = ()
        self.blocks: list[list[int]] = []
        self.kept: dict[int, dict[int, tuple[Any, ...]]] = {}
        self.stored = 0
        self.store_after = 0.0
        self.has_stored = False
        self.first_step: int | None = None
        self.local_tokens = 0
        self.content = 0
        self.media: Future[tuple[Media, ...] | None] | None = None
        self.load_tiers: tuple[str, ...] = ()
        self.weighed = False
        self.passed_over = 0
        self.within_step = False
        self.sound_tokens = sys.maxsize
        self.stage = Stage.WAITING

    def extend_keys(self, chunk_tokens: int) -> None:
        """Add the keys of chunks that have become whole; none before its namespace is known."""
        if self.namespace is None:
            return
        start = len(self.chunk_keys) * chunk_tokens
        end = self.request.num_tokens // chunk_tokens * chunk_tokens
        if end <= start:
            return
        tokens = np.fromiter(self.request.all_token_ids[start:end], dtype="<i4", count=end - start)
        media = (self.media.result() if self.media is not None else None) or ()
        parent = self.chunk_keys[-1] if self.chunk_keys else self.namespace.digest()
        self.chunk_keys += chunk_keys(parent, tokens, chunk_tokens, start=start, media=media)

    def answer(self, tiers: tuple[str, ...]) -> None:
        """Take the answer to the request's question."""
        self.told = 0
        self.weighed = False
        self.passed_over = 0
        self.hits = tiers
        self.question = 0
        self.parked_since = None
        self.late = False
        self.answered_at = time.monotonic()

    def pass_over(self, hits: int) -> None:
        """Load no more than the leading `hits` chunks of those that were found; the rest is computed, and offered to
        the store like what was found nowhere."""
        self.passed_over += len(self.hits) - hits
        self.hits = self.hits[:hits]

    @property
    def lost_blocks(self) -> bool:
        """vLLM has taken its blocks, and nobody has said so."""
        return bool(self.blocks) and self.stage is not Stage.LOADING and self.request.status.name == "PREEMPTED"

    @property
    def is_fresh(self) -> bool:
        """Nothing of it was computed, loaded or promised to be."""
        return self.stage is Stage.WAITING and not (self.hits or self.stored)

    def begin_anew(self) -> None:
        """Its KV will be in another namespace than was thought."""
        self.namespace = None
        self.chunk_keys = []
        self.told = 0
        self.question = 0
        self.answered_at = None

    def offered(self, count: int) -> None:
        """The next `count` chunks beyond those that are held or were offered are planned to be stored."""
        self.stored = max(self.stored, len(self.hits)) + count
        self.has_stored = True

    def offer_again(self, after: float) -> None:
        """Chunks of it are not where they were thought to be: offer all of them, but not before `after` (monotonic)."""
        self.stored = 0
        self.store_after = after
        self.hits = ()
        self.beside = ()

    def preempted(self) -> None:
        """Its blocks are gone; it will be asked about, loaded (where that is not planned already) and computed anew."""
        self.stored = 0
        self.sound_tokens = sys.maxsize
        self.first_step = None
        if self.stage is Stage.LOADING:
            return
        self.stage = Stage.WAITING
        self.blocks = []
        self.question = 0
        self.answered_at = None
        self.late = False
        self.parked_since = None
        self.hits = ()
        self.beside = ()


def is_cacheable(request: Request) -> bool:
    """Requests whose KV is not a function of their token ids, or not a prefix of anything, stay out."""
    if getattr(request, "prompt_embeds", None) is not None or request.prompt_token_ids is None:
        return False
    return getattr(request, "pooling_params", None) is None and not getattr(request, "resumable", False)


def wants_reading(request: Request) -> bool:
    """Not where every token of the prompt must be computed, to know its logprobs."""
    params = request.sampling_params
    return not request.skip_reading_prefix_cache and (params is None or params.prompt_logprobs is None)


def uses_draft_kv(config: Any) -> bool:
    """EAGLE and MTP drafts write KV of their own that lags behind in the last block."""
    speculative = getattr(config, "speculative_config", None)
    return speculative is not None and bool(speculative.use_eagle())
