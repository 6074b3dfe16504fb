# SPDX-License-Identifier: Apache-2.0
"""What operators ask for: operations on what they select, pages of what there is, events. Changes are audited.

Threading: the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, assert_never

from loracache.cache.eviction import Evicted
from loracache.control.fields import (
    audit_summary,
    compressible_tier,
    count_evicted,
    describe_event,
    own_tier,
    planes,
    removable_tiers,
)
from loracache.control.incompressible import Incompressible
from loracache.control.jobs import JobTurns, Operation, Operations
from loracache.control.listing import Listing
from loracache.control.location import Locator
from loracache.control.pinning import pin, unpin
from loracache.control.purging import Whose, empty_redis, known_in_redis, whose_of
from loracache.control.recount import Recounter
from loracache.control.selection import Selected, Selector, all_known, select
from loracache.control.steps import done, start, turn
from loracache.control.transfer import Mover
from loracache.errors import Unknown, UsageError
from loracache.keys import KEY_BYTES, is_digest
from loracache.results import NodeKind
from loracache.storage_backends.base import Outcome
from loracache.tiers import Tier
from loracache.wire import control_messages as messages
from loracache.wire.protocol import split_keys
from loracache.wire.requests import AdapterChange, ControlRequest

if TYPE_CHECKING:
    from loracache.cache.tiered import TieredCache
    from loracache.control.adapters import Adapters
    from loracache.control.audit import Audit
    from loracache.control.lookup import Finder
    from loracache.namespaces import Namespaces

__all__ = ["Control"]

_MOVES_AT_ONCE = 2  # each holds a slice of the arena
_PART = 500  # keys of one step: a few milliseconds
_SPACES = 50  # descriptors written between two looks at the socket
_PAGE = 1000  # items of one answer, however many are asked for: a few milliseconds too

Parts = Iterator[list[bytes]]


class Control:
    """Serves control_messages of all connections. settings(): what `loracache config` shows."""

    def __init__(
        self,
        cache: TieredCache,
        namespaces: Namespaces,
        adapters: Adapters,
        finder: Finder,
        audit: Audit,
        settings: Callable[[], dict[str, Any]],
    ) -> None:
        self._cache = cache
        self._namespaces = namespaces
        self._adapters = adapters
        self._audit = audit
        self._settings = settings
        self._listing = Listing(cache.index, namespaces)
        self._locator = Locator(cache, namespaces, adapters, finder)
        self._about: dict[str, dict[str, Any]] = {}  # of running operations: what the audit log says of them
        self.operations = Operations(self._ended)
        self._incompressible = Incompressible()
        self._turns = JobTurns(_MOVES_AT_ONCE)
        self._recounter = Recounter(cache)

    async def serve(self, request: ControlRequest, label: str) -> list[Any]:
        """Answer a request. label: who asks, for the audit log; request.by: who the client says that it is. Raises
        LoRACacheError for one that cannot be served."""
        match request:
            case messages.Locate():
                return await self._on_locate(request, label)
            case messages.LocateChain():
                return await self._on_locate_chain(request, label)
            case messages.SpaceList():
                return await self._on_space_list(request, label)
            case messages.Pin():
                return await self._on_pin(request, label)
            case messages.Unpin():
                return await self._on_unpin(request, label)
            case messages.Evict():
                return await self._on_evict(request, label)
            case messages.Clear():
                return await self._on_clear(request, label)
            case messages.Admit():
                return await self._on_admit(request, label)
            case messages.Move():
                return await self._on_move(request, label)
            case messages.Compress():
                return await self._on_compress(request, label)
            case messages.Decompress():
                return await self._on_decompress(request, label)
            case messages.OperationShow():
                return await self._on_operation_show(request, label)
            case messages.OperationList():
                return await self._on_operation_list(request, label)
            case messages.Cancel():
                return await self._on_cancel(request, label)
            case messages.ObjectList():
                return await self._on_objects(request, label)
            case messages.Tree():
                return await self._on_tree(request, label)
            case messages.EventList():
                return await self._on_events(request, label)
            case messages.ConfigShow():
                return [self._settings()]
            case messages.IndexCheck():
                return await self._recounter.count()
            case _:
                assert_never(request)

    def stop(self) -> None:
        """The daemon drains: no operation begins another step."""
        self.operations.stop()

    def close(self) -> None:
        """Nothing comes back from the tiers any more; the audit log takes the last lines."""
        self.operations.end_all("the daemon ended")

    async def audited(self, request: AdapterChange, by: str, work: Awaitable[list[Any]]) -> list[Any]:
        """What `work` answers, noted down where something changed."""
        payload = await work
        if payload:
            self._audit.write(by, request.operation, says=request.by, name=request.name)
        return payload

    # -- operations ----------

    async def _on_pin(self, request: messages.Pin, label: str) -> list[Any]:
        tier, ttl = Tier.named(request.tier), request.ttl or None
        self._cache.pins.pin((), tier)  # says which tiers can be pinned in
        operation, parts = await self._begin(request, label)
        work = pin(self._cache, operation, parts, tier, ttl)
        return await self._run(request, operation, work)

    async def _on_unpin(self, request: messages.Unpin, label: str) -> list[Any]:
        tier = Tier.named(request.tier)
        self._cache.pins.pin((), tier)
        operation, parts = await self._begin(request, label)
        work = unpin(self._cache, operation, parts, tier)
        return await self._run(request, operation, work)

    async def _on_evict(self, request: messages.Evict, label: str) -> list[Any]:
        tiers = removable_tiers(request.tiers)
        selector = await self._selector(request)
        redis = self._cache.redis
        whose = None
        if redis is not None and Tier.REDIS in tiers:
            whose = await done(whose_of(selector, self._namespaces, request.scope))
        try:
            selected = await done(select(selector, self._namespaces, request.scope))
        except Unknown:  # here; other machines may have stored it
            if redis is None or whose is None or not await known_in_redis(redis.io, whose):
                raise
            selected = Selected(scope=request.scope)
        operation, parts = self._begin_with(request, label, selected)
        return await self._run(request, operation, self._evict(operation, parts, tiers, whose))

    async def _on_clear(self, request: messages.Clear, label: str) -> list[Any]:
        tiers = removable_tiers(request.tiers)
        if request.scope:
            raise UsageError("a tenant clears nothing but its own; evict what the tenant's salt selects")
        operation = self._new(request, label, {})
        return await self._run(request, operation, self._clear(operation, tiers))

    async def _on_admit(self, request: messages.Admit, label: str) -> list[Any]:
        target = own_tier(request.tier, self._cache.tiers, request.ttl)
        return await self._move(request, label, target, wanted=lambda node: not node.held_in(target), hold=request.ttl)

    async def _on_move(self, request: messages.Move, label: str) -> list[Any]:
        source, target = own_tier(request.source, self._cache.tiers), own_tier(request.tier, self._cache.tiers)
        if source is target:
            raise UsageError(f"source and tier are both {source.label}; give two tiers")
        return await self._move(request, label, target, source=source, keep=request.keep)

    async def _on_compress(self, request: messages.Compress, label: str) -> list[Any]:
        tier = compressible_tier(request.tier, self._cache.tiers)
        return await self._move(
            request,
            label,
            tier,
            source=tier,
            planes=lambda node: planes(node, self._namespaces),
            wanted=lambda node: tier is not Tier.DISK or not node.stored,
            in_redis=lambda stored: tier is not Tier.REDIS or not stored,
            hopeless=self._incompressible,
        )

    async def _on_decompress(self, request: messages.Decompress, label: str) -> list[Any]:
        tier = compressible_tier(request.tier, self._cache.tiers)
        wanted = {
            "wanted": lambda node: tier is not Tier.DISK or bool(node.stored),
            "in_redis": lambda stored: tier is not Tier.REDIS or bool(stored),
        }
        return await self._move(request, label, tier, source=tier, planes=lambda node: 0, **wanted)

    async def _on_operation_show(self, request: messages.OperationShow, label: str) -> list[Any]:
        operation = self.operations.get(request.name, request.scope)
        await operation.over(request.wait)
        return [operation.describe()]

    async def _on_operation_list(self, request: messages.OperationList, label: str) -> list[Any]:
        return [operation.describe() for operation in self.operations.latest(request.scope, request.count)]

    async def _on_cancel(self, request: messages.Cancel, label: str) -> list[Any]:
        operation = self.operations.cancel(request.name, request.scope)
        self._audit.write(label, "cancel", says=request.by, operation=operation.id, state=operation.state)
        if self._turns.leave(operation):
            self.operations.end(operation)
        return [operation.describe()]

    # -- reading ----------

    async def _on_locate(self, request: messages.Locate, label: str) -> list[Any]:
        return await self._locator.locate(await self._select(request))

    async def _on_space_list(self, request: messages.SpaceList, label: str) -> list[Any]:
        found = []
        for digest in (await self._select(request)).spaces[: min(request.count, _PAGE)]:
            if (space := self._namespaces.get(digest)) is not None:
                found.append(space.descriptor())
            if not len(found) % _SPACES:
                await turn()
        return found

    async def _on_locate_chain(self, request: messages.LocateChain, label: str) -> list[Any]:
        namespace = self._namespaces.get(request.namespace)
        if namespace is None or (request.scope and namespace.salt != request.scope):
            raise Unknown(f"namespace {request.namespace.hex()} is not registered here")
        keys = (request.keys[at : at + KEY_BYTES] for at in range(0, len(request.keys), KEY_BYTES))
        found = [bytes(await self._locator.leading(keys))]
        return [*found, await self._locator.where(split_keys(request.beside))] if request.beside else found

    async def _on_objects(self, request: messages.ObjectList, label: str) -> list[Any]:
        tier = Tier.named(request.tier) if request.tier else None
        if tier in (Tier.GPU, Tier.REDIS):
            raise UsageError(f"tier {request.tier!r} keeps its own books; list cpu or disk")
        selected = await self._select(request) if request.selector or request.scope else None
        count = min(request.count, _PAGE)
        end, objects = await done(self._listing.objects(selected, tier, request.after, count, request.scope))
        return [end, *objects]

    async def _on_tree(self, request: messages.Tree, label: str) -> list[Any]:
        await all_known(self._namespaces)
        count = min(request.count, _PAGE)
        end, found = await done(self._listing.tree(request.name, request.after, count, request.scope))
        adapters = [node for node in found if node["kind"] == NodeKind.ADAPTER]
        names = await self._adapters.names() if adapters and not request.scope else {}
        for node in adapters:
            node["names"] = names.get(node["digest"], [])
            node["engines"] = self._adapters.engines[bytes.fromhex(node["digest"])] if not request.scope else 0
        return [end, *found]

    async def _on_events(self, request: messages.EventList, label: str) -> list[Any]:
        events = self._cache.events
        since = request.since or events.last
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request.wait
        while True:
            found, lost = events.after(since, min(request.count, _PAGE))
            left = deadline - loop.time()
            if found or left <= 0:
                end = found[-1].number if found else min(since, events.last)
                return [end, lost, *([describe_event(each) for each in found])]
            woken = loop.create_future()
            wake = partial(woken.set_result, None)  # looked at a turn later: what comes in one go is answered in one go
            events.wake.add(wake)
            await asyncio.wait({woken}, timeout=left)
            events.wake.discard(wake)

    # -- inside ----------

    async def _evict(self, operation: Operation, parts: Parts, tiers: list[Tier], whose: Whose | None) -> None:
        deletions: Counter[Outcome] = Counter()
        for keys in operation.while_running(parts):
            await self._remove(operation, partial(self._cache.evict, keys, tiers), deletions)
            await turn()
        if Tier.REDIS in tiers and self._cache.redis is not None:
            await empty_redis(self._cache.redis.io, operation, deletions, whose)

    async def _clear(self, operation: Operation, tiers: list[Tier]) -> None:
        deletions: Counter[Outcome] = Counter()
        redis = self._cache.redis if Tier.REDIS in tiers else None
        kept = await self._adapters.named() if redis is not None else frozenset()
        counted = frozenset(key for key in kept if self._cache.index.get(key) is not None)
        await self._remove(operation, partial(self._cache.clear, tiers), deletions)
        if redis is not None:
            whose = Whose(everything=True, kept=kept, counted=counted)
            await empty_redis(redis.io, operation, deletions, whose)

    async def _remove(
        self, operation: Operation, slices: Callable[[Evicted], Iterator[None]], deletions: Counter[Outcome]
    ) -> None:
        did = Evicted(redis=deletions)
        try:
            for _ in operation.while_running(slices(did)):
                await turn()
        finally:
            count_evicted(operation, did)

    async def _move(self, request: Any, label: str, target: Tier, **options: Any) -> list[Any]:
        operation, parts = await self._begin(request, label)
        mover = Mover(self._cache, operation, parts, target, **options)
        return await self._run(request, operation, self._turns.run(operation, mover.run))

    async def _begin(self, request: Any, label: str) -> tuple[Operation, Parts]:
        """A new operation, and what was selected for it."""
        return self._begin_with(request, label, await self._select(request))

    def _begin_with(self, request: Any, label: str, selected: Selected) -> tuple[Operation, Parts]:
        operation = self._new(request, label, request.selector)
        operation.total = selected.total
        return operation, selected.parts(self._cache.index, self._namespaces, _PART)

    async def _run(self, request: Any, operation: Operation, work: Coroutine[Any, Any, None]) -> list[Any]:
        """Do an operation's work, and answer at its end, or after `wait` seconds."""
        start(self.operations.run(operation, work))
        await operation.over(request.wait)
        return [operation.describe()]

    def _new(self, request: Any, label: str, selector: Mapping[str, Any]) -> Operation:
        operation = self.operations.begin(request.operation, label, request.scope)
        where = {name: getattr(request, name) for name in ("tier", "tiers", "source") if hasattr(request, name)}
        self._about[operation.id] = {"says": request.by} | audit_summary(selector) | where
        return operation

    def _ended(self, operation: Operation) -> None:
        about = self._about.pop(operation.id, {})
        self._audit.write(
            operation.by,
            operation.verb,
            tenant=operation.scope,
            **about,
            operation=operation.id,
            state=operation.state,
            objects=operation.objects,
            bytes=operation.nbytes,
            skipped=sum(operation.causes.values()),
            error=operation.error,
        )

    async def _select(self, request: Any) -> Selected:
        """What the request's selector stands for."""
        selected = await done(select(await self._selector(request), self._namespaces, request.scope))
        raised = isinstance(request, messages.Admit) and request.tier == Tier.CPU.label
        return selected.behind_adapters(self._cache.index) if raised else selected

    async def _selector(self, request: Any) -> Selector:
        """The request's selector, an adapter by its digest."""
        await all_known(self._namespaces)
        fields = dict(request.selector)
        if fields.get("adapter"):
            fields["adapter"] = await self._digest(fields["adapter"], len(fields) == 1, request.scope)
        return Selector(**fields)

    async def _digest(self, name: str, alone: bool, scope: str) -> str:
        """Of an adapter by name or digest; `alone`: nothing else is selected, so that there must be one."""
        if is_digest(name) and (scope or not alone):
            return name
        if is_digest(name):
            known = [name] if await self._adapters.show(name) else []
        else:
            known = await self._adapters.find(name)
        if known:
            return str(known[0])
        if scope:  # what there is of it is none of the tenant's
            return "0" * 64
        raise Unknown(f"no adapter has the name or digest {str(name)[:200]!a}; see: loracache adapters list")
