"""What operators ask for: operations on what they select, pages of what there is, events. Changes are audited.

Threading: the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, assert_never

from loracache.cache.eviction import Evicted
from loracache.control.fields import audit_summary, count_evicted, describe_event, planes, removable_tiers
from loracache.control.jobs import Operation, Operations, Turns, guarded
from loracache.control.listing import Listing
from loracache.control.location import Locator
from loracache.control.selection import Selected, Selector, select
from loracache.control.transfer import Mover
from loracache.errors import LoRACacheError, Rejected, Unknown, UsageError
from loracache.keys import is_digest
from loracache.results import Cause, NodeKind
from loracache.tiers import Tier
from loracache.wire import control_messages as messages
from loracache.wire import protocol
from loracache.wire.requests import ControlRequest

if TYPE_CHECKING:
    from loracache.cache.tier.io import Post
    from loracache.cache.tiered import TieredCache
    from loracache.control.adapters import Adapters, Answer
    from loracache.control.audit import Audit
    from loracache.control.lookup import Finder
    from loracache.namespaces import Namespaces

__all__ = ["Control"]

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_MOVES_AT_ONCE = 2  # each holds a slice of the arena
_PART = 500  # keys of one step: a few milliseconds

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
        post: Post,
        settings: Callable[[], dict[str, Any]],
    ) -> None:
        self._cache = cache
        self._namespaces = namespaces
        self._adapters = adapters
        self._audit = audit
        self._post = post
        self._settings = settings
        self._listing = Listing(cache.index, namespaces)
        self._locator = Locator(cache, namespaces, adapters, finder, post)
        self._about: dict[str, dict[str, Any]] = {}  # of running operations: what the audit log says of them
        self.operations = Operations(self._ended)
        self._turns = Turns(_MOVES_AT_ONCE)

    def serve(self, request: ControlRequest, label: str, answer: Answer) -> None:
        """Answer a request of the connection called `label`. Raises LoRACacheError for one that cannot be served."""
        match request:
            case messages.Locate():
                self._on_locate(request, label, answer)
            case messages.Pin():
                self._on_pin(request, label, answer)
            case messages.Unpin():
                self._on_unpin(request, label, answer)
            case messages.Evict():
                self._on_evict(request, label, answer)
            case messages.Clear():
                self._on_clear(request, label, answer)
            case messages.Admit():
                self._on_admit(request, label, answer)
            case messages.Move():
                self._on_move(request, label, answer)
            case messages.Compress():
                self._on_compress(request, label, answer)
            case messages.Decompress():
                self._on_decompress(request, label, answer)
            case messages.OperationShow():
                self._on_operation_show(request, label, answer)
            case messages.OperationList():
                self._on_operation_list(request, label, answer)
            case messages.Cancel():
                self._on_cancel(request, label, answer)
            case messages.ObjectList():
                self._on_objects(request, label, answer)
            case messages.Tree():
                self._on_tree(request, label, answer)
            case messages.EventList():
                self._on_events(request, label, answer)
            case messages.ConfigShow():
                self._on_config(request, label, answer)
            case _:
                assert_never(request)

    def stop(self) -> None:
        """The daemon drains: no operation begins another step."""
        self.operations.stop()

    def close(self) -> None:
        """Nothing comes back from the tiers any more; the audit log takes the last lines."""
        self.operations.end_all("the daemon ended")

    def audited(self, request: protocol.AdapterAdd | protocol.AdapterRemove, by: str, answer: Answer) -> Answer:
        """`answer`, noted down where something changed."""

        def note(result: list[Any] | Exception) -> None:
            if result and not isinstance(result, Exception):
                self._audit.write(by, request.operation, name=request.name)
            answer(result)

        return note

    # -- operations ----------

    def _on_pin(self, request: messages.Pin, label: str, answer: Answer) -> None:
        tier, ttl = Tier.named(request.tier), request.ttl or None
        self._cache.pins.pin((), tier)  # says which tiers can be pinned in
        self._each(request, label, answer, lambda keys: self._cache.pins.pin(keys, tier, ttl))

    def _on_unpin(self, request: messages.Unpin, label: str, answer: Answer) -> None:
        tier = Tier.named(request.tier)
        self._cache.pins.pin((), tier)
        self._each(request, label, answer, lambda keys: self._cache.pins.unpin(keys, tier))

    def _on_evict(self, request: messages.Evict, label: str, answer: Answer) -> None:
        tiers = removable_tiers(request.tiers)

        def work(operation: Operation, parts: Parts) -> None:
            def step() -> None:
                keys = next(parts, None) if operation.running else None
                if keys is None:
                    self.operations.end(operation)
                else:
                    self._cache.evict(keys, tiers, evicted, lambda: operation.running)

            def evicted(did: Evicted) -> None:
                count_evicted(operation, did)
                if did.error:
                    self.operations.end(operation, did.error)
                else:
                    self._post(self._guard(operation, step))

            step()

        self._begin(request, label, answer, work)

    def _on_clear(self, request: messages.Clear, label: str, answer: Answer) -> None:
        tiers = removable_tiers(request.tiers)
        if request.scope:
            raise UsageError("a tenant clears nothing but its own; evict what the tenant's salt selects")
        operation = self._new(request, label, {})

        def cleared(did: Evicted) -> None:
            count_evicted(operation, did)
            self.operations.end(operation, did.error)

        self._guard(operation, self._cache.clear)(tiers, cleared, lambda: operation.running)
        self._answer(operation, request.wait, answer)

    def _on_admit(self, request: messages.Admit, label: str, answer: Answer) -> None:
        target = self._own(request.tier)
        self._move(request, label, answer, target, wanted=lambda node: not node.held_in(target))

    def _on_move(self, request: messages.Move, label: str, answer: Answer) -> None:
        source, target = self._own(request.source), self._own(request.tier)
        if source is target:
            raise UsageError(f"source and tier are both {source.label}; give two tiers")
        self._move(request, label, answer, target, source=source, keep=request.keep)

    def _on_compress(self, request: messages.Compress, label: str, answer: Answer) -> None:
        tier = self._compressible(request.tier)
        self._move(
            request, label, answer, tier, source=tier, planes=lambda node: planes(node, self._namespaces),
            wanted=lambda node: tier is not Tier.DISK or not node.stored,
        )  # fmt: skip

    def _on_decompress(self, request: messages.Decompress, label: str, answer: Answer) -> None:
        tier = self._compressible(request.tier)
        self._move(
            request, label, answer, tier, source=tier, planes=lambda node: 0,
            wanted=lambda node: tier is not Tier.DISK or bool(node.stored),
        )  # fmt: skip

    def _on_operation_show(self, request: messages.OperationShow, label: str, answer: Answer) -> None:
        self._answer(self.operations.get(request.name, request.scope), request.wait, answer)

    def _on_operation_list(self, request: messages.OperationList, label: str, answer: Answer) -> None:
        answer([operation.describe() for operation in self.operations.latest(request.scope, request.count)])

    def _on_cancel(self, request: messages.Cancel, label: str, answer: Answer) -> None:
        operation = self.operations.cancel(request.name, request.scope)
        self._audit.write(request.by or label, "cancel", operation=operation.id, state=operation.state)
        if self._turns.leave(operation):
            self.operations.end(operation)
        answer([operation.describe()])

    # -- reading ----------

    def _on_locate(self, request: messages.Locate, label: str, answer: Answer) -> None:
        self._select(request, lambda selected: self._locator.locate(selected, answer), answer)

    def _on_objects(self, request: messages.ObjectList, label: str, answer: Answer) -> None:
        tier = Tier.named(request.tier) if request.tier else None
        if tier in (Tier.GPU, Tier.REDIS):
            raise UsageError(f"tier {request.tier!r} keeps its own books; list cpu or disk")

        def page(selected: Selected | None) -> None:
            end, found = self._listing.objects(selected, tier, request.after, request.count, request.scope)
            answer([end, *found])

        if request.selector or request.scope:
            self._select(request, page, answer)
        else:
            page(None)

    def _on_tree(self, request: messages.Tree, label: str, answer: Answer) -> None:
        end, found = self._listing.tree(request.name, request.after, request.count, request.scope)
        adapters = [node for node in found if node["kind"] == NodeKind.ADAPTER]
        names = self._adapters.names() if adapters and not request.scope else {}
        for node in adapters:
            node["names"] = names.get(node["digest"], [])
            node["engines"] = self._adapters.engines[bytes.fromhex(node["digest"])] if not request.scope else 0
        answer([end, *found])

    def _on_events(self, request: messages.EventList, label: str, answer: Answer) -> None:
        events = self._cache.events
        since = request.since or events.last
        loop = asyncio.get_running_loop()
        answered = False

        def look(last: bool) -> None:
            nonlocal answered
            if answered:
                return
            found, lost = events.after(since, request.count)
            if found or last:
                answered = True
                timer.cancel()
                events.wake.discard(wake)
                end = found[-1].number if found else min(since, events.last)
                answer([end, lost, *([describe_event(each) for each in found])])
            else:
                events.wake.add(wake)

        def wake() -> None:
            loop.call_soon(look, False)  # what comes in one go is answered in one go

        timer = loop.call_later(request.wait, look, True)
        look(not request.wait)

    def _on_config(self, request: messages.ConfigShow, label: str, answer: Answer) -> None:
        answer([self._settings()])

    # -- inside ----------

    def _each(self, request: Any, label: str, answer: Answer, change: Callable[[list[bytes]], int]) -> None:
        """An operation that changes so many objects of each part."""

        def work(operation: Operation, parts: Parts) -> None:
            def step() -> None:
                keys = next(parts, None) if operation.running else None
                if keys is None:
                    self.operations.end(operation)
                    return
                changed = change(keys)
                operation.objects += changed
                operation.skip(Cause.ABSENT, len(keys) - changed)
                self._post(self._guard(operation, step))

            step()

        self._begin(request, label, answer, work)

    def _move(self, request: Any, label: str, answer: Answer, target: Tier, **options: Any) -> None:
        def work(operation: Operation, parts: Parts) -> None:
            def done(error: str) -> None:
                self.operations.end(operation, error)
                self._post(self._turns.give_back)

            mover = Mover(self._cache, self._post, operation, parts, target, done, **options)
            self._turns.take(operation, mover.start)

        self._begin(request, label, answer, work)

    def _begin(self, request: Any, label: str, answer: Answer, work: Callable[[Operation, Parts], None]) -> None:
        def selected(found: Selected) -> None:
            operation = self._new(request, label, request.selector)
            operation.total = found.total
            parts = found.parts(self._cache.index, self._namespaces, _PART)
            self._guard(operation, work)(operation, parts)
            self._answer(operation, request.wait, answer)

        self._select(request, selected, answer)

    def _guard(self, operation: Operation, step: Callable[_P, None]) -> Callable[_P, None]:
        return guarded(step, lambda error: self.operations.end(operation, error))

    def _new(self, request: Any, label: str, selector: Mapping[str, Any]) -> Operation:
        operation = self.operations.begin(request.operation, request.by or label, request.scope)
        where = {name: getattr(request, name) for name in ("tier", "tiers", "source") if hasattr(request, name)}
        self._about[operation.id] = audit_summary(selector) | where
        return operation

    def _answer(self, operation: Operation, wait: float, answer: Answer) -> None:
        """After the operation's end, or after `wait` seconds."""
        if operation.ended or not wait:  # a cancelled one has its last step before it
            answer([operation.describe()])
            return
        answered = False

        def once() -> None:
            nonlocal answered
            if not answered:
                answered = True
                timer.cancel()
                answer([operation.describe()])

        timer = asyncio.get_running_loop().call_later(wait, once)
        operation.waiting.append(once)

    def _ended(self, operation: Operation) -> None:
        about = self._about.pop(operation.id, {})
        self._audit.write(
            operation.by, operation.verb, tenant=operation.scope, **about, operation=operation.id,
            state=operation.state, objects=operation.objects, bytes=operation.nbytes,
            skipped=sum(operation.causes.values()), error=operation.error,
        )  # fmt: skip

    def _select(self, request: Any, then: Callable[[Selected], None], answer: Answer) -> None:
        """Call `then` with what the request's selector stands for; an adapter's name may have to be asked for."""
        fields = dict(request.selector)
        name = fields.get("adapter")

        def go(digest: str | None) -> None:
            try:
                then(select(Selector(**fields | {"adapter": digest}), self._namespaces, request.scope))
            except LoRACacheError as error:
                answer(error)
            except Exception as error:  # noqa: BLE001 - top of a callback: an answer that never comes hangs a client
                _log.exception("%s failed", request.operation)
                answer(Rejected(repr(error)))

        def found(result: list[Any] | Exception) -> None:
            if isinstance(result, Exception):
                answer(result)
            elif result:
                go(str(result[0]))
            elif request.scope:  # what there is of it is none of the tenant's
                go("0" * 64)
            else:
                answer(Unknown(f"no adapter has the name or digest {str(name)[:200]!a}; see: loracache adapters list"))

        def known(result: list[Any] | Exception) -> None:
            found([name] if isinstance(result, list) and result else result)

        if not name or (is_digest(name) and (request.scope or len(fields) > 1)):
            go(name)
        elif is_digest(name):
            self._adapters.show(name, known)
        else:
            self._adapters.find(name, found)

    def _own(self, name: str) -> Tier:
        """The tier of that name. Raises UsageError where this daemon does not have it."""
        tier = Tier.named(name)
        if tier not in self._cache.tiers:
            why = "belongs to the engines" if tier is Tier.GPU else "is not configured here"
            known = ", ".join(each.label for each in sorted(self._cache.tiers))
            raise UsageError(f"tier {tier.label!r} {why}; this daemon has {known}")
        return tier

    def _compressible(self, name: str) -> Tier:
        tier = self._own(name)
        if tier is Tier.CPU:
            raise UsageError("engines map tier 'cpu' and read its bytes as they are; compress disk or redis")
        return tier
