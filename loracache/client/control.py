# SPDX-License-Identifier: Apache-2.0
"""The control calls of CacheClient, for people and scripts that steer a running daemon.

Objects are named by a `Selection`. What changes many objects is an operation of the daemon: its `OperationReport` says
how far it was after at most `wait` seconds; `operation` asks again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loracache.errors import ProtocolError, Unavailable, UsageError
from loracache.keys import TokenArray, salt_digest, token_array
from loracache.results import Cause, OperationState
from loracache.wire import control_messages as messages
from loracache.wire import protocol
from loracache.wire.fields import MAX_WAIT_S

__all__ = ["ALL_TIERS", "Located", "OperationReport", "ControlCalls", "Selection"]

ALL_TIERS = ("cpu", "disk", "redis")
_PAGE = 1000
_RECOUNT_S = 300.0  # of very many objects, in a daemon that has much else to do
_ANSWER_S = 10.0  # on top of what the daemon is told to wait


@dataclass(frozen=True, slots=True)
class Selection:
    """Which objects: by their keys; or an adapter; or a model's, with the token ids of a prompt or without; or a
    tenant's. Fields left None do not restrict, but that token ids are of the base model, without a salt, where neither
    is given. Keys or token ids that are empty stand for nothing.
    """

    keys: Sequence[bytes] | None = None
    """32 bytes each, in the order of a chain."""
    model: str = ""
    """A served name, an identity, its first 8 digits, or "*" for any."""
    tokens: Sequence[int] | TokenArray | None = None
    """Token ids of a prompt."""
    adapter: str | None = None
    """A name or hex digest; "": the base model."""
    salt: str | None = None
    """A tenant's cache_salt."""

    def encode(self) -> dict[str, Any]:
        """As a message's field. Raises UsageError."""
        fields: dict[str, Any] = {}
        if self.keys is not None:
            fields["keys"] = protocol.join_keys(list(dict.fromkeys(self.keys)))
        if self.model:
            fields["model"] = self.model
        if self.tokens is not None:
            fields["tokens"] = token_array(self.tokens).tobytes()
        if self.adapter is not None:
            fields["adapter"] = self.adapter
        if self.salt is not None:
            fields["salt"] = salt_digest(self.salt)
        return fields


@dataclass(frozen=True, slots=True)
class Located:
    """How far what was selected is held."""

    hits: int
    """Leading keys that some tier holds; of a prompt the whole chunks behind which it can be continued."""
    asked: int
    """Of how many."""
    tiers: tuple[str, ...]
    """The fastest that has each, of a prompt of those of which anything is needed; "gpu": an engine's memory."""
    tokens: int
    """Leading tokens that need not be computed: those of these chunks."""
    namespace: str
    """Where that is, as a hex digest."""
    engines: int
    """Engines that hold the adapter in their own memory."""
    held: dict[str, tuple[int, int]]
    """Of a model or tenant: what there is, by tier as (objects, bytes)."""

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Located:
        """From the daemon's answer. Raises ProtocolError."""
        try:
            held = {str(tier): (int(counts[0]), int(counts[1])) for tier, counts in fields["held"].items()}
            return cls(**(fields | {"tiers": tuple(fields["tiers"]), "held": held}))
        except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise ProtocolError(f"the daemon's answer is malformed: {error}") from None


@dataclass(frozen=True, slots=True)
class OperationReport:
    """An operation of the daemon, as far as it is."""

    id: str
    verb: str
    state: OperationState
    started: float
    """Unix seconds."""
    seconds: float
    """How long it took, or takes until now."""
    total: int | None
    """Objects that were named; None where they are counted as they come."""
    objects: int
    """Done."""
    bytes: int
    """Of those."""
    saved: int
    """Bytes that compression took off."""
    skipped: int
    """Objects left as they are: the sum of `causes`."""
    causes: dict[str, int] = field(default_factory=dict)
    """Why, by `Cause`."""
    error: str = ""
    """What went wrong, where it failed."""

    @property
    def counts(self) -> tuple[int, int, int]:
        """(objects, bytes, skipped)."""
        return self.objects, self.bytes, self.skipped

    @classmethod
    def of(cls, fields: Any) -> OperationReport:
        """From the daemon's answer. Raises ProtocolError."""
        names = {each.name for each in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or fields.keys() != names:
            raise ProtocolError("the daemon's answer is malformed: it is not an operation")
        try:
            return cls(**fields | {"state": OperationState(fields["state"])})
        except ValueError as error:
            raise ProtocolError(f"the daemon's answer is malformed: {error}") from None


class ControlCalls:
    """The control calls; CacheClient gives the connection. All raise UsageError for arguments that cannot be meant,
    Rejected where the daemon refuses, and Unknown (a Rejected) where a model, an adapter or a node of the tree is not
    there.
    """

    def _call(self, request: protocol.Request, timeout: float | None = None) -> list:  # type: ignore[type-arg]
        raise NotImplementedError

    def _ask(self, request: protocol.Request, timeout: float | None = None) -> list:  # type: ignore[type-arg]
        """As `_call`, for what the daemon will understand: it closes the connection on nonsense, and its leases end."""
        if wrong := protocol.fault(request):
            raise UsageError(wrong)
        return self._call(request, timeout)

    def locate(self, selection: Selection) -> Located:
        """How far what is selected is held, and where."""
        (found,) = self._ask(messages.Locate("", "", selection.encode()))
        return Located.of(found)

    def pin(self, selection: Selection | Sequence[bytes], *, tier: str = "cpu", ttl: float | None = None) -> int:
        """Keep objects in `tier` ("cpu", "disk") until unpinned or for `ttl` seconds, an hour at most; answers how many
        were there."""
        if ttl is not None and not 0 < ttl <= protocol.MAX_TTL_S:
            raise UsageError(
                f"ttl={ttl} must be seconds, more than 0 and at most {protocol.MAX_TTL_S:.0f}; "
                "leave it out to pin until unpinned"
            )
        return self._operation(messages.Pin("", "", _encode(selection), tier, ttl or 0.0, MAX_WAIT_S)).objects

    def unpin(self, selection: Selection | Sequence[bytes], *, tier: str = "cpu") -> int:
        """End pins; answers how many there were."""
        return self._operation(messages.Unpin("", "", _encode(selection), tier, MAX_WAIT_S)).objects

    def evict(
        self, selection: Selection | Sequence[bytes], *, tiers: Sequence[str] = ALL_TIERS, wait: float = MAX_WAIT_S
    ) -> OperationReport:
        """Remove objects and their descendants from `tiers`. Those that are leased, pinned, named, or needed by one
        that is, are skipped."""
        return self._operation(messages.Evict("", "", _encode(selection), list(tiers), wait))

    def clear(self, *, tiers: Sequence[str] = ALL_TIERS, wait: float = MAX_WAIT_S) -> OperationReport:
        """Remove everything from `tiers` (from Redis: what the daemon knows of)."""
        return self._operation(messages.Clear("", "", list(tiers), wait))

    def admit(
        self,
        selection: Selection | Sequence[bytes],
        *,
        tier: str = "cpu",
        ttl: float = 0.0,
        wait: float = MAX_WAIT_S,
    ) -> OperationReport:
        """Bring objects to a tier ahead of need, from wherever they are; with a prompt's KV its adapter comes to cpu.
        ttl: seconds for which cpu holds them then, giving way only to what is read; 0: not at all."""
        return self._operation(messages.Admit("", "", _encode(selection), tier, wait, ttl))

    def _write_down(self, selection: Selection | Sequence[bytes], seconds: float) -> dict[str, list[int]]:
        """Bring objects to every tier below memory, whatever admission says; [there, not there] by tier. Raises
        Unavailable where that takes longer."""
        (status,) = self._ask(protocol.Status())
        found: dict[str, list[int]] = {}
        deadline = time.monotonic() + seconds
        for tier in status["tiers"]:
            if tier == ALL_TIERS[0]:
                continue
            report = self.admit(selection, tier=tier, wait=min(max(0.0, deadline - time.monotonic()), MAX_WAIT_S))
            if report.state is OperationState.RUNNING:
                raise Unavailable(f"{tier}: not all was written within {seconds:g} s; operation {report.id} goes on")
            already = report.causes.get(Cause.ALREADY, 0)
            found[tier] = [report.objects + already, report.skipped - already]
        return found

    def move(
        self,
        selection: Selection | Sequence[bytes],
        source: str,
        tier: str,
        *,
        keep: bool = False,
        wait: float = MAX_WAIT_S,
    ) -> OperationReport:
        """Bring objects from tier `source` to another; keep: leave them at the source too."""
        return self._operation(messages.Move("", "", _encode(selection), source, tier, keep, wait))

    def compress(
        self, selection: Selection | Sequence[bytes], *, tier: str = "disk", wait: float = MAX_WAIT_S
    ) -> OperationReport:
        """Keep objects of "disk" or "redis" compressed, losslessly; loading undoes it."""
        return self._operation(messages.Compress("", "", _encode(selection), tier, wait))

    def decompress(
        self, selection: Selection | Sequence[bytes], *, tier: str = "disk", wait: float = MAX_WAIT_S
    ) -> OperationReport:
        """Keep objects of a tier as they are again."""
        return self._operation(messages.Decompress("", "", _encode(selection), tier, wait))

    def operation(self, id_: str, *, wait: float = 0.0) -> OperationReport:
        """How far an operation is. Raises Unknown where there is none of that id."""
        return self._operation(messages.OperationShow("", "", id_, wait))

    def operations(self, count: int = 100) -> list[OperationReport]:
        """The operations begun last, the latest first."""
        return [OperationReport.of(item) for item in self._ask(messages.OperationList("", "", count))]

    def cancel(self, id_: str) -> OperationReport:
        """Have an operation end before its next step."""
        return self._operation(messages.Cancel("", "", id_))

    def objects(self, selection: Selection | None = None, *, tier: str = "") -> Iterator[dict[str, Any]]:
        """Objects that cpu or disk hold, namespace by namespace in the order of keys."""
        selector = selection.encode() if selection is not None else {}
        after = ""
        while True:
            after, *found = self._ask(messages.ObjectList("", "", selector, tier, after, _PAGE))
            yield from found
            if not after:
                return

    def tree(self, under: str = "") -> Iterator[dict[str, Any]]:
        """What stands below a node of the dependency tree: the base models and the adapters, their namespaces, their
        chains, chunk by chunk."""
        after = ""
        while True:
            after, *found = self._ask(messages.Tree("", "", under, after, _PAGE))
            yield from found
            if not after:
                return

    def events(self, since: int = 0, *, count: int = 1000, wait: float = 10.0) -> tuple[int, int, list[dict[str, Any]]]:
        """(number of the last, how many are lost, the events behind `since`), after at most `wait` seconds. since: 0
        begins now."""
        last, lost, *found = self._ask(messages.EventList("", "", since, count, wait), wait + _ANSWER_S)
        return last, lost, found

    def set_quota(
        self, kind: str, name: str, *, tier: str = "cpu", soft: int = 0, hard: int | None = None
    ) -> dict[str, Any]:
        """Give a tenant (kind "tenant", by the digest of its salt: `keys.salt_digest`), an "adapter" (name or digest)
        or a "model" a quota in bytes of a tier, in the place of an earlier one; name "*": all that have none of their
        own. soft: what nobody else pushes it below; hard: beyond it stores are refused. Answers it with what is used.
        """
        (found,) = self._ask(messages.QuotaSet("", "", kind, name, tier, soft, -1 if hard is None else hard))
        return dict(found)

    def remove_quota(self, kind: str, name: str, *, tier: str = "cpu") -> bool:
        """End a quota; whether there was one."""
        (there,) = self._ask(messages.QuotaRemove("", "", kind, name, tier))
        return bool(there)

    def quotas(self) -> list[dict[str, Any]]:
        """All quotas, each with the bytes used and the objects refused and evicted."""
        return [dict(row) for row in self._ask(messages.QuotaList("", ""))]

    def config(self) -> dict[str, Any]:
        """The daemon's settings; of secrets only whether they are set."""
        (settings,) = self._ask(messages.ConfigShow())
        return dict(settings)

    def check_index(self) -> dict[str, Any]:
        """Whether the daemon's index fits together, counted while it works: `loracache check` says what it means."""
        (found,) = self._ask(messages.IndexCheck(), _RECOUNT_S)
        return dict(found)

    def _operation(self, request: Any) -> OperationReport:
        wait = getattr(request, "wait", 0.0)
        (found,) = self._ask(request, wait + _ANSWER_S)
        return OperationReport.of(found)


def _encode(selection: Selection | Sequence[bytes]) -> dict[str, Any]:
    return selection.encode() if isinstance(selection, Selection) else {"keys": protocol.join_keys(selection)}
