# SPDX-License-Identifier: Apache-2.0
"""Quotas as operators see them: given by names, kept beside the disk tier over restarts, listed with what is used.

What was given or ended while a daemon ran wins over the configuration. Threading: the event loop; the file is written
on a thread, one at a time.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from loracache.cache.policy.quotas import EVERY, Quota, Subject
from loracache.errors import Unavailable, Unknown, UsageError
from loracache.folder import make_folders, replace_file, sync_folder
from loracache.keys import is_digest
from loracache.results import NodeKind
from loracache.tiers import Tier
from loracache.wire import control_messages as messages

if TYPE_CHECKING:
    from loracache.cache.tiered import TieredCache
    from loracache.control.adapters import Adapters
    from loracache.control.audit import Audit
    from loracache.namespaces import Namespaces
    from loracache.wire.requests import QuotaRequest

__all__ = ["Given", "QuotaKeeper", "describe_quotas"]

_log = logging.getLogger(__name__)
_NO_LIMIT = -1
_MOST = 10_000

Given = tuple[str, str, str, int, int | None]
"""kind, name, tier, soft, hard."""


class QuotaKeeper:
    """folder: where they are kept; None: nowhere. sync: so that a crash of the machine changes nothing."""

    def __init__(
        self,
        cache: TieredCache,
        namespaces: Namespaces,
        adapters: Adapters,
        audit: Audit,
        folder: Path | None,
        *,
        sync: bool,
    ) -> None:
        self._cache = cache
        self._audit = audit
        self._adapters = adapters
        self._namespaces = namespaces
        self._file = folder / "quotas.json" if folder is not None else None
        self._sync = sync
        self._changed: dict[tuple[Subject, Tier], Quota | None] = {}  # at run time; None: ended
        self._turn = asyncio.Lock()
        cache.quotas.names = self._names

    def begin(self, given: Iterable[Given]) -> None:
        """Give what the configuration says and what was kept. Raises UsageError for what the configuration cannot mean;
        of what was kept, what does not fit any more is left out, with a word in the log."""
        self._changed = self._read()
        for kind, name, label, soft, hard in given:
            subject, tier = Subject(kind, name), Tier.named(label)
            if (subject, tier) not in self._changed:
                self._cache.quotas.set(tier, subject, Quota(soft, hard))
        for (subject, tier), kept in self._changed.items():
            if kept is not None:
                try:
                    self._cache.quotas.set(tier, subject, kept)
                except UsageError as error:
                    _log.warning("the quota of %s %s that was kept is left out: %s", *subject, error)

    async def serve(self, request: QuotaRequest, label: str) -> list[Any]:
        """Answer a request. label: who asks, for the audit log. Raises UsageError for a quota that cannot be kept,
        Unknown for an adapter that nobody knows, Unavailable where it cannot be written down."""
        match request:
            case messages.QuotaList():
                return await self._list(request.scope)
            case messages.QuotaSet():
                answer = await self._set(request)
            case messages.QuotaRemove():
                answer = await self._remove(request)
            case _:
                assert_never(request)
        about = {
            name: getattr(request, name) for name in ("kind", "name", "tier", "soft", "hard") if hasattr(request, name)
        }
        self._audit.write(label, request.operation, says=request.by, **about)
        return answer

    async def _set(self, request: messages.QuotaSet) -> list[Any]:
        """Give a quota; answers its description."""
        subject, tier = await self._subject(request.kind, request.name), Tier.named(request.tier)
        quota = Quota(request.soft, None if request.hard == _NO_LIMIT else request.hard)
        async with self._turn:
            quotas = self._cache.quotas
            quotas.check(tier, subject, quota)
            if sum(1 for _ in quotas.all()) >= _MOST:
                raise UsageError(f"{_MOST} quotas are given already; a default (name *) is of all that have none")
            await self._keep((subject, tier), quota)
            quotas.set(tier, subject, quota)
        return [row for row in describe_quotas(self._cache) if _is(row, subject, tier)]

    async def _remove(self, request: messages.QuotaRemove) -> list[Any]:
        """End a quota; [whether there was one]."""
        subject, tier = await self._subject(request.kind, request.name, known=False), Tier.named(request.tier)
        async with self._turn:
            if not any((each, where) == (subject, tier) for where, each, *_ in self._cache.quotas.all()):
                return [False]
            await self._keep((subject, tier), None)
            return [self._cache.quotas.remove(tier, subject)]

    async def _list(self, tenant: str) -> list[Any]:
        """All, with the names of adapters and models; of a tenant that asks, its own."""
        rows = describe_quotas(self._cache)
        if tenant:
            return [row for row in rows if (row["kind"], row["name"]) == ("tenant", tenant)]
        names = await self._adapters.names() if any(row["kind"] == NodeKind.ADAPTER for row in rows) else {}
        for row in rows:
            called = names.get(row["name"], []) if row["kind"] == NodeKind.ADAPTER else []
            row["names"] = called or (list(self._namespaces.names(row["name"])) if row["kind"] == "model" else [])
        return rows

    async def _subject(self, kind: str, name: str, *, known: bool = True) -> Subject:
        if name == EVERY or kind == "model" or is_digest(name):
            if not name:
                raise UsageError('a model has a name; give one that engines call it, its identity, or "*" for all')
            return Subject(kind, name)
        if kind == "tenant":
            raise UsageError(f"tenant {name[:80]!r} is not the digest of a salt; give the salt, or '*' for all")
        found = await self._adapters.find(name)
        if not found:
            raise Unknown(f"no adapter is called {name[:210]!r}; see: loracache adapters list")
        return Subject(kind, found[0])

    def _names(self, namespace: bytes) -> dict[str, tuple[str, ...]] | None:
        found = self._namespaces.get(namespace)
        if found is None:
            return None
        model = (found.model, *self._namespaces.names(found.model))
        return {
            "tenant": (found.salt,) if found.salt else (),
            "adapter": (found.adapter,) if found.adapter else (),
            "model": model,
        }

    # -- the file ----------

    async def _keep(self, which: tuple[Subject, Tier], quota: Quota | None) -> None:
        """Raises Unavailable, and nothing is changed, where it cannot be written."""
        changed = self._changed | {which: quota}
        if self._file is not None:
            try:
                await asyncio.to_thread(self._write, self._file, changed)
            except OSError as error:
                raise Unavailable(f"the quota cannot be kept in {self._file}: {error.strerror}") from None
        self._changed = changed

    def _write(self, path: Path, changed: dict[tuple[Subject, Tier], Quota | None]) -> None:
        rows = [
            [*subject, tier.label, *((quota.soft, quota.hard) if quota is not None else (None, None))]
            for (subject, tier), quota in changed.items()
        ]
        make_folders(path.parent, sync=self._sync)
        replace_file(path, json.dumps(rows).encode(), sync=self._sync)
        if self._sync:
            sync_folder(path.parent)

    def _read(self) -> dict[tuple[Subject, Tier], Quota | None]:
        if self._file is None:
            return {}
        found: dict[tuple[Subject, Tier], Quota | None] = {}
        try:
            for kind, name, tier, soft, hard in json.loads(self._file.read_bytes()):
                quota = Quota(int(soft), int(hard) if hard is not None else None) if soft is not None else None
                found[(Subject(str(kind), str(name)), Tier.named(tier))] = quota
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, UsageError, RecursionError) as error:
            _log.warning("%s is ignored, and the quotas that were kept in it: %s", self._file, error)
            return {}
        return found


def describe_quotas(cache: TieredCache) -> list[dict[str, Any]]:
    """Every quota in plain values, those of a tier side by side. bytes, refused, evicted: of its owner, 0 of a
    default."""
    return [
        {
            "kind": subject.kind,
            "name": subject.name,
            "names": [],
            "tier": tier.label,
            "soft": quota.soft,
            "hard": quota.hard,
            "bytes": owner.bytes if owner is not None else 0,
            "refused": owner.refused if owner is not None else 0,
            "evicted": owner.pushed if owner is not None else 0,
        }
        for tier, subject, quota, owner in cache.quotas.all()
    ]


def _is(row: dict[str, Any], subject: Subject, tier: Tier) -> bool:
    return (row["kind"], row["name"], row["tier"]) == (*subject, tier.label)
