# SPDX-License-Identifier: Apache-2.0
"""The thread that copies adapters in, against a real daemon: all of an adapter is resident, or nothing of it."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loracache.client import link as client_link
from loracache.connectors.vllm.lora.paths import path_of
from loracache.connectors.vllm.worker.lora import activation
from loracache.connectors.vllm.worker.lora.activation import Activator, Order
from loracache.connectors.vllm.worker.lora.recipe import copy_plain

NOWHERE = "unix:///nowhere/loracache.sock"


class Worker:
    """One worker's pool and its thread. `done` gets (order's number, cause), `why` the words of the last."""

    def __init__(self, url: str, manager: Any, timeout: float) -> None:
        self.manager, self.pool = manager, manager.pool
        self.done: queue.Queue[tuple[int, str]] = queue.Queue()
        self.activator = Activator(url, lambda: None, manager, self._finished, timeout)
        self._numbers = iter(range(1, 1000))
        self.why = ""

    def _finished(self, number: int, cause: str, why: str) -> None:
        self.why = why
        self.done.put((number, cause))

    def order(self, digest: str, path: str = "") -> int:
        number = next(self._numbers)
        self.pool.want(digest)
        self.activator.submit(Order(number, digest, path))
        return number

    def load(self, digest: str, path: str = "") -> str:
        """Why the adapter is not resident, or ""."""
        number = self.order(digest, path)
        done, cause = self.done.get(timeout=20)
        assert done == number
        assert (self.pool.get(digest) is not None) == (not cause)
        assert self.pool.audit() == []
        return cause

    def is_empty(self) -> bool:
        return self.pool.free_pages == self.pool.shape.pages and not self.pool.digests()


@pytest.fixture
def make_worker(make_manager: Any, make_shape: Callable[..., Any]) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(
        url: str, pages: int = 100, dtype: torch.dtype = torch.float32, timeout: float = 20.0, **shape: Any
    ) -> Worker:
        manager = make_manager(make_shape(pages, element_bytes=dtype.itemsize, **shape), dtype)
        made.append(Worker(url, manager, timeout))
        return made[-1]

    yield make
    for worker in made:
        worker.activator.close()
        assert worker.done.empty()  # nothing was reported twice
        assert not worker.activator._thread.is_alive()


@pytest.fixture(autouse=True)
def fast_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_link, "RETRY_S", 0.05)


class Gate:
    """Stands behind the pool's reserve: the thread has pages, and nothing on them, until the gate is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def before(self, worker: Worker) -> None:
        """Put the gate into this worker's pool."""
        reserve = worker.pool.reserve

        def gated(*arguments: Any) -> Any:
            found = reserve(*arguments)
            self.reached.set()
            assert self.opened.wait(20)
            return found

        worker.pool.reserve = gated


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


# -- from the arena ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("chunk", [4, 8])  # rows of the model's widths end with a chunk of 4, and not always one of 8
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_of_the_cache_is_resident_after_an_order(
    url: str, client: Any, make_worker: Any, make_adapter: Any, serves: Any, dtype: str, chunk: int, scattered: bool
) -> None:
    worker = make_worker(url, dtype=getattr(torch, dtype), pages=500, page=40, chunk=chunk)
    if scattered:
        worker.pool._free.allocate(500)
        for page in range(0, 500, 2):
            worker.pool._free.release(page, 1)
    adapters = [
        make_adapter(f"{dtype} {chunk} {scattered} {number}", rank, (dtype, "float16")[number % 2])
        for number, rank in enumerate((3, 7, 3, {"model.layers.1.self_attn.k_proj": 2}))
    ]
    for number, adapter in enumerate(adapters):
        client.add_adapter(adapter.path)
        shutil.rmtree(adapter.path)
        worker.order(adapter.digest)
        assert worker.done.get(timeout=20) == (number + 1, "")
    for adapter in adapters:
        assert serves(worker.pool, worker.pool.get(adapter.digest), adapter)
    assert client.status()["leases"] == 0
    for adapter in adapters:
        worker.pool.evict(adapter.digest)
    assert worker.pool.free_pages == (250 if scattered else 500)


@pytest.mark.parametrize("chunk", [4, 8])
@pytest.mark.parametrize("where", ["magic", "length", "header", "first", "last"])
def test_bytes_that_do_not_match_their_checksum_are_not_resident_and_leave_the_cache(
    url: str, client: Any, make_worker: Any, make_adapter: Any, serves: Any, where: str, chunk: int
) -> None:
    adapter, worker = make_adapter(f"tampered with in {where}, {chunk}"), make_worker(url, chunk=chunk)
    client.add_adapter(adapter.path)
    key, length = bytes.fromhex(adapter.digest), int.from_bytes(adapter.payload()[8:16], "little")
    with client.acquire([key]) as reading:
        buffer = reading.slots[0].buffers[0]
        at = {"magic": 0, "length": 8, "header": 20, "first": -(-(16 + length) // 64) * 64, "last": -1}[where]
        buffer[at] ^= 1
    assert worker.load(adapter.digest) == "checksum"
    assert worker.is_empty()
    assert worker.load(adapter.digest) == "absent"
    client.add_adapter(adapter.path)
    assert worker.load(adapter.digest) == ""
    assert serves(worker.pool, worker.pool.get(adapter.digest), adapter)


def test_what_no_tier_has_is_not_resident(url: str, make_worker: Any) -> None:
    worker = make_worker(url)
    assert worker.load(os.urandom(32).hex()) == "absent"
    assert worker.is_empty()


def test_an_object_that_is_no_adapter_is_unusable(url: str, client: Any, make_worker: Any) -> None:
    from loracache import Namespace

    worker, key = make_worker(url), os.urandom(32)
    root = client.register(Namespace("m", "float32", "layout", 16))
    with client.reserve(root, [key], [500]) as reservation:
        reservation.write(0, os.urandom(500))
    assert worker.load(key.hex()) == "unusable"
    assert worker.is_empty()


def test_what_the_model_cannot_adapt_is_unusable_and_the_thread_goes_on(
    url: str, client: Any, make_worker: Any, make_adapter: Any
) -> None:
    high = make_adapter("of high rank", 9)
    other = make_adapter("of another model", {"lm_head": 2}, sizes={"lm_head": (24, 50)})
    good, worker = make_adapter("good", 8), make_worker(url, most_rank=8)
    for adapter, cause in ((high, "unusable"), (other, "unusable"), (good, "")):
        client.add_adapter(adapter.path)
        assert worker.load(adapter.digest) == cause
        assert bool(worker.why) == bool(cause)
    assert worker.pool.digests() == [good.digest]


def test_a_pool_without_room_takes_nothing(url: str, client: Any, make_worker: Any, make_adapter: Any) -> None:
    one, two = make_adapter("one"), make_adapter("two")
    client.add_adapter(one.path)
    client.add_adapter(two.path)
    worker = make_worker(url, pages=40)
    assert worker.load(one.digest) == ""
    free = worker.pool.free_pages
    assert worker.load(two.digest) == "pool_full"
    assert worker.pool.free_pages == free
    worker.pool.evict(one.digest)
    assert worker.load(two.digest) == ""


@pytest.mark.parametrize(
    ("dtype", "cause"), [("float32", ""), ("float16", "lease_lost")], ids=["bytes are copied", "numbers are cast"]
)
def test_what_was_read_under_a_lease_that_ended_is_resident_only_where_its_pages_prove_it(
    url: str,
    client: Any,
    make_worker: Any,
    make_adapter: Any,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Any,
    serves: Any,
    dtype: str,
    cause: str,
) -> None:
    """The pages of the arena may have been another object's by then."""
    monkeypatch.setattr(activation, "_LEASE_S", 0.1)
    adapter, worker = make_adapter(f"slowly read {dtype}", dtype=dtype), make_worker(url, chunk=4)
    client.add_adapter(adapter.path)
    gate.before(worker)
    number = worker.order(adapter.digest)
    assert gate.reached.wait(20)
    eventually(lambda: client.status()["leases"] == 0, "the lease ends")
    gate.opened.set()
    assert worker.done.get(timeout=20) == (number, cause)
    assert worker.is_empty() == bool(cause)
    monkeypatch.setattr(activation, "_LEASE_S", 60.0)
    worker.pool.evict(adapter.digest)
    assert worker.load(adapter.digest) == ""
    assert serves(worker.pool, worker.pool.get(adapter.digest), adapter)


def test_bytes_that_change_while_they_are_copied_are_not_resident(
    url: str, client: Any, make_worker: Any, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where whoever looked at the payload again would find it whole."""
    adapter, worker = make_adapter("changes"), make_worker(url, chunk=4)
    client.add_adapter(adapter.path)
    with client.acquire([bytes.fromhex(adapter.digest)]) as reading:
        buffer = reading.slots[0].buffers[0]
        before = bytes(buffer)

        def changed(pool: Any, resident: Any, recipe: Any, payload: Any) -> int:
            middle = recipe.plain[len(recipe.plain) // 2][0]
            buffer[middle] ^= 1
            total = copy_plain(pool, resident, recipe, payload)
            buffer[:] = before
            return int(total)

        monkeypatch.setattr(activation, "copy_plain", changed)
        assert worker.load(adapter.digest) == "checksum"
        assert worker.is_empty()


# -- orders that overlap -----------------------------------------------------------------------------------------------


def test_an_adapter_evicted_while_it_is_copied_in_is_not_resident_and_leaves_no_page_behind(
    url: str, client: Any, make_worker: Any, make_adapter: Any, gate: Gate
) -> None:
    adapter, worker = make_adapter("evicted"), make_worker(url)
    client.add_adapter(adapter.path)
    gate.before(worker)
    number = worker.order(adapter.digest)
    assert gate.reached.wait(20)
    assert worker.pool.free_pages < worker.pool.shape.pages
    worker.pool.evict(adapter.digest)
    gate.opened.set()
    assert worker.done.get(timeout=20) == (number, "evicted")
    assert worker.is_empty()
    assert worker.pool.audit() == []
    assert worker.load(adapter.digest) == ""


def test_an_adapter_ordered_twice_is_there_once(
    url: str, client: Any, make_worker: Any, make_adapter: Any, gate: Gate, serves: Any
) -> None:
    adapter, worker = make_adapter("twice"), make_worker(url)
    client.add_adapter(adapter.path)
    gate.before(worker)
    first = worker.order(adapter.digest)
    assert gate.reached.wait(20)
    worker.pool.evict(adapter.digest)
    second = worker.order(adapter.digest)  # ordered again before the first order is done
    gate.opened.set()
    assert [worker.done.get(timeout=20) for _ in range(2)] == [(first, ""), (second, "")]
    resident = worker.pool.get(adapter.digest)
    assert worker.pool.free_pages == worker.pool.shape.pages - len(resident.page_ids)
    assert worker.pool.audit() == []
    assert serves(worker.pool, resident, adapter)


# -- from the folder ---------------------------------------------------------------------------------------------------


def test_without_a_daemon_it_is_read_from_its_folder_where_it_has_one(
    make_worker: Any, make_adapter: Any, serves: Any
) -> None:
    adapter, worker = make_adapter("in a folder", 5, "bfloat16"), make_worker(NOWHERE)
    assert worker.load(adapter.digest) == "unavailable"
    assert worker.is_empty()
    assert worker.load(adapter.digest, adapter.path) == ""
    assert serves(worker.pool, worker.pool.get(adapter.digest), adapter)


def test_what_left_the_cache_is_read_from_its_folder(
    url: str, make_worker: Any, make_adapter: Any, serves: Any
) -> None:
    adapter, worker = make_adapter("never added"), make_worker(url)
    assert worker.load(adapter.digest, adapter.path) == ""
    assert serves(worker.pool, worker.pool.get(adapter.digest), adapter)


def test_a_folder_that_changed_since_is_not_taken_for_what_it_was(make_worker: Any, make_adapter: Any) -> None:
    adapter, worker = make_adapter("before", folder="changing"), make_worker(NOWHERE)
    make_adapter("after", folder="changing")
    assert worker.load(adapter.digest, adapter.path) == "changed"
    assert worker.is_empty()
    shutil.rmtree(adapter.path)
    assert worker.load(adapter.digest, adapter.path) == "unusable"
    assert worker.is_empty()


def test_a_daemon_that_dies_under_a_copy_leaves_the_folder(
    daemon: Any, make_worker: Any, make_adapter: Any, gate: Gate, serves: Any
) -> None:
    running = daemon()
    adapter, worker = make_adapter("orphan"), make_worker(running.url)
    running.client().add_adapter(adapter.path)
    gate.before(worker)
    number = worker.order(adapter.digest, adapter.path)
    assert gate.reached.wait(20)
    running.stop(signal.SIGKILL)
    gate.opened.set()
    assert worker.done.get(timeout=20) == (number, "")
    assert serves(worker.pool, worker.pool.get(adapter.digest), adapter)
    worker.pool.evict(adapter.digest)
    assert worker.is_empty()
    assert worker.load(adapter.digest) == "unavailable"
    daemon(socket=running.socket).client().add_adapter(adapter.path)
    time.sleep(0.1)  # it is tried again so much later
    assert worker.load(adapter.digest) == ""


def test_a_daemon_that_is_silent_costs_its_time_and_no_more(daemon: Any, make_worker: Any, make_adapter: Any) -> None:
    """Of one order, not of each: those after it do not wait for the greeting either."""
    running = daemon()
    worker = make_worker(running.url, pages=500, timeout=1.0)
    first, *others = (make_adapter(f"silence {number}") for number in range(12))
    running.client().add_adapter(first.path)
    assert worker.load(first.digest) == ""
    running.send(signal.SIGSTOP)
    numbers = {worker.order(adapter.digest, adapter.path) for adapter in others}
    assert {worker.done.get(timeout=10) for _ in others} == {(number, "") for number in numbers}
    running.send(signal.SIGCONT)


# -- ahead of the first request ----------------------------------------------------------------------------------------


def test_what_is_fetched_ahead_is_in_the_arena_and_takes_no_page(
    daemon: Any, make_worker: Any, make_adapter: Any, tmp_path: Path, eventually: Any
) -> None:
    running = daemon(disk_path=tmp_path / "disk")
    client, worker, adapter = running.client(), make_worker(running.url), make_adapter("ahead")

    def tiers() -> tuple[str, ...]:
        shown = client.show_adapter(adapter.digest)
        return shown.tiers if shown is not None else ()

    worker.activator.fetch("/nowhere/at/all")
    worker.activator.fetch(adapter.path)
    eventually(lambda: tiers() == ("cpu", "disk"), "the folder is taken in")
    client.evict([bytes.fromhex(adapter.digest)], tiers=["cpu"])
    worker.activator.fetch(path_of(os.urandom(32).hex()))
    worker.activator.fetch(path_of(adapter.digest))
    eventually(lambda: tiers() == ("cpu", "disk"), "it is raised from the disk")
    assert worker.is_empty()
    assert worker.load(adapter.digest) == ""


def test_without_a_daemon_nothing_is_fetched_ahead_and_orders_go_on(make_worker: Any, make_adapter: Any) -> None:
    worker, adapter = make_worker(NOWHERE), make_adapter("alone")
    worker.activator.fetch(adapter.path)
    assert worker.load(adapter.digest, adapter.path) == ""


def test_what_is_ordered_after_the_end_is_dropped(url: str, client: Any, make_worker: Any, make_adapter: Any) -> None:
    adapter, worker = make_adapter("late"), make_worker(url)
    client.add_adapter(adapter.path)
    worker.activator.close()
    worker.order(adapter.digest)
    time.sleep(0.05)
    assert worker.done.empty()
    assert worker.is_empty()
