# SPDX-License-Identifier: Apache-2.0
"""Reservations: pages for objects that a client is about to write, under its lease until it commits.

Threading: the cache's thread; a long reservation is done in slices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from loracache.cache.policy.limits import Quotas
from loracache.cache.state.arena import Arena
from loracache.cache.state.counters import Counters
from loracache.cache.state.index import Index, Node
from loracache.cache.state.leases import Leases, Writing
from loracache.cache.state.slices import parts
from loracache.results import Cause
from loracache.storage_backends.base import ObjectInfo
from loracache.tiers import Tier

__all__ = ["Reserver"]


class Reserver:
    """Reserves. make_room(nbytes, protected, promised, info) returns whether the arena has that much free now;
    held(node) says whether an object need not be stored again; queue_again(node) has one that exists written where it
    is not."""

    def __init__(
        self,
        arena: Arena,
        index: Index,
        leases: Leases,
        counters: Counters,
        make_room: Callable[[int, set[Node], bool, ObjectInfo], Generator[None, None, bool]],
        quotas: Quotas,
        held: Callable[[Node], bool],
        queue_again: Callable[[Node], None],
    ) -> None:
        self._arena = arena
        self._index = index
        self._leases = leases
        self._counters = counters
        self._make_room = make_room
        self._quotas = quotas
        self._held = held
        self._queue_again = queue_again

    def reserve(
        self, owner: int, lease_id: bytes, infos: Sequence[ObjectInfo], ttl: float, *, promised: bool
    ) -> Generator[None, None, list[Writing | Cause]]:
        """See TieredCache.reserve."""
        answers: list[Writing | Cause] = []
        slices = list(parts(infos))
        protected: set[Node] = set()
        for part in slices:
            if protected:
                yield
            protected |= self._parents(part)
        for part in slices:
            if answers:
                yield
            parents = self._parents(part) if len(slices) > 1 else protected
            reserving = _Reserving(owner, lease_id, ttl, promised, parents)
            yield from self._reserve_part(reserving, part, protected, answers)
            if promised and answers and answers[-1] is Cause.FULL:
                break
        return answers

    def _parents(self, infos: Sequence[ObjectInfo]) -> set[Node]:
        found = (self._index.get(info.parent) for info in infos if info.parent)
        return {node for node in found if node is not None}

    def _reserve_part(
        self, reserving: _Reserving, infos: Sequence[ObjectInfo], protected: set[Node], answers: list[Writing | Cause]
    ) -> Iterator[None]:
        fresh, promised = reserving.fresh, reserving.promised
        ahead = True  # as long as there is room for all of them
        for at, info in enumerate(infos):
            cause = self._refused(info, fresh)
            size = self._arena.rounded(info.size)
            if not cause and self._quotas.refuses(Tier.CPU, info, size):
                cause = Cause.OVER_QUOTA
            if not cause and self._arena.free_bytes < size:
                self._keep_reserved(reserving)  # others may come in between
                if ahead:  # one choice of victims for many objects costs little more than for one
                    ahead = yield from self._make_room(self._coming(infos[at:], fresh), protected, promised, info)
                if self._arena.free_bytes < size and not (yield from self._make_room(size, protected, promised, info)):
                    cause = Cause.FULL
                cause = self._refused(info, fresh) or cause
            if not cause and (extents := self._arena.allocate(info.size)) is not None:
                settle = self._quotas.charge(Tier.CPU, info, size)
                answers.append(fresh.setdefault(info.key, Writing(info, extents, promised, settle)))
                continue
            cause = cause or Cause.FULL
            if cause is Cause.EXISTS:
                self._exists(info.key, promised)
            elif cause is not Cause.BUSY and not (promised and cause is Cause.FULL):
                self._counters.add(f"store.refused.{cause}")
            answers.append(cause)
            if promised and cause is Cause.FULL:
                break
        self._keep_reserved(reserving)

    def _coming(self, infos: Sequence[ObjectInfo], fresh: Collection[bytes]) -> int:
        """Bytes of the first of `infos`, and of those behind it that are of the same owners and will get pages too, as
        things stand."""
        coming, total = set(fresh), 0
        for info in infos:
            size = self._arena.rounded(info.size)
            if (info.namespace, info.kind) != (infos[0].namespace, infos[0].kind):
                break
            if self._refused(info, coming):
                continue
            if total and self._quotas.beyond(Tier.CPU, info, total + size):
                break
            coming.add(info.key)
            total += size
        return total

    def _exists(self, key: bytes, promised: bool) -> None:
        node = self._index.get(key)
        assert node is not None, f"{key.hex()} exists and is not in the index"
        self._index.touch(node)
        if promised and node.held_in(Tier.CPU):
            self._queue_again(node)

    def _keep_reserved(self, reserving: _Reserving) -> None:
        """Put what was reserved under its lease, with its parents."""
        if reserving.fresh:
            owner, lease_id, ttl = reserving.owner, reserving.lease_id, reserving.ttl
            self._leases.hold(owner, lease_id, ttl, list(reserving.parents))
            self._leases.open_writing(owner, lease_id, ttl, list(reserving.fresh.values()))
            reserving.parents = set()
            reserving.fresh.clear()

    def _refused(self, info: ObjectInfo, fresh: Collection[bytes]) -> Cause:
        node = self._index.get(info.key)
        if node is not None and self._held(node):
            return Cause.EXISTS
        if info.key in self._leases.being_written or info.key in fresh:
            return Cause.BUSY
        parent_coming = info.parent in fresh or info.parent in self._leases.being_written
        if info.parent == info.key or (info.parent and not parent_coming and not self._index.knows(info.parent)):
            return Cause.NO_PARENT
        if info.size <= 0 or self._arena.rounded(info.size) > self._arena.size:
            return Cause.TOO_LARGE
        return Cause.NONE


@dataclass(slots=True)
class _Reserving:
    """A part of a reservation on its way: its lease, the parents to hold, and what is not under the lease yet."""

    owner: int
    lease_id: bytes
    ttl: float
    promised: bool
    parents: set[Node]
    fresh: dict[bytes, Writing] = field(default_factory=dict)
