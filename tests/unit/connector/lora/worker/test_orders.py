# SPDX-License-Identifier: Apache-2.0
"""What the scheduler orders is carried out by a worker, and answered once."""

from __future__ import annotations

import os
from typing import Any

from loracache.connectors.vllm.common.messages import AdapterOrders
from loracache.connectors.vllm.worker.lora.orders import PoolWorker


def test_orders_are_carried_out_and_answered_once(
    url: str, client: Any, make_manager: Any, make_shape: Any, make_adapter: Any, eventually: Any
) -> None:
    adapter, missing = make_adapter("ordered"), os.urandom(32).hex()
    client.add_adapter(adapter.path)
    manager, bound = make_manager(make_shape(100)), []
    worker = PoolWorker(manager, url, lambda: None, lambda *what: bound.append(what), 20.0)
    activated: dict[int, int] = {}
    failed: dict[int, tuple[str, str]] = {}

    def all_answered(count: int) -> bool:
        news = worker.take_news()
        if news is not None:
            assert news.activated.keys().isdisjoint(activated)
            assert news.not_activated.keys().isdisjoint(failed)
            activated.update(news.activated)
            failed.update(news.not_activated)
        return len(activated) + len(failed) >= count

    assert worker.facts.shape is manager.pool.shape
    worker.carry_out(AdapterOrders(load=[(1, adapter.digest, ""), (2, missing, "")], bind={7: adapter.digest}))
    assert (manager.ids, bound) == ({7: adapter.digest}, [(7, adapter.digest)])
    eventually(lambda: all_answered(2))
    assert (activated, failed) == ({1: 1}, {2: ("absent", "")})
    # What is evicted and ordered in one plan is copied in anew: elsewhere it may have failed.
    worker.carry_out(AdapterOrders(evict=[adapter.digest], load=[(3, adapter.digest, "")]))
    eventually(lambda: all_answered(3))
    assert manager.pool.get(adapter.digest) is not None
    worker.carry_out(AdapterOrders(evict=[adapter.digest, missing]))
    assert manager.pool.free_pages == manager.pool.shape.pages
    assert worker.take_news() is None
    manager.lost, manager.pinned_news = True, {7: True}
    news = worker.take_news()
    assert news is not None
    assert (news.lost, news.pinned) == (True, {7: True})
    assert worker.take_news() is None
    worker.close()
