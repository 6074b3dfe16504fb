# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's side makes of changed weights and of vLLM's `reset_prefix_cache`.

A reset changes no weights, so the cache stays. But users reset after they changed them: the workers then look. It also
needs every block to be free, so those of finished requests that wait for their stores are freed here; before anything
may overwrite them, the workers finish those stores.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from loracache.connectors.vllm.common.connectors_of import connectors_of

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = ["HeldBlocks", "KnownWeights", "hook_scheduler_class"]

_MARK = "_loracache_hears_of_resets"


class KnownWeights:
    """Which weights the workers are believed to compute with, and whether vLLM's own prefix cache is of them."""

    def __init__(self) -> None:
        self.versions: dict[int, int] = {}  # of each worker that ever changed them, by rank
        self._changed_at = 0
        self._reset_at = 0

    def take_news(self, news: Mapping[int, tuple[int, int]]) -> bool:
        """Whether a worker has other weights than it was believed to."""
        versions = self.versions | {rank: version for rank, (version, _) in news.items()}
        if versions == self.versions:
            return False
        self.versions = versions
        self._changed_at = max([self._changed_at, *(step for _, step in news.values())])
        return True

    def prefix_cache_reset(self, step: int) -> None:
        """vLLM forgot all KV of its own after planning `step`."""
        self._reset_at = step

    @property
    def trust_local_prefix(self) -> bool:
        """Whether what vLLM's prefix cache holds was computed with today's weights: it was emptied since the last step
        that was computed with others.
        """
        return self._reset_at >= self._changed_at


class HeldBlocks:
    """Finished requests whose blocks wait for stores. freed: requests whose blocks are free before their stores are
    over."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}
        self.freed: set[str] = set()

    def hold(self, request: Request) -> None:
        """vLLM keeps its blocks until its stores are done."""
        self._requests[request.request_id] = request

    def stored(self, request_ids: Iterable[str]) -> None:
        """Their stores are done; vLLM frees what it still keeps."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)
            self.freed.discard(request_id)

    @property
    def pending(self) -> bool:
        """Whether blocks will be free soon."""
        return bool(self._requests)

    def free(self, manager: Any) -> None:
        """Free all of them now. manager: vLLM's KVCacheManager; that it frees them again later does nothing."""
        for request_id, request in self._requests.items():
            manager.free(request)
            self.freed.add(request_id)
        self._requests.clear()

    def take_freed(self) -> set[str]:
        """Requests whose stores must be over before a block is written."""
        freed, self.freed = self.freed, set()
        return freed


def hook_scheduler_class() -> None:
    """Let our connectors hear of every reset of vLLM's prefix cache, with `reset_connector` or without."""
    from vllm.v1.core.sched.scheduler import Scheduler

    original = getattr(Scheduler, "reset_prefix_cache", None)
    if original is None or _MARK in vars(Scheduler):
        return

    @functools.wraps(original)
    def reset_prefix_cache(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        manager = getattr(scheduler, "kv_cache_manager", None)
        connectors = connectors_of(scheduler)
        for one in connectors:
            before = getattr(one, "before_prefix_cache_reset", None)
            if before is not None:
                # Inside a MultiConnector others may be reading the same blocks: they stay.
                before(manager if one is connectors[0] else None)
        done = original(scheduler, *args, **kwargs)
        for one in connectors:
            after = getattr(one, "after_prefix_cache_reset", None)
            if after is not None and done:
                after()
        return done

    setattr(Scheduler, "reset_prefix_cache", reset_prefix_cache)  # noqa: B010
    setattr(Scheduler, _MARK, True)
