# SPDX-License-Identifier: Apache-2.0
"""Loads and stores larger than the daemon's memory, and beside one another, with a real daemon."""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loracache.connectors.vllm.common.groups import KVGroup, Member
from loracache.connectors.vllm.common.messages import ChunkBlocks, Store
from loracache.connectors.vllm.worker import loader as loader_module
from loracache.connectors.vllm.worker import storer as storer_module
from loracache.connectors.vllm.worker.objects import GroupObjects
from loracache.connectors.vllm.worker.storer import StoreJob, Storer
from loracache.groups import Need
from loracache.kernels.page_copy import PageCopier
from loracache.keys import Namespace, chunk_keys, object_key

SIZE = 64 << 10
SPACE = Namespace("m" * 64, "float32", "rows", 1)
OBJECTS = (GroupObjects(KVGroup(Need.ALL, 0, (Member(0, 1, ()),)), "s", (SIZE,)),)
COUNT = 96  # of SIZE: six times the smallest arena there is
CHUNKS = chunk_keys(SPACE.digest(), range(COUNT), 1)
Make = Callable[..., Any]


@pytest.fixture
def make_worker(make_rows_worker: Make) -> Make:
    return partial(make_rows_worker, CHUNKS, SIZE)


@pytest.fixture
def content() -> torch.Tensor:
    return torch.randint(1, 1 << 60, (COUNT, SIZE // 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def stocked(daemon: Any, tmp_path: Any, content: torch.Tensor) -> Any:
    """A daemon with 1 MiB of memory and all chunks on disk, which one store has put there."""
    running = daemon(memory="1MiB", page_size="4KiB", disk_path=tmp_path / "disk", disk="1GiB")
    done: queue.Queue[dict[str, int]] = queue.Queue()
    storer = Storer(
        running.url,
        lambda: None,
        PageCopier((content,)),
        OBJECTS,
        lambda store: True,
        lambda job, causes: done.put(causes),
    )
    storer.submit(
        StoreJob(Store("r", SPACE, b"", tuple(ChunkBlocks(each, (at,)) for at, each in enumerate(CHUNKS)), None, 1))
    )
    assert done.get(timeout=60) == {}
    with running.client() as client:
        client.flush()
    storer.close()
    return running


def test_a_load_larger_than_the_memory_arrives_whole(stocked: Any, make_worker: Make, content: torch.Tensor) -> None:
    worker = make_worker(stocked.url)
    worker.load()
    assert worker.loaded() == ([], {})
    assert torch.equal(worker.rows, content)
    assert stocked.status()["leases"] == 0


def test_a_store_that_gets_no_room_ends_and_the_next_does_not_wait(
    stocked: Any, content: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of requests that have ended wait for their stores."""
    monkeypatch.setattr(storer_module, "_NO_ROOM_S", 0.05)
    monkeypatch.setattr(storer_module, "_FULL_S", 3600.0)
    pauses: list[float] = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda pause: pauses.append(pause) or time.sleep(pause))
    monkeypatch.setattr(storer_module, "time", clock)
    done: queue.Queue[dict[str, int]] = queue.Queue()
    finished = lambda job, causes: done.put(causes)  # noqa: E731
    storer = Storer(stocked.url, lambda: None, PageCopier((content,)), OBJECTS, lambda store: True, finished)
    other = chunk_keys(SPACE.digest(), range(500, 504), 1)
    with stocked.client().acquire([object_key(chunk, "s") for chunk in CHUNKS[:16]]):
        for waits in (True, False):
            pauses.clear()
            store = Store("r", SPACE, b"", tuple(ChunkBlocks(each, (at,)) for at, each in enumerate(other)), None, 1)
            storer.submit(StoreJob(store))
            assert done.get(timeout=60) == {"full": 1, "no_parent": 3}
            assert bool(pauses) == waits
    storer.close()


def test_of_a_store_whose_daemon_dies_between_parts_what_was_not_stored_has_failed(
    daemon: Any, content: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = daemon(memory="1MiB", page_size="4KiB")
    done: queue.Queue[tuple[int, dict[str, int]]] = queue.Queue()
    copier = PageCopier((content,))
    gather, copied = copier.gather, []

    def watched(*arguments: Any) -> Any:
        copy = gather(*arguments)
        copied.append(arguments)
        if len(copied) == 8:
            running.stop(signal.SIGKILL)
        return copy

    monkeypatch.setattr(copier, "gather", watched)
    finished = lambda job, causes: done.put((job.nbytes, causes))  # noqa: E731
    storer = Storer(running.url, lambda: None, copier, OBJECTS, lambda store: True, finished)
    chunks = tuple(ChunkBlocks(each, (at,)) for at, each in enumerate(CHUNKS[:20]))
    storer.submit(StoreJob(Store("r", SPACE, b"", chunks, None, 1)))
    assert done.get(timeout=60) == (7 * SIZE, {"unavailable": 13})
    storer.close()


def test_so_do_several_at_once_in_two_engines(stocked: Any, make_worker: Make, content: torch.Tensor) -> None:
    one, two = make_worker(stocked.url), make_worker(stocked.url)
    for worker in (one, two):
        worker.load(name="a")
        worker.load(name="b")
    for worker in (one, two, one, two):
        assert worker.loaded() == ([], {})
    assert torch.equal(one.rows, content)
    assert torch.equal(two.rows, content)


def test_a_load_waits_for_room_that_others_hold(
    stocked: Any, make_worker: Make, content: torch.Tensor, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    monkeypatch.setattr(loader_module, "_NO_ROOM_S", 60.0)
    worker, client = make_worker(stocked.url), stocked.client()
    keys = [object_key(chunk, "s") for chunk in CHUNKS[:16]]
    with client.acquire(keys) as reading:
        assert all(reading.slots)
        worker.load(range(16, 48))
        eventually(lambda: stocked.status()["counters"].get("acquire.failed.memory_full", 0) > 2, "it asks again")
        assert worker.done.empty()
    assert worker.loaded() == ([], {})
    assert torch.equal(worker.rows[16:48], content[16:48])


def test_room_that_nobody_gives_is_waited_for_a_while(
    stocked: Any, make_worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_NO_ROOM_S", 0.1)
    worker, client = make_worker(stocked.url), stocked.client()
    with client.acquire([object_key(chunk, "s") for chunk in CHUNKS[:16]]):
        worker.load(range(16, 20))
        assert worker.loaded() == ([16, 17, 18, 19], {"memory_full": 4})
        worker.load(range(8, 20))  # what is there is of use
        assert worker.loaded() == ([16, 17, 18, 19], {"memory_full": 4})
    assert stocked.status()["leases"] == 0


def test_what_a_silent_daemon_brought_before_counts(
    stocked: Any, make_worker: Make, content: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(stocked.url, timeout=2.0)
    scatter, copied = worker.copier.scatter, []

    def watched(*arguments: Any) -> Any:
        copy = scatter(*arguments)
        copied.append(arguments)
        if len(copied) == 40:
            stocked.send(signal.SIGSTOP)
        return copy

    monkeypatch.setattr(worker.copier, "scatter", watched)
    worker.load()
    failed, causes = worker.loaded()
    stocked.send(signal.SIGCONT)
    assert causes == {"deadline": 1}
    kept = sorted(set(range(COUNT)).difference(failed))  # of two parts under way, the later may come first
    assert 0 < failed[0] <= len(kept) <= len(copied)
    assert torch.equal(worker.rows[kept], content[kept])
