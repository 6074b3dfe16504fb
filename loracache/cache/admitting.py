# SPDX-License-Identifier: Apache-2.0
"""What of the arena is written to the lower tiers: what admission says, and what somebody asks for whatever it says.

No child without its parents: whoever is written takes along those of its ancestors that the tier lacks, and one whose
parent does not get there after all (given up, refused, failed) is not kept either. Of Redis, which evicts on its own,
this daemon knows only what it wrote or found there: `Node.sent`. Threading: the cache's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from loracache.cache.policy import Admission
from loracache.cache.policy.benefit import Benefit
from loracache.cache.state.counters import Counters
from loracache.cache.state.index import Node
from loracache.cache.tier.disk import DiskTier
from loracache.cache.tier.write_behind import WriteBehind
from loracache.results import Cause, Refusal
from loracache.storage_backends.base import Kind, Outcome
from loracache.tiers import Tier

__all__ = ["Admitter"]


class Admitter:
    """Queues writes. moves(key): whether an operation moves that object now, so that a use of it is none. `disk` and
    `redis` are given once they are there."""

    def __init__(self, admission: Admission, benefit: Benefit, counters: Counters, moves: Callable[[bytes], bool]):
        self._admission = admission
        self._benefit = benefit
        self._counters = counters
        self._moves = moves
        self.disk: DiskTier | None = None
        self.redis: WriteBehind | None = None
        self._alone: set[Node] = set()  # queued for Redis because somebody named them, parents or not

    def committed(self, node: Node, promised: bool) -> None:
        """An object has come into the arena from its writer."""
        node.sent = False  # these are other bytes than what Redis may have
        refusal = Refusal.NONE if promised else self._admission.came(node)
        if refusal:
            self._refused(Tier.DISK, refusal)
            self._refused(Tier.REDIS, refusal)
        else:
            self._write(node, promised=promised)

    def used(self, node: Node) -> bool:
        """An object of the arena is read; answers whether a write was queued."""
        if not self._admission.again(node) or node.dirty or self._moves(node.key) or not self._lacked(node):
            return False
        self._write(node, promised=False)
        return True

    def promise(self, node: Node) -> None:
        """Write what is in the arena to the first tier below: its writer wants to be sure of it."""
        if self.disk is not None:
            self.disk.queue_write(node, promised=True)
        elif self.redis is not None:
            self.to_redis(node, promised=True)

    def to_redis(self, node: Node, *, promised: bool = False) -> None:
        """Queue an object of the arena for Redis, and before it those ancestors that Redis lacks but the arena has."""
        if self.redis is None:
            return
        missing = [node]
        above = node.parent
        while above is not None and above.held_in(Tier.CPU) and not _in_redis_or_coming(above):
            missing.append(above)
            above = above.parent
        for each in reversed(missing):
            self.redis.enqueue(each, promised=promised)

    def to_redis_alone(self, node: Node) -> None:
        """Queue just this one, because somebody named it."""
        if self.redis is not None and not node.dirty >> Tier.REDIS & 1:
            self._alone.add(node)
            self.redis.enqueue(node)

    def refuse_in_redis(self, node: Node) -> Generator[None, None, Cause]:
        """What Redis refuses: a child without its parent. It makes room itself."""
        return Cause.NO_PARENT if self._orphan(node) else Cause.NONE
        yield

    def written_to_redis(self, node: Node, outcome: Outcome) -> bool:
        """The writing ended; whether Redis keeps the object."""
        orphan = self._orphan(node)
        self._alone.discard(node)
        if outcome is not Outcome.OK:
            return False
        if orphan and self.redis is not None:  # its parent failed on the way
            self.redis.io.delete([node.key])
            self._counters.add(f"write.{Tier.REDIS.label}.dropped.{Cause.NO_PARENT}")
            return False
        node.sent = True
        return True

    def _orphan(self, node: Node) -> bool:
        parent = node.parent
        if parent is None or parent.kind is Kind.LORA or node in self._alone:
            return False
        return not _in_redis_or_coming(parent)

    def _lacked(self, node: Node) -> bool:
        """Whether some lower tier does not have it, and takes anything now."""
        if self.disk is not None and not node.held_in(Tier.DISK) and self.disk.io.writable:
            return True
        return self.redis is not None and not node.sent and self.redis.io.writable

    def _write(self, node: Node, *, promised: bool) -> None:
        """To every tier that lacks it and is worth it: an adapter always, for nothing computes one again."""
        always = promised or node.kind is Kind.LORA
        if self.disk is not None:
            if always or self._benefit.worth(Tier.DISK):
                self.disk.queue_write(node, promised=promised)
            else:
                self._refused(Tier.DISK, Refusal.BELOW_BENEFIT)
        if self.redis is not None and not node.sent:
            if always or self._benefit.worth(Tier.REDIS):
                self.to_redis(node, promised=promised)
            else:
                self._refused(Tier.REDIS, Refusal.BELOW_BENEFIT)

    def _refused(self, tier: Tier, why: Refusal) -> None:
        if (self.disk if tier is Tier.DISK else self.redis) is not None:
            self._counters.add(f"not_admitted.{tier.label}.{why}")


def _in_redis_or_coming(node: Node) -> bool:
    return node.sent or bool(node.dirty >> Tier.REDIS & 1)
