"""The scheduler's side of paged LoRA: which content a request's adapter is, fetching it, and when the request may run.

A request waits until its adapter is on the pages of every worker, and the others run on. Nothing here waits: the
daemon is asked when a request arrives, and its answers are looked for when vLLM asks whether the request can run.
While no daemon answers, an adapter that has a folder is read from there, on a thread of its own.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.lora.utils import get_adapter_absolute_path

from loracache.adapters import Packed, Packing, adapter_digest
from loracache.connectors.vllm.link import SchedulerLink
from loracache.connectors.vllm.lora.ledger import Answer, PageLedger
from loracache.connectors.vllm.lora.names import model_name
from loracache.connectors.vllm.lora.paths import digest_in
from loracache.connectors.vllm.messages import AdapterOrders, PoolFacts, WorkerNews
from loracache.errors import LoRACacheError, UsageError
from loracache.peft import PeftFolder

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

__all__ = ["AdapterAdmission"]

_log = logging.getLogger(__name__)
_LEASE_S = 30.0
_AGAIN_S = 0.5
_RESIDENT_S = 0.2


@dataclass(slots=True)
class _Adapter:
    """One content. path: a folder that holds it, or "". costs: pages by worker, once known. here: it can be copied in
    now. asked: the number of the question that fetches it, since: when it was asked. order: the number of the last
    order to copy it in, ready: how many workers have done so.
    """

    digest: str
    path: str = ""
    costs: tuple[int, ...] | None = None
    here: bool = False
    asked: int = 0
    since: float = 0.0
    lease: bytes = b""
    next_try: float = 0.0
    order: int = 0
    ready: int = 0
    problem: str = ""


@dataclass(slots=True)
class _Folder:
    """A folder whose content is asked for: of the daemon, or, while none answers, of a thread of our own. place: where
    it is, "" while that is not known (a name on a hub has to be downloaded). read: what the thread found.
    """

    place: str = ""
    asked: int = 0
    since: float = 0.0
    reading: bool = False
    read: list[tuple[str, dict[str, int]] | str] = field(default_factory=list)


class AdapterAdmission:
    """Admission of one engine's requests: of all, unless a pool is `wanted`. bound(id, digest) is called when it
    is known what serves an adapter id; `fail` takes the ids of requests that can never run, where there is a way to
    tell vLLM. patience: seconds for which a request waits for a content that nobody has.
    """

    def __init__(self, link: SchedulerLink, patience: float, bound: Callable[[int, str], None], wanted: bool) -> None:
        self._link = link
        self._patience = patience
        self._wanted = wanted
        self._bound = bound
        self._pools: list[PoolFacts] = []
        self._ledger = PageLedger(())
        self._ids: dict[int, str] = {}
        self._folders: dict[str, _Folder] = {}
        self._adapters: dict[str, _Adapter] = {}
        self._since: dict[str, float] = {}  # request -> when it first waited for a content that nobody has
        self._waited: set[str] = set()
        self._running: dict[str, int] = {}  # request -> adapter id, from admission to its end
        self._orders = AdapterOrders()
        self._last_order = 0
        self._told: dict[int, str] = {}  # what the workers were told serves an adapter id
        self._next_resident = 0.0
        self.fail: Callable[[str], None] = lambda request_id: None

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
        self._folders.pop(adapter.lora_path, None)

    def admit(self, request: Request) -> bool:
        """Whether the request's adapter is on all workers' pages, and stays there until the request ends."""
        adapter = request.lora_request
        if adapter is None or not self._wanted:
            return True
        admitted = bool(self._pools) and self._admit(request, adapter)
        if not admitted:
            self._waited.add(request.request_id)
            return False
        self._since.pop(request.request_id, None)
        if request.request_id not in self._running:
            self._link.count("adapter.miss" if request.request_id in self._waited else "adapter.hit", 1)
            self._running[request.request_id] = adapter.lora_int_id
        return True

    def _admit(self, request: Request, adapter: LoRARequest) -> bool:
        digest = self._digest(request.request_id, adapter)
        if digest is None:
            return False
        found = self._adapters[digest]
        if not (digest in self._ledger or self._fetch(found)):
            self._complain(request.request_id, found)
            return False
        assert found.costs is not None
        answer, victims = self._ledger.ask(request.request_id, digest, found.costs, time.monotonic())
        if answer is Answer.NEVER:
            _log.error("adapter %s needs %s pages, the pool has %s: make lora_pool larger", adapter.lora_name,
                       max(found.costs), min(pool.shape.pages for pool in self._pools))  # fmt: skip
            self.fail(request.request_id)
        if answer is Answer.GIVEN:
            self._orders.evict += victims
            self._last_order += 1
            found.order, found.ready = self._last_order, 0
            self._orders.load.append((found.order, digest, found.path))
            self._link.count("adapter.load", 1)
            if victims:
                self._link.count("adapter.evict", len(victims))
        return answer not in (Answer.WAIT, Answer.NEVER) and self._served(adapter.lora_int_id, found)

    def _served(self, adapter: int, found: _Adapter) -> bool:
        """Whether the workers serve this id with this content: its copy is done, and they were told in an earlier step
        (in the same step some vLLMs tell them too late). Requests that run under the id, whose adapter was loaded in
        place, are served by it too from then on.
        """
        ready = found.ready >= len(self._pools)
        if self._told.get(adapter) == found.digest:
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
        self._since.pop(request_id, None)
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
                    self._let_go(found)
        for order, cause in news.not_activated.items():
            self._link.count(f"adapter.{cause}", 1)
            found = under_way.get(order)
            if found is not None and found.digest in self._ledger:
                self._ledger.drop(found.digest)
                self._orders.evict.append(found.digest)  # some workers may have it
                self._let_go(found)
                found.next_try = time.monotonic() + _AGAIN_S
                if cause == "changed":
                    self._forget_ids(found)
                if cause == "unusable":
                    found.problem = "the engine cannot use it; its log says why"
        if news.pools_lost:
            for digest in self._ledger.adapters():
                self._ledger.drop(digest)
                self._orders.evict.append(digest)  # what was being copied in comes to its pages after the loss
        for adapter, pinned in news.pinned.items():
            if adapter in self._told:
                self._ledger.pin(self._told[adapter], pinned)

    def take_orders(self) -> AdapterOrders:
        """What the workers do in the next step."""
        orders, self._orders = self._orders, AdapterOrders()
        self._told.update(orders.bind)
        now = time.monotonic()
        if self._pools and now >= self._next_resident and self._link.connected:
            self._next_resident = now + _RESIDENT_S
            ready = [each for each in self._ledger.adapters() if self._adapters[each].ready >= len(self._pools)]
            self._link.resident({bytes.fromhex(digest) for digest in ready})
        return orders

    # -- which content ----------

    def _digest(self, request_id: str, adapter: LoRARequest) -> str | None:
        """The content that serves an adapter id, or None while it is not known."""
        known = self._ids.get(adapter.lora_int_id)
        if known is not None:
            return known
        named = digest_in(adapter.lora_path)
        if named is not None:
            return self._bind(adapter.lora_int_id, named, "")
        folder = self._folders.setdefault(adapter.lora_path, _Folder())
        answer = self._ask_folder(folder, adapter.lora_path)
        if answer is None:
            return None
        place = self._folders.pop(adapter.lora_path).place
        if isinstance(answer, str):
            _log.error("adapter %s cannot be served: %s", adapter.lora_name, answer)
            self.fail(request_id)
            return None
        digest, ranks = answer
        self._bind(adapter.lora_int_id, digest, place)
        if ranks:
            self._price(self._adapters[digest], ranks)
        return digest

    def _bind(self, adapter: int, digest: str, path: str) -> str:
        self._ids[adapter] = digest
        found = self._adapters.setdefault(digest, _Adapter(digest))
        found.path = path or found.path
        self._bound(adapter, digest)
        return digest

    def _ask_folder(self, folder: _Folder, path: str) -> tuple[str, dict[str, int]] | str | None:
        """(digest, ranks by module where they are known), why the folder cannot be served, or None while neither is
        known."""
        if folder.reading:
            if not folder.read:
                return None
            folder.reading = False
            return folder.read.pop()
        if not folder.place and os.path.isdir(path):
            folder.place = path
        if not folder.asked:
            if folder.place and (self._link.connected or self._link.begin()):
                folder.asked, folder.since = self._link.ask_adapter_add(folder.place), time.monotonic()
            if not folder.asked:
                self._read(folder, path)
            return None
        done, payload = self._link.answer(folder.asked)
        if not done:
            if time.monotonic() - folder.since > self._patience:  # the daemon is there, but silent
                folder.asked = 0
                self._read(folder, path)
            return None
        folder.asked = 0
        if isinstance(payload, str):  # it is none that can be served, or there is no room for it: look ourselves
            _log.warning("%s is not taken into the cache: %s", path, payload)
            self._link.count("adapter.refused", 1)
            self._read(folder, path)
            return None
        return (str(payload[0]), {}) if payload else None

    def _read(self, folder: _Folder, path: str) -> None:
        folder.reading = True
        threading.Thread(target=_read_folder, args=(path, folder), daemon=True).start()

    # -- fetching ----------

    def _fetch(self, found: _Adapter) -> bool:
        """Whether the content can be copied in now; if not, have the daemon raise it."""
        if found.here:
            return True
        now = time.monotonic()
        if found.asked:
            done, payload = self._link.answer(found.asked)
            if not done and now - found.since <= self._patience:
                return False
            found.asked = 0
            found.next_try = now + _AGAIN_S
            self._fetched(found, payload)
            if not found.here:
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
                self._folders.setdefault(found.path, _Folder())
                self._forget_ids(found)
        return found.here

    def _fetched(self, found: _Adapter, payload: Any) -> None:
        try:
            (_, *rest), *_ = payload or [[0, "unavailable"]]
            if len(rest) == 1:
                self._link.count(f"adapter.{rest[0]}", 1)
                if found.path:  # it left the cache: take its folder in once more
                    self._forget_ids(found)
                return
            size, _, extents = rest
            modules = Packed(self._link.buffers(extents, size)).modules()
            self._price(found, {name: module.rank for name, module in modules.items()})
        except (LoRACacheError, ValueError, TypeError) as error:
            _log.warning("adapter %s: %s", found.digest[:12], error)

    def _forget_ids(self, found: _Adapter) -> None:
        """Ask anew which content the adapter's folder holds."""
        for adapter in [adapter for adapter, digest in self._ids.items() if digest == found.digest]:
            del self._ids[adapter]

    def _price(self, found: _Adapter, ranks: dict[str, int]) -> None:
        try:
            found.costs = tuple(
                pool.shape.pages_of({model_name(name, pool.mapper): rank for name, rank in ranks.items()})
                for pool in self._pools
            )
            found.here = True
        except UsageError as error:
            found.problem = str(error)
            found.next_try = time.monotonic() + _AGAIN_S

    def _let_go(self, found: _Adapter) -> None:
        """The daemon need not hold it for us any longer; the next time it is needed it is asked for again."""
        if found.lease:
            self._link.release(found.lease)
        found.lease, found.here = b"", False

    # -- requests ----------

    def _complain(self, request_id: str, found: _Adapter) -> None:
        """Give a request up whose adapter nobody has, after a while, or at once where nothing will help."""
        now = time.monotonic()
        since = self._since.setdefault(request_id, now)
        if found.problem or (now - since > self._patience and not found.asked and not found.path):
            _log.error("adapter %s: %s", found.digest[:12], found.problem or "no tier has it, and there is no folder")
            self.fail(request_id)


def _read_folder(path: str, folder: _Folder) -> None:
    """What the daemon would have done, as far as it is needed; and before that find the folder, as vLLM does."""
    try:
        folder.place = folder.place or get_adapter_absolute_path(path)
        with PeftFolder(folder.place) as peft:
            ranks = Packing(peft).ranks()
        folder.read.append((adapter_digest(folder.place), ranks))
    except LoRACacheError as error:
        folder.read.append(str(error))
    except Exception as error:  # noqa: BLE001 - top of the thread: an answer that never comes hangs a request
        folder.read.append(repr(error))
