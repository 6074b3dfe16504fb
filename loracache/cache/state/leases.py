# SPDX-License-Identifier: Apache-2.0
"""Clients' holds on extents: for reading until release, for writing until commit.

A lease ends by release, by its time to live, or with its connection. Extents of a write lease that ended without its
writer saying so go into quarantine: the writer may still be copying into them through its mapping, so they are used
again only when the writer commits or aborts after all, or when its process is gone.

What a lookup found, or a prefetch raises, is held loosely: nobody reads it yet, and where the arena is full it gives
way to what somebody reads now, as far as a lower tier has it too. Else requests that wait for their turn would keep
those out that have it. Threading: the cache's thread.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from loracache.cache.state.arena import Arena, Extent
from loracache.cache.state.index import Index, Node
from loracache.cache.state.slices import Slices
from loracache.storage_backends.base import ObjectInfo

__all__ = ["Grip", "Leases", "Writing"]

_LOOKS = 4096  # at loosely held objects for some that give way: about a millisecond

_SLICE = 2048  # holds ended between two looks at the socket: a millisecond

LeaseKey = tuple[int, bytes]  # (owner's number, the lease's id chosen by its client)


class Grip(enum.Enum):
    """How a lease holds what it holds for reading."""

    FIRM = "firm"
    """Somebody reads it."""
    LOOSE = "loose"
    """Somebody will: it gives way where a lower tier has it."""


@dataclass(slots=True)
class Writing:
    """An object that a client is writing: reserved, not yet visible."""

    info: ObjectInfo
    extents: tuple[Extent, ...]
    promised: bool = False
    """Its write to the lower tiers is not given up to make room."""
    settle: Callable[[], None] = lambda: None
    """To be called when it is under no lease any more: quotas count it meanwhile."""


@dataclass(slots=True)
class _Lease:
    expires: float
    grip: Grip = Grip.FIRM
    nodes: dict[Node, int] = field(default_factory=dict)
    writing: dict[bytes, Writing] = field(default_factory=dict)


class Leases:
    """All leases, by owner (a connection) and id."""

    def __init__(self, arena: Arena, index: Index, slices: Slices, clock: Callable[[], float]) -> None:
        self._arena = arena
        self._index = index
        self._slices = slices
        self._clock = clock
        self._leases: dict[LeaseKey, _Lease] = {}
        self._owners: dict[int, set[bytes]] = {}
        self._loose: dict[LeaseKey, _Lease] = {}  # the oldest first
        self._quarantine: dict[LeaseKey, list[Extent]] = {}
        self.being_written: set[bytes] = set()
        self.expired = 0

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def held_objects(self) -> int:
        """Objects held for reading, counted once a lease."""
        return sum(len(lease.nodes) for lease in self._leases.values())

    @property
    def quarantined(self) -> int:
        """Bytes out of use because a writer that never finished may still write to them."""
        return sum(length for extents in self._quarantine.values() for _, length in extents)

    def held_extents(self) -> list[Extent]:
        """Extents being written or in quarantine, for audits."""
        extents = [extent for kept in self._quarantine.values() for extent in kept]
        for lease in self._leases.values():
            for item in lease.writing.values():
                extents.extend(item.extents)
        return extents

    def hold(self, owner: int, lease_id: bytes, ttl: float, nodes: Sequence[Node], grip: Grip = Grip.FIRM) -> None:
        """Add `nodes` to a read lease, made or prolonged as needed. One that ever held firmly does so to its end."""
        lease = self._open(owner, lease_id, ttl, grip)
        if grip is Grip.FIRM and lease.grip is Grip.LOOSE:
            lease.grip = grip
            del self._loose[(owner, lease_id)]
        for node in nodes:
            if node not in lease.nodes:
                lease.nodes[node] = 1
                self._index.hold(node)

    def give_way(self, nbytes: int, elsewhere: Callable[[Node], bool]) -> int:
        """Let go of loosely held objects that a lower tier has too (`elsewhere`), of about `nbytes` bytes: those of the
        youngest lease first, which is needed last, and of it the ends of chains. Answers how many.
        """
        freed = count = looks = 0
        for lease in reversed(self._loose.values()):
            for node in reversed(list(lease.nodes)):
                looks += 1
                if freed >= nbytes or looks > _LOOKS:
                    return count
                if node.leases == 1 and not node.dirty and elsewhere(node):
                    del lease.nodes[node]
                    self._index.unhold(node)
                    freed += node.size
                    count += 1
        return count

    def open_writing(self, owner: int, lease_id: bytes, ttl: float, items: Sequence[Writing]) -> None:
        """Add reserved objects to a write lease."""
        lease = self._open(owner, lease_id, ttl)
        for item in items:
            lease.writing[item.info.key] = item
            self.being_written.add(item.info.key)

    def take_written(
        self, owner: int, lease_id: bytes, written: Iterable[tuple[bytes, int]]
    ) -> Iterator[tuple[Writing | None, int]]:
        """The reserved objects to be committed now, given (key, checksum), each taken out of its lease as it is asked
        for; None where the lease is lost."""
        lease = self._leases.get((owner, lease_id))
        for key, checksum in written:
            item = lease.writing.pop(key, None) if lease is not None else None
            if item is not None:
                self.being_written.discard(key)
                item.settle()
            yield item, checksum

    def held_by(self, owner: int) -> tuple[int, int]:
        """An owner's leases, and the objects that they hold for reading."""
        leases = [self._leases[(owner, lease_id)] for lease_id in self._owners.get(owner, ())]
        return len(leases), sum(len(lease.nodes) for lease in leases)

    def release_empty(self, owner: int, lease_id: bytes) -> None:
        """End a lease that holds nothing."""
        lease = self._leases.get((owner, lease_id))
        if lease is not None and not lease.nodes and not lease.writing:
            self._close((owner, lease_id), lease)

    def alive(self, owner: int, lease_id: bytes) -> bool:
        """Whether the lease is held still."""
        return (owner, lease_id) in self._leases

    def renew(self, owner: int, lease_id: bytes, ttl: float) -> bool:
        """Prolong a lease; False where it is lost."""
        lease = self._leases.get((owner, lease_id))
        if lease is None:
            return False
        lease.expires = max(lease.expires, self._clock() + ttl)
        return True

    def release(self, owner: int, lease_id: bytes) -> bool:
        """End a lease by its holder's word: nothing reads or writes its extents any more. False where it was lost. A
        lease that broke with an earlier connection of its holder is known by its id, which is random.
        """
        key = (owner, lease_id)
        for broken in [broken for broken in self._quarantine if broken[1] == lease_id]:
            self._arena.free(self._quarantine.pop(broken))
        lease = self._leases.get(key)
        if lease is None:
            return False
        for extents in self._close(key, lease):
            self._arena.free(extents)
        return True

    def expire(self) -> int:
        """End the leases whose time is over; answers how many. The cost grows with the leases, not with the objects."""
        now = self._clock()
        over = [(key, lease) for key, lease in self._leases.items() if lease.expires <= now]
        for key, lease in over:
            self._quarantine_writes(key, lease)
        self.expired += len(over)
        return len(over)

    def disconnect(self, owner: int) -> bool:
        """End all leases of a connection that is gone; True where its process must be watched (`writer_gone`)."""
        for lease_id in list(self._owners.get(owner, ())):
            self._quarantine_writes((owner, lease_id), self._leases[(owner, lease_id)])
        self._owners.pop(owner, None)
        return any(key[0] == owner for key in self._quarantine)

    def writer_gone(self, owner: int) -> None:
        """The process behind a connection is gone: its extents in quarantine may be used again."""
        for key in [key for key in self._quarantine if key[0] == owner]:
            self._arena.free(self._quarantine.pop(key))

    def _open(self, owner: int, lease_id: bytes, ttl: float, grip: Grip = Grip.FIRM) -> _Lease:
        key = (owner, lease_id)
        expires = self._clock() + ttl
        lease = self._leases.get(key)
        if lease is None:
            lease = self._leases[key] = _Lease(expires, grip)
            if grip is Grip.LOOSE:
                self._loose[key] = lease
            self._owners.setdefault(owner, set()).add(lease_id)
        lease.expires = max(lease.expires, expires)
        return lease

    def _quarantine_writes(self, key: LeaseKey, lease: _Lease) -> None:
        extents = [extent for extents in self._close(key, lease) for extent in extents]
        if extents:
            self._quarantine.setdefault(key, []).extend(extents)

    def _close(self, key: LeaseKey, lease: _Lease) -> list[tuple[Extent, ...]]:
        owner, lease_id = key
        del self._leases[key]
        self._loose.pop(key, None)
        self._owners[owner].discard(lease_id)
        self._slices.run(self._let_go(lease.nodes))
        self.being_written.difference_update(lease.writing)
        for item in lease.writing.values():
            item.settle()
        return [item.extents for item in lease.writing.values()]

    def _let_go(self, nodes: Collection[Node]) -> Iterator[None]:
        """End the holds of a lease that is over."""
        for count, node in enumerate(nodes, start=1):
            self._index.unhold(node)
            if not count % _SLICE:
                yield
