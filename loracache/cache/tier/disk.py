# SPDX-License-Identifier: Apache-2.0
"""The disk tier's side of the cache: its budget, who may enter, who leaves, and what an earlier run left behind.

Rules: bytes on disk never exceed the limit, those being written included; a child enters with or after its parent, and
never stays where the parent is missing when it lands. Threading: the cache's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence

from loracache.cache.policy import Policy
from loracache.cache.policy.limits import Quotas
from loracache.cache.state.arena import Arena
from loracache.cache.state.counters import Counters
from loracache.cache.state.index import Index, Node
from loracache.cache.state.slices import Slices
from loracache.cache.tier.flushes import Flushes
from loracache.cache.tier.io import TierIO
from loracache.cache.tier.write_behind import WriteBehind
from loracache.results import Cause, Departure
from loracache.storage_backends.base import Kind, ObjectInfo, Outcome, Result, Transfer, padded
from loracache.tiers import Tier

__all__ = ["DiskTier"]

_log = logging.getLogger(__name__)
_DELETE_AGAIN_S = 5.0
_EVICTED = 64  # objects evicted between two looks at the socket
_ASKED = (Departure.ASKED, Departure.MOVED, "replaced")  # causes of leaving that nobody has to be told of


class DiskTier:
    """What enters and leaves the disk. Its policy of `policies` chooses its victims, `limit` is in bytes; `written` is
    told how each write ended.
    """

    def __init__(
        self,
        io: TierIO,
        arena: Arena,
        index: Index,
        counters: Counters,
        slices: Slices,
        flushes: Flushes,
        policies: Mapping[Tier, Policy],
        quotas: Quotas,
        limit: int,
        written: Callable[[Node, Outcome], bool],
    ) -> None:
        self.io = io
        self.limit = limit
        self.used = 0
        self.loaded = False
        self.writer = WriteBehind(
            io, arena, index, counters, slices, flushes, self._refuse, self._written, started=False
        )
        self._arena = arena
        self._index = index
        self._counters = counters
        self._slices = slices
        self._flushes = flushes
        self._policies = policies
        self._quotas = quotas
        self._settle: dict[Node, Callable[[], None]] = {}  # of what is being written
        self._on_written = written
        self._unreadable: set[Node] = set()
        self._undeleted: dict[bytes, int] = {}  # key -> bytes it still takes
        self.left_alone: dict[bytes, int] = {}  # the same, of what another version or integrity_key wrote
        self.left_alone_bytes = 0
        self._replacing: dict[bytes, int] = {}  # of those, what is being written anew
        self._rewriting = 0  # bytes of room for what is being kept in another way
        self.rewritten = 0  # objects that were, in all
        self._next_deletion = 0.0

    def cost(self, node: Node) -> int:
        """Bytes of the budget that a node takes."""
        return self.io.backend.footprint(node.stored or node.size)

    def used_beside(self) -> tuple[int, int]:
        """Bytes of the budget in use beside what the objects here cost: at least, and at most. What is on its way here
        may count already."""
        sure = sum(self._undeleted.values()) + self.left_alone_bytes + sum(self._replacing.values()) + self._rewriting
        return sure, sure + self.writer.cost_in_flight(self.cost)

    def queue_write(self, node: Node, *, promised: bool = False) -> None:
        """Queue an object of the arena, and before it those ancestors that the disk lacks but the arena has. promised:
        as of WriteBehind."""
        missing = []
        above: Node | None = node
        while above is not None and above.held_in(Tier.CPU) and not self._is_coming(above, promised):
            missing.append(above)
            above = above.parent
        for ancestor in reversed(missing):
            self.writer.enqueue(ancestor, promised=promised)

    def reads(self, node: Node) -> bool:
        """Whether to try to read the object from here now."""
        return node.held_in(Tier.DISK) and self.io.available

    def keeps(self, node: Node) -> bool:
        """Whether the object is safe here, so that it need not be stored anew: it can be read as far as we know."""
        return self.reads(node) and node not in self._unreadable

    def evict(self, nodes: Iterable[Node], cause: str) -> None:
        """Remove objects, children before parents."""
        self._evict((node, cause) for node in nodes)

    def _evict(self, nodes: Iterable[tuple[Node, str]]) -> None:
        going = {}
        for node, cause in nodes:
            going[node.key] = self.cost(node)
            self._leave(node, cause)
            self._counters.add(f"evict.disk.{cause}")
        self._delete(going)

    def load_ended(self, node: Node, outcome: Outcome) -> None:
        """What is gone or corrupt leaves the tier. Its children stay, to be reached again once the object was computed
        and stored anew. What could not be read stays too, but is taken anew when it is offered."""
        self._unreadable.discard(node)
        if not node.held_in(Tier.DISK):
            return
        if outcome in (Outcome.MISS, Outcome.CORRUPT):
            self._leave(node, outcome.value)
        elif outcome is Outcome.UNPROVEN:
            cost = self.cost(node)
            self._leave(node, outcome.value)
            self._leave_alone({node.key: cost})
        elif outcome is Outcome.FAILED:
            self._unreadable.add(node)

    def give_up(self, node: Node) -> None:
        """Remove an object that could not be read, because it was computed anew; its children stay."""
        if node.held_in(Tier.DISK):
            cost = self.cost(node)
            self._leave(node, "replaced")
            self._delete({node.key: cost})

    def tick(self) -> None:
        """Try again to delete what could not be deleted."""
        now = time.monotonic()
        if self._undeleted and self.io.available and now >= self._next_deletion:
            self._next_deletion = now + _DELETE_AGAIN_S
            going = {key: cost for key, cost in self._undeleted.items() if not self._wanted(key)}
            for key in going:
                self._no_longer_undeleted(key)
            self._delete(going)

    def drop_left_alone(self, nbytes: int | None = None) -> tuple[int, int]:
        """Delete what another version or integrity_key left: all, or as much as `nbytes` need. (objects, bytes)"""
        going: dict[bytes, int] = {}
        freed = 0
        while self.left_alone and (nbytes is None or freed < nbytes):
            key, cost = self.left_alone.popitem()
            going[key] = cost
            freed += cost
        self.used -= freed
        self.left_alone_bytes -= freed
        self._counters.add("evict.disk.left_alone", len(going))
        self._delete(going)
        return len(going), freed

    def rewrite(self, items: Sequence[tuple[Node, int]], done: Callable[[list[tuple[Node, Result]]], None]) -> None:
        """Keep objects, which are in the arena and here, in another way: (node, its planes). While the new is written
        the old one still stands, so there must be room for both; what has none answers FULL. `done` is told how each
        went.
        """
        self._slices.run(self._rewrite(items, done))

    def _rewrite(
        self, items: Sequence[tuple[Node, int]], done: Callable[[list[tuple[Node, Result]]], None]
    ) -> Iterator[None]:
        going: list[Node] = []
        transfers: list[Transfer] = []
        results: list[tuple[Node, Result]] = []
        protected = {node for node, _ in items}
        for node, planes in items:
            room = self.io.backend.footprint(node.size)
            enough = node.held_in(Tier.DISK) and (yield from self._make_room(room, protected, node))
            if not node.held_in(Tier.DISK):
                results.append((node, Result(Outcome.MISS)))
            elif not enough:
                results.append((node, Result(Outcome.FULL)))
            else:
                self.used += room
                self._rewriting += room
                going.append(node)
                buffers = self._arena.buffers(node.extents, padded(node.size))
                transfers.append(Transfer(node.info(), buffers, planes))

        def stored(kept: list[Result]) -> None:
            for node, result in zip(going, kept, strict=True):
                room = self.io.backend.footprint(node.size)
                self.used -= room
                self._rewriting -= room
                if result.outcome is Outcome.OK and not node.held_in(Tier.DISK):  # a deletion is queued behind us
                    result = Result(Outcome.MISS)
                elif result.outcome is Outcome.OK:
                    before = self.cost(node)
                    node.stored = result.stored
                    self.rewritten += 1
                    self.used += self.cost(node) - before
                    self._index.resize(node, Tier.DISK, self.cost(node) - before)
                results.append((node, result))
            done(results)

        if transfers:
            self.io.store(transfers, stored)
        else:
            done(results)

    def adopt(self, infos: Iterable[ObjectInfo]) -> list[ObjectInfo]:
        """Enter objects of an earlier run; answers those whose parent is not known yet."""
        waiting = []
        for info in infos:
            node = self._index.insert(info)
            if node is None:
                waiting.append(info)
            elif not node.held_in(Tier.DISK):
                if self.writer.forget(node, Cause.EXISTS):
                    node.written = self._flushes.wrote(Tier.DISK)
                node.stored = info.stored
                node.sent = True  # what the disk got, an earlier run's Redis got too
                self._index.enter(node, Tier.DISK, "found")
                self.used += self.cost(node)
        return waiting

    def adopted_all(self, orphans: Sequence[ObjectInfo], left_alone: Mapping[bytes, int] | None = None) -> None:
        """The earlier run's objects are entered, but for `orphans`, whose parent is nowhere: delete those, and shrink
        to the limit. Only now are objects written: before, nobody knows how much room there is.

        left_alone: what the backend found and does not serve, key -> bytes. It stays until there is no room, and with
        it what depends on it.
        """
        self._leave_alone(left_alone or {})
        orphans = self._without_dependants(orphans)
        self._counters.add("disk.orphans", len(orphans))
        self._delete({info.key: self.io.backend.footprint(info.stored or info.size) for info in orphans})
        self._slices.run(self._open())

    def _open(self) -> Iterator[None]:
        yield from self._make_room(0, (), None)
        self.loaded = True
        self.writer.start()

    def _refuse(self, node: Node) -> Generator[None, None, Cause]:
        parent = node.parent
        if parent is not None and parent.kind is not Kind.LORA and not _on_disk_or_coming(parent):
            return Cause.NO_PARENT
        cost = self.cost(node)
        if self._quotas.refuses(Tier.DISK, node, cost):
            return Cause.OVER_QUOTA
        replaced = self.left_alone.pop(node.key, 0)  # its file takes that one's place, which nobody is to delete
        self.left_alone_bytes -= replaced
        if not (yield from self._make_room(cost, () if parent is None else {parent}, node)):
            self._take_back(node.key, replaced)
            return Cause.FULL
        self.used += cost
        self._settle[node] = self._quotas.charge(Tier.DISK, node, cost)
        if replaced:
            self._replacing[node.key] = replaced
        return Cause.NONE

    def _take_back(self, key: bytes, cost: int) -> None:
        if cost:
            self.left_alone[key] = cost
            self.left_alone_bytes += cost

    def _written(self, node: Node, outcome: Outcome) -> bool:
        self.used -= self.cost(node)
        self._settle.pop(node)()
        replaced = self._replacing.pop(node.key, 0)
        if outcome is Outcome.OK:
            self.used -= replaced
        else:
            self._take_back(node.key, replaced)
        self._on_written(node, outcome)
        if outcome is not Outcome.OK or node.held_in(Tier.DISK):  # a scan was faster
            return node.held_in(Tier.DISK)
        self._no_longer_undeleted(node.key)  # its file took the old one's place
        parent = node.parent
        if parent is not None and parent.kind is not Kind.LORA and not parent.held_in(Tier.DISK):
            self._delete({node.key: self.cost(node)})
            self._counters.add("write.disk.dropped.no_parent")
            return False
        self._index.enter(node, Tier.DISK, "written")
        self.used += self.cost(node)
        return True

    def _make_room(self, nbytes: int, protected: Container[Node], wanting: Node | None) -> Generator[None, None, bool]:
        """Delete what was left alone, then evict, until so many bytes fit; False, and nothing evicted, where they
        cannot. Yields between two slices."""
        while (excess := self.used + nbytes - self.limit) > 0:
            if nbytes > self.limit:  # without asking every object on disk whether it would go for this one
                return False
            excess -= self.drop_left_alone(excess)[1]
            if excess <= 0:
                return True
            policy = self._policies[Tier.DISK]
            victims, freed = yield from policy.victims(excess, protected, wanting)
            if freed < excess:
                return False
            for at in range(0, len(victims), _EVICTED):
                if at:
                    yield
                going = (node for node in victims[at : at + _EVICTED] if node not in protected)
                with self._index.together():
                    self._evict((node, policy.reason(node)) for node in self._leaving(going, policy, wanting))
        return True

    def _leaving(self, chosen: Iterable[Node], policy: Policy, wanting: Node | None) -> Iterator[Node]:
        """Those that may go still, each when the one before it has gone."""
        for node in chosen:
            if self._may_go(node) and policy.may_push(wanting, node):
                policy.pushed(node)
                yield node

    def _may_go(self, node: Node) -> bool:
        return not node.children[Tier.DISK] and self._index.evictable(node, Tier.DISK)

    def _leave(self, node: Node, cause: str) -> None:
        self.used -= self.cost(node)
        if node.written:
            self._flushes.left(Tier.DISK, node.written, asked=cause in _ASKED)
        self._unreadable.discard(node)
        self._index.leave(node, Tier.DISK, cause)  # who is told of it may ask what it cost
        node.stored = node.written = 0

    def _delete(self, going: dict[bytes, int]) -> None:
        """Delete (key -> bytes on disk) that nobody finds any more. What cannot be deleted counts until it can."""
        if not going:
            return

        def deleted(results: list[Result]) -> None:
            for (key, cost), result in zip(going.items(), results, strict=True):
                if result.outcome not in (Outcome.OK, Outcome.MISS) and key not in self._undeleted:
                    self._undeleted[key] = cost
                    self.used += cost

        self.io.delete(list(going), deleted)

    def _is_coming(self, node: Node, promised: bool) -> bool:
        if promised and node.dirty >> Tier.DISK & 1:
            return node in self.writer.promised
        return _on_disk_or_coming(node)

    def _leave_alone(self, found: Mapping[bytes, int]) -> None:
        if found and not self.left_alone:
            _log.warning(
                "disk: objects that another release, or another integrity_key, wrote are left alone and not served; "
                "they go when their room is needed, or with: loracache clear --tier disk"
            )
        for key, cost in found.items():
            if key not in self.left_alone and not self._wanted(key):
                self._take_back(key, cost)
                self.used += cost

    def _without_dependants(self, orphans: Sequence[ObjectInfo]) -> list[ObjectInfo]:
        """The orphans but for those whose parents are left alone, which are left with them."""
        left = list(orphans)
        while self.left_alone:
            cost = self.io.backend.footprint
            with_parent = [info for info in left if info.parent in self.left_alone]
            if not with_parent:
                break
            self._leave_alone({info.key: cost(info.stored or info.size) for info in with_parent})
            left = [info for info in left if info.key not in self.left_alone]
        return left

    def _no_longer_undeleted(self, key: bytes) -> None:
        self.used -= self._undeleted.pop(key, 0)

    def _wanted(self, key: bytes) -> bool:
        node = self._index.get(key)
        return node is not None and _on_disk_or_coming(node)


def _on_disk_or_coming(node: Node) -> bool:
    return bool((node.present | node.dirty) >> Tier.DISK & 1)
