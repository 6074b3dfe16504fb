# SPDX-License-Identifier: Apache-2.0
"""Our tiers in the terms of vLLM's hit metrics (0.31 on; before, vLLM does not ask)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["hits_by_source"]


def hits_by_source(tiers: Sequence[str], tokens: int) -> dict[Any, int]:
    """Tokens by vLLM's CacheHitSource. `tiers`: one name a loaded token run of equal length, e.g. a chunk's."""
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    names = {"cpu": CacheHitSource.HOST, "disk": CacheHitSource.DISK, "redis": CacheHitSource.EXTERNAL_UNSPECIFIED}
    split: dict[Any, int] = {}
    left = tokens
    for position, tier in enumerate(tiers):
        share = left // (len(tiers) - position)
        left -= share
        if share:
            split[names[tier]] = split.get(names[tier], 0) + share
    return split if not left else {CacheHitSource.EXTERNAL_UNSPECIFIED: tokens}
