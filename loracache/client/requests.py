# SPDX-License-Identifier: Apache-2.0
"""The requests of the data path, for those who hold a `Connection` or a `Link` and look for the answers themselves.

What each stands for and how it is answered is said beside its definition in the wire room; most users want CacheClient.
"""

from __future__ import annotations

from loracache.wire.protocol import (
    LEASE_BYTES,
    NO_PARENT,
    SOCKET_PATH_BYTES,
    Acquire,
    AdapterAdd,
    AdapterDigest,
    AdapterFind,
    Commit,
    Lookup,
    Prefetch,
    Register,
    Release,
    Report,
    Request,
    Reserve,
    Resident,
    join_keys,
)

__all__ = [
    "LEASE_BYTES", "NO_PARENT", "SOCKET_PATH_BYTES", "Acquire", "AdapterAdd", "AdapterDigest", "AdapterFind", "Commit",
    "Lookup", "Prefetch", "Register", "Release", "Report", "Request", "Reserve", "Resident", "join_keys",
]  # fmt: skip
