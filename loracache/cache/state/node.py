# SPDX-License-Identifier: Apache-2.0
"""One object: its place in the tree, and where it stands in each tier.

`Node.state(tier)` says where; only methods of the Index change it. The tables ARENA and LOWER are every way from one
state to another: the diagram in docs/architecture.md is these, and tests see each of them gone and no other.
"""

from __future__ import annotations

from enum import Enum

from loracache.cache.state.arena import Extent
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier

__all__ = ["ARENA", "LOWER", "Node", "State", "children_of", "link", "parents_first", "unlink"]


class State(Enum):
    """Of one object in one tier."""

    ABSENT = "absent"
    """The tier has nothing of it."""
    LOADING = "loading"
    """Arena: its bytes are on their way up from disk or Redis."""
    WRITING = "writing"
    """Disk, Redis: its bytes are on their way down from the arena, queued or in flight."""
    CLEAN = "clean"
    """The tier holds it. What Redis holds is found by asking, so there an object is never clean."""
    DIRTY = "dirty"
    """Arena: held, and some tier below waits for it."""
    CONDEMNED = "condemned"
    """Arena: gone for everybody who asks; its pages wait for those who read them still."""


_S = State

ARENA: dict[tuple[State, State], str] = {
    (_S.ABSENT, _S.CLEAN): "commit",
    (_S.ABSENT, _S.LOADING): "load begins",
    (_S.LOADING, _S.CLEAN): "load ends",
    (_S.LOADING, _S.DIRTY): "load ends, an earlier write in flight",
    (_S.LOADING, _S.ABSENT): "load fails",
    (_S.LOADING, _S.CONDEMNED): "load fails, old pages read still",
    (_S.CLEAN, _S.DIRTY): "write queued",
    (_S.DIRTY, _S.CLEAN): "last write ends or is given up",
    (_S.CLEAN, _S.ABSENT): "evicted or reported bad",
    (_S.CLEAN, _S.CONDEMNED): "reported bad, read still",
    (_S.DIRTY, _S.CONDEMNED): "reported bad, write in flight",
    (_S.CONDEMNED, _S.ABSENT): "last hold ends",
    (_S.CONDEMNED, _S.CLEAN): "commit, old pages read still",
    (_S.CONDEMNED, _S.DIRTY): "commit, an earlier write in flight",
    (_S.CONDEMNED, _S.LOADING): "load begins, old pages read still",
}
"""The arena's: (from, to) -> what causes it."""

LOWER: dict[tuple[State, State], str] = {
    (_S.ABSENT, _S.WRITING): "write queued",
    (_S.WRITING, _S.CLEAN): "written to disk, or a scan finds it there",
    (_S.WRITING, _S.ABSENT): "written to Redis, refused, failed or given up",
    (_S.ABSENT, _S.CLEAN): "a scan finds it on disk",
    (_S.CLEAN, _S.ABSENT): "evicted, lost, damaged or replaced",
}
"""Of disk and Redis alike: (from, to) -> what causes it."""


class Node:
    """One object of the tree.

    `children[tier]` counts children present in that tier; all children hang in a linked list from `first_child`.
    `leases` counts holds on the extents by clients and by transfers; `pins` and `offered` (to a policy) are bit masks
    of tiers; `tick` is its last use by the index's clock; `hits` counts lookups that found it, and of what is beside a
    chain those behind which it was read; `asked`: one has found it there since; `stored` is what it takes on disk, 0
    where that is its size; `written` is the interval between two flushes in which it got there, 0 where it was found;
    `sent` is whether Redis got it, as far as is known, for it evicts on its own.

    `state` is made of four: `present` and `dirty` are bit masks of the tiers that hold it and of those that it is being
    written to; `extents` are its pages, from the beginning of a load on; `condemned` are pages that it had in the
    arena, as long as somebody holds them.
    """

    __slots__ = (
        "asked", "checksum", "children", "condemned", "dirty", "extents", "first_child", "hits", "key", "kind",
        "leases", "namespace", "next_sibling", "offered", "parent", "pins", "present", "previous_sibling", "sent",
        "size", "stored", "tick", "written",
    )  # fmt: skip

    def __init__(self, key: bytes, kind: Kind, parent: Node | None) -> None:
        self.key = key
        self.kind = kind
        self.parent = parent
        self.namespace = b""
        self.size = 0
        self.stored = 0
        self.sent = False
        self.written = 0
        self.checksum = 0
        self.extents: tuple[Extent, ...] = ()
        self.condemned: tuple[Extent, ...] = ()
        self.present = 0
        self.offered = 0
        self.children = [0, 0, 0, 0]
        self.first_child: Node | None = None
        self.next_sibling: Node | None = None
        self.previous_sibling: Node | None = None
        self.leases = 0
        self.pins = 0
        self.dirty = 0
        self.tick = 0
        self.hits = 0
        self.asked = False

    @property
    def is_root(self) -> bool:
        """Whether it begins a chain: an adapter, or the first chunk of a prompt."""
        return self.parent is None or self.parent.kind is Kind.LORA

    def held_in(self, tier: Tier) -> bool:
        """Whether `tier` holds the object's bytes."""
        return bool(self.present >> tier & 1)

    def state(self, tier: Tier) -> State:
        """Where the object stands in `tier`."""
        if self.held_in(tier):
            return State.DIRTY if tier is Tier.CPU and self.dirty else State.CLEAN
        if tier is not Tier.CPU:
            return State.WRITING if self.dirty >> tier & 1 else State.ABSENT
        if self.extents:
            return State.LOADING
        return State.CONDEMNED if self.condemned else State.ABSENT

    def info(self) -> ObjectInfo:
        """What travels with the bytes into another tier."""
        parent = self.parent.key if self.parent is not None else b""
        return ObjectInfo(self.key, parent, self.kind, self.namespace, self.size, self.checksum)


def children_of(node: Node) -> list[Node]:
    """Whatever tier they are in, or in none."""
    children = []
    child = node.first_child
    while child is not None:
        children.append(child)
        child = child.next_sibling
    return children


def link(parent: Node, child: Node) -> None:
    """`child`, which hangs nowhere, hangs below `parent` from now on."""
    after = parent.first_child
    child.next_sibling = after
    if after is not None:
        after.previous_sibling = child
    parent.first_child = child


def unlink(parent: Node, child: Node) -> None:
    """`child` hangs below `parent` no longer."""
    before, after = child.previous_sibling, child.next_sibling
    if before is None:
        parent.first_child = after
    else:
        before.next_sibling = after
    if after is not None:
        after.previous_sibling = before
    child.previous_sibling = child.next_sibling = None


def parents_first(nodes: list[Node]) -> list[Node]:
    """Sorted so that children come behind their parents, and else in the order they have."""
    among = set(nodes)
    found: dict[Node, None] = {}
    for node in nodes:
        line = []
        above: Node | None = node
        while above is not None and above in among and above not in found:
            line.append(above)
            above = above.parent
        found.update(dict.fromkeys(reversed(line)))
    return list(found)
