# SPDX-License-Identifier: Apache-2.0
"""Whatever goes wrong with an adapter, its requests run later or are given up with the reason, and the others run."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from loracache import Namespace
from loracache.connectors.vllm.common import answer_times
from loracache.connectors.vllm.lora.paths import path_of
from loracache.connectors.vllm.lora.refusals import Refusal
from loracache.connectors.vllm.scheduler.lora import admission as admission_module
from loracache.connectors.vllm.worker.lora.orders import PoolWorker

NOWHERE = "unix:///nowhere/loracache.sock"

pytestmark = pytest.mark.usefixtures("fast_retry")


def lora(adapter: Any, number: int = 1, **more: Any) -> LoRARequest:
    """By its folder, or by its digest where that is all there is."""
    path = path_of(adapter) if isinstance(adapter, str) else adapter.path
    return LoRARequest(f"adapter {number}", number, path, **more)


# -- contents that are not to be had -----------------------------------------------------------------------------------


def test_a_content_that_nobody_has_is_given_up_after_a_while_and_the_others_run(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine, missing = make_engine(url, patience=0.4), os.urandom(32).hex()
    started = time.monotonic()
    engine.arrive("nobody has it", lora(missing, 1))
    engine.arrive("good", lora(make_adapter("good"), 2))
    eventually(lambda: engine.runs("good"))
    eventually(lambda: engine.step() or engine.failed)
    assert time.monotonic() - started >= 0.4
    assert engine.failed == ["nobody has it"]
    assert "adapter adapter 1 cannot be served: no tier has it, and there is no folder" in caplog.text
    assert engine.refusals["nobody has it"] == Refusal("no tier has it, and there is no folder", forever=False)
    assert len(engine.orders) == 1
    eventually(lambda: client.status()["leases"] == 0, "a question that found nothing leaves no lease")


def test_a_content_that_somebody_adds_in_time_is_served(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    adapter, engine = make_adapter("added late"), make_engine(url)
    engine.arrive("a", lora(adapter.digest))
    for _ in range(20):
        assert not engine.runs("a")
        time.sleep(0.005)
    client.add_adapter(adapter.path)
    eventually(lambda: engine.runs("a"))
    assert not engine.failed


@pytest.mark.parametrize("connected", [True, False])
def test_a_folder_that_cannot_be_served_fails_its_request_with_the_reason(
    url: str, make_engine: Any, make_adapter: Any, eventually: Any, caplog: pytest.LogCaptureFixture, connected: bool
) -> None:
    bad, engine = make_adapter("bad"), make_engine(url if connected else NOWHERE)
    config = Path(bad.path) / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"LOHA"'))
    engine.arrive("bad", lora(bad, 1))
    engine.arrive("gone", LoRARequest("gone", 2, "/nowhere/at/all"))
    engine.arrive("good", lora(make_adapter("good"), 3))
    eventually(lambda: engine.runs("good") and len(set(engine.failed)) == 2)
    assert sorted(engine.failed) == ["bad", "gone"]
    assert f"{config}: peft_type is 'LOHA'; only LORA is served" in caplog.text
    assert "'/nowhere/at/all/adapter_config.json' cannot be read: No such file or directory" in caplog.text
    assert engine.refusals["bad"] == Refusal(f"{config}: peft_type is 'LOHA'; only LORA is served", forever=True)
    good = make_adapter("bad")  # mended
    engine.arrive("mended", lora(good, 1))
    eventually(lambda: engine.runs("mended"))


@pytest.mark.parametrize("by_digest", [True, False])
def test_what_the_model_cannot_adapt_fails_with_the_reason(
    url: str,
    client: Any,
    make_engine: Any,
    make_shape: Any,
    make_adapter: Any,
    eventually: Any,
    caplog: Any,
    by_digest: bool,
) -> None:
    high = make_adapter("of high rank", 9)
    other = make_adapter("of another model", {"lm_head": 2}, sizes={"lm_head": (24, 50)})
    engine = make_engine(url, make_shape(400, most_rank=8))
    for number, adapter in enumerate((high, other), 1):
        client.add_adapter(adapter.path)
        engine.arrive(f"request {number}", lora(adapter.digest if by_digest else adapter, number))
    eventually(lambda: engine.step() or len(set(engine.failed)) == 2)
    assert "is over max_lora_rank=8; raise that" in caplog.text
    assert "module 'lm_head' of the adapter is none that this model can adapt" in caplog.text
    assert {refusal.forever for refusal in engine.refusals.values()} == {True}
    assert not engine.orders
    eventually(lambda: client.status()["leases"] == 0, "nobody needs what cannot be used")
    engine.arrive("again", lora(high.digest if by_digest else high, 1))
    eventually(lambda: engine.step() or "again" in engine.failed)


def test_what_the_cache_has_no_room_for_is_served_from_its_folder_each_time(
    daemon: Any, make_engine: Any, make_manager: Any, make_shape: Any, make_adapter: Any, eventually: Any
) -> None:
    running = daemon(memory="1MiB", page_size="4KiB")
    manager = make_manager(make_shape(400))
    engine = make_engine(running.url, manager.pool.shape)
    worker = PoolWorker(manager, running.url, lambda: None, lambda *_: None, 20.0)
    engine.workers, engine.answers = [worker], False
    adapter, client = make_adapter("without room"), running.client()
    root = client.register(Namespace("m", "float32", "layout", 16))
    with contextlib.suppress(ZeroDivisionError), client.reserve(root, [os.urandom(32)], [1 << 20]):
        for name in ("a", "b"):
            engine.arrive(name, lora(adapter))
            eventually(lambda: engine.runs(name))  # noqa: B023
            engine.end(name)
            assert client.show_adapter(adapter.digest) is None
            manager.pool.evict(adapter.digest)
            engine.report(pools_lost=True)
        raise ZeroDivisionError  # nothing is committed
    assert not engine.failed
    assert engine.link._counts["adapter.refused"] == 2
    engine.arrive("c", lora(adapter))
    eventually(lambda: engine.runs("c"))
    assert client.show_adapter(adapter.digest).tiers[-1] == "cpu"
    worker.close()


# -- copies that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["checksum", "lease_lost", "pool_full", "unavailable", "bug"])
def test_a_copy_that_failed_is_ordered_again(
    url: str, make_engine: Any, make_shape: Any, make_adapter: Any, eventually: Any, cause: str
) -> None:
    adapter, engine = make_adapter(f"fails with {cause}"), make_engine(url, make_shape(400), make_shape(400))
    engine.answers = False
    engine.arrive("a", lora(adapter))
    eventually(lambda: engine.step() or engine.orders)
    engine.report(activated={1: 1}, not_activated={1: (cause, "")})  # of two workers
    plans = []
    take = engine.admission.take_orders

    def taken() -> Any:
        plans.append(take())
        return plans[-1]

    engine.admission.take_orders = taken
    eventually(lambda: engine.step() or len(engine.orders) == 2)
    assert [plan.evict for plan in plans if plan.evict] == [[adapter.digest]]  # from the one that had it
    engine.report(activated={1: 2})  # what is said of the old order is not said of this
    engine.report(not_activated={1: ("late", "")})
    for _ in range(3):
        assert not engine.runs("a")
    assert len(engine.orders) == 2
    engine.report(activated={2: 2})
    assert engine.runs("a")
    assert engine.link._counts[f"adapter.{cause}"] == 1


def test_a_copy_that_never_will_succeed_fails_its_request(
    url: str, make_engine: Any, make_adapter: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, engine = make_adapter("unusable"), make_engine(url)
    engine.answers = False
    engine.arrive("a", lora(adapter))
    eventually(lambda: engine.step() or engine.orders)
    engine.report(not_activated={1: ("unusable", "rank 9 is over it")})
    eventually(lambda: engine.step() or engine.failed)
    assert engine.failed == ["a"]
    assert engine.refusals["a"] == Refusal("rank 9 is over it", forever=True)
    assert "adapter adapter 1 cannot be served: rank 9 is over it" in caplog.text


def test_what_cannot_be_served_is_told_to_all_who_wait_for_it(
    url: str, make_engine: Any, make_shape: Any, make_adapter: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to one after another, each after another try."""
    monkeypatch.setattr(admission_module, "_AGAIN_S", 30.0)
    adapter, high = make_adapter("unusable for all"), make_adapter("of high rank", 9)
    engine = make_engine(url, make_shape(400, most_rank=8))
    engine.answers = False
    names = [f"request {number}" for number in range(5)]
    for name in names:
        engine.arrive(name, lora(adapter, 1))
        engine.arrive(f"{name}, high", lora(high, 2))
    eventually(lambda: engine.step() or (engine.orders and len(set(engine.failed)) == 5))
    engine.report(not_activated={1: ("unusable", "rank 9 is over it")})
    eventually(lambda: engine.step() or len(set(engine.failed)) == 10)


def test_what_workers_lost_is_copied_in_anew(url: str, make_engine: Any, make_adapter: Any, eventually: Any) -> None:
    adapter, engine = make_adapter("lost"), make_engine(url)
    engine.arrive("a", lora(adapter))
    eventually(lambda: engine.runs("a"))
    engine.report(pools_lost=True)
    engine.preempt("a", lora(adapter))
    assert not engine.runs("a")
    eventually(lambda: engine.runs("a"))
    assert [digest for _, digest, _ in engine.orders] == [adapter.digest] * 2


def test_a_copy_under_way_when_all_was_lost_leaves_no_page_behind(
    url: str, make_engine: Any, make_manager: Any, make_shape: Any, make_adapter: Any, eventually: Any
) -> None:
    """It ends after the loss, and whoever asked for it is gone: the room in the books has to be there."""
    first, second, shape = make_adapter("first", 4), make_adapter("second", 4), make_shape()
    manager = make_manager(make_shape(shape.cost(shape.place(first.ranks).elements)))
    engine = make_engine(url, manager.pool.shape)
    worker = PoolWorker(manager, url, lambda: None, lambda *_: None, 20.0)
    engine.workers, engine.answers = [worker], False
    engine.arrive("a", lora(first, 1))
    eventually(lambda: engine.step() or engine.orders)
    engine.report(pools_lost=True)
    engine.end("a")
    eventually(lambda: manager.pool.get(first.digest))
    engine.arrive("b", lora(second, 2))
    eventually(lambda: engine.runs("b"))
    assert manager.pool.digests() == [second.digest]
    worker.close()


def test_patience_is_counted_anew_each_time_a_request_waits(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that was preempted may find its adapter gone for a while, twice."""
    ran = 0.0
    monkeypatch.setattr(admission_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + ran))
    adapter, engine = make_adapter("comes and goes"), make_engine(url, patience=20.0)
    client.add_adapter(adapter.path)
    engine.arrive("a", lora(adapter.digest))
    eventually(lambda: engine.runs("a"))
    for _ in range(2):
        engine.report(pools_lost=True)
        eventually(lambda: client.evict([bytes.fromhex(adapter.digest)]).objects)
        engine.preempt("a", lora(adapter.digest))
        eventually(lambda: engine.step() or engine.admission._waits)
        client.add_adapter(adapter.path)
        eventually(lambda: engine.runs("a"))
        ran += 60.0
    assert not engine.failed


# -- contents that leave, and what is counted --------------------------------------------------------------------------


def test_an_adapter_that_left_the_cache_is_taken_in_again(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    adapter, engine = make_adapter("leaves"), make_engine(url)
    engine.arrive("a", lora(adapter))
    eventually(lambda: engine.runs("a"))
    engine.end("a")
    engine.report(pools_lost=True)
    eventually(lambda: client.evict([bytes.fromhex(adapter.digest)]).objects == 1)
    engine.arrive("b", lora(adapter))
    eventually(lambda: engine.runs("b"))
    assert client.show_adapter(adapter.digest) is not None
    engine.end("b")
    engine.report(pools_lost=True)
    client.evict([bytes.fromhex(adapter.digest)])
    shutil.rmtree(adapter.path)
    engine.arrive("c", lora(adapter))
    eventually(lambda: engine.step() or engine.failed)
    assert engine.failed == ["c"]


def test_what_was_taken_in_again_is_asked_for_at_once(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause after an answer that it left is for what nobody can bring back."""
    monkeypatch.setattr(admission_module, "_AGAIN_S", 60.0)
    monkeypatch.setattr(admission_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 1000.0))
    adapter, engine = make_adapter("comes back"), make_engine(url)
    engine.arrive("a", lora(adapter))
    eventually(lambda: engine.runs("a"))
    engine.end("a")
    engine.report(pools_lost=True)
    eventually(lambda: client.evict([bytes.fromhex(adapter.digest)]).objects == 1)
    engine.admission._adapters[adapter.digest].taken_in -= 100.0  # long ago
    engine.arrive("b", lora(adapter))
    eventually(lambda: engine.runs("b"))
    assert engine.link._counts["adapter.absent"] == 1


def test_the_answer_to_a_question_that_was_just_sent_is_waited_for(
    url: str, client: Any, make_engine: Any, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a request whose adapter is in memory loses a whole step of the others."""
    for bound in ("_MOST_S", "_LEAST_S"):  # longer than a busy machine makes the daemon wait
        monkeypatch.setattr(answer_times, bound, 5.0)
    adapter = make_adapter("in memory")
    client.add_adapter(adapter.path)
    for number in range(20):
        engine = make_engine(url)
        engine.arrive("a", lora(adapter.digest, number + 1))
        engine.step()
        assert [order[1] for order in engine.orders] == [adapter.digest]


def test_a_silent_daemon_costs_a_step_a_few_milliseconds_at_most(
    url: str, make_engine: Any, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(admission_module, "time", SimpleNamespace(monotonic=lambda: now))  # the steps take no time
    engine = make_engine(url)
    waited: list[float] = []
    engine.admission._link.answer = lambda number: (False, None)
    engine.admission._link.wait_answer = lambda number, seconds: (waited.append(seconds), (False, None))[1]
    engine.arrive("a", lora(make_adapter("never").digest))
    for _ in range(5):
        engine.step()
    assert len(waited) == 1, "and the next is not waited for"
    assert waited[0] <= 0.003


def test_hits_misses_loads_and_evictions_are_counted(
    url: str, make_engine: Any, make_shape: Any, make_adapter: Any, eventually: Any
) -> None:
    first, second, shape = make_adapter("counted", 4), make_adapter("counted, too", 4), make_shape()
    engine = make_engine(url, make_shape(shape.cost(shape.place(first.ranks).elements)))
    for name, adapter, number in (("cold", first, 1), ("warm", first, 1), ("other", second, 2)):
        engine.arrive(name, lora(adapter, number))
        eventually(lambda: engine.runs(name))  # noqa: B023
        engine.end(name)
    counts = {cause: engine.link._counts[f"adapter.{cause}"] for cause in ("hit", "miss", "load", "evict")}
    assert counts == {"hit": 1, "miss": 2, "load": 2, "evict": 1}


def test_a_count_of_every_failure_reaches_the_daemon(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    engine = make_engine(url)
    engine.arrive("a", lora(os.urandom(32).hex()))
    eventually(lambda: engine.step() or engine.link._counts["adapter.absent"])
    engine.link.flush()
    eventually(lambda: client.status()["counters"].get("client.adapter.absent"))
