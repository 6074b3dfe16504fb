# SPDX-License-Identifier: Apache-2.0
"""When a request may run: its adapter fetched from a real daemon, on every worker's pages, and nobody else delayed."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from loracache.connectors.vllm.lora.paths import digest_in, path_of
from loracache.connectors.vllm.scheduler.lora import admission as admission_module
from loracache.connectors.vllm.worker.lora.orders import PoolWorker


def lora(adapter: Any, number: int = 1, **more: Any) -> LoRARequest:
    """By its folder, or by its digest where that is all there is."""
    path = path_of(adapter) if isinstance(adapter, str) else adapter.path
    return LoRARequest(f"adapter {number}", number, path, **more)


@pytest.fixture(autouse=True)
def fast_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "_AGAIN_S", 0.05)
    monkeypatch.setattr(admission_module, "_RESIDENT_S", 0.02)


def test_a_path_names_an_adapter_by_its_digest() -> None:
    digest = os.urandom(32).hex()
    assert digest_in(path_of(digest)) == digest
    for path in (
        "/some/folder",
        "loracache:",
        f"loracache:{digest[1:]}",
        f"loracache:{digest}/",
        f"x{path_of(digest)}",
    ):
        assert digest_in(path) is None


def test_requests_without_an_adapter_run_at_once(url: str, make_engine: Any, make_adapter: Any) -> None:
    engine = make_engine(url)
    engine.answers = False
    engine.arrive("adapted", lora(make_adapter("a")))
    engine.arrive("plain", None)
    assert engine.runs("plain")
    assert "adapted" not in engine.running


def test_a_cold_adapter_is_fetched_at_arrival_and_ordered_once(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    adapter, engine = make_adapter("cold"), make_engine(url)
    engine.answers = False
    engine.arrive("a", lora(adapter))
    eventually(lambda: client.show_adapter(adapter.digest), "the daemon took it in though nobody asked to run it")
    engine.arrive("b", lora(adapter))
    eventually(lambda: engine.step() or engine.orders)
    for _ in range(5):
        engine.step()
    assert engine.orders == [(1, adapter.digest, adapter.path)]
    assert not engine.running
    engine.report(activated={1: 1})
    assert engine.runs("a", "b")
    assert len(engine.orders) == 1
    assert engine.bound == {1: adapter.digest}
    eventually(lambda: client.status()["leases"] == 0, "the daemon need not hold it any longer")
    engine.arrive("c", lora(adapter))
    assert engine.runs("c")  # what is there is there


def test_an_adapter_of_the_cache_needs_no_folder(
    url: str, client: Any, make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    adapter, engine = make_adapter("in the cache only"), make_engine(url)
    client.add_adapter(adapter.path)
    shutil.rmtree(adapter.path)
    engine.arrive("a", lora(adapter.digest))
    eventually(lambda: engine.runs("a"))
    assert engine.orders == [(1, adapter.digest, "")]


def test_every_worker_has_to_have_it(
    url: str, make_engine: Any, make_shape: Any, make_adapter: Any, eventually: Any
) -> None:
    adapter, engine = make_adapter("on three"), make_engine(url, *[make_shape(400)] * 3)
    engine.answers = False
    engine.arrive("a", lora(adapter))
    eventually(lambda: engine.step() or engine.orders)
    for _ in range(2):
        engine.report(activated={1: 1})
        assert not engine.runs("a")
    engine.report(activated={1: 1})
    assert engine.runs("a")


def test_the_workers_are_told_what_serves_an_id_a_step_before(
    url: str, make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    """Another id for what is there already: nothing is copied, but the workers have to be told first."""
    adapter, engine = make_adapter("of two ids"), make_engine(url)
    engine.arrive("a", lora(adapter, 1))
    eventually(lambda: engine.runs("a"))
    engine.arrive("b", lora(adapter, 2))
    engine.arrive("c", lora(adapter, 2))
    eventually(lambda: engine.step() or engine.told.get(2) == adapter.digest)
    assert set(engine.running) == {"a"}
    assert engine.runs("b", "c")
    assert len(engine.orders) == 1


def test_who_is_too_large_fails_alone(
    url: str, make_engine: Any, make_shape: Any, make_adapter: Any, eventually: Any, caplog: Any
) -> None:
    large, small = make_adapter("too large", 9), make_adapter("small enough", 2)
    engine = make_engine(url, make_shape(400), make_shape(20))
    engine.knows(large, small)
    engine.arrive("large", lora(large, 1))
    engine.arrive("small", lora(small, 2))
    eventually(lambda: engine.runs("small") and engine.failed)
    assert set(engine.failed) == {"large"}
    assert [digest for _, digest, _ in engine.orders] == [small.digest]
    assert "the pool has 20: make lora_pool larger" in caplog.text


def test_adapters_take_turns_on_the_pages_there_are(
    url: str, make_engine: Any, make_shape: Any, make_adapter: Any, eventually: Any
) -> None:
    """Twelve adapters where three fit: whoever waits, waits for pages only, and everybody runs."""
    adapters = [make_adapter(f"turn {number}", 4) for number in range(12)]
    cost = make_shape().cost(make_shape().place(adapters[0].ranks).elements)
    engine = make_engine(url, make_shape(3 * cost + 1), make_shape(4 * cost))
    engine.knows(*adapters)
    for number, adapter in enumerate(adapters):
        engine.arrive(f"request {number}", lora(adapter, number + 1))
    done: set[str] = set()

    def all_ran() -> bool:
        engine.step()
        assert len(engine.running) <= 3
        done.update(engine.running)
        for name in list(engine.running)[:1]:
            engine.end(name)
        return len(done) == len(adapters)

    eventually(all_ran)
    assert not engine.failed
    assert len(engine.orders) == len(adapters)


def test_what_is_resident_is_reported_to_the_daemon(
    url: str, client: Any, make_engine: Any, make_shape: Any, make_adapter: Any, eventually: Any
) -> None:
    first, second = make_adapter("resident first", 4), make_adapter("resident second", 4)
    shape = make_shape()
    engine = make_engine(url, make_shape(shape.cost(shape.place(first.ranks).elements)))

    def where(adapter: Any) -> tuple[str, ...]:
        engine.step()
        found = client.show_adapter(adapter.digest)
        return found.tiers if found is not None else ()

    engine.answers = False
    engine.arrive("a", lora(first, 1))
    eventually(lambda: where(first) == ("cpu",) and engine.orders)
    engine.answers = True
    eventually(lambda: where(first) == ("gpu", "cpu"))
    engine.end("a")
    engine.arrive("b", lora(second, 2))
    eventually(lambda: where(second) == ("gpu", "cpu") and where(first) == ("cpu",))
    engine.link.close()
    eventually(lambda: client.show_adapter(second.digest).tiers == ("cpu",))


# -- what ends, what is pinned, what is loaded in place ----------------------------------------------------------------


def test_a_request_that_ends_before_it_ran_lets_go(
    url: str, make_engine: Any, make_shape: Any, make_adapter: Any, eventually: Any
) -> None:
    first, second, shape = make_adapter("given up", 4), make_adapter("wanted", 4), make_shape()
    engine = make_engine(url, make_shape(shape.cost(shape.place(first.ranks).elements)))
    engine.knows(first, second)
    engine.answers = False
    engine.arrive("a", lora(first, 1))
    eventually(lambda: engine.step() or engine.orders)
    engine.end("a")
    engine.end("never heard of")
    engine.answers = True
    engine.arrive("b", lora(second, 2))
    eventually(lambda: engine.runs("b"))


def test_a_pinned_adapter_keeps_its_pages_until_it_is_unpinned(
    url: str, make_engine: Any, make_shape: Any, make_adapter: Any, eventually: Any
) -> None:
    pinned, other, shape = make_adapter("pinned", 4), make_adapter("other", 4), make_shape()
    engine = make_engine(url, make_shape(shape.cost(shape.place(pinned.ranks).elements)))
    engine.knows(pinned, other)
    engine.arrive("a", lora(pinned, 1))
    eventually(lambda: engine.runs("a"))
    engine.report(pinned={1: True, 99: True})
    engine.end("a")
    engine.arrive("b", lora(other, 2))
    for _ in range(20):
        assert not engine.runs("b")
        time.sleep(0.005)
    assert engine.resident == {pinned.digest}
    engine.report(pinned={1: False})
    eventually(lambda: engine.runs("b"))
    assert engine.resident == {other.digest}


def test_a_pin_is_of_what_an_id_serves_and_ends_with_that(
    url: str, make_engine: Any, make_shape: Any, make_adapter: Any, eventually: Any
) -> None:
    old, new, shape = make_adapter("pinned at first", 4), make_adapter("loaded in its place", 4), make_shape()
    engine = make_engine(url, make_shape(2 * shape.cost(shape.place(old.ranks).elements)))
    others = [make_adapter(f"for its pages {number}", 4) for number in range(2)]
    engine.knows(old, new, *others)
    engine.arrive("old", lora(old))
    eventually(lambda: engine.runs("old"))
    engine.arrive("waits", lora(new, load_inplace=True))  # the workers do not know it yet
    engine.report(pinned={1: True})
    engine.end("old")
    engine.end("waits")
    for number, other in enumerate(others, 2):  # one after another, beside the pinned one
        engine.arrive(f"{number}", lora(other, number))
        eventually(lambda: engine.runs(f"{number}"))  # noqa: B023
        engine.end(f"{number}")
    assert engine.resident == {old.digest, others[1].digest}
    engine.arrive("new", lora(new, load_inplace=True))
    eventually(lambda: engine.runs("new"))
    engine.end("new")
    for number, other in enumerate(others, 2):
        engine.arrive(f"{number} again", lora(other, number))
    eventually(lambda: engine.runs("2 again", "3 again"))  # nothing is pinned any more


def test_an_adapter_loaded_in_place_serves_new_requests_and_those_that_run(
    url: str, make_engine: Any, make_shape: Any, make_adapter: Any, eventually: Any
) -> None:
    """As in vLLM: an id has one content at a time, and whoever runs goes on with the new one."""
    old, new, other = make_adapter("old", 4), make_adapter("new", 4), make_adapter("third", 4)
    shape = make_shape()
    cost = shape.cost(shape.place(old.ranks).elements)
    engine = make_engine(url, make_shape(2 * cost))
    engine.knows(old, new, other)
    engine.arrive("old", lora(old))
    eventually(lambda: engine.runs("old"))
    engine.answers = False
    engine.arrive("new", lora(new, load_inplace=True))
    eventually(lambda: engine.step() or len(engine.orders) == 2)
    engine.step()
    assert engine.told == {1: old.digest}  # until the new one is there, the old one serves
    engine.answers = True
    eventually(lambda: engine.runs("new"))
    assert engine.told == {1: new.digest}
    engine.running["old"] = new.digest  # which it goes on with
    engine.end("new")
    engine.arrive("third", lora(other, 3))
    for _ in range(20):
        assert not engine.runs("third")  # the one that runs holds both
        time.sleep(0.005)
    engine.end("old")
    eventually(lambda: engine.runs("third"))


@pytest.mark.parametrize("preempted", [False, True])
def test_who_waits_keeps_no_pages_of_a_content_that_was_replaced(
    url: str, make_engine: Any, make_shape: Any, make_adapter: Any, eventually: Any, preempted: bool
) -> None:
    """The pool has room for one: a request that held on to what its id stood for would wait for itself."""
    old, new, shape = make_adapter("given first", 4), make_adapter("given then", 4), make_shape()
    engine = make_engine(url, make_shape(shape.cost(shape.place(old.ranks).elements)))
    engine.knows(old, new)
    engine.answers = preempted
    engine.arrive("waits", lora(old))
    eventually(lambda: engine.runs("waits") if preempted else engine.step() or engine.orders)
    engine.admission.renew(lora(new, load_inplace=True))
    if preempted:
        engine.preempt("waits", lora(new))
    else:
        engine.waiting[0].lora_request = lora(new)
    engine.answers = True
    eventually(lambda: engine.runs("waits"), "it gets its pages")
    assert engine.running["waits"] == new.digest


def test_a_folder_whose_content_changed_is_loaded_in_place(
    url: str, make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    old, engine = make_adapter("before it changed", folder="one"), make_engine(url)
    engine.arrive("a", lora(old))
    eventually(lambda: engine.runs("a"))
    engine.end("a")
    new = make_adapter("after it changed", folder="one")
    engine.arrive("b", lora(new))
    assert engine.runs("b")  # an id stands for what it was first seen with
    assert engine.running["b"] == old.digest
    engine.end("b")
    engine.arrive("c", lora(new, load_inplace=True))
    eventually(lambda: engine.runs("c"))
    assert engine.running["c"] == new.digest


# -- with workers ------------------------------------------------------------------------------------------------------


def test_what_was_admitted_is_on_every_worker_s_pages(
    url: str,
    make_engine: Any,
    make_manager: Any,
    make_shape: Callable[..., Any],
    make_adapter: Any,
    serves: Any,
    eventually: Any,
) -> None:
    """Nothing but the engine's loop is played: two workers copy from the daemon's arena on threads of their own."""
    adapters = [make_adapter(f"served {number}", 1 + number % 5) for number in range(10)]
    engine = make_engine(url, make_shape(60, page=160), make_shape(70))
    engine.knows(*adapters)
    engine.answers = False
    managers = [make_manager(shape) for shape in engine.shapes]
    engine.workers = [PoolWorker(manager, url, lambda: None, lambda *_: None, 20.0) for manager in managers]
    rng, wanted, done, computed = random.Random(3), iter(range(50)), [], {}

    def all_ran() -> bool:
        number = next(wanted, None)
        if number is not None:
            which = rng.randrange(10)
            engine.arrive(f"{number}", lora(adapters[which], which + 1))
        before = set(engine.running)
        engine.step()
        for name in engine.running.keys() - before:
            adapter = next(each for each in adapters if each.digest == engine.running[name])
            for manager in managers:
                resident = manager.pool.get(adapter.digest)
                assert id(resident) in computed or serves(manager.pool, resident, adapter)
                computed[id(resident)] = resident
        for name in [name for name in engine.running if rng.random() < 0.3]:
            done.append(name)
            engine.end(name)
        return len(done) == 50

    eventually(all_ran)
    assert not engine.failed
    assert len(engine.orders) > len(adapters)  # some were evicted and copied in again
    for worker, manager in zip(engine.workers, managers, strict=True):
        worker.close()
        assert manager.pool.audit() == []
        assert sorted(manager.pool.digests()) == sorted(engine.resident | set(engine.open.values()))
