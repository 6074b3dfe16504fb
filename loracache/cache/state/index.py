# SPDX-License-Identifier: Apache-2.0
"""What is where: the dependency tree of all objects over the tiers that the daemon itself fills.

A node is one object; its parent is the chunk before it, or its adapter. The index keeps states, leases and pins per
node and answers which nodes may leave a tier. What Redis holds is not in here: that is found by asking.

Invariants (tests hold them): a tier's victim has no child in that tier, no lease (cpu) and no pin; a node stays while
it is in some tier or has children, and no longer. Threading: one thread, the cache's.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from sortedcontainers import SortedDict, SortedList

from loracache.cache.state.arena import Extent
from loracache.cache.state.node import Node, State, children_of, link, unlink
from loracache.memory_limit import give_back_memory
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier

__all__ = ["Index", "Node", "Space"]

_WORTH_SHRINKING = 10_000  # nodes
_FEW = 5_000  # of them a whole collection takes a few milliseconds
_OFFERED = (Tier.CPU, Tier.DISK)  # tiers that somebody chooses victims of


class Index:
    """The tree, by key.

    `on_candidate(tier, node)` is called whenever a node may have become a victim; of one that its policy has taken as
    a candidate (`Node.offered`), `on_used(tier, node, its tick before)` when it is used and `on_left(tier, node)` when
    it leaves the tier or is no leaf of it any more; `on_gone(tier, node)` whenever a node has left a tier; `on_few()`
    when few nodes are left of very many. `free` takes back extents that nobody holds any more. `adapters` are keys that
    stand for a node without a tier as soon as a chain needs one as its parent: adapters that an engine serves and the
    cache does not hold. `retained` are keys of adapters that have a name: such a node stays in the tier
    `retaining_tier`, and in the arena until it is there. `spaces` says what there is of each namespace that has
    anything, in the order of their digests. `on_change(node, tier, entered, cause)` is told of every change. `costs`
    say what a node takes of a tier's room; `on_count(node, tier, amount)`, where somebody wants to know, is told before
    what a namespace takes grows or shrinks.
    """

    def __init__(self, on_candidate: Callable[[Tier, Node], None], free: Callable[[Iterable[Extent]], None]) -> None:
        self._nodes: dict[bytes, Node] = {}
        self._on_candidate = on_candidate
        self.on_used: Callable[[Tier, Node, int], None] = lambda tier, node, before: None
        self.on_left: Callable[[Tier, Node], None] = lambda tier, node: None
        self.on_gone: Callable[[Tier, Node], None] = lambda tier, node: None
        self.on_few: Callable[[], None] = lambda: None
        self._free = free
        self._clock = itertools.count(1)
        self.adapters: set[bytes] = set()
        self.retained: set[bytes] = set()
        self.retaining_tier: Tier | None = None
        self.spaces: SortedDict[bytes, Space] = SortedDict()
        self.on_change: Callable[[Node, Tier, bool, str], None] = lambda node, tier, entered, cause: None
        self.costs: dict[Tier, Callable[[Node], int]] = dict.fromkeys(Tier, lambda node: node.size)
        self.on_count: Callable[[Node, Tier, int], None] | None = None
        self.objects = [0, 0, 0, 0]
        self.bytes = [0, 0, 0, 0]
        self.beside = [0, 0, 0, 0]  # of the objects, those beside chains
        self._uncovered: list[tuple[Node, Tier]] | None = None  # parents without children, while many leave
        self._most = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def get(self, key: bytes) -> Node | None:
        """The node of `key`, held somewhere or kept by its children."""
        return self._nodes.get(key)

    def ghost(self, key: bytes, kind: Kind) -> Node:
        """The node of `key`, made without tier and parent where there is none."""
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Node(key, kind, None)
        return node

    def knows(self, key: bytes) -> bool:
        """Whether `key` can be a parent."""
        return key in self._nodes or key in self.adapters

    def insert(self, info: ObjectInfo, checksum: int | None = None) -> Node | None:
        """The node for `info`, in no tier yet; None where its parent is not in the tree. checksum: where it is known
        only now."""
        node = self._nodes.get(info.key)
        # One that is held keeps its place: its parent counts its children in a tier as they enter and leave it.
        if node is None or (node.parent is None and info.parent and not node.present):
            parent = self._nodes.get(info.parent) if info.parent else None
            if info.parent and parent is None:
                if info.parent not in self.adapters:
                    return None
                parent = self.ghost(info.parent, Kind.LORA)
            if node is None:
                node = self._nodes[info.key] = Node(info.key, info.kind, None)
            node.parent = parent
            if parent is not None:
                link(parent, node)
        if not node.present:
            node.namespace, node.size = info.namespace, info.size
            node.checksum = info.checksum if checksum is None else checksum
        return node

    # -- states: the only methods that change `present`, `dirty`, `extents` and `condemned` ----------

    def load(self, node: Node, extents: tuple[Extent, ...]) -> None:
        """The object's bytes are on their way from a lower tier into `extents`. Its loader holds the node."""
        assert not node.extents, f"{node.key.hex()} has pages already"
        node.extents = extents

    def load_failed(self, node: Node) -> None:
        """They did not come."""
        assert node.state(Tier.CPU) is State.LOADING, f"{node.key.hex()} is not loading"
        self._free(node.extents)
        node.extents = ()

    def queue(self, node: Node, tier: Tier) -> None:
        """An object of the arena is to be written to `tier`."""
        assert node.present >> Tier.CPU & 1, f"{node.key.hex()} is not in the arena"
        bit = 1 << tier
        assert not (node.present | node.dirty) & bit, f"{node.key.hex()} is in {tier.label} already or on its way"
        node.dirty |= bit

    def unqueue(self, node: Node, tier: Tier) -> None:
        """The writing to `tier` is over, or given up."""
        node.dirty &= ~(1 << tier)
        if not node.leases:
            self.offer(node, Tier.CPU)

    def enter(self, node: Node, tier: Tier, cause: str = "", extents: tuple[Extent, ...] = ()) -> None:
        """`tier` holds the node's bytes from now on. cause: why, for those who watch. extents: in the arena, where the
        bytes were not loaded."""
        bit = 1 << tier
        assert not node.present & bit, f"{node.key.hex()} is in {tier.label} already"
        if extents:
            assert not node.extents, f"{node.key.hex()} is loading"
            node.extents = extents
        if not node.present:
            self._list(node)
        node.present |= bit
        node.dirty &= ~bit
        self._count(node, tier, 1)
        parent = node.parent
        if parent is not None:
            parent.children[tier] += 1
            if parent.offered & bit:
                self.on_left(tier, parent)
        self.touch(node)
        self.offer(node, tier)
        if node.key in self.retained and tier is self.retaining_tier:
            self.offer(node, Tier.CPU)
        self.on_change(node, tier, True, cause)

    def leave(self, node: Node, tier: Tier, cause: str = "") -> None:
        """`tier` no longer holds the node's bytes; the node goes with its last tier and child. Pages that somebody
        holds are condemned until nobody does."""
        bit = 1 << tier
        assert node.present & bit, f"{node.key.hex()} is not in {tier.label}"
        if tier is Tier.CPU:
            assert node.leases or not node.dirty, f"{node.key.hex()} waits to be written"
            if node.leases:
                node.condemned += node.extents
            else:
                self._free(node.extents)
            node.extents = ()
        node.present &= ~bit
        node.pins &= ~bit
        if node.offered & bit:
            self.on_left(tier, node)
        self.on_gone(tier, node)
        self._count(node, tier, -1)
        parent = node.parent
        if parent is not None:
            parent.children[tier] -= 1
            if self._uncovered is None:
                self.offer(parent, tier)
            elif not parent.children[tier]:
                self._uncovered.append((parent, tier))
        if not node.present:
            self._unlist(node)
        self.on_change(node, tier, False, cause)
        self.prune(node)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Many leave in one go: a parent that goes behind its last child is no candidate. Nobody chooses victims."""
        assert self._uncovered is None, "objects leave together already"
        uncovered = self._uncovered = []
        try:
            yield
        finally:
            self._uncovered = None
            for node, tier in uncovered:
                self.offer(node, tier)

    # -- the rest ----------

    def _count(self, node: Node, tier: Tier, sign: int) -> None:
        nbytes = sign * node.size
        self.objects[tier] += sign
        if node.kind is Kind.BESIDE:
            self.beside[tier] += sign
        self.bytes[tier] += nbytes
        space = self.spaces[node.namespace]
        space.objects[tier] += sign
        space.bytes[tier] += nbytes
        self.resize(node, tier, sign * self.costs[tier](node))

    def resize(self, node: Node, tier: Tier, amount: int) -> None:
        """A node takes so many bytes more of a tier's room."""
        if self.on_count is not None:
            self.on_count(node, tier, amount)
        self.spaces[node.namespace].taken[tier] += amount

    def _list(self, node: Node) -> None:
        space = self.spaces.get(node.namespace)
        if space is None:
            space = self.spaces[node.namespace] = Space()
        space.keys.add(node.key)
        if node.is_root:
            space.roots.add(node.key)

    def _unlist(self, node: Node) -> None:
        space = self.spaces[node.namespace]
        space.keys.remove(node.key)
        if node.is_root:
            space.roots.remove(node.key)
        if not space.keys:
            del self.spaces[node.namespace]

    def prune(self, node: Node | None) -> None:
        """Forget `node`, and its ancestors after it, where nothing needs them any more."""
        while node is not None and not node.present and node.first_child is None and not node.leases:
            if self._nodes.get(node.key) is not node:
                return
            del self._nodes[node.key]
            parent = node.parent
            if parent is not None:
                unlink(parent, node)
            node = parent

    def shrink(self) -> None:
        """Give memory back after very many nodes have gone: a dict from which they were deleted keeps their places."""
        self._most = max(self._most, len(self._nodes))
        if self._most > _WORTH_SHRINKING + 4 * len(self._nodes):
            self._most = len(self._nodes)
            self._nodes = dict(self._nodes)
            if len(self._nodes) < _FEW:
                self.on_few()
                gc.collect()  # the daemon looks at young objects only: what it takes grows with all there are
            give_back_memory()

    def touch(self, node: Node) -> None:
        """Record a use."""
        before, node.tick = node.tick, next(self._clock)
        if node.offered:
            for tier in _OFFERED:
                if node.offered >> tier & 1:
                    self.on_used(tier, node, before)

    def read_beside(self, node: Node) -> None:
        """Record that an object is read behind a lookup that has found it beside a chain. Lookups find many of these
        that nobody needs, so this is what counts: once, however many workers share it and whoever raises it first."""
        node.asked = False
        node.hits += 1
        if node.present:
            self.spaces[node.namespace].hits += 1

    def hold(self, node: Node) -> None:
        """Keep the node's extents where they are until `unhold`."""
        node.leases += 1

    def unhold(self, node: Node) -> None:
        """End one hold."""
        assert node.leases > 0, f"{node.key.hex()} is not held"
        node.leases -= 1
        if not node.leases:
            if node.condemned:
                self._free(node.condemned)
                node.condemned = ()
            self.offer(node, Tier.CPU)
            self.prune(node)

    def evictable(self, node: Node, tier: Tier) -> bool:
        """Whether the node may leave `tier` now, its children in that tier left aside."""
        if not node.present >> tier & 1 or (tier is Tier.CPU and (node.leases or node.dirty)):
            return False
        return not self.stays(node, tier)

    def stays(self, node: Node, tier: Tier) -> bool:
        """Whether a pin or a name keeps the node in `tier`."""
        if node.pins >> tier & 1:
            return True
        if node.key not in self.retained or self.retaining_tier is None:
            return False
        return tier is self.retaining_tier or not node.held_in(self.retaining_tier)

    def offer(self, node: Node, tier: Tier) -> None:
        """Tell the tier's policy of a node that may be a victim."""
        if not node.children[tier] and not node.offered >> tier & 1 and self.evictable(node, tier):
            self._on_candidate(tier, node)

    def leading(self, keys: Sequence[bytes], tiers: int) -> list[Node]:
        """Nodes of the longest run of `keys`, from the first on, that one of `tiers` (a bit mask) holds. Records their
        use."""
        nodes = []
        find, clock = self._nodes.get, self._clock
        for key in keys:
            node = find(key)
            if node is None or not node.present & tiers:
                break
            node.hits += 1
            if node.offered:
                self.touch(node)
            else:
                node.tick = next(clock)
            nodes.append(node)
        if nodes:
            self.spaces[nodes[0].namespace].hits += len(nodes)
        return nodes

    def leaf_below(self, node: Node, tier: Tier) -> Node:
        """A descendant of `node` in `tier` that has no child there; `node` itself where it has none."""
        while node.children[tier]:
            child = node.first_child
            while child is not None and not child.held_in(tier):
                child = child.next_sibling
            assert child is not None, f"{node.key.hex()} counts children in {tier.label} that it does not have"
            node = child
        return node

    def below(self, root: Node, seen: set[Node]) -> Iterator[Node]:
        """`root` and all its descendants, children before parents, but for those in `seen`, and what is below them.
        Adds to `seen` what it answers. Between two answers the tree may change: what came below a node that was looked
        at already is not among them.
        """
        if root in seen:
            return
        seen.add(root)
        path = [(root, iter(children_of(root)))]
        while path:
            node, children = path[-1]
            child = next(children, None)
            if child is None:
                path.pop()
                yield node
            elif child not in seen:
                seen.add(child)
                path.append((child, iter(children_of(child))))


@dataclass(slots=True)
class Space:
    """What there is of one namespace: objects and bytes by tier, lookups' hits, its keys in their order, those of them
    that begin a chain, and what all take of each tier's room.
    """

    objects: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    bytes: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    hits: int = 0
    keys: SortedList[bytes] = field(default_factory=SortedList)
    roots: SortedList[bytes] = field(default_factory=SortedList)
    taken: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
