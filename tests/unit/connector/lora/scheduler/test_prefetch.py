# SPDX-License-Identifier: Apache-2.0
"""Adapters that are asked for elsewhere come onto free pages ahead of a request, and cost nobody anything."""

from __future__ import annotations

import time
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from loracache.connectors.vllm.lora.paths import path_of
from loracache.connectors.vllm.scheduler.lora import admission as admission_module


def lora(adapter: Any, number: int = 1) -> LoRARequest:
    return LoRARequest(f"adapter {number}", number, path_of(adapter.digest))


def keys(*adapters: Any) -> list[bytes]:
    return [bytes.fromhex(each.digest) for each in adapters]


@pytest.fixture(autouse=True)
def fast_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "_AGAIN_S", 0.05)


def ahead(engine: Any, *adapters: Any) -> bool:
    """A step in which the engine hears that these are asked for; whether all of them are resident then."""
    engine.admission.prefetch(keys(*adapters))
    engine.step()
    return all(each.digest in engine.resident for each in adapters)


def test_a_request_finds_its_adapter_on_pages(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    one, two = make_adapter("one"), make_adapter("two")
    for each in (one, two):
        client.add_adapter(each.path)
    engine = make_engine(url)
    engine.link.begin()
    eventually(lambda: ahead(engine, one, two), "both come, one after the other")
    assert [digest for _, digest, _ in engine.orders] == [one.digest, two.digest]
    eventually(lambda: client.status()["leases"] == 0, "the daemon holds neither")
    engine.arrive("a", lora(two))
    engine.step()
    assert engine.runs("a")
    assert len(engine.orders) == 2


def test_nobody_leaves_for_what_may_come(
    url: str, client: Any, make_engine: Any, make_adapter: Any, make_shape: Any, eventually: Any
) -> None:
    held, idle, hot = (make_adapter(name) for name in ("held", "idle", "hot"))
    for each in (held, idle, hot):
        client.add_adapter(each.path)
    cost = make_shape().cost(make_shape().place(hot.ranks).elements)
    engine = make_engine(url, make_shape(pages=2 * cost))
    engine.arrive("a", lora(held, 1))
    engine.arrive("b", lora(idle, 2))
    eventually(lambda: engine.runs("a", "b"))
    engine.end("b")
    until = time.monotonic() + 1.5  # it is fetched once, to learn what it costs
    while time.monotonic() < until:
        assert not ahead(engine, hot)
    assert engine.resident == {held.digest, idle.digest}
    eventually(lambda: client.status()["leases"] == 0, "the daemon does not hold it for us")
    engine.arrive("c", lora(hot, 3))
    eventually(lambda: engine.runs("c"), "for a request the idle one goes")
    assert engine.resident == {held.digest, hot.digest}


def test_what_is_gone_or_of_another_model_is_left_alone(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    other = make_adapter(
        "of another model", {"model.layers.0.mlp.down_proj": 4}, sizes={"model.layers.0.mlp.down_proj": (7, 9)}
    )
    good, gone = make_adapter("good"), make_adapter("gone")
    for each in (other, good):
        client.add_adapter(each.path)
    engine = make_engine(url)
    engine.link.begin()
    eventually(lambda: ahead(engine, good) or engine.admission.prefetch(keys(gone, other, good)), "the good one comes")
    for _ in range(5):
        engine.admission.prefetch(keys(gone, other, good))
        engine.step()
    assert engine.resident == {good.digest}
    assert not engine.failed
