"""The disk tier's side of the cache: its budget, who may enter, who leaves, and what an earlier run left behind.

Rules: bytes on disk never exceed the limit, those being written included; a child enters with or after its parent, and
never stays where the parent is missing when it lands. Threading: the cache's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence

from loracache.arena import Arena
from loracache.counters import Counters
from loracache.index import Index, Node
from loracache.policy import Policy
from loracache.storage_backends.base import Kind, ObjectInfo, Outcome
from loracache.tier_io import TierIO
from loracache.tiers import Tier
from loracache.write_behind import WriteBehind

__all__ = ["DiskTier"]


class DiskTier:
    """What enters and leaves the disk. `policy` chooses its victims, `limit` is in bytes; `written` is told how each
    write ended.
    """

    def __init__(
        self,
        io: TierIO,
        arena: Arena,
        index: Index,
        counters: Counters,
        policy: Policy,
        limit: int,
        written: Callable[[Node, Outcome], None],
    ) -> None:
        self.io = io
        self.limit = limit
        self.used = 0
        self.loaded = False
        self.writer = WriteBehind(io, arena, index, counters, self._refuse, self._written)
        self._index = index
        self._counters = counters
        self._policy = policy
        self._on_written = written

    def cost(self, node: Node) -> int:
        """Bytes of the budget that a node takes."""
        return self.io.backend.footprint(node.size)

    def queue_write(self, node: Node) -> None:
        """Queue an object of the arena, and before it those ancestors that the disk lacks but the arena has."""
        missing = []
        above: Node | None = node
        while above is not None and above.held_in(Tier.CPU) and not self._on_disk_or_coming(above):
            missing.append(above)
            above = above.parent
        for ancestor in reversed(missing):
            self.writer.enqueue(ancestor)

    def evict(self, node: Node) -> None:
        """Remove an object."""
        self._counters.add("evict.disk")
        self.io.delete([node.key])
        self._leave(node)

    def load_failed(self, node: Node, outcome: Outcome) -> None:
        """What is gone or corrupt leaves the tier. Its children stay, to be reached again once the object was computed
        and stored anew."""
        if node.held_in(Tier.DISK) and outcome in (Outcome.MISS, Outcome.CORRUPT):
            self._leave(node)

    def adopt(self, infos: Iterable[ObjectInfo]) -> list[ObjectInfo]:
        """Enter objects of an earlier run; answers those whose parent is not known yet."""
        waiting = []
        for info in infos:
            node = self._index.insert(info)
            if node is None:
                waiting.append(info)
            elif not node.held_in(Tier.DISK):
                self._index.enter(node, Tier.DISK)
                self.used += self.cost(node)
        return waiting

    def adopted_all(self, orphans: Sequence[ObjectInfo]) -> None:
        """The earlier run's objects are entered, but for `orphans`, whose parent is nowhere: delete those, and shrink
        to the limit.
        """
        self._counters.add("disk.orphans", len(orphans))
        if orphans:
            self.io.delete([info.key for info in orphans])
        self._make_room(0, ())
        self.loaded = True

    def _refuse(self, node: Node) -> str | None:
        if node.held_in(Tier.DISK):
            return "exists"
        parent = node.parent
        if parent is not None and parent.kind is not Kind.LORA and not self._on_disk_or_coming(parent):
            return "no_parent"
        cost = self.cost(node)
        if not self._make_room(cost, () if parent is None else {parent}):
            return "full"
        self.used += cost
        return None

    def _written(self, node: Node, outcome: Outcome) -> None:
        self.used -= self.cost(node)
        self._on_written(node, outcome)
        if outcome is not Outcome.OK or node.held_in(Tier.DISK):
            return
        parent = node.parent
        if parent is not None and parent.kind is not Kind.LORA and not parent.held_in(Tier.DISK):
            self.io.delete([node.key])
            self._counters.add("write.disk.dropped.no_parent")
            return
        self._index.enter(node, Tier.DISK)
        self.used += self.cost(node)

    def _on_disk_or_coming(self, node: Node) -> bool:
        return node.held_in(Tier.DISK) or self.writer.writing(node)

    def _make_room(self, nbytes: int, protected: Container[Node]) -> bool:
        excess = self.used + nbytes - self.limit
        if excess <= 0:
            return True
        if nbytes > self.limit:  # without asking every object on disk whether it would go for this one
            return False
        victims = self._policy.victims(excess, protected)
        if victims is None:
            return False
        for node in victims:
            self.evict(node)
        return True

    def _leave(self, node: Node) -> None:
        self.used -= self.cost(node)
        self._index.leave(node, Tier.DISK)
