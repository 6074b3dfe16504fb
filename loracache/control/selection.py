# SPDX-License-Identifier: Apache-2.0
"""Which objects an operator means: by keys, adapter, model, token ids or tenant. Threading: the cache's thread."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from loracache.cache.state.index import Index, Node
from loracache.errors import Rejected, Unknown, UsageError
from loracache.keys import KEY_BYTES, Namespace, TokenArray
from loracache.namespaces import Namespaces

__all__ = ["ANY_MODEL", "Chain", "Selected", "Selector", "all_known", "gather", "select", "visible"]

ANY_MODEL = "*"
_KNOWN_S, _LOOK_S = 8.0, 0.05
_CHUNKS = 64  # hashed between two looks at the socket
_CHAINS = 500  # made between two looks

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Selector:
    """What was asked for; at least one field is set.

    keys: of objects, in the order of their chain. model: identity, its first 8 digits or more, a name that engines
    serve it under, or "*". tokens: little-endian int32. adapter: hex digest, "" for the base model, None for any (with
    tokens: the base model). salt: a tenant's salt digest, "" for requests without a salt, None for any (with tokens:
    without). Keys or tokens that are given and empty stand for nothing, not for any.
    """

    keys: bytes | None = None
    model: str = ""
    tokens: bytes | None = None
    adapter: str | None = None
    salt: str | None = None

    @property
    def by_namespace(self) -> bool:
        """Whether it means KV by what it belongs to, rather than objects by their keys."""
        return bool(self.model) or self.tokens is not None or self.salt is not None


@dataclass(frozen=True, slots=True)
class Chain:
    """The objects of one prompt in one namespace, chunk by chunk: a chunk's shards side by side, and what is beside it.
    They are hashed when they are asked for: a prompt may be looked for in very many namespaces.
    """

    namespace: Namespace
    tokens: TokenArray

    @property
    def chunks(self) -> int:
        """Whole chunks of the prompt."""
        return len(self.tokens) // self.namespace.chunk_tokens

    def __len__(self) -> int:
        return self.chunks * self.namespace.width

    def keys(self) -> Iterator[bytes]:
        """Keys of the objects, hashed a few chunks at a time as they are asked for."""
        return self.namespace.keys_by_parts(self.tokens, _CHUNKS)


@dataclass(frozen=True, slots=True)
class Selected:
    """What a selector stands for: the keys that it names, or those of chains, or all of some namespaces. scope: the
    salt digest outside of which nothing is seen ("": everything is); chains and namespaces are inside of it. first:
    keys that come before all these.
    """

    named: bytes = b""
    chains: Sequence[Chain] = ()
    spaces: Sequence[bytes] = ()
    scope: str = ""
    first: Sequence[bytes] = ()

    @property
    def total(self) -> int | None:
        """How many keys there are; None where that is seen only when they are looked at, or by looking at very many."""
        if self.spaces or len(self.chains) > _CHAINS:
            return None
        return len(self.first) + len(self.named) // KEY_BYTES + sum(map(len, self.chains))

    def keys(self, start: int = 0) -> Iterator[bytes]:
        """Keys by name or of chains, from that position on."""
        for at in range(start * KEY_BYTES, len(self.named), KEY_BYTES):
            yield self.named[at : at + KEY_BYTES]
        start = max(0, start - len(self.named) // KEY_BYTES)
        for chain in self.chains:
            if start < len(chain):
                yield from itertools.islice(chain.keys(), start, None)
            start = max(0, start - len(chain))

    def parts(self, index: Index, namespaces: Namespaces, size: int) -> Iterator[list[bytes]]:
        """The keys, each once, at most `size` at a time (none, where a tenant may not see them); of whole namespaces
        what is held when its turn comes, in the order of keys."""
        seen: set[bytes] = set()
        keys = itertools.chain(self.first, self.keys())
        while part := list(itertools.islice(keys, size)):
            fresh = [key for key in dict.fromkeys(part) if key not in seen]
            seen.update(fresh)
            yield [key for key in fresh if self.shows(index, namespaces, key)]
        for digest in self.spaces:
            after = b""
            while (space := index.spaces.get(digest)) is not None:
                part = list(itertools.islice(space.keys.irange(after, inclusive=(False, True)), size))
                if not part:
                    break
                after = part[-1]
                yield part

    def behind_adapters(self, index: Index) -> Selected:
        """The same, and before it the adapters that its chains are of, as far as a tier that the index knows has
        them."""
        keys = {chain.namespace.adapter_key() for chain in self.chains if chain.namespace.adapter}
        nodes = (index.get(key) for key in sorted(keys))
        return replace(self, first=[node.key for node in nodes if node is not None and node.present])

    def shows(self, index: Index, namespaces: Namespaces, key: bytes) -> bool:
        """Whether the tenant that asks may know of one of `keys`."""
        return not self.scope or not self.named or visible(index.get(key), namespaces, self.scope)


def visible(node: Node | None, namespaces: Namespaces, scope: str) -> bool:
    """Whether a node belongs to the tenant whose salt digest is `scope`."""
    namespace = namespaces.get(node.namespace) if node is not None else None
    return namespace is not None and namespace.salt == scope


def gather(parts: Iterable[Iterable[_T]]) -> Generator[None, None, list[_T]]:
    """All that is in `parts`; yields after each."""
    found: list[_T] = []
    for part in parts:
        found += part
        yield
    return found


def select(selector: Selector, namespaces: Namespaces, scope: str) -> Generator[None, None, Selected]:
    """What `selector` stands for. Raises UsageError for a contradictory one, Unknown for a model that nobody knows.
    Yields between two slices, for others to be served."""
    if selector.keys is not None and (selector.by_namespace or selector.adapter is not None):
        raise UsageError("a selector by keys takes neither adapter, model, tokens nor tenant: keys say it all")
    if scope and selector.salt not in (None, scope):
        return Selected(scope=scope)
    if selector.keys is not None:
        return Selected(selector.keys, scope=scope)
    salt = scope or selector.salt
    if not selector.by_namespace and not scope:
        if not selector.adapter:
            raise UsageError("a selector is empty; give keys, adapter, model, tokens or tenant")
        return Selected(bytes.fromhex(selector.adapter))
    model = "" if selector.model == ANY_MODEL else selector.model
    if model and not scope and not namespaces.knows(model):
        raise Unknown(f"no engine has registered a model {model[:100]!a}; give its served name or identity, or *")
    if selector.tokens is None:
        found = yield from gather(namespaces.matching_parts(model, selector.adapter, salt))
        return Selected(spaces=found, scope=scope)
    if not selector.model:
        raise UsageError("a selector by tokens needs the model that they are of")
    tokens = np.frombuffer(selector.tokens, dtype="<i4")
    found = yield from gather(namespaces.matching_parts(model, selector.adapter or "", salt or ""))
    chains: list[Chain] = []
    for at in range(0, len(found), _CHAINS):
        chains += [Chain(space, tokens) for space in map(namespaces.get, found[at : at + _CHAINS]) if space is not None]
        yield
    return Selected(chains=chains, scope=scope)


async def all_known(namespaces: Namespaces) -> None:
    """Wait while the namespaces of an earlier run are read: a model may be known then. Raises Rejected."""
    for _ in range(int(_KNOWN_S / _LOOK_S)):
        if not namespaces.reading:
            return
        await asyncio.sleep(_LOOK_S)
    raise Rejected("the namespaces beside the disk tier are being read still; ask again later")
