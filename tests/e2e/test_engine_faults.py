# SPDX-License-Identifier: Apache-2.0
"""Engines that die, stop, run out of blocks or lose their daemon: right tokens, nothing leaked, the next one is
served.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient

TIGHT = {
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 256,
    "num_gpu_blocks_override": 20,
    "max_num_seqs": 6,
}


def stored(socket: str) -> int:
    with CacheClient(f"unix://{socket}") as client:
        return int(client.status()["counters"].get("store.objects", 0))  # type: ignore[attr-defined]


def answers(socket: str) -> bool:
    try:
        CacheClient(f"unix://{socket}").close()
    except OSError:
        return False
    return True


def clean(status: dict[str, Any]) -> bool:
    """Nothing held, and every used page is an object's."""
    cpu = status["tiers"]["cpu"]
    return bool(status["leases"] == 0 and status["quarantined_bytes"] == 0 and cpu["used_bytes"] == cpu["bytes"])


@pytest.mark.parametrize("moment", ["storing", "loading"])
def test_an_engine_killed_while_it_moves_kv_leaks_nothing(
    daemon: Any, engine_factory: Any, prompts: Callable[[int], list[int]], eventually: Any, tmp_path: Path, moment: str
) -> None:
    serving = daemon(memory="64MiB", disk_path=tmp_path / "disk", disk="256MiB")
    many = [prompts(1900) for _ in range(6)]
    victim = engine_factory({"server": serving.url}, max_num_batched_tokens=256)
    expected = {}
    if moment == "loading":
        expected = {number: victim.ask(tokens).tokens for number, tokens in enumerate(many)}
    for tokens in many:
        victim.start(tokens, max_tokens=50)
    deadline = time.monotonic() + 5
    while serving.status()["leases"] == 0 and time.monotonic() < deadline:
        pass
    victim.kill()
    eventually(lambda: clean(serving.status()), "the dead engine's pages and leases are free", 20)
    heir = engine_factory({"server": serving.url})
    first = [heir.ask(tokens) for tokens in many]
    with serving.client() as client:
        client.flush()
        client.clear()
    again = [heir.ask(tokens).tokens for tokens in many]
    assert [answer.tokens for answer in first] == again  # with whatever the dead one left, and computed anew
    assert all(again[number] == tokens for number, tokens in expected.items())
    heir.close()
    eventually(lambda: clean(serving.status()), "nothing is held at the end")


def test_a_stopped_engine_delays_nobody_and_goes_on(
    daemon: Any, engine_factory: Any, prompts: Callable[[int], list[int]]
) -> None:
    serving = daemon(memory="64MiB")
    tokens = prompts(1900)
    stopped = engine_factory({"server": serving.url}, max_num_batched_tokens=256)
    other = engine_factory({"server": serving.url})
    cold = other.ask(tokens)
    calls = [stopped.start(tokens, max_tokens=40), stopped.start(prompts(1900), max_tokens=40)]
    time.sleep(0.05)
    stopped.signal_all(signal.SIGSTOP)
    assert other.ask(tokens).tokens == cold.tokens
    assert other.ask(prompts(700)).cached == 0
    stopped.signal_all(signal.SIGCONT)
    assert stopped.result(calls[0]).tokens[:8] == cold.tokens
    assert len(stopped.result(calls[1]).tokens) == 40
    stopped.close()
    other.close()


def test_the_private_daemon_lives_and_dies_with_its_engine(
    engine_factory: Any, prompts: Callable[[int], list[int]], eventually: Any, tmp_path: Path, short_tmp: Path
) -> None:
    """Also: chunked prefill, preemption and the engine's own prefix cache, through a restart."""
    extra = {"memory": "64MiB", "disk_path": str(tmp_path / "disk"), "disk": "256MiB"}
    environment = {"XDG_RUNTIME_DIR": str(short_tmp)}
    engine = engine_factory(extra, environment, **TIGHT)
    (socket,) = map(str, Path(environment["XDG_RUNTIME_DIR"]).glob("loracache-*/*.sock"))

    # Five requests that need more blocks than there are: some are preempted and come back through the cache.
    many = [prompts(400) for _ in range(5)]
    alone = [engine.ask(tokens, max_tokens=200).tokens for tokens in many]
    with CacheClient(f"unix://{socket}") as client:
        client.clear()
    engine.reset()
    calls = [engine.start(tokens, max_tokens=200) for tokens in many]
    assert [engine.result(call).tokens for call in calls] == alone

    # A prefix that the engine holds itself, and a longer one that only the cache holds.
    longer = many[0] + alone[0] + prompts(200)
    once = engine.ask(longer)
    engine.reset()
    engine.ask(many[0][:300])
    assert engine.ask(longer).tokens == once.tokens

    # The daemon is killed: the engine starts another, which finds the disk.
    with CacheClient(f"unix://{socket}") as client:
        client.flush()
        pid = client.status()["pid"]
    os.kill(int(str(pid)), signal.SIGKILL)
    engine.reset()
    assert engine.ask(longer).tokens == once.tokens

    def hits() -> bool:
        forgotten = engine.reset()
        return bool(forgotten and engine.ask(longer).cached >= 640 and answers(socket))

    eventually(hits, "the next private daemon serves the disk", 60)
    assert engine.ask(longer).tokens == once.tokens

    # The engine is killed: its daemon saves what it has and ends; the next engine finds it.
    last = prompts(600)
    before = stored(socket)
    cold = engine.ask(last)
    eventually(lambda: stored(socket) == before + 4, "the prompt's chunks are committed")
    engine.kill()
    eventually(lambda: not answers(socket), "the private daemon ends", 30)
    heir = engine_factory(extra, environment, **TIGHT)
    warm = heir.ask(last)
    assert warm.cached == 512
    assert warm.tokens == cold.tokens
    heir.close()


def test_an_arena_too_small_for_a_prompt_and_a_full_disk_are_only_misses(
    daemon: Any, engine_factory: Any, prompts: Callable[[int], list[int]], file_system: Callable[[int], Path]
) -> None:
    serving = daemon(memory="1MiB", disk_path=file_system(2) / "disk", disk="1GiB")  # seven chunks, and fourteen
    engine = engine_factory({"server": serving.url})
    many = [prompts(length) for length in (1900, 300, 1000, 600, 700)]
    cold = [engine.ask(tokens).tokens for tokens in many]
    for _ in range(3):
        calls = [engine.start(tokens) for tokens in many]
        assert [engine.result(call).tokens for call in calls] == cold
    counters = serving.status()["counters"]
    assert counters["store.refused.full"] > 0
    assert counters["failure.disk.full"] > 0
    assert counters["hit.disk"] > 0
    engine.close()
