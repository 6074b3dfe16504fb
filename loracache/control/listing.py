# SPDX-License-Identifier: Apache-2.0
"""Objects and the dependency tree, a page at a time: what a page costs does not grow with the objects that are held.

A page is made in slices, and between two of them the index may change: each begins behind the place where the one
before it ended. Threading: the cache's thread.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from loracache.cache.state.index import Index, Node, Space
from loracache.control.selection import Selected, gather, visible
from loracache.errors import Unknown, UsageError
from loracache.keys import KEY_BYTES, LORA_NAMESPACE
from loracache.namespaces import Namespaces
from loracache.results import NodeKind
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["Listing", "Page", "sum_of"]

_LOOKED_AT = 5000  # objects for one page, at most, where most do not match
_SLICE = 250  # objects or namespaces looked at between two looks at the socket
_RUN = 4096  # digests sorted in one go
_TIERS = (Tier.CPU, Tier.DISK)

Page = tuple[str, list[dict[str, Any]]]
"""(where the next page goes on, "" at the end; what stands on this one)"""
Paging = Generator[None, None, Page]


def sum_of(index: Index, digests: Sequence[bytes]) -> Generator[None, None, tuple[Space, int]]:
    """What is held of some namespaces together, the keys left out, and of how many; yields between two slices."""
    objects, nbytes, hits, held = [0, 0, 0, 0], [0, 0, 0, 0], 0, 0
    for at, digest in enumerate(digests, start=1):
        space = index.spaces.get(digest)
        if space is not None:
            for tier in _TIERS:
                objects[tier] += space.objects[tier]
                nbytes[tier] += space.bytes[tier]
            hits += space.hits
            held += 1
        if not at % _SLICE:
            yield
    return Space(objects, nbytes, hits), held


class Listing:
    """Reads the index. Nodes of the tree are named "base" (base models), "adapter:DIGEST", "space:DIGEST" or the key of
    an object.
    """

    def __init__(self, index: Index, namespaces: Namespaces) -> None:
        self._index = index
        self._namespaces = namespaces

    # -- objects ----------

    def objects(self, selected: Selected | None, tier: Tier | None, after: str, count: int, scope: str) -> Paging:
        """The next `count` objects behind `after`; fewer where the page has looked at too many that do not match. Those
        of whole namespaces in the order of digests and keys; those that are named as they are named."""
        by_keys = selected is not None and (selected.named or selected.chains)
        named = (yield from self._named(selected, after)) if selected is not None and by_keys else None
        digests = (yield from _Sorted.of(selected.spaces)) if selected is not None and not by_keys else None
        found: list[dict[str, Any]] = []
        looked = 0
        while True:
            places, most = self._held_in(digests, after, scope) if named is None else named, looked + _SLICE
            for place, node in itertools.islice(places, _SLICE):
                after, looked = place, looked + 1
                if node is not None and (tier is None or node.held_in(tier)):
                    found.append(self.describe(node))
                if len(found) == count or looked == _LOOKED_AT:
                    return place, found
            if looked < most:
                return "", found
            yield

    def _named(self, selected: Selected, after: str) -> Generator[None, None, Iterator[tuple[str, Node | None]]]:
        if after and not (after.isascii() and after.isdigit()):
            raise _no_place(after)
        start = int(after or 0)
        keys = selected.keys(0 if selected.chains else start)
        for at in range(0, start if selected.chains else 0, _SLICE):  # hashed, a few at a time
            deque(itertools.islice(keys, min(_SLICE, start - at)), maxlen=0)
            yield
        return self._places(selected, keys, start)

    def _places(self, selected: Selected, keys: Iterator[bytes], start: int) -> Iterator[tuple[str, Node | None]]:
        for position, key in enumerate(keys, start=start + 1):
            node = self._index.get(key)
            shown = node is not None and node.present and selected.shows(self._index, self._namespaces, key)
            yield str(position), node if shown else None

    def _held_in(self, selected: _Sorted | None, after: str, scope: str) -> Iterator[tuple[str, Node | None]]:
        """Places behind `after`. Of use only until something changes."""
        space, key = _place(after)
        spaces = self._index.spaces
        digests: Iterable[bytes] = ()
        if selected is not None:
            digests = selected.behind(space, inclusive=True)
        elif not scope:
            digests = spaces.irange(space)
        for digest in digests:
            held = spaces.get(digest)
            if held is None:
                if digest != space or not after:
                    yield f"{digest.hex()}{bytes(KEY_BYTES).hex()}", None
                continue
            for each in held.keys.irange(key if digest == space else None, inclusive=(False, True)):
                listed = self._index.get(each)
                assert listed is not None, f"{each.hex()} is listed and not held"
                yield f"{digest.hex()}{each.hex()}", listed

    def describe(self, node: Node) -> dict[str, Any]:
        """One object, as users see it."""
        parent = node.parent
        return {
            "key": node.key.hex(),
            "kind": node.kind.name.lower(),
            "namespace": node.namespace.hex(),
            "parent": parent.key.hex() if parent is not None else "",
            "size": node.size,
            "checksum": f"{node.checksum:016x}",
            "stored": node.stored or node.size,
            "tiers": [tier.label for tier in _TIERS if node.held_in(tier)],
            "pinned": [tier.label for tier in _TIERS if node.pins >> tier & 1],
            "leases": node.leases,
            "hits": node.hits,
            "children": max(node.children[tier] for tier in _TIERS),
        }

    # -- the tree ----------

    def tree(self, under: str, after: str, count: int, scope: str) -> Paging:
        """The next `count` nodes below `under`. Raises Unknown where that is not there (any more)."""
        if not under:
            return (yield from self._top(after, count, scope))
        kind, _, rest = under.partition(":")
        if under == NodeKind.BASE:
            return (yield from self._spaces("", after, count, scope))
        if kind == NodeKind.ADAPTER and _is_key(rest):
            yield from self._check_adapter(rest, scope)
            return (yield from self._spaces(rest, after, count, scope))
        if kind == NodeKind.SPACE and _is_key(rest):
            return (yield from self._roots(bytes.fromhex(rest), after, count, scope))
        if not _is_key(under):
            raise UsageError(f"{under[:80]!a} is not a node of the tree; give one that the tree answered")
        return self._children(bytes.fromhex(under), after, count, scope)

    def _top(self, after: str, count: int, scope: str) -> Paging:
        """The base models, then the adapters: those that are held, and those that any KV is of."""
        start = _digest(after, "adapter") if after not in ("", NodeKind.BASE) else b""
        own = (yield from self._by_adapter(scope)) if scope else None
        found = [] if after else [(yield from self._sum(NodeKind.BASE, "", own))]
        if own is not None:
            behind = (yield from _Sorted.of([digest for digest in own if digest])).behind(start)
            digests = [digest.hex() for digest in itertools.islice(behind, count)]
        else:
            digests = self._namespaces.adapters_from(start.hex(), count)
            adapters = self._index.spaces.get(LORA_NAMESPACE)
            held = adapters.keys.irange(start, inclusive=(False, True)) if adapters is not None else ()
            digests += [key.hex() for key in itertools.islice(held, count)]
        for digest in sorted(set(digests))[: count - len(found)]:
            found.append((yield from self._sum(f"adapter:{digest}", digest, own)))
            yield
        return (str(found[-1]["id"]) if len(found) == count else ""), found

    def _by_adapter(self, scope: str) -> Generator[None, None, dict[bytes, list[bytes]]]:
        """A tenant's namespaces, by their adapter's key."""
        found: dict[bytes, list[bytes]] = {}
        for part in self._namespaces.matching_parts("", None, scope):
            for digest in part:
                if (space := self._namespaces.get(digest)) is not None:
                    found.setdefault(space.adapter_key(), []).append(digest)
            yield
        return found

    def _check_adapter(self, digest: str, scope: str) -> Iterator[None]:
        """Raises Unknown for an adapter that is not held and that nothing is of."""
        node = self._index.get(bytes.fromhex(digest)) if not scope else None
        if node is not None and node.kind is Kind.LORA:
            return
        for part in self._namespaces.matching_parts("", digest, scope or None):
            if part:
                return
            yield
        raise Unknown(f"nothing is known of adapter:{digest}")

    def _sum(
        self, id_: str, adapter: str, own: dict[bytes, list[bytes]] | None
    ) -> Generator[None, None, dict[str, Any]]:
        """own: of the tenant that asks, its namespaces by adapter."""
        key = bytes.fromhex(adapter)
        spaces = list(self._namespaces.of_adapter(adapter)) if own is None else own.get(key, [])
        total, held = yield from sum_of(self._index, spaces)
        node = self._index.get(key) if adapter and own is None else None
        return {
            "id": id_,
            "kind": NodeKind.ADAPTER if adapter else NodeKind.BASE,
            "digest": adapter,
            "size": node.size if node is not None else 0,
            "tiers": [tier.label for tier in _TIERS if node is not None and node.held_in(tier)],
            "pinned": [tier.label for tier in _TIERS if node is not None and node.pins >> tier & 1],
            "children": held,
        } | _told(total)

    def _in(self, digest: bytes, scope: str) -> bool:
        namespace = self._namespaces.get(digest)
        return not scope or (namespace is not None and namespace.salt == scope)

    def _spaces(self, adapter: str, after: str, count: int, scope: str) -> Paging:
        start = _digest(after, "space") if after else b""
        own = None
        if scope:
            own = yield from _Sorted.of((yield from gather(self._namespaces.matching_parts("", adapter, scope))))
        found: list[dict[str, Any]] = []
        looked = 0
        while True:
            behind = self._namespaces.of_adapter_from(adapter, start) if own is None else own.behind(start)
            most = looked + _SLICE
            for digest in itertools.islice(behind, _SLICE):
                start, looked = digest, looked + 1
                if digest in self._index.spaces:
                    found.append(self._space(digest))
                if len(found) == count or looked == _LOOKED_AT:
                    return f"space:{digest.hex()}", found
            if looked < most:
                return "", found
            yield

    def _space(self, digest: bytes) -> dict[str, Any]:
        namespace = self._namespaces.get(digest)
        assert namespace is not None
        space = self._index.spaces[digest]
        return {
            "id": f"space:{digest.hex()}",
            "kind": NodeKind.SPACE,
            "model": namespace.model,
            "names": list(self._namespaces.names(namespace.model)),
            "kv_dtype": namespace.kv_dtype,
            "chunk_tokens": namespace.chunk_tokens,
            "salt": namespace.salt,
            "children": len(space.roots),
        } | _told(space)

    def _roots(self, digest: bytes, after: str, count: int, scope: str) -> Paging:
        if digest not in self._index.spaces or not self._in(digest, scope):
            raise Unknown(f"nothing is held of space:{digest.hex()}")
        start = _key(after) if after else None
        found: list[dict[str, Any]] = []
        while (space := self._index.spaces.get(digest)) is not None:
            part = list(itertools.islice(space.roots.irange(start, inclusive=(False, True)), _SLICE))
            nodes = [node for node in map(self._index.get, part[: count - len(found)]) if node is not None]
            found += map(self._chunk, nodes)
            if len(found) == count:
                return str(found[-1]["id"]), found
            if len(part) < _SLICE:
                break
            start = part[-1]
            yield
        return "", found

    def _children(self, key: bytes, after: str, count: int, scope: str) -> Page:
        node = self._index.get(key)
        if node is None or (scope and not visible(node, self._namespaces, scope)):
            raise Unknown(f"no object {key.hex()} is held")
        child = node.first_child
        if after:
            seen = self._index.get(_key(after))
            if seen is None or seen.parent is not node:
                raise Unknown(f"{after[:80]} has left the tree; ask for the first page again")
            child = seen.next_sibling
        found: list[dict[str, Any]] = []
        looked, last = 0, after
        while child is not None and len(found) < count and looked < _LOOKED_AT:
            if child.kind is not Kind.LORA and child.present:
                found.append(self._chunk(child))
            looked, last, child = looked + 1, child.key.hex(), child.next_sibling
        return (last if child is not None else ""), found

    def _chunk(self, node: Node) -> dict[str, Any]:
        return {"id": node.key.hex()} | self.describe(node) | {"kind": NodeKind.CHUNK}


class _Sorted:
    """Digests in their order, sorted a run at a time: all at once they would keep others waiting."""

    def __init__(self, runs: list[list[bytes]]) -> None:
        self._runs = runs

    @classmethod
    def of(cls, digests: Sequence[bytes]) -> Generator[None, None, _Sorted]:
        """Yields between two runs."""
        runs: list[list[bytes]] = []
        for at in range(0, len(digests), _RUN):
            runs.append(sorted(digests[at : at + _RUN]))
            yield
        return cls(runs)

    def behind(self, digest: bytes, *, inclusive: bool = False) -> Iterator[bytes]:
        """Those after one, in their order."""
        at = bisect_left if inclusive else bisect_right
        return heapq.merge(*(run[at(run, digest) :] for run in self._runs))


def _told(space: Space) -> dict[str, Any]:
    return {
        "objects": {tier.label: space.objects[tier] for tier in _TIERS},
        "bytes": {tier.label: space.bytes[tier] for tier in _TIERS},
        "hits": space.hits,
    }


def _is_key(text: str) -> bool:
    try:
        return len(bytes.fromhex(text)) == KEY_BYTES
    except ValueError:
        return False


def _key(text: str) -> bytes:
    if not _is_key(text):
        raise _no_place(text)
    return bytes.fromhex(text)


def _digest(after: str, kind: str) -> bytes:
    """Of the node of the tree that a page ended with."""
    named, _, digest = after.partition(":")
    if named != kind or not _is_key(digest):
        raise _no_place(after)
    return bytes.fromhex(digest)


def _no_place(after: str) -> UsageError:
    return UsageError(f"after={after[:80]!a} is not a place in this list; give `next` of the page before")


def _place(after: str) -> tuple[bytes, bytes]:
    if not after:
        return b"", b""
    try:
        both = bytes.fromhex(after)
    except ValueError:
        both = b""
    if len(both) != 2 * KEY_BYTES:
        raise _no_place(after)
    return both[:KEY_BYTES], both[KEY_BYTES:]
