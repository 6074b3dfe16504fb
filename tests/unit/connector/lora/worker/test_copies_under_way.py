# SPDX-License-Identifier: Apache-2.0
"""Adapters on a device that copies by itself: pages and bytes are nobody else's before its stream has ended."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from loracache.connectors.vllm.worker.lora import activation
from loracache.connectors.vllm.worker.lora.activation import Activator, Order
from loracache.errors import UsageError


class Stream:
    """Says when it was waited for."""

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self.error = ""

    def wait_event(self, event: object) -> None:
        self._log.append(f"after {event}")

    def synchronize(self) -> None:
        self._log.append("ended")
        if self.error:
            raise RuntimeError(self.error)


class Worker:
    """A pool, its thread and what happens in which order."""

    def __init__(self, url: str, manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.done: queue.Queue[tuple[int, str, str]] = queue.Queue()
        self.pool = manager.pool
        self.activator = Activator(url, lambda: None, manager, lambda *what: self.done.put(what), 20.0)
        self.stream = Stream(self.log)
        self.activator._stream = self.stream
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        self._watch(monkeypatch, activation, "fill_pages", "copies")
        self._watch(monkeypatch, activation, "checksum", "hashes")
        self._watch(monkeypatch, self.pool, "give_back", "pages go")
        connection = self.activator._link.connection
        send = connection.send

        def sent(request: Any, **options: Any) -> int:
            if type(request).__name__ == "Release":
                self.log.append("lease goes")
            return send(request, **options)

        monkeypatch.setattr(connection, "send", sent)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, target: Any, name: str, word: str) -> None:
        call = getattr(target, name)

        def watched(*arguments: Any) -> Any:
            self.log.append(word)
            return call(*arguments)

        monkeypatch.setattr(target, name, watched)

    def load(self, digest: str) -> str:
        self.pool.want(digest)
        self.activator.submit(Order(1, digest, "", "the step"))
        return self.done.get(timeout=20)[1]


@pytest.fixture
def make_worker(
    make_manager: Any, make_shape: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Worker]]:
    made: list[Worker] = []

    def make(url: str) -> Worker:
        made.append(Worker(url, make_manager(make_shape(100, element_bytes=4), torch.float32), monkeypatch))
        return made[-1]

    yield make
    for worker in made:
        worker.activator.close()


def test_an_adapter_is_hashed_while_it_is_copied_and_resident_afterwards(
    url: str, client: Any, make_worker: Any, make_adapter: Any, serves: Any
) -> None:
    worker, adapter = make_worker(url), make_adapter("late", 4)
    client.add_adapter(adapter.path)
    assert worker.load(adapter.digest) == ""
    assert worker.log == ["after the step", "copies", "hashes", "ended", "lease goes"]
    assert serves(worker.pool, worker.pool.get(adapter.digest), adapter)


@pytest.mark.parametrize(
    ("error", "cause"), [(RuntimeError("CUDA error"), "copy_failed"), (UsageError("a shape"), "unusable")]
)
def test_pages_and_lease_of_a_copy_that_fails_go_when_nothing_is_under_way(
    url: str, client: Any, make_worker: Any, make_adapter: Any, monkeypatch: Any, error: Exception, cause: str
) -> None:
    worker, adapter = make_worker(url), make_adapter("fails", 4)
    client.add_adapter(adapter.path)
    fill = vars(activation)["fill_pages"]  # as it is watched

    def fails(*arguments: Any) -> None:
        fill(*arguments)  # in part, say
        raise error

    monkeypatch.setattr(activation, "fill_pages", fails)
    assert worker.load(adapter.digest) == cause
    assert [word for word in worker.log if word != "hashes"][1:] == ["copies", "ended", "pages go", "lease goes"]
    assert worker.pool.free_pages == worker.pool.shape.pages
    monkeypatch.setattr(activation, "fill_pages", fill)
    assert worker.load(adapter.digest) == ""  # and the thread goes on


def test_a_copy_that_the_device_fails_later_is_not_resident(
    url: str, client: Any, make_worker: Any, make_adapter: Any
) -> None:
    worker, adapter = make_worker(url), make_adapter("later", 4)
    client.add_adapter(adapter.path)
    worker.stream.error = "CUDA error: an illegal memory access was encountered"
    assert worker.load(adapter.digest) == "copy_failed"
    assert worker.pool.free_pages == worker.pool.shape.pages
    assert client.status()["leases"] == 0
