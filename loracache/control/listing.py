# SPDX-License-Identifier: Apache-2.0
"""Objects and the dependency tree, a page at a time: what a page costs does not grow with what is held.

Threading: the cache's thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from loracache.cache.state.index import Index, Node
from loracache.control.selection import Selected, visible
from loracache.errors import Unknown, UsageError
from loracache.keys import KEY_BYTES, LORA_NAMESPACE
from loracache.namespaces import Namespaces
from loracache.results import NodeKind
from loracache.storage_backends.base import Kind
from loracache.tiers import Tier

__all__ = ["Listing", "Page"]

_LOOKED_AT = 5000  # objects for one page, at most, where most do not match
_TIERS = (Tier.CPU, Tier.DISK)

Page = tuple[str, list[dict[str, Any]]]
"""(where the next page goes on, "" at the end; what stands on this one)"""


class Listing:
    """Reads the index. Nodes of the tree are named "base" (base models), "adapter:DIGEST", "space:DIGEST" or the key of
    an object.
    """

    def __init__(self, index: Index, namespaces: Namespaces) -> None:
        self._index = index
        self._namespaces = namespaces

    # -- objects ----------

    def objects(self, selected: Selected | None, tier: Tier | None, after: str, count: int, scope: str) -> Page:
        """The next `count` objects behind `after`; fewer where the page has looked at too many that do not match. Those
        of whole namespaces in the order of digests and keys; those that are named as they are named."""
        by_keys = selected is not None and (selected.named or selected.chains)
        places = self._named(selected, after) if selected and by_keys else self._held_in(selected, after, scope)
        found: list[dict[str, Any]] = []
        for looked, (place, node) in enumerate(places, start=1):
            if node is not None and (tier is None or node.held_in(tier)):
                found.append(self.describe(node))
            if len(found) == count or looked == _LOOKED_AT:
                return place, found
        return "", found

    def _named(self, selected: Selected, after: str) -> Iterator[tuple[str, Node | None]]:
        if after and not (after.isascii() and after.isdigit()):
            raise _no_place(after)
        start = int(after or 0)
        for position, key in enumerate(selected.keys(start), start=start + 1):
            node = self._index.get(key)
            shown = node is not None and node.present and selected.shows(self._index, self._namespaces, key)
            yield str(position), node if shown else None

    def _held_in(self, selected: Selected | None, after: str, scope: str) -> Iterator[tuple[str, Node | None]]:
        space, key = _place(after)
        spaces = self._index.spaces
        digests: Iterable[bytes] = ()
        if selected is not None:
            digests = sorted(digest for digest in selected.spaces if digest >= space)
        elif not scope:
            digests = spaces.irange(space)
        for digest in digests:
            held = spaces.get(digest)
            if held is None:
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

    def tree(self, under: str, after: str, count: int, scope: str) -> Page:
        """The next `count` nodes below `under`. Raises Unknown where that is not there (any more)."""
        if not under:
            return self._top(after, count, scope)
        kind, _, rest = under.partition(":")
        if under == NodeKind.BASE:
            return self._spaces("", after, count, scope)
        if kind == NodeKind.ADAPTER and _is_key(rest):
            return self._spaces(self._known_adapter(rest, scope), after, count, scope)
        if kind == NodeKind.SPACE and _is_key(rest):
            return self._roots(bytes.fromhex(rest), after, count, scope)
        if not _is_key(under):
            raise UsageError(f"{under[:80]!a} is not a node of the tree; give one that the tree answered")
        return self._children(bytes.fromhex(under), after, count, scope)

    def _top(self, after: str, count: int, scope: str) -> Page:
        """The base models, then the adapters: those that are held, and those that any KV is of."""
        found = [] if after else [self._sum(NodeKind.BASE, "", scope)]
        start = _digest(after, "adapter") if after not in ("", NodeKind.BASE) else b""
        if scope:
            digests = [each for each in self._adapters_of(scope) if each > start.hex()]
        else:
            digests = self._namespaces.adapters_from(start.hex(), count)
            adapters = self._index.spaces.get(LORA_NAMESPACE)
            behind = adapters.keys.irange(start, inclusive=(False, True)) if adapters is not None else ()
            digests += [key.hex() for key in itertools.islice(behind, count)]
        page = sorted(set(digests))[: count - len(found)]
        found += [self._sum(f"adapter:{digest}", digest, scope) for digest in page]
        return (str(found[-1]["id"]) if len(found) == count else ""), found

    def _adapters_of(self, scope: str) -> set[str]:
        spaces = map(self._namespaces.get, self._namespaces.matching("", None, scope))
        return {space.adapter for space in spaces if space is not None and space.adapter}

    def _known_adapter(self, digest: str, scope: str) -> str:
        node = self._index.get(bytes.fromhex(digest)) if not scope else None
        held = node is not None and node.kind is Kind.LORA
        if not held and not self._namespaces.matching("", digest, scope or None):
            raise Unknown(f"nothing is known of adapter:{digest}")
        return digest

    def _sum(self, id_: str, adapter: str, scope: str) -> dict[str, Any]:
        node = self._index.get(bytes.fromhex(adapter)) if adapter and not scope else None
        there = self._index.spaces
        own = self._namespaces.matching("", adapter, scope) if scope else self._namespaces.of_adapter(adapter)
        spaces = [digest for digest in own if digest in there]
        return {
            "id": id_,
            "kind": NodeKind.ADAPTER if adapter else NodeKind.BASE,
            "digest": adapter,
            "size": node.size if node is not None else 0,
            "tiers": [tier.label for tier in _TIERS if node is not None and node.held_in(tier)],
            "pinned": [tier.label for tier in _TIERS if node is not None and node.pins >> tier & 1],
            "children": len(spaces),
        } | self._held(spaces)

    def _in(self, digest: bytes, scope: str) -> bool:
        namespace = self._namespaces.get(digest)
        return not scope or (namespace is not None and namespace.salt == scope)

    def _held(self, digests: list[bytes]) -> dict[str, Any]:
        held = [self._index.spaces[digest] for digest in digests if digest in self._index.spaces]
        return {
            "objects": {tier.label: sum(space.objects[tier] for space in held) for tier in _TIERS},
            "bytes": {tier.label: sum(space.bytes[tier] for space in held) for tier in _TIERS},
            "hits": sum(space.hits for space in held),
        }

    def _spaces(self, adapter: str, after: str, count: int, scope: str) -> Page:
        start = _digest(after, "space") if after else b""
        if scope:
            own = self._namespaces.matching("", adapter, scope)
            behind: Iterable[bytes] = sorted(digest for digest in own if digest > start)
        else:
            behind = self._namespaces.of_adapter_from(adapter, start)
        found: list[dict[str, Any]] = []
        for looked, digest in enumerate(behind, start=1):
            if digest in self._index.spaces:
                found.append(self._space(digest))
            if len(found) == count or looked == _LOOKED_AT:
                return f"space:{digest.hex()}", found
        return "", found

    def _space(self, digest: bytes) -> dict[str, Any]:
        namespace = self._namespaces.get(digest)
        assert namespace is not None
        return {
            "id": f"space:{digest.hex()}",
            "kind": NodeKind.SPACE,
            "model": namespace.model,
            "names": list(self._namespaces.names(namespace.model)),
            "kv_dtype": namespace.kv_dtype,
            "chunk_tokens": namespace.chunk_tokens,
            "salt": namespace.salt,
            "children": len(self._index.spaces[digest].roots),
        } | self._held([digest])

    def _roots(self, digest: bytes, after: str, count: int, scope: str) -> Page:
        space = self._index.spaces.get(digest)
        if space is None or not self._in(digest, scope):
            raise Unknown(f"nothing is held of space:{digest.hex()}")
        behind = space.roots.irange(_key(after) if after else None, inclusive=(False, True))
        found = [self._chunk(node) for node, _ in zip(map(self._index.get, behind), range(count), strict=False) if node]
        return (str(found[-1]["id"]) if len(found) == count else ""), found

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
