"""Which adapter content a `lora_int_id` stands for.

vLLM keeps the weights first loaded under an id, whatever path or files a later request names. So KV is keyed by what
the engine serves for the id: the scheduler binds an id to the digest of the files it first sees for it; the worker
hashes what it really loads and its word wins. Workers number the contents that an id has served: that number is in what
vLLM's own blocks are keyed by (blocks.py).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loracache.adapters import AdapterDigests
from loracache.errors import UsageError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from loracache.connectors.vllm.messages import Prefix

__all__ = ["LoadedAdapters", "ServedAdapters"]

_log = logging.getLogger(__name__)


class ServedAdapters:
    """The scheduler's bindings. `ask(path)` sends the daemon a question; `answer(number)` is (done, digest or None)."""

    def __init__(self, ask: Callable[[str], int | None], answer: Callable[[int], tuple[bool, str | None]]) -> None:
        self._ask = ask
        self._answer = answer
        self._digests: dict[int, str | None] = {}
        self._asked: dict[int, int] = {}

    def digest(self, request: LoRARequest) -> tuple[bool, str | None]:
        """(known by now, the digest; None where its content cannot be known). Asks the daemon at the first sight of
        an id.
        """
        adapter = request.lora_int_id
        if adapter in self._digests and adapter not in self._asked:
            return self._bind(request, self._digests[adapter])
        number = self._asked.get(adapter)
        if number is None:
            if not os.path.isdir(request.lora_path):
                return self._bind(request, None)
            number = self._ask(request.lora_path)
            if number is None:
                return False, None
            self._asked[adapter] = number
        done, digest = self._answer(number)
        if not done:
            return False, None
        del self._asked[adapter]
        return self._bind(request, digest) if digest is not None else (False, None)

    def renew(self, request: LoRARequest) -> None:
        """The engine was told to load this id anew: what it serves must be asked for again."""
        self._digests.pop(request.lora_int_id, None)

    def correct(self, adapter: int, digest: str) -> None:
        """A worker says what it loaded under an id ("": it does not know)."""
        old = self._digests.get(adapter)
        self._asked.pop(adapter, None)
        self._digests[adapter] = digest or None
        if old is not None and old != digest:
            _log.info("adapter id %d now serves content %s", adapter, digest[:12] or "unknown")

    def serves(self, adapter: int, digest: str) -> bool:
        """Whether the id still stands for this content."""
        return self._digests.get(adapter) == digest

    def _bind(self, request: LoRARequest, digest: str | None) -> tuple[bool, str | None]:
        first = request.lora_int_id not in self._digests
        self._digests[request.lora_int_id] = digest
        if digest is None and first:
            _log.warning("adapter %s has no local folder; its KV is not cached", request.lora_name)
        return True, digest


class LoadedAdapters:
    """The worker's truth, learnt by a hook on vLLM's loader. The hook runs on the worker's main thread; readers may
    be on others.
    """

    def __init__(self, changed: Callable[[int], None]) -> None:
        self._digests = AdapterDigests()
        self._changed = changed
        self._lock = threading.Lock()
        self._loaded: dict[int, tuple[str, int]] = {}  # id -> (digest or "", first step that may use it)
        self._contents: dict[int, int] = {}  # id -> how many contents it has served
        self._news: dict[int, str] = {}
        self.step = 0

    def install(self) -> None:
        """Hook the loader of this process's LoRA manager. An engine without LoRA never calls it."""
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

        original = LRUCacheWorkerLoRAManager._load_adapter

        def load(manager: Any, lora_request: LoRARequest) -> Any:
            before = self._content(lora_request)
            model = original(manager, lora_request)
            after = self._content(lora_request)
            self.confirm(lora_request.lora_int_id, before if before == after else "")
            return model

        LRUCacheWorkerLoRAManager._load_adapter = load

    def digest(self, adapter: int) -> str | None:
        """What was loaded last under an id; None where nothing was, "" where its content is not known."""
        with self._lock:
            entry = self._loaded.get(adapter)
        return entry[0] if entry is not None else None

    def computed_with(self, adapter: int, digest: str, first_step: int) -> bool:
        """Whether a request first computed in `first_step` was computed with this content throughout."""
        with self._lock:
            entry = self._loaded.get(adapter)
        return entry is not None and entry[0] == digest and entry[1] <= first_step

    def stale_blocks(self, prefixes: Sequence[Prefix]) -> set[int]:
        """Blocks of these prefixes that were not computed with what their adapters' ids serve now. Requests that begin
        upon them in this step are not taken to be computed with that either, whatever they say that they are.
        """
        with self._lock:
            stale = [each for each in prefixes if max(each.content, 1) != self._contents.get(each.lora_int_id, 1)]
            for each in stale:
                if each.lora_int_id in self._loaded:
                    self._loaded[each.lora_int_id] = (self._loaded[each.lora_int_id][0], self.step + 1)
            return {block for prefix in stale for block in prefix.blocks}

    def take_news(self) -> tuple[dict[int, str], dict[int, int]]:
        """(digests of the ids loaded since the last call, how many contents each of them has served)"""
        with self._lock:
            news, self._news = self._news, {}
            return news, {adapter: self._contents[adapter] for adapter in news}

    def _content(self, request: LoRARequest) -> str:
        if not os.path.isdir(request.lora_path):
            return ""
        try:
            return self._digests.digest(request.lora_path)[0]
        except UsageError as error:
            _log.warning("adapter %s: %s", request.lora_name, error)
            return ""

    def confirm(self, adapter: int, digest: str) -> None:
        """From now on `adapter` is served by this content ("": it is not known)."""
        with self._lock:
            old = self._loaded.get(adapter)
            if old is None:
                self._loaded[adapter] = (digest, 0)
            elif old[0] != digest:
                self._loaded[adapter] = (digest, self.step + 1)
            if old is None or old[0] != digest or not digest:
                self._contents[adapter] = self._contents.get(adapter, 0) + 1
            self._news[adapter] = digest
        if old is None or old[0] != digest:
            self._changed(adapter)
