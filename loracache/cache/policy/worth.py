# SPDX-License-Identifier: Apache-2.0
"""What an object is worth: the seconds that it takes to have it again when a tier no longer holds it.

KV is loaded from the tier below where that has it, or computed again, whichever is faster; an adapter is never computed
again: it comes from the tier below, or from where its files are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from loracache.cache.state.index import Node
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["Speeds"]


@dataclass(slots=True)
class Speeds:
    """Bytes a second, and seconds before the first byte. The defaults are a model of 8B parameters (128 KiB of KV a
    token, 8,000 tokens a second) beside a local NVMe disk; adapters come from files that have to be read and checked.
    All policies of a cache share one, in which what was measured takes the place of what was assumed. measured: the
    names of these.
    """

    prefill: float = 8_000 * 128 * 1024
    disk: float = 2e9
    disk_latency: float = 0.001
    origin: float = 0.5e9
    origin_latency: float = 0.05
    measured: set[str] = field(default_factory=set)

    def learn(self, **speeds: float) -> None:
        """Take what was measured, by the names above; 0: nothing was."""
        for name, value in speeds.items():
            if value > 0:
                setattr(self, name, value)
                self.measured.add(name)

    def seconds(self, node: Node, tier: Tier) -> float:
        """To have `node` again once it has left `tier`. A chunk waits for the disk with many others."""
        lower = tier is Tier.CPU and node.held_in(Tier.DISK)
        if node.kind is Kind.LORA:
            origin = self.from_origin(node.size)
            return min(self.from_disk(node.size), origin) if lower else origin
        return node.size / (max(self.disk, self.prefill) if lower else self.prefill)

    def by_size(self, node: Node, tier: Tier) -> float:
        """The same, by its bytes: seconds that a byte of it saves."""
        return self.seconds(node, tier) / max(node.size, 1)

    def from_disk(self, nbytes: int) -> float:
        """To read so many bytes from the disk tier."""
        return self.disk_latency + nbytes / self.disk

    def from_origin(self, nbytes: int) -> float:
        """To read so many bytes of an adapter from where its files are."""
        return self.origin_latency + nbytes / self.origin
