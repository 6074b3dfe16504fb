# SPDX-License-Identifier: Apache-2.0
"""What is worth a place in the lower tiers: everything, what was asked for twice, or what is likely to be.

Asked when an object has come into the arena, and again when it is used there. A chunk is never asked for without its
parents, so those are known where it is; and a chunk that is written takes along those of its parents that the tier
lacks. What stands beside a chunk goes where that went. Adapters are always admitted: nothing computes one again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from math import log2

from loracache.cache.policy.lower_shadow import SHARES, Kinds, LowerShadows
from loracache.cache.policy.names import Names
from loracache.cache.state.index import Node
from loracache.results import Refusal
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["AdaptiveAdmission", "AdmitAll", "SecondTouch"]

_HEADS = 1024  # chains that were looked up, and whose new part has not been stored yet
_SHARED = 8  # hits of the last known object of a chain: many begin with it, and what follows is a new session's
_WORTH_FORGETTING = 10_000  # objects that are no more
_STEPS = 2  # kinds by the length of what is new, for each time that it doubles


class AdmitAll:
    """Everything is admitted as it comes. Of each: objects() says how many there are, memory() and lower() for how many
    there is room in the arena and in the tier below it.
    """

    def __init__(self, objects: Callable[[], int], memory: Callable[[], int], lower: Callable[[], int]) -> None:
        pass

    def asked(self, keys: Sequence[bytes], found: Sequence[Node]) -> None:
        """A lookup asks for a chain, of which the first are `found`."""

    def work(self) -> Iterator[None]:
        """Look at what was asked; yields between two slices."""
        yield from ()

    def came(self, node: Node) -> Refusal:
        """Why an object that has come into the arena is not to be written down, or NONE."""
        return Refusal.NONE

    def again(self, node: Node) -> bool:
        """Whether one that is used in the arena, and that some lower tier lacks, is to be written down."""
        return False


class SecondTouch(AdmitAll):
    """What comes again is admitted, and what is used while it is in the arena."""

    def __init__(self, objects: Callable[[], int], memory: Callable[[], int], lower: Callable[[], int]) -> None:
        self._objects = objects
        self._seen = Names()

    def came(self, node: Node) -> Refusal:
        """Why an object that has come into the arena is not to be written down: it was not there before."""
        name = hash(node.key)
        if node.kind is Kind.LORA or name in self._seen or _goes_with_its_chunk(node):
            return Refusal.NONE
        self._seen.add(name, self._objects())
        return self._first(node)

    def again(self, node: Node) -> bool:
        """Whether one that is used in the arena, and that some lower tier lacks, is to be written down."""
        return True

    def _first(self, node: Node) -> Refusal:
        """Of one that comes for the first time."""
        return Refusal.FIRST_TOUCH


class AdaptiveAdmission(SecondTouch):
    """What comes again is admitted, and of what comes for the first time those kinds that come again often enough.

    A kind is whether the chain goes on from what is known, a session's own or what many share, and how much is new. How
    often is often enough, shadows of memory and the lower tier find out: the least that is written for about what the
    best of them finds. A namespace (a model with an adapter, and a tenant) of which next to nothing comes again is
    admitted by second touch alone.
    """

    def __init__(self, objects: Callable[[], int], memory: Callable[[], int], lower: Callable[[], int]) -> None:
        super().__init__(objects, memory, lower)
        self._kinds = Kinds()
        self._shadows = LowerShadows(self._kinds, memory, lower)
        self._spaces = Kinds()
        self._most = 0  # objects that there were
        self._heads: OrderedDict[int, Hashable] = OrderedDict()  # first names of what is new -> their kinds
        self._parts: OrderedDict[int, Hashable] = OrderedDict()  # names last stored of such parts -> the same

    def asked(self, keys: Sequence[bytes], found: Sequence[Node]) -> None:
        """A lookup asks for a chain: what is new in it is of one kind."""
        if found:
            once = len(found) - bisect_left(found, -1, key=lambda node: -node.hits)  # parents are found more often
            self._spaces.again(found[-1].namespace, once)
        known = self._known(keys, len(found))
        new = len(keys) - known
        shared = len(found) == known > 0 and found[-1].hits > _SHARED
        kind = (known > 0, shared, int(_STEPS * log2(new + 1)))
        if new:
            _remember(self._heads, hash(keys[known]), kind)
        self._shadows.ask(keys, known, kind)

    def work(self) -> Iterator[None]:
        """Look at what was asked; yields between two slices."""
        objects = self._objects()
        self._most = max(self._most, objects)
        if self._most > _WORTH_FORGETTING + 4 * objects:  # names that lie among what has gone keep its memory
            self._most = objects
            for names in (self._heads, self._parts):
                names.clear()
            self._shadows.forget()
        return self._shadows.work()

    def came(self, node: Node) -> Refusal:
        """Why an object that has come into the arena is not to be written down, or NONE."""
        if node.kind is Kind.KV and hash(node.key) in self._seen:
            self._spaces.again(node.namespace)
        return super().came(node)

    def _known(self, keys: Sequence[bytes], held: int) -> int:
        """How many of a chain's first objects came before; none comes without its parents."""
        low, high = held, len(keys)
        while low < high:
            middle = (low + high) // 2
            if hash(keys[middle]) in self._seen:
                low = middle + 1
            else:
                high = middle
        return low

    def _first(self, node: Node) -> Refusal:
        name = hash(node.key)
        if _chunk_of(node) is not None:  # it goes where its chunk went, whose kind is that of what follows the chunk
            return Refusal.FIRST_TOUCH
        kind = self._heads.pop(name, None)
        if kind is None and node.parent is not None:
            kind = self._parts.pop(hash(node.parent.key), None)
        _remember(self._parts, name, kind)
        if node.kind is Kind.KV:  # of what is beside chains no lookup says that it came again
            self._spaces.came(node.namespace)
        if self._spaces.share(node.namespace) < SHARES[0]:
            return Refusal.FIRST_TOUCH
        return Refusal.NONE if self._kinds.share(kind) >= self._shadows.share else Refusal.FIRST_TOUCH


def _remember(kinds: OrderedDict[int, Hashable], name: int, kind: Hashable) -> None:
    kinds[name] = kind
    if len(kinds) > _HEADS:
        kinds.popitem(last=False)


def _chunk_of(node: Node) -> Node | None:
    """The chunk that an object stands beside; None for all others, and where no layer has full attention."""
    above = node.parent
    return above if node.kind is Kind.BESIDE and above is not None and above.kind is not Kind.LORA else None


def _goes_with_its_chunk(node: Node) -> bool:
    """Whether it stands beside a chunk that a lower tier has, or waits for: that may be of no use there without it."""
    chunk = _chunk_of(node)
    return chunk is not None and (chunk.sent or bool(chunk.dirty) or chunk.held_in(Tier.DISK))
