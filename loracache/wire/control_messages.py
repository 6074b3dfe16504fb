"""The messages by which operators steer a daemon (protocol.py has those of the data path, and says how they travel).

`by` says who asked, for the audit log, where the connection asks for somebody else; `scope` is the salt digest of the
tenant that asks, outside of which nothing is seen ("": all is). A selector is a map of Selector's fields
(selection.py); its `adapter` may be a name. An operation is answered by its description after at most `wait` seconds,
whether it has ended by then or not. Pure encoding and checking; used by both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from loracache.wire.protocol import Request

__all__ = [
    "Admit", "Cancel", "Clear", "Compress", "Config", "Decompress", "Events", "Evict", "Locate", "Move", "Objects",
    "OperationList", "OperationShow", "Pin", "Tree", "Unpin",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Asked(Request):
    by: str
    scope: str


@dataclass(frozen=True, slots=True)
class Locate(_Asked):
    """How far what is selected is held, and where. -> [a map: tokens, objects, hits, tiers (a label a hit), ...]"""

    operation: ClassVar[str] = "locate"
    selector: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pin(_Asked):
    """Keep objects in a tier. ttl: seconds, 0 for ever. -> [operation]"""

    operation: ClassVar[str] = "pin"
    selector: dict[str, Any]
    tier: str
    ttl: float
    wait: float


@dataclass(frozen=True, slots=True)
class Unpin(_Asked):
    """End pins. -> [operation]"""

    operation: ClassVar[str] = "unpin"
    selector: dict[str, Any]
    tier: str
    wait: float


@dataclass(frozen=True, slots=True)
class Evict(_Asked):
    """Remove objects and their descendants from tiers. -> [operation]"""

    operation: ClassVar[str] = "evict"
    selector: dict[str, Any]
    tiers: list[str]
    wait: float


@dataclass(frozen=True, slots=True)
class Clear(_Asked):
    """Remove everything from tiers, but for what is leased, pinned or named. -> [operation]"""

    operation: ClassVar[str] = "clear"
    tiers: list[str]
    wait: float


@dataclass(frozen=True, slots=True)
class Admit(_Asked):
    """Raise (or write) objects to a tier ahead of need, from wherever they are. -> [operation]"""

    operation: ClassVar[str] = "admit"
    selector: dict[str, Any]
    tier: str
    wait: float


@dataclass(frozen=True, slots=True)
class Move(_Asked):
    """Bring objects from the tier `source` to another; keep: leave them at the source too. -> [operation]"""

    operation: ClassVar[str] = "move"
    selector: dict[str, Any]
    source: str
    tier: str
    keep: bool
    wait: float


@dataclass(frozen=True, slots=True)
class Compress(_Asked):
    """Keep objects of a tier compressed, losslessly. -> [operation]"""

    operation: ClassVar[str] = "compress"
    selector: dict[str, Any]
    tier: str
    wait: float


@dataclass(frozen=True, slots=True)
class Decompress(_Asked):
    """Keep objects of a tier as they are again. -> [operation]"""

    operation: ClassVar[str] = "decompress"
    selector: dict[str, Any]
    tier: str
    wait: float


@dataclass(frozen=True, slots=True)
class OperationShow(_Asked):
    """How far an operation is. -> [operation]"""

    operation: ClassVar[str] = "operation_show"
    name: str
    wait: float


@dataclass(frozen=True, slots=True)
class OperationList(_Asked):
    """The operations begun last, the latest first. -> [operation, ...]"""

    operation: ClassVar[str] = "operation_list"
    count: int


@dataclass(frozen=True, slots=True)
class Cancel(_Asked):
    """Have an operation end before its next step. -> [operation]"""

    operation: ClassVar[str] = "cancel"
    name: str


@dataclass(frozen=True, slots=True)
class Objects(_Asked):
    """Objects held, namespace by namespace in the order of keys. selector: as elsewhere, or {} for all. tier: a label,
    "" for any. after: where the page before ended. -> [where this one ended ("" at the end), a map, ...]"""

    operation: ClassVar[str] = "objects"
    selector: dict[str, Any]
    tier: str
    after: str
    count: int


@dataclass(frozen=True, slots=True)
class Tree(_Asked):
    """What stands below `name` in the tree: "" (the base models, the adapters), or a node's id as answered here.
    -> [where this page ended ("" at the end), a map, ...]"""

    operation: ClassVar[str] = "tree"
    name: str
    after: str
    count: int


@dataclass(frozen=True, slots=True)
class Events(_Asked):
    """Events behind number `since` (0: from now on), after at most `wait` seconds. -> [number of the last, how many are
    lost, a map, ...]"""

    operation: ClassVar[str] = "events"
    since: int
    count: int
    wait: float


@dataclass(frozen=True, slots=True)
class Config(Request):
    """The daemon's settings, secrets left out. -> [a map]"""

    operation: ClassVar[str] = "config"
