# SPDX-License-Identifier: Apache-2.0
"""The messages by which operators steer a daemon (protocol.py has those of the data path, and says how they travel).

A selector is a map of Selector's fields (control/selection.py); its `adapter` may be a name. An operation is answered
by its description after at most `wait` seconds, whether it has ended by then or not. Pure encoding and checking; used
by both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from loracache.wire.protocol import Request

__all__ = [
    "Admit", "Cancel", "Clear", "Compress", "ConfigShow", "Decompress", "EventList", "Evict", "IndexCheck", "Locate",
    "LocateChain", "Move",
    "ObjectList", "OperationList", "OperationShow", "Pin", "QuotaList", "QuotaRemove", "QuotaSet", "SpaceList", "Tree",
    "Unpin",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class _ControlRequest(Request):
    by: str
    """Who asked, for the audit log. Believed of the daemon's own REST process; of others noted as what they say."""
    scope: str
    """Salt digest of the tenant that asks, outside of which nothing is seen; "": everything is."""


@dataclass(frozen=True, slots=True)
class Locate(_ControlRequest):
    """How far what is selected is held, and where. -> [a map: tokens, objects, hits, tiers (a label a hit), ...]"""

    operation: ClassVar[str] = "locate"
    selector: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SpaceList(_ControlRequest):
    """The namespaces that a selector without tokens stands for; for whoever hashes those. -> [descriptor, ...]"""

    operation: ClassVar[str] = "space_list"
    selector: dict[str, Any]
    count: int
    """At most so many."""


@dataclass(frozen=True, slots=True)
class LocateChain(_ControlRequest):
    """Leading run of the keys of a chain that is held, and where each of those beside it is. -> as Lookup"""

    operation: ClassVar[str] = "locate_chain"
    namespace: bytes
    keys: bytes
    beside: bytes = b""


@dataclass(frozen=True, slots=True)
class Pin(_ControlRequest):
    """Keep objects in a tier. -> [operation]"""

    operation: ClassVar[str] = "pin"
    selector: dict[str, Any]
    tier: str
    ttl: float
    """Seconds; 0: for ever."""
    wait: float


@dataclass(frozen=True, slots=True)
class Unpin(_ControlRequest):
    """End pins. -> [operation]"""

    operation: ClassVar[str] = "unpin"
    selector: dict[str, Any]
    tier: str
    wait: float


@dataclass(frozen=True, slots=True)
class Evict(_ControlRequest):
    """Remove objects and their descendants from tiers. -> [operation]"""

    operation: ClassVar[str] = "evict"
    selector: dict[str, Any]
    tiers: list[str]
    wait: float


@dataclass(frozen=True, slots=True)
class Clear(_ControlRequest):
    """Remove everything from tiers, but for what is leased, pinned or named. -> [operation]"""

    operation: ClassVar[str] = "clear"
    tiers: list[str]
    wait: float


@dataclass(frozen=True, slots=True)
class Admit(_ControlRequest):
    """Raise (or write) objects to a tier ahead of need, from wherever they are; before a prompt's KV the adapter that
    it is of goes to cpu. -> [operation]"""

    operation: ClassVar[str] = "admit"
    selector: dict[str, Any]
    tier: str
    wait: float
    ttl: float = 0.0
    """Of cpu: seconds for which they are held there, loosely; 0: they may leave at once."""


@dataclass(frozen=True, slots=True)
class Move(_ControlRequest):
    """Bring objects from the tier `source` to another. -> [operation]"""

    operation: ClassVar[str] = "move"
    selector: dict[str, Any]
    source: str
    tier: str
    keep: bool
    """Leave them at the source too."""
    wait: float


@dataclass(frozen=True, slots=True)
class Compress(_ControlRequest):
    """Keep objects of a tier compressed, losslessly. -> [operation]"""

    operation: ClassVar[str] = "compress"
    selector: dict[str, Any]
    tier: str
    wait: float


@dataclass(frozen=True, slots=True)
class Decompress(_ControlRequest):
    """Keep objects of a tier as they are again. -> [operation]"""

    operation: ClassVar[str] = "decompress"
    selector: dict[str, Any]
    tier: str
    wait: float


@dataclass(frozen=True, slots=True)
class OperationShow(_ControlRequest):
    """How far an operation is. -> [operation]"""

    operation: ClassVar[str] = "operation_show"
    name: str
    wait: float


@dataclass(frozen=True, slots=True)
class OperationList(_ControlRequest):
    """The operations begun last, the latest first. -> [operation, ...]"""

    operation: ClassVar[str] = "operation_list"
    count: int


@dataclass(frozen=True, slots=True)
class Cancel(_ControlRequest):
    """Have an operation end before its next step. -> [operation]"""

    operation: ClassVar[str] = "cancel"
    name: str


@dataclass(frozen=True, slots=True)
class ObjectList(_ControlRequest):
    """A page of the objects held, namespace by namespace in the order of keys. -> [where it ended ("" at the end), a
    map, ...]"""

    operation: ClassVar[str] = "objects"
    selector: dict[str, Any]
    """As elsewhere, or {} for all."""
    tier: str
    """A label, "" for any."""
    after: str
    """Where the page before ended."""
    count: int


@dataclass(frozen=True, slots=True)
class Tree(_ControlRequest):
    """What stands below a node of the tree. -> [where this page ended ("" at the end), a map, ...]"""

    operation: ClassVar[str] = "tree"
    name: str
    """A node's id as answered here, or "": the base models, the adapters."""
    after: str
    count: int


@dataclass(frozen=True, slots=True)
class EventList(_ControlRequest):
    """The next events. -> [number of the last, how many are lost, a map, ...]"""

    operation: ClassVar[str] = "events"
    since: int
    """Number behind which they begin; 0: from now on."""
    count: int
    wait: float
    """Seconds at most, where there is none yet."""


@dataclass(frozen=True, slots=True)
class QuotaSet(_ControlRequest):
    """Give a tenant, an adapter or a model a quota in a tier, in the place of an earlier one. -> [a map]"""

    operation: ClassVar[str] = "quota_set"
    kind: str
    name: str
    """A salt's digest, an adapter's name or digest, a model's name or identity; "*": all that have none."""
    tier: str
    soft: int
    """Bytes that nobody else pushes it below."""
    hard: int
    """Bytes beyond which its stores are refused; -1: no limit."""


@dataclass(frozen=True, slots=True)
class QuotaRemove(_ControlRequest):
    """End a quota. -> [there was one]"""

    operation: ClassVar[str] = "quota_remove"
    kind: str
    name: str
    tier: str


@dataclass(frozen=True, slots=True)
class QuotaList(_ControlRequest):
    """All quotas, and what is used of them; of a tenant that asks, its own. -> [a map, ...]"""

    operation: ClassVar[str] = "quotas"


@dataclass(frozen=True, slots=True)
class ConfigShow(Request):
    """The daemon's settings, secrets left out. -> [a map]"""

    operation: ClassVar[str] = "config"


@dataclass(frozen=True, slots=True)
class IndexCheck(Request):
    """Whether the index fits together: every entry's state, and the books of the tiers against what is counted anew.
    -> [a map: checked, faults, examples ([key, words] of the first), counts (by tier: objects and bytes by the books,
    and as counted), used (by tier: bytes of its budget in use, and the least and most that are explained)]"""

    operation: ClassVar[str] = "index_check"
