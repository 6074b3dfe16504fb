# SPDX-License-Identifier: Apache-2.0
"""The requests of the data path, and what engines use of the others, for those who hold a `Connection` or a `Link` and
look for the answers themselves.

What each stands for and how it is answered is said beside its definition in the wire room; most users want CacheClient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loracache.errors import UsageError
from loracache.wire.control_messages import EventList, Move, Pin
from loracache.wire.protocol import (
    LEASE_BYTES,
    MAX_TTL_S,
    NO_PARENT,
    NOWHERE,
    PRIORITIES,
    SOCKET_PATH_BYTES,
    Acquire,
    AdapterAdd,
    AdapterDigest,
    AdapterFind,
    Commit,
    Keep,
    Lookup,
    Prefetch,
    Priority,
    Register,
    Release,
    Report,
    Request,
    Reserve,
    Resident,
    join_keys,
    split_keys,
)

__all__ = [
    "LEASE_BYTES", "MAX_TTL_S", "NOWHERE", "NO_PARENT", "PRIORITIES", "SOCKET_PATH_BYTES", "Acquire", "AdapterAdd",
    "AdapterDigest", "AdapterFind", "Commit", "EventList", "Keep", "Lookup", "Move", "Pin", "Prefetch", "Priority",
    "Register", "Release", "Report", "Request", "Reserve", "Resident", "join_keys", "lookup_parts",
    "lookup_parts_beside", "split_keys",
]  # fmt: skip

_PART_KEYS = 8192  # of a lookup: a quarter of a megabyte, which the daemon answers within milliseconds


def lookup_parts(keys: Sequence[bytes], group: int) -> Iterator[Sequence[bytes]]:
    """`keys` in parts of whole groups that are asked for one after the other, as far as they are held."""
    most = max(group, _PART_KEYS // group * group)
    for at in range(0, max(len(keys), 1), most):
        yield keys[at : at + most]


def lookup_parts_beside(
    keys: Sequence[bytes], group: int, beside: Sequence[bytes]
) -> Iterator[tuple[Sequence[bytes], Sequence[bytes]]]:
    """The same, and what is beside the chunks of each part: `beside` has as many for each. All of it, in parts, where
    there are no keys. Raises UsageError."""
    if not beside:
        yield from ((part, ()) for part in lookup_parts(keys, group))
        return
    if not keys:
        yield from (((), part) for part in lookup_parts(beside, 1))
        return
    chunks = len(keys) // group
    if len(keys) % group or len(beside) % chunks:
        raise UsageError(f"{len(beside)} keys beside {len(keys)}, {group} a chunk: give as many for each whole chunk")
    width = len(beside) // chunks
    most = max(1, _PART_KEYS // max(group, width))
    for at in range(0, chunks, most):
        yield keys[at * group : (at + most) * group], beside[at * width : (at + most) * width]
