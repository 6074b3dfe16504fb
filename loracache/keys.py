# SPDX-License-Identifier: Apache-2.0
"""Names of everything cached: namespaces, chunk keys, object keys, checksums.

Two machines that know the same model, tokens and adapter content agree on every key: no process seed, no Python
`hash()`, no path and no adapter name goes into one. Pure functions and frozen values; safe from any thread.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import xxhash

from loracache.errors import UsageError
from loracache.groups import Group, Need

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    TokenArray: TypeAlias = npt.NDArray[np.int32]
else:
    TokenArray = Any  # commands that have no tokens do without numpy

__all__ = [
    "KEY_BYTES", "LORA_NAMESPACE", "Media", "Namespace", "TokenArray", "checksum", "chunk_keys", "is_digest",
    "object_key", "salt_digest", "token_array",
]  # fmt: skip

KEY_BYTES = 32
LORA_NAMESPACE = hashlib.sha256(b"loracache/adapters").digest()  # of all adapters: their digest is all their name
_HEX = re.compile(r"[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Whether it is 32 bytes as lower-case hex."""
    return _HEX.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Namespace:
    """What makes KV interchangeable. Objects of two namespaces never meet, whatever their tokens.

    model: the model identity (see DESIGN). kv_dtype: as the engine stores it, "bfloat16". layout: block shape, order
    of its dimensions and, on CPUs, the instruction set that packed it; behind a "#" the shards that make up a chunk,
    with "|" between them. chunk_tokens: tokens of a chunk. adapter: hex digest of the LoRA adapter's content, or "".
    salt: hex digest of the tenant's salt (`salt_digest`), or "". groups: what those layers need that do not read all of
    a prefix, kept in objects beside the chain; a layout without shards then says that no layer reads all of it.
    """

    model: str
    kv_dtype: str
    layout: str
    chunk_tokens: int
    adapter: str = ""
    salt: str = ""
    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        if self.chunk_tokens <= 0:
            raise UsageError(f"chunk_tokens must be positive, not {self.chunk_tokens}")
        for name in ("adapter", "salt"):
            if getattr(self, name) != "" and not is_digest(getattr(self, name)):
                raise UsageError(f"{name} must be empty or 64 hexadecimal digits, not {getattr(self, name)!r}")
        if self.groups:
            self._check_groups()

    def _check_groups(self) -> None:
        if type(self.groups) is not tuple or not all(isinstance(group, Group) for group in self.groups):
            raise UsageError(f"groups must be a tuple of Group, not {self.groups!r}")
        if any(group.need is Need.ALL for group in self.groups):
            raise UsageError("layers that need all of a prefix are no group beside it; layout names their shards")
        names = (*self.shards, *self.beside)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"shard {twice!r} is named twice: two objects of a chunk would have one key")

    def descriptor(self) -> str:
        """Canonical JSON: what is registered with a daemon and kept beside the disk tier."""
        fields = asdict(self)
        if not self.groups:  # as those wrote it that knew of none: digests stay
            del fields["groups"]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def parse(cls, descriptor: str) -> Namespace:
        """The namespace of a descriptor. Raises UsageError where it is not one."""
        try:
            fields = json.loads(descriptor)
            if isinstance(fields, dict) and "groups" in fields:
                fields["groups"] = _groups(fields["groups"])
            namespace = cls(**fields)
            typed = all(isinstance(fields[name], str) for name in fields if name not in ("chunk_tokens", "groups"))
            if not typed or type(namespace.chunk_tokens) is not int:
                raise UsageError("chunk_tokens must be an integer and every other field but groups a string")
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"not a namespace descriptor: {descriptor[:200]!r} ({error})") from None
        return namespace

    def digest(self) -> bytes:
        """32 bytes: the root of every chain in this namespace."""
        return hashlib.sha256(b"loracache/namespace\0" + self.descriptor().encode()).digest()

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the parts that a chunk of the chain is kept in, each an object; none where a chunk's key is its
        object's, or, with groups, where the chain has no objects of its own."""
        names = self.layout.partition("#")[2]
        return tuple(names.split("|")) if names else ()

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of the parts that a chunk is kept in beside the chain, each an object: of one group after the other."""
        return tuple(name for group in self.groups for name in group.shards)

    @property
    def lead(self) -> int:
        """Objects of a chunk that the chain is made of, which a hit needs of every chunk."""
        return len(self.shards) or (0 if self.groups else 1)

    @property
    def width(self) -> int:
        """Objects of a chunk, those beside the chain included."""
        return self.lead + len(self.beside)

    def object_keys(self, tokens: Sequence[int] | TokenArray) -> list[bytes]:
        """Keys of the objects that hold the KV of `tokens`, chunk by chunk, a chunk's shards side by side, and behind
        them those of its other groups."""
        return list(self.keys_by_parts(tokens, max(1, len(tokens))))

    def keys_by_parts(self, tokens: Sequence[int] | TokenArray, chunks: int) -> Iterator[bytes]:
        """The same, hashed when they are asked for, the keys of so many chunks at a time."""
        lead, more = self.lead, len(self.beside)
        for chain, beside in self.parts(tokens, chunks):
            if not more:
                yield from chain
            for at in range(len(beside) // more if more else 0):
                yield from chain[at * lead : (at + 1) * lead]
                yield from beside[at * more : (at + 1) * more]

    def parts(self, tokens: Sequence[int] | TokenArray, chunks: int) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """(keys of the chain's objects, keys of those beside it) of so many chunks at a time, chunk by chunk, hashed
        when they are asked for."""
        ids, parent, shards, beside, lead = token_array(tokens), self.digest(), self.shards, self.beside, self.lead
        for at in range(0, len(ids), chunks * self.chunk_tokens):
            part = chunk_keys(parent, ids[at : at + chunks * self.chunk_tokens], self.chunk_tokens)
            if part:
                parent = part[-1]
            chain = [object_key(chunk, shard) for chunk in part for shard in shards] if shards else part
            yield chain if lead else [], [object_key(chunk, name) for chunk in part for name in beside]

    def adapter_key(self) -> bytes:
        """32 bytes of the adapter's digest, or b"" for the base model."""
        return bytes.fromhex(self.adapter)


def _groups(told: Any) -> tuple[Group, ...]:
    """Of a descriptor. Raises UsageError saying which of them is none."""
    if not isinstance(told, list):
        raise UsageError(f"groups must be a list, not {str(told)[:80]!r}")
    groups = []
    for each in told:
        if not isinstance(each, dict) or each.keys() != {"need", "tokens", "shards"}:
            raise UsageError(f"a group is a map of need, tokens and shards, not {str(each)[:80]!r}")
        need = next((need for need in Need if need == each["need"]), each["need"])
        shards = tuple(each["shards"]) if isinstance(each["shards"], list) else each["shards"]
        groups.append(Group(need, each["tokens"], shards))
    return tuple(groups)


@dataclass(frozen=True, slots=True)
class Media:
    """An image or the like inside a prompt, and the tokens it stands for. identifier: of its content, the same on every
    machine; never a name that a caller or an engine made up."""

    identifier: str
    offset: int
    length: int


def salt_digest(salt: str | None) -> str:
    """Hex digest of a tenant's `cache_salt`, "" for none. The salt itself is stored nowhere."""
    return hashlib.sha256(b"loracache/salt\0" + salt.encode()).hexdigest() if salt else ""


def token_array(tokens: Sequence[int] | TokenArray) -> TokenArray:
    """Token ids as little-endian int32, shape (n,). Convert once: a list costs several times its hashing.

    Raises UsageError where an id does not fit an int32.
    """
    import numpy as np  # a third of what starting a command takes, and most need no tokens

    try:
        ids = np.asarray(tokens)
    except (OverflowError, TypeError, ValueError) as error:
        raise UsageError(f"token ids must be integers of 32 bits: {error}") from None
    if ids.size and ids.dtype.kind not in "iu":
        raise UsageError(f"token ids must be integers of 32 bits, not {ids.dtype}")
    # A cast would wrap a wider id onto another token's, and with it onto another prompt's KV.
    if ids.size and not np.can_cast(ids.dtype, np.int32) and (ids.min() < -(2**31) or ids.max() >= 2**31):
        raise UsageError(f"token ids must be integers of 32 bits, not from {ids.min()} to {ids.max()}")
    return np.ascontiguousarray(ids, dtype="<i4").reshape(-1)


def chunk_keys(
    parent: bytes,
    tokens: Sequence[int] | TokenArray,
    chunk_tokens: int,
    *,
    start: int = 0,
    media: Iterable[Media] = (),
) -> list[bytes]:
    """Keys of the whole chunks of `tokens`; a tail shorter than `chunk_tokens` has none.

    parent: the key of the chunk before (32 bytes), or the namespace's digest for the first. start: position of
    tokens[0] in its prompt. media: whatever overlaps; each chunk hashes identifier and offset of those it touches,
    because equal placeholder tokens may stand for different images.
    """
    if len(parent) != KEY_BYTES:
        raise UsageError(f"a parent key has {KEY_BYTES} bytes, not {len(parent)}")
    if chunk_tokens <= 0:
        raise UsageError(f"chunk_tokens must be positive, not {chunk_tokens}")
    view = token_array(tokens).data.cast("B")
    spans = sorted(media, key=lambda item: (item.offset, item.identifier))
    keys = []
    width = chunk_tokens * 4
    for at in range(0, len(view) - width + 1, width):
        state = hashlib.sha256(parent)
        state.update(view[at : at + width])
        if spans:
            first = start + at // 4
            _hash_media(state, spans, first, first + chunk_tokens)
        parent = state.digest()
        keys.append(parent)
    return keys


def _hash_media(state: hashlib._Hash, spans: list[Media], first: int, end: int) -> None:
    for item in spans:
        if item.offset < end and item.offset + item.length > first:
            name = item.identifier.encode()
            state.update(item.offset.to_bytes(8, "little") + len(name).to_bytes(4, "little") + name)


def object_key(chunk_key: bytes, shard: str) -> bytes:
    """Key of the part of a chunk that `shard` (a range of layers and KV heads) names."""
    return hashlib.sha256(chunk_key + shard.encode()).digest()


def checksum(buffers: Iterable[memoryview | bytes]) -> int:
    """xxh3_64 over the concatenated buffers, an unsigned 64-bit integer."""
    state = xxhash.xxh3_64()
    for buffer in buffers:
        state.update(buffer)
    return int(state.intdigest())
