# SPDX-License-Identifier: Apache-2.0
"""Which adapter content a `lora_int_id` stands for, as a worker knows it: it hashes what it really loads.

Workers number the contents that an id has served: that number is in what vLLM's own blocks are keyed by
(scheduler/blocks.py). Ids that are not in use are forgotten where there are too many; one that comes again begins with
a number above all that were forgotten, so that no number is used twice.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from loracache.adapters.payload import AdapterDigests
from loracache.connectors.vllm.common.recent import MOST_ADAPTERS, Recent
from loracache.errors import UsageError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from loracache.connectors.vllm.common.messages import Prefix

__all__ = ["LoadedAdapters"]

_log = logging.getLogger(__name__)


class LoadedAdapters:
    """The worker's truth, learnt by a hook on vLLM's loader. The hook runs on the worker's main thread; readers may
    be on others.
    """

    def __init__(self, changed: Callable[[int], None]) -> None:
        self._digests = AdapterDigests()
        self._changed = changed
        self._lock = threading.Lock()
        self._loaded: Recent[int, tuple[str, int]] = Recent()  # id -> (digest or "", first step that may use it)
        self._contents: dict[int, int] = {}  # id -> how many contents it has served
        self._news: dict[int, str] = {}
        self._forgotten = 0  # the highest id that was forgotten: those up to it may have been
        self._most_contents = 0  # of a forgotten id
        self._in_use: Callable[[], Container[int]] | None = None  # ids of vLLM's manager, where that decides
        self.step = 0

    def install(self) -> None:
        """Hook the loader of this process's LoRA manager. An engine without LoRA never calls it."""
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

        original = LRUCacheWorkerLoRAManager._load_adapter

        def load(manager: Any, lora_request: LoRARequest) -> Any:
            self._in_use = lambda: manager.list_adapters()
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
            stale = [each for each in prefixes if max(each.content, 1) != self._number(each.lora_int_id)]
            for each in stale:
                if each.lora_int_id in self._loaded:
                    digest = self._loaded[each.lora_int_id][0]
                    self._loaded[each.lora_int_id] = digest, self.step + 1
                    self._news[each.lora_int_id] = digest  # the scheduler may have forgotten the number
            return {block for prefix in stale for block in prefix.blocks}

    def take_news(self) -> tuple[dict[int, str], dict[int, int]]:
        """(digests of the ids loaded since the last call, how many contents each of them has served)"""
        with self._lock:
            news, self._news = self._news, {}
            return news, {adapter: self._contents[adapter] for adapter in news}

    def forget(self, adapters: Iterable[int]) -> None:
        """The scheduler has forgotten these ids, which no request has."""
        with self._lock:
            self._forget([adapter for adapter in adapters if self._loaded.pop(adapter, None) is not None])

    def _forget(self, adapters: Iterable[int]) -> None:
        for adapter in adapters:
            self._most_contents = max(self._most_contents, self._contents.pop(adapter, 0))
            self._forgotten = max(self._forgotten, adapter)
            self._news.pop(adapter, None)

    def _number(self, adapter: int) -> int:
        """Of the content that an id serves; 0, which is nobody's, where that may have been forgotten."""
        return self._contents.get(adapter, 1 if adapter > self._forgotten else 0)

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
            old = self._loaded.used(adapter)
            known = adapter > self._forgotten or adapter in self._contents
            if old is None:
                self._loaded[adapter] = (digest, 0 if known else self.step + 1)
            elif old[0] != digest:
                self._loaded[adapter] = (digest, self.step + 1)
            if old is None or old[0] != digest or not digest:
                self._contents[adapter] = 1 + self._contents.get(adapter, 0 if known else self._most_contents)
            self._news[adapter] = digest
            if self._in_use is not None and len(self._loaded) > MOST_ADAPTERS:
                self._forget(self._loaded.drop_oldest(self._in_use()))
        if old is None or old[0] != digest:
            self._changed(adapter)
