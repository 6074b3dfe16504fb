# SPDX-License-Identifier: Apache-2.0
"""Without a daemon, with one that is silent, or with another: adapters are served from their folders meanwhile."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from loracache.connectors.vllm.lora.paths import path_of
from loracache.connectors.vllm.worker.lora.orders import PoolWorker

NOWHERE = "unix:///nowhere/loracache.sock"

pytestmark = pytest.mark.usefixtures("fast_retry")


def lora(adapter: Any, number: int = 1) -> LoRARequest:
    """By its folder, or by its digest where that is all there is."""
    return LoRARequest(f"adapter {number}", number, path_of(adapter) if isinstance(adapter, str) else adapter.path)


def test_without_a_daemon_adapters_are_read_from_their_folders(
    make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    adapter, engine = make_adapter("alone"), make_engine(NOWHERE, patience=0.3)
    engine.arrive("by digest", lora(os.urandom(32).hex(), 1))
    engine.arrive("a", lora(adapter, 2))
    eventually(lambda: engine.runs("a"))
    assert engine.orders == [(1, adapter.digest, adapter.path)]
    eventually(lambda: engine.step() or engine.failed)
    assert engine.failed == ["by digest"]


def test_a_folder_that_changed_while_no_daemon_is_there_is_served_as_it_is(
    make_engine: Any, make_manager: Any, make_shape: Any, make_adapter: Any, serves: Any, eventually: Any
) -> None:
    """What the id stood for is not to be had any more. vLLM, too, reads the folder when it needs the adapter again."""
    manager = make_manager(make_shape(400))
    engine = make_engine(NOWHERE, manager.pool.shape)
    worker = PoolWorker(manager, NOWHERE, lambda: None, lambda *_: None, 20.0)
    engine.workers, engine.answers = [worker], False
    old = make_adapter("as it was", folder="f")
    engine.arrive("a", lora(old))
    eventually(lambda: engine.runs("a"))
    engine.end("a")
    engine.report(pools_lost=True)
    manager.pool.evict(old.digest)
    new = make_adapter("as it is", folder="f")
    engine.arrive("b", lora(new))
    eventually(lambda: engine.runs("b"), seconds=5)
    assert engine.running["b"] == new.digest
    assert serves(manager.pool, manager.pool.get(new.digest), new)
    worker.close()


def test_a_daemon_that_dies_is_done_without_and_its_successor_is_used(
    daemon: Any, make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    running = daemon()
    engine = make_engine(running.url)
    first, second, third = (make_adapter(name) for name in ("first", "second", "third"))
    engine.arrive("a", lora(first, 1))
    eventually(lambda: engine.runs("a"))
    running.send(signal.SIGSTOP)
    engine.arrive("b", lora(second, 2))
    engine.step()
    running.stop(signal.SIGKILL)
    eventually(lambda: engine.runs("b"))
    with daemon(socket=running.socket).client() as client:
        eventually(engine.link.begin)
        engine.arrive("c", lora(third, 3))
        eventually(lambda: engine.runs("c"))
        assert client.show_adapter(third.digest) is not None
        assert not engine.failed


def test_a_silent_daemon_delays_an_adapter_for_the_patience_and_is_used_again_when_it_wakes(
    daemon: Any, make_engine: Any, make_manager: Any, make_shape: Any, make_adapter: Any, eventually: Any
) -> None:
    running = daemon()
    manager = make_manager(make_shape(2000))
    engine = make_engine(running.url, manager.pool.shape, patience=0.3)
    worker = PoolWorker(manager, running.url, lambda: None, lambda *_: None, 0.3)
    engine.workers, engine.answers = [worker], False
    known, *others = (make_adapter(f"in silence {number}") for number in range(8))
    engine.arrive("known", lora(known, 1))
    eventually(lambda: engine.runs("known"))
    engine.end("known")
    running.send(signal.SIGSTOP)
    manager.pool.evict(known.digest)
    engine.report(pools_lost=True)
    waiting = {f"request {number}": lora(adapter, number) for number, adapter in enumerate([known, *others], 1)}
    for name, adapter in waiting.items():
        engine.arrive(name, adapter)
    eventually(lambda: len([name for name in waiting if engine.runs(name)]) == len(waiting))
    assert not engine.failed
    running.send(signal.SIGCONT)
    eventually(engine.link.begin)
    engine.arrive("awake", lora(late := make_adapter("after the silence"), 20))
    eventually(lambda: engine.runs("awake"))
    with running.client() as client:
        eventually(lambda: client.show_adapter(late.digest), "the daemon takes it in")
    worker.close()


def test_the_engine_s_adapters_are_told_to_a_daemon_that_was_started_anew(
    daemon: Any, make_engine: Any, make_adapter: Any, eventually: Any
) -> None:
    running = daemon()
    adapter, engine = make_adapter("resident"), make_engine(running.url)
    engine.arrive("a", lora(adapter))

    def is_told(client: Any) -> bool:
        engine.step()
        found = client.show_adapter(adapter.digest)
        return found is not None and "gpu" in found.tiers

    with running.client() as client:
        eventually(lambda: is_told(client))
    running.stop(signal.SIGKILL)
    with daemon(socket=running.socket).client() as anew:
        anew.add_adapter(adapter.path)
        engine.arrive("b", lora(os.urandom(32).hex(), 2))  # it learns of the loss when it asks for something
        eventually(lambda: is_told(anew))
