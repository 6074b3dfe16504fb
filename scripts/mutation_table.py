# SPDX-License-Identifier: Apache-2.0
"""What scripts/mutations.py breaks, one invariant a line: here those of the cache, others in the files beside.

`old` stands exactly once in `file` (tests/unit/test_mutations.py holds that); `tests` are what has to fail.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CACHE", "Mutation"]


@dataclass(frozen=True, slots=True)
class Mutation:
    """promise: what `new` in place of `old` breaks. tests: files or tests, with blanks between."""

    promise: str
    file: str
    old: str
    new: str
    tests: str


def _cache(*names: str) -> str:
    return " ".join(f"tests/unit/cache/test_{name}.py" for name in names)


_LEASES = _cache("leases", "cache", "states")
_INDEX = _cache("states", "index", "policies", "cache")
_WRITES = _cache("cache", "disk_tier", "tier_io", "removal")
_VICTIMS = _cache("policies", "making_room", "removal", "cache")
_LOADS = _cache("promotion", "states", "damaged_payload", "cache")
_DISK = _cache("disk_tier", "states", "damaged_payload", "cache")
CACHE = [
    # -- leases ----------
    Mutation(
        "pages of a writer whose lease is over are not used again while he may write",
        "loracache/cache/state/leases.py",
        "self._quarantine_writes(key, lease)\n        self.expired",
        "[self._arena.free(extents) for extents in self._close(key, lease)]\n        self.expired",
        _LEASES,
    ),
    Mutation(
        "renewing a lease never shortens it",
        "loracache/cache/state/leases.py",
        "lease.expires = max(lease.expires, self._clock() + ttl)",
        "lease.expires = self._clock() + ttl",
        _LEASES,
    ),
    Mutation(
        "adding to a lease never shortens it",
        "loracache/cache/state/leases.py",
        "lease.expires = max(lease.expires, expires)",
        "lease.expires = expires",
        _LEASES,
    ),
    Mutation(
        "a lease holds an object once, however often it is asked for",
        "loracache/cache/state/leases.py",
        "if node not in lease.nodes:",
        "if True:",
        _LEASES,
    ),
    Mutation(
        "a writer that comes back on another connection gives up its pages",
        "loracache/cache/state/leases.py",
        "if broken[1] == lease_id]",
        "if broken == key]",
        _LEASES,
    ),
    Mutation(
        "pages that somebody reads are not given to others",
        "loracache/cache/state/index.py",
        "            if node.leases:\n                node.condemned",
        "            if not node.leases:\n                node.condemned",
        _INDEX,
    ),
    Mutation(
        "what is leased stays in the arena",
        "loracache/cache/state/index.py",
        "(node.leases or node.dirty)",
        "node.dirty",
        _INDEX,
    ),
    # -- flush and writes ----------
    Mutation(
        "what is queued to be written stays in the arena",
        "loracache/cache/state/index.py",
        "(node.leases or node.dirty)",
        "node.leases",
        _INDEX,
    ),
    Mutation(
        "a flush waits for what is in flight",
        "loracache/cache/tier/write_behind.py",
        "itertools.chain(self._in_flight.values(), self._queue.values())",
        "iter(self._queue.values())",
        _WRITES,
    ),
    Mutation(
        "a flush waits for the last object queued before it",
        "loracache/cache/tier/write_behind.py",
        "if sequence < oldest]",
        "if sequence <= oldest]",
        _WRITES,
    ),
    Mutation(
        "a flush waits for deletions too",
        "loracache/cache/tier/io.py",
        'self._run(self._writes, "wait"',
        'self._run(self._asks, "wait"',
        _WRITES,
    ),
    Mutation(
        "a write that is over leaves the object to be evicted",
        "loracache/cache/state/index.py",
        "        if not node.leases:\n            self.offer(node, Tier.CPU)\n",
        "",
        _INDEX,
    ),
    Mutation(
        "bytes that a tier found to be wrong are served no more",
        "loracache/cache/tiered.py",
        "if outcome is Outcome.CORRUPT:  #",
        "if False:  #",
        _WRITES,
    ),
    # -- eviction ----------
    Mutation(
        "an object that was used since it was offered is not the oldest",
        "loracache/cache/policy/lru.py",
        "        line.take(before)\n        line.put(node.tick, node)",
        "        pass",
        _VICTIMS,
    ),
    Mutation(
        "a choice of victims that does not suffice changes nothing",
        "loracache/cache/room.py",
        "if freed < missing:",
        "if not victims:",
        _VICTIMS,
    ),
    Mutation(
        "of writes that are given up, the leaf's goes first",
        "loracache/cache/room.py",
        "leaf = self._index.leaf_below(node, Tier.CPU)",
        "leaf = node",
        _VICTIMS,
    ),
    Mutation(
        "evicting by key leaves a parent whose child stays",
        "loracache/cache/eviction.py",
        "if node.children[tier] or self._index.stays(node, tier)",
        "if self._index.stays(node, tier)",
        _VICTIMS,
    ),
    Mutation(
        "a parent may go when its last child has gone",
        "loracache/cache/state/index.py",
        "                self.offer(parent, tier)\n            elif",
        "                pass\n            elif",
        _INDEX,
    ),
    Mutation(
        "a pin ends with the object's stay in the tier",
        "loracache/cache/state/index.py",
        "        node.pins &= ~bit\n",
        "",
        _VICTIMS,
    ),
    # -- promotion ----------
    Mutation(
        "an object on its way up is not loaded twice",
        "loracache/cache/tier/promotion.py",
        "if node.state(Tier.CPU) is State.LOADING:\n                self.wait(node, waiter)\n                self._",
        "if False:\n                self.wait(node, waiter)\n                self._",
        _LOADS,
    ),
    Mutation(
        "what Redis has is not taken for what a tier here has with other bytes",
        "loracache/cache/tier/promotion.py",
        "elif node.present and node.checksum != result.info.checksum:",
        "elif False:",
        _LOADS,
    ),
    Mutation(
        "objects that are loaded together do not make room for one another",
        "loracache/cache/tier/promotion.py",
        "            self._index.hold(node)  # making room",
        "            node.leases += 0  # making room",
        _LOADS,
    ),
    Mutation(
        "a load that failed gives its pages back",
        "loracache/cache/state/index.py",
        "        self._free(node.extents)\n        node.extents = ()\n\n",
        "        node.extents = ()\n\n",
        _INDEX,
    ),
    Mutation(
        "what is damaged on disk leaves it",
        "loracache/cache/tier/disk.py",
        "if outcome in (Outcome.MISS, Outcome.CORRUPT):",
        "if outcome is Outcome.MISS:",
        _LOADS,
    ),
    Mutation(
        "what could not be read is stored anew",
        "loracache/cache/tier/disk.py",
        "return self.reads(node) and node not in self._unreadable",
        "return self.reads(node)",
        _LOADS,
    ),
    # -- parents ----------
    Mutation(
        "a child is not written where its parent is missing",
        "loracache/cache/tier/disk.py",
        "parent.kind is not Kind.LORA and not _on_disk_or_coming(parent)",
        "False",
        _DISK,
    ),
    Mutation(
        "a child does not stay on disk whose parent left while it was written",
        "loracache/cache/tier/disk.py",
        "parent.kind is not Kind.LORA and not parent.held_in(Tier.DISK)",
        "False",
        _DISK,
    ),
    Mutation(
        "parents are written before their children",
        "loracache/cache/tier/disk.py",
        "for ancestor in reversed(missing):",
        "for ancestor in missing:",
        _DISK,
    ),
    Mutation(
        "what was chosen as a victim and is in use by now stays",
        "loracache/cache/room.py",
        "if node not in kept and not node.children[Tier.CPU] and self._index.evictable(node, Tier.CPU):",
        "if node.held_in(Tier.CPU) and not node.children[Tier.CPU]:",
        _cache("slices"),
    ),
    Mutation(
        "who reserved meanwhile what room was made for has it",
        "loracache/cache/reserving.py",
        "cause = self._refused(info, fresh) or cause",
        "pass",
        _cache("slices"),
    ),
    Mutation(
        "a client's unfinished messages are counted over all its connections",
        "loracache/daemon/inbox.py",
        "self._waiting[self._client] > _MOST_BYTES",
        "self._counted > _MOST_BYTES",
        "tests/unit/daemon/test_fairness.py",
    ),
    Mutation(
        "an object is not its own parent",
        "loracache/cache/reserving.py",
        "if info.parent == info.key or (",
        "if (",
        _DISK,
    ),
    Mutation(
        "the pages of an object whose parent has gone are free again",
        "loracache/cache/committing.py",
        '            self._arena.free(item.extents)\n            self._counters.add("store.refused.no_parent")',
        '            self._counters.add("store.refused.no_parent")',
        _DISK,
    ),
    Mutation(
        "making room for a child does not take its parent",
        "loracache/cache/reserving.py",
        "yield from self._make_room(size, protected, promised, info)",
        "yield from self._make_room(size, set(), promised, info)",
        _VICTIMS,
    ),
    Mutation(
        "a node without tier and children goes, and its ancestors after it",
        "loracache/cache/state/index.py",
        "                unlink(parent, node)\n            node = parent",
        "                unlink(parent, node)\n            node = None",
        _INDEX,
    ),
    # -- the disk's budget ----------
    Mutation(
        "what cannot be deleted counts against the limit",
        "loracache/cache/tier/disk.py",
        "                    self.used += cost\n",
        "",
        _DISK,
    ),
]
