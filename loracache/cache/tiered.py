# SPDX-License-Identifier: Apache-2.0
"""TieredCache: every operation on cached objects. docs/architecture.md names all that writes index and arena.

Threading: all methods belong to one thread (the daemon's event loop). Nothing here blocks: what touches disk or Redis
is handed to that tier's threads, and its result comes back through `post`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from loracache.cache.admitting import Admitter
from loracache.cache.ahead import Ahead
from loracache.cache.committing import Committer
from loracache.cache.eviction import Evicted, Remover
from loracache.cache.policy import ADMISSIONS, POLICIES, Policy
from loracache.cache.policy.benefit import Benefit
from loracache.cache.policy.keeps import Keeps
from loracache.cache.policy.limits import Quotas
from loracache.cache.reserving import Reserver
from loracache.cache.room import Room
from loracache.cache.state.arena import Arena
from loracache.cache.state.counters import Counters
from loracache.cache.state.events import Events
from loracache.cache.state.index import Index, Node
from loracache.cache.state.leases import Grip, Leases, Writing
from loracache.cache.state.node import State
from loracache.cache.state.pins import Pins
from loracache.cache.state.slices import Slices
from loracache.cache.tier.disk import DiskTier
from loracache.cache.tier.flushes import Flushes
from loracache.cache.tier.io import Post, TierIO
from loracache.cache.tier.promotion import Promoter
from loracache.cache.tier.write_behind import WriteBehind
from loracache.results import Cause
from loracache.storage_backends.base import ObjectInfo, Outcome, StorageBackend
from loracache.tiers import Tier

__all__ = ["OPERATOR", "Acquired", "TieredCache"]

OPERATOR = 0  # owner of the leases of operations: what one reads, nobody has asked for
_NO_LIMIT = 64  # times the arena
_REDIS_ASKS = 4  # a millisecond of network each way leaves time for others; more would only share the interpreter


@dataclass(frozen=True, slots=True)
class Acquired:
    """One object asked for by `acquire`: its place in the request, and the node in the arena or why there is none."""

    position: int
    node: Node | None
    cause: Cause = Cause.NONE


class TieredCache:
    """The tiers cpu, disk and redis under one index. See the module's docstring for threading."""

    def __init__(
        self,
        arena: Arena,
        post: Post,
        *,
        disk: StorageBackend | None = None,
        disk_limit: int = 0,
        redis: StorageBackend | None = None,
        policy: str = "lru",
        disk_policy: str | None = None,
        admission: str = "all",
        keep_share: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.arena = arena
        self.counters = Counters()
        self._policies: dict[Tier, Policy] = {}
        self.index = Index(lambda tier, node: self._policies[tier].offer(node), arena.free)
        self._slices = slices = Slices(post)
        self.quotas = Quotas(self.index, self._policies, slices)
        self.leases = Leases(arena, self.index, slices, clock)
        self.events = Events()
        self.index.on_change = self.events.changed
        self.pins = Pins(self.index, self.events, clock)
        self.keeps = Keeps(self.index, self.quotas, self.counters, int(arena.size * keep_share), clock)
        self.writers: list[WriteBehind] = []
        self.passing: Counter[bytes] = Counter()  # that operations raise only to pass through, how many each
        self.leaving: set[bytes] = set()  # that they take out of a tier now
        self._benefit = Benefit(self.counters, clock, always=admission == "all")
        self._admission = ADMISSIONS[admission](lambda: max(self.index.objects), self._memory_room, self._lower_room)
        self.admitter = Admitter(self._admission, self._benefit, self.counters, self._moves)
        evict, below = self._evict_from_arena, self._in_lower_tier
        self._room = Room(arena, self.index, self.leases, self.counters, self._policies, self.writers, evict, below)
        reserving = self._room.make, self.quotas, self._held, self.admitter.promise
        self._reserver = Reserver(arena, self.index, self.leases, self.counters, *reserving)
        benefit, held = self._benefit, self._held
        self._committer = Committer(arena, self.index, self.leases, self.counters, self.admitter, benefit, held)
        loading = self._room.make_for_load, self.quotas, self._arrived, self._lost
        self._promoter = Promoter(arena, self.index, self.counters, slices, *loading)
        self.quotas.add(Tier.CPU, POLICIES[policy], lambda node: arena.rounded(node.size), arena.size)
        self.disk: DiskTier | None = None
        self.redis: WriteBehind | None = None
        self.flushes = Flushes()
        if disk is not None:
            self._add_disk(disk, disk_limit, disk_policy or policy, post, slices)
        if redis is not None:
            self._add_redis(redis, post, slices)
        self.tiers = frozenset({Tier.CPU, *(writer.io.tier for writer in self.writers)})
        self.index.retaining_tier = Tier.DISK if disk is not None else Tier.CPU if redis is None else None
        self.ahead = Ahead(self.index, self._promoter, self._room, slices, self.disk, self.redis)
        self._remover = Remover(self.index, self._evict_from_arena, self.disk, self.redis)

    def _add_disk(self, disk: StorageBackend, limit: int, policy: str, post: Post, slices: Slices) -> None:
        self.quotas.add(Tier.DISK, POLICIES[policy], lambda node: disk.footprint(node.stored or node.size), limit)
        io = TierIO(Tier.DISK, disk, post, self.counters, self.events)
        having = self._policies, self.quotas, limit, self._written
        self.disk = DiskTier(io, self.arena, self.index, self.counters, slices, self.flushes, *having)
        self.writers.append(self.disk.writer)
        self.admitter.disk = self.disk

    def _add_redis(self, redis: StorageBackend, post: Post, slices: Slices) -> None:
        io = TierIO(Tier.REDIS, redis, post, self.counters, self.events, asks=_REDIS_ASKS)
        refuse, written = self.admitter.refuse_in_redis, self._written_to_redis
        self.redis = WriteBehind(io, self.arena, self.index, self.counters, slices, self.flushes, refuse, written)
        self.writers.append(self.redis)
        self.admitter.redis = self.redis

    # -- reading ----------

    def lookup(self, keys: Sequence[bytes]) -> list[Tier]:
        """Tiers (the fastest of each) of the longest leading run of `keys` that cpu or disk hold. Records the use. A
        disk that is left alone after a failure holds nothing.
        """
        tiers = self._readable
        for policy in self._policies.values():
            policy.asked(keys)
        cpu, disk, in_cpu = Tier.CPU, Tier.DISK, 1 << Tier.CPU
        found = self.index.leading(keys, tiers)
        self.keeps.used(found)
        self._admission.asked(keys, found)
        return [cpu if node.present & in_cpu else disk for node in found]

    def where(self, keys: Sequence[bytes]) -> list[Tier | None]:
        """The fastest of cpu and disk that holds each, as `lookup` has it; None where neither does. It is no use: that
        is recorded when they are acquired."""
        find, in_cpu, on_disk = self.index.get, 1 << Tier.CPU, self._readable & 1 << Tier.DISK
        found: list[Tier | None] = []
        for key in keys:
            node = find(key)
            if node is None or not node.present & (in_cpu | on_disk):
                found.append(None)
                continue
            node.asked = True
            found.append(Tier.CPU if node.present & in_cpu else Tier.DISK)
        return found

    def hold(self, owner: int, lease_id: bytes, keys: Sequence[bytes], ttl: float) -> None:
        """Keep those of `keys` that are in the arena there until the lease ends, loosely."""
        nodes = [node for node in map(self.index.get, keys) if node is not None and node.held_in(Tier.CPU)]
        self.leases.hold(owner, lease_id, ttl, nodes, Grip.LOOSE)

    def acquire(
        self,
        owner: int,
        lease_id: bytes,
        keys: Sequence[bytes],
        ttl: float,
        ready: Callable[[list[Acquired]], None],
        grip: Grip = Grip.FIRM,
    ) -> None:
        """Hold `keys` under a read lease, raising them into the arena where needed.

        `ready` is called at once with what is there already (or known to be nowhere) and again for the rest as it
        arrives, until every position was answered once.
        """
        self.leases.hold(owner, lease_id, ttl, (), grip)
        at_once: list[Acquired] = []
        queued = False
        on_disk: list[tuple[Node, Callable[[Node | None, Cause], None]]] = []
        elsewhere: list[tuple[bytes, Callable[[Node | None, Cause], None]]] = []

        def waiter(position: int) -> Callable[[Node | None, Cause], None]:
            def arrived(node: Node | None, cause: Cause) -> None:
                if node is not None and not self.leases.alive(owner, lease_id):
                    node, cause = None, Cause.LEASE_LOST
                if node is not None:
                    self.leases.hold(owner, lease_id, ttl, (node,), grip)
                ready([Acquired(position, node, cause)])

            return arrived

        for position, key in enumerate(keys):
            node = self.index.get(key)
            if node is not None and node.asked and owner != OPERATOR:
                self.index.read_beside(node)
                self.keeps.used((node,))
            if node is not None and node.held_in(Tier.CPU):
                self.index.touch(node)
                self.leases.hold(owner, lease_id, ttl, (node,), grip)
                at_once.append(Acquired(position, node))
                queued |= owner != OPERATOR and self.admitter.used(node)
            elif node is not None and node.state(Tier.CPU) is State.LOADING:
                self._promoter.wait(node, waiter(position))
            elif node is not None and self.disk is not None and self.disk.reads(node):
                on_disk.append((node, waiter(position)))
            elif self.redis is not None:
                elsewhere.append((key, waiter(position)))
            else:
                cause = Cause.ABSENT if node is None or not node.present else Cause.DISK_UNAVAILABLE
                at_once.append(Acquired(position, None, cause))
        if queued:
            self.pump()
        if at_once:
            ready(at_once)
        if on_disk and self.disk is not None:
            self._promoter.from_disk(self.disk.io, on_disk)
        if elsewhere and self.redis is not None:
            self._promoter.from_redis(self.redis.io, elsewhere)

    def report_bad(self, keys: Iterable[bytes]) -> None:
        """A reader found these objects' bytes in the arena to disagree with their checksums: never serve them again."""
        for key in keys:
            node = self.index.get(key)
            if node is not None and node.held_in(Tier.CPU):
                self.counters.add("failure.cpu.corrupt")
                self.events.fail(Tier.CPU, "corrupt", key=key)
                self._leave_arena(node, "corrupt")

    # -- writing ----------

    def reserve(
        self, owner: int, lease_id: bytes, infos: Sequence[ObjectInfo], ttl: float, *, promised: bool = False
    ) -> Generator[None, None, list[Writing | Cause]]:
        """Extents to write each object into, or why not: EXISTS, BUSY (somebody is writing it), NO_PARENT,
        TOO_LARGE, FULL. Yields between two slices, for others to be served; what it has reserved by then is under the
        lease.

        promised: no queued write is given up for these, nor one of these for others, and what exists is queued for the
        tier below that lacks it. The answers end with the first FULL: there may be room when the queues are shorter.
        """
        return self._reserver.reserve(owner, lease_id, infos, ttl, promised=promised)

    def commit(
        self, owner: int, lease_id: bytes, written: Sequence[tuple[bytes, int]]
    ) -> Generator[None, None, list[Cause]]:
        """Make written objects visible, given (key, checksum) with parents before children; NONE or why not:
        LEASE_LOST, EXISTS, NO_PARENT. The write lease ends. Yields between two slices, for others to be served.
        """
        answers = yield from self._committer.commit(owner, lease_id, written)
        self.pump()
        return answers

    def pump(self) -> None:
        """Start the writes that may start."""
        for writer in self.writers:
            writer.pump()

    @property
    def loading(self) -> int:
        """Objects on their way up into the arena."""
        return len(self._promoter)

    # -- steering ----------

    def retain(self, keys: Iterable[bytes]) -> None:
        """Objects that an operator named: the disk never drops them for others, and the arena not before they are
        there. Without a disk the arena keeps them, but where there is a Redis to find them in. What the disk had no
        room for is offered to it again.
        """
        for key in keys:
            self.index.retained.add(key)
            node = self.index.get(key)
            if node is not None and self.disk is not None:
                self.disk.queue_write(node)
        self.pump()

    def stop_retaining(self, key: bytes) -> None:
        """No name stands for the object any more: it may go like any other."""
        self.index.retained.discard(key)
        node = self.index.get(key)
        for tier in (Tier.CPU, Tier.DISK) if node is not None else ():
            self.index.offer(node, tier)  # type: ignore[arg-type]

    def evict(self, keys: Sequence[bytes], tiers: Collection[Tier], did: Evicted) -> Iterator[None]:
        """Take objects, and their descendants with them, out of `tiers`, noting in `did` what came of it. What is
        leased or pinned stays, its ancestors with it, and is counted as skipped. Yields between two slices, for others
        to be served; few objects are one slice. Whoever asks for no more ends it there.
        """
        return self._remover.remove(keys, tiers, did)

    def drop(self, nodes: Iterable[Node], tier: Tier, cause: str) -> Evicted:
        """Take just these objects, children before parents, out of cpu or disk, as far as they may go. The next is
        asked for when the one before it has gone."""
        return self._remover.drop(nodes, tier, cause)

    def clear(self, tiers: Collection[Tier], did: Evicted) -> Iterator[None]:
        """Take everything out of `tiers` (out of Redis: what the index knows of), but for what is leased or pinned; a
        slice at a time, as `evict`."""
        return self._remover.remove_all(tiers, did)

    def when_flushed(self, done: Callable[[], None]) -> None:
        """Call `done` once everything committed so far is written to the lower tiers or given up, and everything
        evicted from them so far is deleted."""
        left = len(self.writers)
        if not left:
            done()

        def one() -> None:
            nonlocal left
            left -= 1
            if not left:
                done()

        for writer in self.writers:
            writer.when_flushed(lambda io=writer.io: io.when_written(one))  # type: ignore[misc]

    def expect(self, batch: float) -> None:
        """So many requests run at once in all engines, as they say."""
        for policy in self._policies.values():
            policy.expect(batch)

    def tick(self) -> None:
        """End what is over: leases and pins past their time."""
        self.counters.add("lease.expired", self.leases.expire())
        for tick in (self.pins.tick, self.keeps.tick, self.index.shrink, self._benefit.tick):
            tick()
        self._slices.run(self._admission.work())
        if self.disk is not None:
            self.disk.tick()
        for writer in self.writers:
            writer.io.tick()
        self.pump()

    # -- inside ----------

    @property
    def _readable(self) -> int:
        """The tiers whose objects are found, as a bit mask."""
        disk = self.disk is not None and self.disk.io.available
        return 1 << Tier.CPU | (1 << Tier.DISK if disk else 0)

    def _held(self, node: Node) -> bool:
        """Whether the object need not be stored again: a tier has it that can be read now."""
        return node.held_in(Tier.CPU) or (self.disk is not None and self.disk.keeps(node))

    def _in_lower_tier(self, node: Node) -> bool:
        """Whether a clean object of the arena can be had again: from disk, or from Redis, which got it once."""
        return node.held_in(Tier.DISK) or node.sent

    def _evict_from_arena(self, node: Node, cause: str) -> None:
        self.counters.add(f"evict.cpu.{cause}")
        self._leave_arena(node, cause)

    def _leave_arena(self, node: Node, cause: str) -> None:
        for writer in self.writers:
            writer.forget(node, "evicted")
        self.index.leave(node, Tier.CPU, cause)

    def _arrived(self, node: Node, source: Tier) -> None:
        self.index.enter(node, Tier.CPU, f"from_{source.label}")
        node.sent = node.sent or source is Tier.REDIS
        if source is Tier.DISK and self.disk is not None:
            self.disk.load_ended(node, Outcome.OK)
        elif source is Tier.REDIS and self.disk is not None and node.key not in self.passing:
            self.disk.queue_write(node)
            self.pump()

    def _lost(self, node: Node, source: Tier, outcome: Outcome) -> None:
        if source is Tier.DISK and self.disk is not None:
            self.disk.load_ended(node, outcome)

    def _written(self, node: Node, outcome: Outcome) -> bool:
        if outcome is Outcome.CORRUPT:  # the tier proved the arena's bytes against the checksum, and they disagree
            self.report_bad([node.key])
        return outcome is Outcome.OK

    def _memory_room(self) -> int:
        """For how many objects of chains there is room in the arena, as large as those are that it holds, with what is
        beside them."""
        objects = self.index.objects[Tier.CPU] - self.index.beside[Tier.CPU]
        return self.arena.size * objects // max(1, self.index.bytes[Tier.CPU])

    def _lower_room(self) -> int:
        """The same of the larger of the tiers below; a Redis that knows no limit has room for all that comes."""
        disk = self.disk.limit if self.disk is not None else 0
        redis = (self.redis.io.backend.limit or _NO_LIMIT * self.arena.size) if self.redis is not None else 0
        return max(disk, redis) * self._memory_room() // self.arena.size

    def _moves(self, key: bytes) -> bool:
        return key in self.passing or key in self.leaving

    def _written_to_redis(self, node: Node, outcome: Outcome) -> bool:
        self._written(node, outcome)
        return self.admitter.written_to_redis(node, outcome)

    def audit(self) -> list[str]:
        """What is wrong with the arena's accounting, in words; empty where every page is held exactly once or free."""
        held = [extent for node in self.index for extent in (*node.extents, *node.condemned)]
        return self.arena.audit(held + self.leases.held_extents())
