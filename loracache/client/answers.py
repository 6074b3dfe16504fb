# SPDX-License-Identifier: Apache-2.0
"""What a CacheClient answers: how far a chain is held, objects held for reading or writing, adapters, flushes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loracache.errors import LeaseLost, ProtocolError, UsageError
from loracache.groups import continued
from loracache.keys import Namespace, checksum
from loracache.results import Cause
from loracache.tiers import Tier

__all__ = ["Adapter", "Flushed", "Lookup", "Reading", "Reservation", "Slot"]


@dataclass(frozen=True, slots=True)
class Lookup:
    """How far a chain is held."""

    tiers: tuple[str, ...]
    """For each leading key that is there the fastest tier that has it: "cpu", "disk" or "redis"."""
    beside: tuple[str, ...] = ()
    """For each key that was asked for beside them the fastest tier that has it, "" where none has."""

    @property
    def hits(self) -> int:
        """How many leading keys are held."""
        return len(self.tiers)

    def chunks(self, namespace: Namespace) -> int:
        """Chunks behind which a chain of `namespace` can be continued, where it was asked for with `group` its `lead`,
        and `beside` chunk by chunk: fewer than are held, where what a layer needs at their end is not."""
        here = [None if not tier else Tier.CPU for tier in self.beside]
        tiers = [Tier.CPU] * len(self.tiers)
        return continued(namespace.groups, namespace.chunk_tokens, namespace.lead, tiers, here)[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter of the cache."""

    name: str
    digest: str
    """Of its content, in hex."""
    added: float
    """Unix seconds."""
    config: str
    """The adapter_config.json it was added with."""
    size: int
    """Bytes, 0 where no tier of this daemon but Redis has it."""
    tiers: tuple[str, ...]
    """Where it is; "gpu": in some engine's memory."""
    engines: int
    """How many engines hold it in their own memory."""
    kv: dict[str, tuple[int, int]]
    """What depends on it, by tier as (objects, bytes)."""
    priority: str = "normal"
    """Of its name: low, normal or high."""

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Adapter:
        """From the daemon's answer. Raises ProtocolError where it is none."""
        try:
            kv = {str(tier): (int(held[0]), int(held[1])) for tier, held in fields["kv"].items()}
            return cls(**(fields | {"tiers": tuple(fields["tiers"]), "kv": kv}))
        except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise ProtocolError(f"the daemon's answer is malformed: {error}") from None


@dataclass(frozen=True, slots=True)
class Slot:
    """One object in the arena."""

    key: bytes
    """32 bytes."""
    size: int
    """Bytes of payload."""
    checksum: int
    """xxh3_64 of the payload; 0 where it is to be written."""
    buffers: tuple[memoryview, ...]
    """The payload as views of the mapped memory, in order; together `size` bytes."""

    def tobytes(self) -> bytes:
        """A copy of the payload. Raises LeaseLost where it does not match its checksum."""
        data = b"".join(self.buffers)
        if checksum([data]) != self.checksum:
            raise LeaseLost(f"object {self.key.hex()}: the bytes do not match their checksum")
        return data


@dataclass(frozen=True, slots=True)
class Flushed:
    """What a flush found, by lower tier: "disk", "redis". What was written since the client's last flush counts, or, at
    its first, since anybody's; of all clients of the daemon, for they share its queues.
    """

    durable: dict[str, int]
    """Objects that were written there and are there."""
    given_up: dict[str, int]
    """Objects that are not: the device was full or failed, the queue was longer than memory, or they had to make room
    for later ones. The counters `write.TIER.dropped.CAUSE` and `evict.disk.CAUSE` of `status` say why."""

    @property
    def complete(self) -> bool:
        """Whether nothing was given up."""
        return not any(self.given_up.values())

    @classmethod
    def of(cls, payload: Sequence[Any]) -> Flushed:
        """From the daemon's answer. Raises ProtocolError where it is none."""
        try:
            counts = {str(tier): (int(counts[0]), int(counts[1])) for tier, counts in payload[0].items()}
        except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise ProtocolError(f"the daemon's answer is malformed: {error}") from None
        return cls({tier: each[0] for tier, each in counts.items()}, {tier: each[1] for tier, each in counts.items()})


@dataclass(slots=True)
class Reading:
    """Objects held for reading."""

    slots: list[Slot | None]
    """One a key, in their order; None where it could not be read."""
    causes: list[Cause]
    """Why not, one a key; NONE where it can be read."""
    bad: list[bytes] = field(default_factory=list)
    """Keys that the reader adds because their bytes do not match their checksum; they are not served again."""


@dataclass(slots=True)
class Reservation:
    """Space reserved for new objects: write each slot's buffers, then leave the context to commit."""

    slots: list[Slot | None]
    """One a key, in their order; None where it has no space."""
    causes: list[Cause]
    """Why not, one a key (EXISTS: nothing needs to be written); after the commit, why it was not committed."""

    def write(self, position: int, data: bytes | memoryview) -> None:
        """Copy the payload of one object into its slot."""
        slot = self.slots[position]
        if slot is None:
            raise UsageError(f"object {position} has no space reserved: {self.causes[position]}")
        view = memoryview(data).cast("B")
        if len(view) != slot.size:
            raise UsageError(f"object {position} was reserved with {slot.size} bytes, not {len(view)}")
        at = 0
        for buffer in slot.buffers:
            buffer[:] = view[at : at + len(buffer)]
            at += len(buffer)
