# SPDX-License-Identifier: Apache-2.0
"""Memory and disk of a simulated daemon: the daemon's own index, policies and admission, and nothing that moves bytes.

What the daemon does in between is done at once: a write to disk has ended when the next request comes. A chunk enters
memory when it was computed and disk where admission says so, with those of its parents that disk lacks; what is found
on disk is raised into memory. An adapter that no tier has comes from its files.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loracache.cache.policy import ADMISSIONS, POLICIES, Policy
from loracache.cache.policy.worth import Speeds
from loracache.cache.state.index import Index, Node
from loracache.cache.state.slices import whole
from loracache.errors import ConfigError
from loracache.simulator.hints import Held
from loracache.simulator.request import Kept, Request
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier

__all__ = ["Found", "Sizes", "Store", "Way"]

_TREE = "tree"
_HELD = 0.9  # of memory, at most, for sessions that said that they come back
_HELD_S = 900.0  # at most
_BOTH = 1 << Tier.CPU | 1 << Tier.DISK
_ALL_BITS = (1 << 256) - 1
_SPREAD = 0x9E3779B97F4A7C15F39CC0605CEDC8341082276BF3A27251F86C6A11D0C18E95  # odd: no two numbers become one


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes: of the tiers, of a token's KV, of each adapter."""

    memory: int
    disk: int
    token: int
    adapters: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Way:
    """How room is made and what is written. split: the percentage of memory that holds adapters and nothing else, where
    both have pools of their own and no tree, as in an engine without a cache like this; 0: one pool. without: parts of
    the memory's policy that are switched off, and "tree"."""

    policy: str
    disk_policy: str
    admission: str = "all"
    split: int = 0
    without: tuple[str, ...] = ()

    @classmethod
    def parse(cls, policy: str, disk_policy: str | None = None, admission: str = "all") -> Way:
        """Of "lru", of "cost-visits-decay" for `cost` without both, or of "static:20" for LRU in two pools. Raises
        ConfigError."""
        kind, _, share = policy.strip().partition(":")
        split = int(share) if kind == "static" and share.isascii() and share.isdigit() else 0
        name, *without = ["lru"] if 0 < split < 100 else policy.strip().split("-")
        for option, given, known in (
            ("policy", name, [*POLICIES, "static:P, with P from 1 to 99"]),
            ("disk-policy", disk_policy or name, list(POLICIES)),
            ("admission", admission, list(ADMISSIONS)),
        ):
            if given not in known:
                raise ConfigError(f"--{option} {given!r} is none; give one of {', '.join(known)}")
        parts = [_TREE, *getattr(POLICIES[name], "PARTS", ())]
        for part in without:
            if part not in parts:
                raise ConfigError(f"--policy {policy!r}: {name} has no part {part!r}; it has {', '.join(parts)}")
        return cls(name, disk_policy or name, admission, split, tuple(without))

    @property
    def label(self) -> str:
        """What `parse` was given for the policy."""
        return f"static:{self.split}" if self.split else "-".join((self.policy, *self.without))

    @property
    def tree(self) -> bool:
        """Whether KV is below its adapter."""
        return not self.split and _TREE not in self.without


@dataclass(slots=True)
class Found:
    """What one request found: blocks, tokens in each tier, the bytes that have to be loaded, where its adapter was."""

    blocks: int = 0
    cpu: int = 0
    disk: int = 0
    cpu_bytes: int = 0
    disk_bytes: int = 0
    adapter: Tier | None = Tier.CPU
    adapter_bytes: int = 0


class Store:
    """One run's tiers. counts: bytes and objects by what happened to them."""

    def __init__(self, sizes: Sizes, way: Way, speeds: Speeds | None = None) -> None:
        self.sizes = sizes
        self._split = way.split
        self._tree = way.tree
        self.counts: Counter[str] = Counter()
        self.choosing = 0.0  # seconds
        self._policies: dict[Tier, Policy] = {}
        self.index = index = Index(lambda tier, node: self._policy(tier, node).offer(node), lambda extents: None)
        index.on_used = lambda tier, node, before: self._policy(tier, node).used(node, before)
        index.on_left = lambda tier, node: self._policy(tier, node).withdraw(node)
        index.on_gone = lambda tier, node: self._policy(tier, node).gone(node)
        self._policies[Tier.CPU] = policy = POLICIES[way.policy](index, Tier.CPU, _size)
        self._policies[Tier.DISK] = POLICIES[way.disk_policy](index, Tier.DISK, _size)
        self._own_pool = POLICIES[way.policy](index, Tier.CPU, _size)  # adapters', where they have one
        policy.without = way.without
        for each in (policy, self._policies[Tier.DISK], self._own_pool):
            each.speeds = speeds or Speeds()
        rooms = (self._room(sizes.memory), self._room(sizes.disk))
        self._admission = ADMISSIONS[way.admission](lambda: index.objects[Tier.DISK], *rooms)
        kv = sizes.memory * (100 - way.split) // 100
        self._limits = {Tier.CPU: kv, Tier.DISK: sizes.disk, None: sizes.memory - kv}
        self._used: dict[Tier | None, int] = dict.fromkeys(self._limits, 0)
        self._held = Held(index, int(_HELD * kv), _HELD_S)
        self._namespaces = {number: _namespace(number) for number in range(-1, len(sizes.adapters))}
        self._kv_of: dict[Tier, Counter[bytes]] = {tier: Counter() for tier in (Tier.CPU, Tier.DISK)}  # by namespace

    def serve(self, request: Request) -> Found:
        """Look up, load, compute and store one prompt, after what was stored before it."""
        found = Found()
        self._held.returned(request.session, request.time)
        for kept in request.kept:
            if kept.blocks:
                self._keep(kept)
            else:
                self._serve_adapter(kept.adapter, found if kept.adapter == request.adapter else Found())
        if request.held is None and request.adapter >= 0:
            adapter: Node | None = self._serve_adapter(request.adapter, found)
        else:  # as recorded: of an adapter that its engine held the daemon was not asked
            adapter = self._adapter(request.adapter)
        keys = self.keys_of(request)
        last = self._load(request, keys, adapter, found)
        last, admitted = self._compute(request, keys, adapter, last, found)
        if request.returns and last is not None:
            self._held.keep(request.session, last, request.time)
        if admitted is not None and self.sizes.disk:
            self._write(admitted)
        self.index.prune(adapter)
        return found

    def _load(self, request: Request, keys: Sequence[bytes], adapter: Node | None, found: Found) -> Node | None:
        """Raise what is there into memory; answers the last chunk that is there then."""
        last: Node | None = None
        again: Node | None = None
        for policy in self._policies.values():
            policy.asked(keys)
        held = self.index.leading(keys, _BOTH)
        self._admission.asked(keys, held)
        for _ in self._admission.work():
            pass
        for node in held:
            tokens = request.tokens_of(found.blocks)
            if node.held_in(Tier.CPU):
                found.cpu += tokens
                found.cpu_bytes += node.size
                if self.sizes.disk and not node.held_in(Tier.DISK) and self._admission.again(node):
                    again = node
            elif self._enter(node, Tier.CPU, (last, adapter)):
                found.disk += tokens
                found.disk_bytes += node.size
            else:
                break
            found.blocks += 1
            last = node
        if again is not None:
            self._write(again)
        return last

    def _compute(
        self, request: Request, keys: Sequence[bytes], adapter: Node | None, last: Node | None, found: Found
    ) -> tuple[Node | None, Node | None]:
        """Store the chunks that follow; answers the last in memory, and the last of them that is to be written to
        disk."""
        end = len(keys) if request.held is None else min(request.held, len(keys))
        last = adapter if last is None and self._tree else last
        sizes = request.sizes(found.blocks, end, self.sizes.token)
        self._free(Tier.CPU, Tier.CPU, sum(sizes), (last, adapter))  # for all at once, where that is to be had
        return self._store(keys[found.blocks : end], sizes, request.adapter, adapter, last)

    def _keep(self, kept: Kept) -> None:
        """Store what an engine stored in a recorded trace, as far as what it is behind is there."""
        adapter = self._adapter(kept.adapter)
        last = adapter if self._tree else None
        if kept.below is not None:
            last = self.index.get(_key(kept.adapter, kept.below))
            if last is None or not last.present:
                return
        keys = [_key(kept.adapter, block) for block in kept.blocks]
        _, admitted = self._store(keys, [kept.nbytes] * len(keys), kept.adapter, adapter, last)
        if admitted is not None:
            self._write(admitted)
        self.index.prune(adapter)

    def _store(
        self, keys: Sequence[bytes], sizes: Sequence[int], number: int, adapter: Node | None, last: Node | None
    ) -> tuple[Node | None, Node | None]:
        """Store chunks of an adapter's, each behind the one before and the first behind `last`. Answers the last that
        is there, and the last of the new ones that is to be written to disk."""
        admitted: Node | None = None
        for key, size in zip(keys, sizes, strict=True):
            node = self._insert(key, last.key if last is not None else b"", Kind.KV, number, size)
            if node.present:
                self.index.touch(node)
            elif self._enter(node, Tier.CPU, (last, adapter)):
                self.counts["stored"] += size
                if self.sizes.disk and not self._admission.came(node):
                    admitted = node
            else:
                self.index.prune(node)
                break
            last = node
        return last, admitted

    def _adapter(self, number: int) -> Node | None:
        """Its node, in no tier perhaps; None for no adapter."""
        return self._insert(_key(number), b"", Kind.LORA, number, self.sizes.adapters[number]) if number >= 0 else None

    # -- what the swapper swaps into: see cache/swap ----------

    @property
    def size(self) -> int:
        """Bytes of memory, where all of it is one pool."""
        return self._limits[Tier.CPU]

    @property
    def free_bytes(self) -> int:
        """Of these, in use by nobody."""
        return self._limits[Tier.CPU] - self._used[Tier.CPU]

    def rounded(self, nbytes: int) -> int:
        """What an object takes: its size."""
        return nbytes

    def keys_of(self, request: Request) -> list[bytes]:
        """The keys of its blocks."""
        return [_key(request.adapter, block) for block in request.blocks]

    def raise_(self, node: Node, *, evict: bool) -> bool:
        """Take an object of the disk into memory; whether there was room. evict: others may go for it."""
        return (evict or node.size <= self.free_bytes) and self._enter(node, Tier.CPU, (node.parent,))

    def free_ahead(self, nbytes: int) -> None:
        """Have victims leave memory until so many bytes are free."""
        self._free(Tier.CPU, Tier.CPU, nbytes, ())

    def restart(self) -> None:
        """Memory is empty, as after a daemon's end; the disk is as it was."""
        for node in [node for node in self.index if node.held_in(Tier.CPU) and not node.children[Tier.CPU]]:
            last: Node | None = node
            while last is not None and last.held_in(Tier.CPU) and not last.children[Tier.CPU]:
                parent = last.parent
                self._leave(last, Tier.CPU)
                last = parent

    def invalid_share(self, tier: Tier | None = None) -> float:
        """Bytes of KV in `tier` whose adapter is not there, by bytes of KV there; None: in all tiers, in none."""
        kv = self._kv_of[Tier.CPU] + self._kv_of[Tier.DISK] if tier is None else self._kv_of[tier]
        named = ((_adapter_of(namespace), nbytes) for namespace, nbytes in kv.items())
        gone = (nbytes for number, nbytes in named if number >= 0 and not self._has_adapter(number, tier))
        return sum(gone) / total if (total := sum(kv.values())) else 0.0

    def _has_adapter(self, number: int, tier: Tier | None) -> bool:
        node = self.index.get(_key(number))
        return node is not None and (node.held_in(tier) if tier is not None else bool(node.present))

    def _serve_adapter(self, number: int, found: Found) -> Node:
        size = self.sizes.adapters[number]
        node = self._insert(_key(number), b"", Kind.LORA, number, size)
        node.hits += 1
        if node.held_in(Tier.CPU):
            self.index.touch(node)
            return node
        found.adapter = Tier.DISK if node.held_in(Tier.DISK) else None
        found.adapter_bytes = size
        self.counts["adapters_loaded"] += 1
        if self._enter(node, Tier.CPU, ()) and self.sizes.disk and not self._admission.came(node):
            self._write(node)
        return node

    def _write(self, node: Node) -> None:
        """Write to disk, the parents that it lacks first."""
        missing = []
        above: Node | None = node
        while above is not None and above.held_in(Tier.CPU) and not above.held_in(Tier.DISK):
            missing.append(above)
            above = above.parent
        self._free(Tier.DISK, Tier.DISK, sum(each.size for each in missing), (above,))
        for each in reversed(missing):
            if not self._enter(each, Tier.DISK, (each.parent,)):
                return
            self.counts["disk_written"] += each.size

    def _insert(self, key: bytes, parent: bytes, kind: Kind, adapter: int, size: int) -> Node:
        node = self.index.insert(ObjectInfo(key, parent, kind, self._namespaces[adapter], size, 0))
        assert node is not None, "a parent was evicted under its child"
        return node

    def _enter(self, node: Node, tier: Tier, protected: Iterable[Node | None]) -> bool:
        pool, size = self._pool(tier, node), node.size
        if not self._free(tier, pool, size, protected):
            return False
        self.index.enter(node, tier)
        self._used[pool] += size
        if node.kind is Kind.KV:
            self._kv_of[tier][node.namespace] += size
        return True

    def _free(self, tier: Tier, pool: Tier | None, nbytes: int, protected: Iterable[Node | None]) -> bool:
        """Evict until so many bytes fit; False, and nothing evicted, where they cannot."""
        excess = self._used[pool] + nbytes - self._limits[pool]
        if excess <= 0:
            return True
        if nbytes > self._limits[pool]:
            return False
        policy = self._own_pool if pool is None else self._policies[tier]
        began = time.process_time()
        victims, freed = whole(policy.victims(excess, {node for node in protected if node is not None}))
        self.choosing += time.process_time() - began
        if freed < excess:
            return False
        with self.index.together():
            for victim in victims:
                self._leave(victim, tier)
        self.counts["evicted"] += len(victims)
        return True

    def _leave(self, node: Node, tier: Tier) -> None:
        self.index.leave(node, tier)
        self._used[self._pool(tier, node)] -= node.size
        if node.kind is Kind.KV:
            self._kv_of[tier][node.namespace] -= node.size

    def _room(self, nbytes: int) -> Callable[[], int]:
        """For how many objects there is room in so many bytes."""
        index = self.index
        return lambda: nbytes * index.objects[Tier.CPU] // max(1, index.bytes[Tier.CPU])

    def _pool(self, tier: Tier, node: Node) -> Tier | None:
        return None if self._split and tier is Tier.CPU and node.kind is Kind.LORA else tier

    def _policy(self, tier: Tier, node: Node) -> Policy:
        return self._own_pool if self._split and self._pool(tier, node) is None else self._policies[tier]


def _size(node: Node) -> int:
    return node.size


def _key(adapter: int, block: int | None = None) -> bytes:
    """Of a block of an adapter's KV, or of the adapter: spread as the daemon's keys are, which are hashes."""
    number = adapter + 1 if block is None else (block + 1 << 32) + adapter + 1
    return (number * _SPREAD & _ALL_BITS).to_bytes(32, "big")


def _namespace(adapter: int) -> bytes:
    return (adapter + 1).to_bytes(32, "big")


def _adapter_of(namespace: bytes) -> int:
    return int.from_bytes(namespace, "big") - 1
