# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side of paged LoRA: which content a request's adapter is, fetching it, and when the request may run.

A request waits until its adapter is on the pages of every worker, and the others run on. Nothing here waits but for an
answer that was just asked for, a few milliseconds a step, for without it the request loses a whole step:
the daemon is asked when a request arrives, and its answers are looked for when vLLM asks whether the request can run.
While no daemon answers, an adapter that has a folder is read from there, on a thread of its own (folders.py).

No request waits for ever. It waits for pages as long as others run on them; for a content that cannot be had or copied
in, however it is asked for, as long as its patience.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loracache.adapters.payload import ModuleSize, Packed
from loracache.backoff import Backoff
from loracache.connectors.vllm.common.answer_times import AnswerTimes
from loracache.connectors.vllm.common.messages import AdapterOrders, PoolFacts, WorkerNews
from loracache.connectors.vllm.common.recent import MOST_ADAPTERS, Recent
from loracache.connectors.vllm.link.scheduler import SchedulerLink
from loracache.connectors.vllm.lora.names import model_names
from loracache.connectors.vllm.lora.paths import digest_in
from loracache.connectors.vllm.lora.refusals import Refusal
from loracache.connectors.vllm.scheduler.lora.content import Content, Wait
from loracache.connectors.vllm.scheduler.lora.folders import Folders
from loracache.connectors.vllm.scheduler.lora.ledger import Answer, PageLedger
from loracache.errors import LoRACacheError, UsageError
from loracache.results import Cause

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

__all__ = ["AdapterAdmission"]

_log = logging.getLogger(__name__)
_LEASE_S = 30.0
_AGAIN_S = 0.5
_RESIDENT_S = 0.2
_FOLDER_PATIENCES = 4  # a daemon that is silent takes up to three before the folder is read


class AdapterAdmission:
    """Admission of one engine's requests: of all, unless a pool is `wanted`. bound(id, digest) is called when it
    is known what serves an adapter id; `fail` takes the ids of requests that are given up, and why, where vLLM can be
    told. patience: seconds for which a request waits for a content that nobody has, or cannot be copied in.
    """

    def __init__(self, link: SchedulerLink, patience: float, bound: Callable[[int, str], None], wanted: bool) -> None:
        self._link = link
        self._patience = patience
        self._wanted = wanted
        self._bound = bound
        self._pools: list[PoolFacts] = []
        self._ledger = PageLedger(())
        self._ids: Recent[int, str] = Recent()
        self._folders = Folders(link, patience)
        self._adapters: dict[str, Content] = {}
        self._waits: dict[str, Wait] = {}
        self._waited: set[str] = set()
        self._running: dict[str, int] = {}  # request -> adapter id, from admission to its end
        self._orders = AdapterOrders()
        self._last_order = 0
        self._told: Recent[int, str] = Recent()  # what the workers were told serves an adapter id
        self._pinned: set[int] = set()
        self._answers = AnswerTimes()
        self._most_contents = MOST_ADAPTERS  # more, where more are in use
        self._next_resident = 0.0
        self.fail: Callable[[str, Refusal], None] = lambda request_id, refusal: None

    def set_pools(self, pools: Sequence[PoolFacts]) -> None:
        """What the workers told of their pools."""
        if not pools or self._pools:
            return
        self._pools = list(pools)
        self._ledger = PageLedger([pool.shape.pages for pool in pools])
        self._link.begin()

    def on_new_request(self, request: Request) -> None:
        """Start to fetch what the request needs."""
        adapter = request.lora_request
        if adapter is None or not self._pools:
            return
        if getattr(adapter, "load_inplace", False):
            self.renew(adapter)
        digest = self._digest(request.request_id, adapter)
        if digest is not None and digest not in self._ledger:
            self._fetch(self._adapters[digest])

    def renew(self, adapter: LoRARequest) -> None:
        """The engine was told to load this id anew: its folder is looked at again."""
        self._ids.pop(adapter.lora_int_id, None)
        self._folders.forget(adapter.lora_path)

    def admit(self, request: Request) -> bool:
        """Whether the request's adapter is on all workers' pages, and stays there until the request ends."""
        adapter = request.lora_request
        if adapter is None or not self._wanted:
            return True
        admitted = bool(self._pools) and self._admit(request, adapter)
        if not admitted:
            self._waited.add(request.request_id)
            return False
        self._waits.pop(request.request_id, None)
        if request.request_id not in self._running:
            self._link.count("adapter.miss" if request.request_id in self._waited else "adapter.hit", 1)
            self._running[request.request_id] = adapter.lora_int_id
        return True

    def _admit(self, request: Request, adapter: LoRARequest) -> bool:
        wait = self._waits.get(request.request_id)
        if wait is not None and wait.cause and time.monotonic() - wait.since > self._patience:
            late = Refusal(f"it could not be copied in ({wait.cause})", forever=False)
            self._give_up(request.request_id, adapter.lora_name, late)
            return False
        digest = self._digest(request.request_id, adapter)
        if digest is None:
            return False
        found = self._adapters[digest]
        self._ledger.let_go_but(request.request_id, digest)  # of an id that stands for another content now
        if not (digest in self._ledger or self._fetch(found)):
            self._complain(request.request_id, adapter.lora_name, found)
            return False
        if wait is not None and not wait.cause:  # it waited for what is here now; what comes is another wait
            del self._waits[request.request_id]
        assert found.costs is not None
        answer, victims = self._ledger.ask(request.request_id, digest, found.costs, time.monotonic())
        if answer is Answer.NEVER:
            pages = min(pool.shape.pages for pool in self._pools)
            why = f"it needs {max(found.costs)} pages, the pool has {pages}: make lora_pool larger"
            self._give_up(request.request_id, adapter.lora_name, Refusal(why, forever=True))
        if answer is Answer.GIVEN:
            self._orders.evict += victims
            self._load(found)
            if victims:
                self._link.count("adapter.evict", len(victims))
        return answer not in (Answer.WAIT, Answer.NEVER) and self._served(adapter.lora_int_id, found)

    def _load(self, found: Content) -> None:
        self._last_order += 1
        found.order, found.ready = self._last_order, 0
        self._orders.load.append((found.order, found.digest, found.path))
        self._link.count("adapter.load", 1)

    def prefetch(self, keys: Sequence[bytes]) -> None:
        """Bring one of these adapters, the first that has none, onto pages that are free: nobody leaves for it."""
        missing = (key.hex() for key in keys if key.hex() not in self._ledger)
        for found in map(self._content, missing if self._pools else ()):
            full = found.costs is not None and not self._ledger.spare(found.costs)
            if full or found.problem or (not found.asked and time.monotonic() < found.next_try):
                continue
            if self._fetch(found) and found.costs is not None and self._ledger.spare(found.costs):
                self._ledger.give(found.digest, found.costs)
                self._link.count("adapter.prefetch", 1)
                self._load(found)
            elif found.here and self._waited <= self._running.keys():  # else one that waits may need it
                self._let_go(found)
            if found.asked or found.digest in self._ledger:
                return

    def _served(self, adapter: int, found: Content) -> bool:
        """Whether the workers serve this id with this content: its copy is done, and they were told in an earlier step
        (in the same step some vLLMs tell them too late). Requests that run under the id, whose adapter was loaded in
        place, are served by it too from then on.
        """
        ready = found.ready >= len(self._pools)
        if self._told.used(adapter) == found.digest:
            return ready
        running = [request for request, served in self._running.items() if served == adapter]
        if ready or not running:
            self._ledger.pin(self._told.get(adapter, ""), False)  # a pin is of what the id stood for, as in vLLM
            self._orders.bind[adapter] = found.digest
            for request in running:
                self._ledger.also_hold(request, found.digest)
        return False

    def end(self, request_id: str) -> None:
        """A request is over."""
        self._ledger.end(request_id)
        self._waits.pop(request_id, None)
        self._running.pop(request_id, None)
        self._waited.discard(request_id)

    def take_news(self, news: WorkerNews) -> None:
        """Learn what the workers copied in, and what they could not."""
        under_way = {self._adapters[digest].order: self._adapters[digest] for digest in self._ledger.adapters()}
        for order, count in news.activated.items():
            found = under_way.get(order)
            if found is not None:
                found.ready += count
                if found.ready >= len(self._pools):
                    found.pauses.reset()
                    self._let_go(found)
        for order, (cause, why) in news.not_activated.items():
            self._link.count(f"adapter.{cause}", 1)
            found = under_way.get(order)
            if found is not None and found.digest in self._ledger:
                self._failed(found, cause)
                if cause == Cause.UNUSABLE:
                    found.problem = why
        if news.pools_lost:
            for digest in self._ledger.adapters():
                self._ledger.drop(digest)
                self._orders.evict.append(digest)  # what was being copied in comes to its pages after the loss
        for adapter, pinned in news.pinned.items():
            (self._pinned.add if pinned and adapter in self._told else self._pinned.discard)(adapter)
            if adapter in self._told:
                self._ledger.pin(self._told[adapter], pinned)

    def _failed(self, found: Content, cause: str) -> None:
        """A copy failed: nobody has pages of it any more, and the next try is later each time."""
        now = time.monotonic()
        for request in self._ledger.drop(found.digest):
            self._waits.setdefault(request, Wait(now)).cause = cause
        self._orders.evict.append(found.digest)  # some workers may have it
        self._let_go(found)
        found.next_try = now + found.pauses.next()
        if cause == Cause.CHANGED:
            self._forget_ids(found)

    def take_orders(self) -> AdapterOrders:
        """What the workers do in the next step."""
        self._answers.begin_step()
        self._forget_unused()
        orders, self._orders = self._orders, AdapterOrders()
        self._told.update(orders.bind)
        if time.monotonic() >= self._next_resident:
            self.tell_resident()
        return orders

    def tell_resident(self) -> None:
        """Tell the daemon which adapters are on pages of all workers: now and then, and before no step may follow."""
        if self._pools and self._link.answering():
            self._next_resident = time.monotonic() + _RESIDENT_S
            ready = [each for each in self._ledger.adapters() if self._adapters[each].ready >= len(self._pools)]
            self._link.resident({bytes.fromhex(digest) for digest in ready})

    def _forget_unused(self) -> None:
        """Of ids and contents that no request has, those are remembered that were used last."""
        if max(len(self._ids), len(self._told)) > MOST_ADAPTERS:
            kept = {*self._running.values(), *self._pinned, *self._orders.bind}
            ids, told = self._ids.drop_oldest(kept), self._told.drop_oldest(kept)
            for adapter in ids.keys() | told.keys():
                self._ids.pop(adapter, None)
                if adapter in told or self._told.pop(adapter, None) is not None:
                    self._orders.forget.append(adapter)
        if len(self._adapters) > self._most_contents:
            used = {*self._ids.values(), *self._told.values(), *self._ledger.adapters()}
            for digest in [digest for digest in self._adapters if digest not in used]:
                found = self._adapters.pop(digest)
                self._link.abandon(found.asked)
                self._let_go(found)
            self._most_contents = max(MOST_ADAPTERS, len(self._adapters) + MOST_ADAPTERS // 4)

    # -- which content ----------

    def _digest(self, request_id: str, adapter: LoRARequest) -> str | None:
        """The content that serves an adapter id, or None while it is not known."""
        known = self._ids.used(adapter.lora_int_id)
        if known is not None:
            self._bound(adapter.lora_int_id, known)  # whoever else was told may have forgotten it
            return known
        named = digest_in(adapter.lora_path)
        if named is not None:
            return self._bind(adapter.lora_int_id, named, "")
        content = self._folders.ask(adapter.lora_path)
        if content is None:
            return None
        if isinstance(content, Refusal):
            self._give_up(request_id, adapter.lora_name, content)
            return None
        self._bind(adapter.lora_int_id, content.digest, content.place)
        found = self._adapters[content.digest]
        if content.sizes:
            self._price(found, content.sizes)
        elif time.monotonic() - found.taken_in > _AGAIN_S:  # it is back: no pause, unless it leaves over and over
            found.taken_in, found.next_try = time.monotonic(), 0.0
        return content.digest

    def _bind(self, adapter: int, digest: str, path: str) -> str:
        self._ids[adapter] = digest
        found = self._content(digest)
        found.path = path or found.path
        self._bound(adapter, digest)
        return digest

    def _content(self, digest: str) -> Content:
        return self._adapters.setdefault(digest, Content(digest, Backoff(_AGAIN_S, max(_AGAIN_S, self._patience / 4))))

    # -- fetching ----------

    def _fetch(self, found: Content) -> bool:
        """Whether the content can be copied in now; if not, have the daemon raise it."""
        if found.here:
            return True
        now = time.monotonic()
        if found.asked:
            done, payload = self._link.answer(found.asked)
            seconds = 0.0 if done else self._answers.allowance(now, found.since)
            if seconds:
                done, payload = self._link.wait_answer(found.asked, seconds)
                after = time.monotonic()
                if done:
                    self._answers.answered(after - found.since, after - now)
                else:
                    self._answers.missed(after, after - now)
            if not done and now - found.since <= self._patience:
                return False
            found.asked = 0
            self._fetched(found, payload)
            if not found.here:
                found.next_try = now + _AGAIN_S
                self._let_go(found)
            return found.here
        if now < found.next_try:
            return False
        found.problem = ""
        found.lease = os.urandom(16)
        found.asked, found.since = self._link.ask_acquire(found.lease, bytes.fromhex(found.digest), _LEASE_S), now
        if not found.asked:
            found.next_try = now + _AGAIN_S
            found.here = bool(found.path) and found.costs is not None  # the workers read the folder
            if found.path and not found.here:
                self._forget_ids(found)
        return found.here

    def _fetched(self, found: Content, payload: Any) -> None:
        try:
            (_, *rest), *_ = payload or [[0, Cause.UNAVAILABLE]]
            if len(rest) == 1:
                self._link.count(f"adapter.{rest[0]}", 1)
                if found.path:  # it left the cache: take its folder in once more
                    self._forget_ids(found)
                return
            size, _, extents = rest
            modules = Packed(self._link.buffers(extents, size)).modules()
            self._price(found, {name: module.size for name, module in modules.items()})
        except (LoRACacheError, ValueError, TypeError) as error:
            _log.warning("adapter %s: %s", found.digest[:12], error)

    def _forget_ids(self, found: Content) -> None:
        """Ask anew which content the adapter's folder holds."""
        for adapter in [adapter for adapter, digest in self._ids.items() if digest == found.digest]:
            del self._ids[adapter]

    def _price(self, found: Content, sizes: Mapping[str, ModuleSize]) -> None:
        """Pages on every worker, each of which may have other modules, or other parts of the same."""
        try:
            placements = [pool.shape.fit(model_names(sizes, pool.mapper)) for pool in self._pools]
            costs = zip(self._pools, placements, strict=True)
            found.costs = tuple(pool.shape.cost(placement.elements) for pool, placement in costs)
            found.here = True
        except UsageError as error:
            found.problem = str(error)
            found.next_try = time.monotonic() + _AGAIN_S

    def _let_go(self, found: Content) -> None:
        """The daemon need not hold it for us any longer; the next time it is needed it is asked for again."""
        if found.lease:
            self._link.release(found.lease)
        found.lease, found.here = b"", False

    # -- requests ----------

    def _complain(self, request_id: str, name: str, found: Content) -> None:
        """Give a request up whose adapter nobody has, after a while, or at once where nothing will help."""
        now = time.monotonic()
        since = self._waits.setdefault(request_id, Wait(now)).since
        patience = self._patience * (_FOLDER_PATIENCES if found.path else 1)
        if found.problem:
            self._give_up(request_id, name, Refusal(found.problem, forever=True))
        elif now - since > patience and not found.asked:
            nobody = "its folder leaves the cache again and again" if found.path else "and there is no folder"
            self._give_up(request_id, name, Refusal(f"no tier has it, {nobody}", forever=False))

    def _give_up(self, request_id: str, name: str, refusal: Refusal) -> None:
        """End a request with an error that says why; so does the log, once."""
        wait = self._waits.setdefault(request_id, Wait(time.monotonic()))
        if not wait.over:
            _log.error("adapter %s cannot be served: %s", name, refusal.why)
        wait.over = True
        self.fail(request_id, refusal)
