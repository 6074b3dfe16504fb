# SPDX-License-Identifier: Apache-2.0
"""The requests of the data path, and what engines use of the others, for those who hold a `Connection` or a `Link` and
look for the answers themselves.

What each stands for and how it is answered is said beside its definition in the wire room; most users want CacheClient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    "Register", "Release", "Report", "Request", "Reserve", "Resident", "join_keys", "lookup_parts", "split_keys",
]  # fmt: skip

_PART_KEYS = 8192  # of a lookup: a quarter of a megabyte, which the daemon answers within milliseconds


def lookup_parts(keys: Sequence[bytes], group: int) -> Iterator[Sequence[bytes]]:
    """`keys` in parts of whole groups that are asked for one after the other, as far as they are held."""
    most = max(group, _PART_KEYS // group * group)
    for at in range(0, max(len(keys), 1), most):
        yield keys[at : at + most]
