"""Which objects an operator means: by keys, adapter, model, token ids or tenant. Threading: the cache's thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from loracache.errors import Unknown, UsageError
from loracache.index import Index, Node
from loracache.keys import KEY_BYTES, Namespace
from loracache.namespaces import Namespaces

__all__ = ["Chain", "Selected", "Selector", "select"]

ANY_MODEL = "*"


@dataclass(frozen=True, slots=True)
class Selector:
    """What was asked for; at least one field is set.

    keys: of objects, in the order of their chain. model: identity, its first 8 digits or more, a name that engines
    serve it under, or "*". tokens: little-endian int32. adapter: hex digest, "" for the base model, None for any (with
    tokens: the base model). salt: a tenant's salt digest, "" for requests without a salt, None for any (with tokens:
    without).
    """

    keys: bytes = b""
    model: str = ""
    tokens: bytes = b""
    adapter: str | None = None
    salt: str | None = None

    @property
    def by_namespace(self) -> bool:
        """Whether it means KV by what it belongs to, rather than objects by their keys."""
        return bool(self.model or self.tokens) or self.salt is not None


@dataclass(frozen=True, slots=True)
class Chain:
    """The objects of one prompt in one namespace, chunk by chunk, a chunk's shards side by side."""

    namespace: Namespace
    keys: list[bytes]


@dataclass(frozen=True, slots=True)
class Selected:
    """What a selector stands for: keys one by one, and all of some namespaces. scope: the salt digest outside of which
    nothing is seen ("": everything is). ours: whether `keys` were derived inside of it."""

    keys: Sequence[bytes] = ()
    spaces: Sequence[bytes] = ()
    scope: str = ""
    ours: bool = False
    chains: Sequence[Chain] = field(default=())

    def parts(self, index: Index, namespaces: Namespaces, size: int) -> Iterator[list[bytes]]:
        """The keys, at most `size` at a time; of whole namespaces all that is held when their turn comes."""
        keys = self.keys
        if self.scope and not self.ours:
            keys = [key for key in keys if visible(index.get(key), namespaces, self.scope)]
        for at in range(0, len(keys), size):
            yield list(keys[at : at + size])
        for digest in self.spaces:
            space = index.spaces.get(digest)
            if space is None:
                continue
            held = list(space.keys)
            for at in range(0, len(held), size):
                yield held[at : at + size]


def visible(node: Node | None, namespaces: Namespaces, scope: str) -> bool:
    """Whether a node belongs to the tenant whose salt digest is `scope`."""
    namespace = namespaces.get(node.namespace) if node is not None else None
    return namespace is not None and namespace.salt == scope


def select(selector: Selector, namespaces: Namespaces, scope: str) -> Selected:
    """What `selector` stands for. Raises UsageError for a contradictory one, Unknown for a model that nobody knows."""
    if selector.keys and selector.by_namespace:
        raise UsageError("a selector by keys takes neither model, tokens nor tenant: keys say it all")
    if scope and selector.salt not in (None, scope):
        return Selected(scope=scope)
    if selector.keys:
        keys = [selector.keys[at : at + KEY_BYTES] for at in range(0, len(selector.keys), KEY_BYTES)]
        return Selected(list(dict.fromkeys(keys)), scope=scope)
    salt = scope or selector.salt
    if not selector.by_namespace and not scope:
        if not selector.adapter:
            raise UsageError("a selector is empty; give keys, adapter, model, tokens or tenant")
        return Selected([bytes.fromhex(selector.adapter)])
    model = "" if selector.model == ANY_MODEL else selector.model
    if model and not scope and not namespaces.matching(model, None, None):
        raise Unknown(f"no engine has registered a model {model[:100]!a}; give its served name or identity, or *")
    if not selector.tokens:
        return Selected(spaces=namespaces.matching(model, selector.adapter, salt), scope=scope)
    if not selector.model:
        raise UsageError("a selector by tokens needs the model that they are of")
    tokens = np.frombuffer(selector.tokens, dtype="<i4")
    found = namespaces.matching(model, selector.adapter or "", salt or "")
    chains = [Chain(space, space.object_keys(tokens)) for space in map(namespaces.get, found) if space is not None]
    return Selected([key for chain in chains for key in chain.keys], (), scope, True, chains)
