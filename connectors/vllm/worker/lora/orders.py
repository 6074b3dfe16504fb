# SPDX-License-Identifier: Apache-2.0
"""The worker's side of paged LoRA: carries out what the scheduler orders, and tells it what came of that.

Threading: vLLM calls everything here on the worker's main thread, `_finished` is called by the activator's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from loracache.connectors.vllm.common.messages import AdapterOrders, PoolFacts
from loracache.connectors.vllm.common.patches import problem
from loracache.connectors.vllm.worker.lora.activation import Activator, Order
from loracache.errors import ConfigError

__all__ = ["PoolNews", "PoolWorker", "paged_worker"]


@dataclass(slots=True)
class PoolNews:
    """What the scheduler does not know yet: see WorkerNews."""

    activated: dict[int, int] = field(default_factory=dict)
    not_activated: dict[int, tuple[str, str]] = field(default_factory=dict)
    lost: bool = False
    pinned: dict[int, bool] = field(default_factory=dict)


class PoolWorker:
    """One worker's pool under the scheduler's orders. bound(id, digest) is called when other content serves an id.
    timeout: see Activator.
    """

    def __init__(
        self, manager: Any, server: str, ensure: Callable[[], None], bound: Callable[[int, str], None], timeout: float
    ) -> None:
        self._manager = manager
        self._bound = bound
        self._lock = threading.Lock()
        self._news = PoolNews()
        self._cuda = manager.pool.pages.device.type == "cuda"
        self._activator = Activator(server, ensure, manager, self._finished, timeout)
        if manager.fetches_ahead:
            manager.added = self._activator.fetch
        self.facts = PoolFacts(manager.pool.shape, manager.names)

    def carry_out(self, orders: AdapterOrders) -> None:
        """Free pages, start copies, and let ids be served by other content."""
        for digest in orders.evict:
            self._manager.evict(digest)
        after = torch.cuda.current_stream().record_event() if self._cuda and orders.load else None
        for number, digest, path in orders.load:
            self._manager.pool.want(digest)
            self._activator.submit(Order(number, digest, path, after))
        for adapter in orders.forget:
            self._manager.ids.pop(adapter, None)
        for adapter, digest in orders.bind.items():
            self._manager.ids[adapter] = digest
            self._bound(adapter, digest)

    def take_news(self) -> PoolNews | None:
        """What happened since the last call."""
        with self._lock:
            news, self._news = self._news, PoolNews()
        news.lost, self._manager.lost = self._manager.lost, False
        news.pinned, self._manager.pinned_news = self._manager.pinned_news, {}
        return news if news.activated or news.not_activated or news.lost or news.pinned else None

    def close(self) -> None:
        """End the thread."""
        self._activator.close()

    def _finished(self, number: int, cause: str, why: str) -> None:
        with self._lock:
            if cause:
                self._news.not_activated[number] = cause, why
            else:
                self._news.activated[number] = 1


def paged_worker(
    vllm_config: Any, server: str, ensure: Callable[[], None], bound: Callable[[int, str], None], timeout: float
) -> PoolWorker:
    """The worker of the pool that the model was loaded with. Raises ConfigError where it was loaded without one."""
    from loracache.connectors.vllm.worker.lora.manager import pools

    if vllm_config.lora_config is None:
        raise ConfigError("kv_connector_extra_config: lora_pool is set, but LoRA is off; start vLLM with --enable-lora")
    manager = pools.get(vllm_config.kv_transfer_config.engine_id)
    if manager is None:
        raise ConfigError(
            f"kv_connector_extra_config: lora_pool is set, but {problem() or 'vLLM loaded the model without it'}"
        )
    return PoolWorker(manager, server, ensure, bound, timeout)
