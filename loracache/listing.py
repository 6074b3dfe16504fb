"""Objects and the dependency tree, a page at a time: what a page costs does not grow with what is held.

Threading: the cache's thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loracache.errors import Unknown, UsageError
from loracache.index import Index, Node
from loracache.keys import KEY_BYTES, LORA_NAMESPACE
from loracache.namespaces import Namespaces
from loracache.selection import Selected, visible
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
        """The next `count` objects behind `after`; fewer where the page has looked at too many that do not match."""
        found: list[dict[str, Any]] = []
        for looked, (space, node) in enumerate(self._from(selected, after, scope), start=1):
            if tier is None or node.held_in(tier):
                found.append(self.describe(node))
            if len(found) == count or looked == _LOOKED_AT:
                return f"{space.hex()}{node.key.hex()}", found
        return "", found

    def _from(self, selected: Selected | None, after: str, scope: str) -> Iterator[tuple[bytes, Node]]:
        space, key = _place(after)
        if selected is not None and selected.keys:
            named = [node for node in map(self._index.get, selected.keys) if node is not None and node.present]
            for node in sorted(named, key=lambda node: (node.namespace, node.key)):
                behind = (node.namespace, node.key) > (space, key)
                if behind and (not scope or visible(node, self._namespaces, scope)):
                    yield node.namespace, node
            return
        spaces = self._index.spaces
        if selected is None and not scope:
            digests = list(spaces.irange(space))
        else:
            digests = sorted(digest for digest in (selected.spaces if selected else ()) if digest >= space)
        for digest in digests:
            held = spaces.get(digest)
            if held is None:
                continue
            for each in held.keys.irange(key if digest == space else None, inclusive=(False, True)):
                listed = self._index.get(each)
                assert listed is not None, f"{each.hex()} is listed and not held"
                yield digest, listed

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
        if kind == "base" or (kind == "adapter" and _is_key(rest)):
            return self._spaces(self._namespaces.of_adapter(rest), after, count, scope)
        if kind == "space" and _is_key(rest):
            return self._roots(bytes.fromhex(rest), after, count, scope)
        if not _is_key(under):
            raise UsageError(f"{under[:80]!a} is no node of the tree; give one that the tree answered")
        return self._children(bytes.fromhex(under), after, count, scope)

    def _top(self, after: str, count: int, scope: str) -> Page:
        """The base models, then the adapters: those that are held, and those that any KV is of."""
        found = [] if after else [self._sum("base", "", scope)]
        start = after.partition(":")[2]
        digests = self._namespaces.adapters_from(start, count)
        adapters = self._index.spaces.get(LORA_NAMESPACE)
        if adapters is not None and not scope:
            behind = adapters.keys.irange(bytes.fromhex(start) if start else None, inclusive=(False, True))
            digests += [key.hex() for key, _ in zip(behind, range(count), strict=False)]
        page = sorted(set(digests))[: count - len(found)]
        found += [self._sum(f"adapter:{digest}", digest, scope) for digest in page]
        return (str(found[-1]["id"]) if len(found) == count else ""), found

    def _sum(self, id_: str, adapter: str, scope: str) -> dict[str, Any]:
        node = self._index.get(bytes.fromhex(adapter)) if adapter and not scope else None
        spaces = [digest for digest in self._namespaces.of_adapter(adapter) if self._in(digest, scope)]
        return {
            "id": id_,
            "kind": "adapter" if adapter else "base",
            "digest": adapter,
            "size": node.size if node is not None else 0,
            "tiers": [tier.label for tier in _TIERS if node is not None and node.held_in(tier)],
            "pinned": [tier.label for tier in _TIERS if node is not None and node.pins >> tier & 1],
            "children": sum(digest in self._index.spaces for digest in spaces),
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

    def _spaces(self, digests: list[bytes], after: str, count: int, scope: str) -> Page:
        start = after.partition(":")[2]
        behind = sorted(each for each in digests if each.hex() > start and each in self._index.spaces)
        found = []
        for digest in [each for each in behind if self._in(each, scope)][:count]:
            namespace = self._namespaces.get(digest)
            assert namespace is not None
            found.append(
                {
                    "id": f"space:{digest.hex()}",
                    "kind": "space",
                    "model": namespace.model,
                    "names": list(self._namespaces.names(namespace.model)),
                    "kv_dtype": namespace.kv_dtype,
                    "chunk_tokens": namespace.chunk_tokens,
                    "salt": namespace.salt,
                    "children": len(self._index.spaces[digest].roots),
                }
                | self._held([digest])
            )
        return (str(found[-1]["id"]) if len(found) == count else ""), found

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
            last = self._index.get(_key(after))
            if last is None or last.parent is not node:
                raise Unknown(f"{after[:80]} has left the tree; ask for the first page again")
            child = last.next_sibling
        found: list[dict[str, Any]] = []
        while child is not None and len(found) < count:
            if child.kind is not Kind.LORA and child.present:
                found.append(self._chunk(child))
            last_seen, child = child.key.hex(), child.next_sibling
        return (last_seen if child is not None else ""), found

    def _chunk(self, node: Node) -> dict[str, Any]:
        return {"id": node.key.hex()} | self.describe(node) | {"kind": "chunk"}


def _is_key(text: str) -> bool:
    try:
        return len(bytes.fromhex(text)) == KEY_BYTES
    except ValueError:
        return False


def _key(text: str) -> bytes:
    if not _is_key(text):
        raise UsageError(f"after={text[:80]!a} is no place in this list; give `next` of the page before")
    return bytes.fromhex(text)


def _place(after: str) -> tuple[bytes, bytes]:
    if not after:
        return b"", b""
    try:
        both = bytes.fromhex(after)
    except ValueError:
        both = b""
    if len(both) != 2 * KEY_BYTES:
        raise UsageError(f"after={after[:80]!a} is no place in this list; give `next` of the page before")
    return both[:KEY_BYTES], both[KEY_BYTES:]
