# SPDX-License-Identifier: Apache-2.0
"""`loracache top`: what it computes, one frame of it, and a daemon that goes and comes back."""

from __future__ import annotations

import re
import signal
import threading
from typing import Any

import pytest

from loracache import CacheClient
from loracache.cli.top import Sample, rates


def reading(at: float, instance: bytes = b"one", uptime: float = 100.0, **counters: int) -> Sample:
    named = {name.replace("_", "."): value for name, value in counters.items()}
    return Sample(at, instance, {"tiers": {"cpu": {}, "disk": {}}, "uptime_s": uptime, "counters": named}, [])


def test_rates_are_of_the_time_between_two_readings() -> None:
    before = reading(10.0, hit_cpu=100, miss_absent=50, store_bytes=1000, evict_cpu_lru=5)
    now = reading(
        12.0,
        hit_cpu=130,
        hit_disk=6,
        miss_absent=62,
        store_bytes=5000,
        load_disk_bytes=300,
        write_disk_bytes=800,
        evict_cpu_lru=9,
        evict_cpu_asked=2,
        evict_disk_lru=1,
    )
    found = rates(before, now)
    assert (found.hits, found.misses, found.hit_rate) == (18.0, 6.0, 0.75)
    assert found.written == {"cpu": 2000.0, "disk": 400.0}
    assert found.read == {"disk": 150.0}
    assert found.evicted == {"cpu": 3.0, "disk": 0.5}


def test_rates_begin_anew_with_another_daemon() -> None:
    before = reading(10.0, hit_cpu=1000)
    restarted = reading(12.0, b"two", uptime=2.0, hit_cpu=10)
    assert rates(before, restarted) == rates(None, restarted)
    assert rates(None, restarted).hits == 5.0
    assert rates(None, reading(1.0)).hit_rate is None


def traffic(url: str, prompt: Any, until: threading.Event) -> None:
    with CacheClient(url) as own:
        _, keys = prompt(4, of=own)
        while not until.is_set():
            prompt(4, of=own)
            own.lookup([*keys, bytes(32)])


def test_one_frame_shows_a_daemon_at_work(cli: Any, running: Any, prompt: Any, client: CacheClient) -> None:
    over = threading.Event()
    working = threading.Thread(target=traffic, args=(running.url, prompt, over))
    working.start()
    try:
        frame = cli("top", "--once", "--interval", 0.5)
    finally:
        over.set()
        working.join()
    assert (frame.code, frame.err, frame.out.isascii()) == (0, "", True)
    assert f"pid {running.process.pid}" in frame.out
    assert "hit rate 80.0 % now" in frame.out
    rows = {line.split()[0]: line for line in frame.out.splitlines() if line.strip()}
    assert re.search(r"\[[#.]{20}\] +\d+ %  +[\d.]+ [KM]iB of 16.0 MiB +\d+ +[\d.]+ [KM]iB ", rows["cpu"])
    assert re.search(r" of 64.0 MiB ", rows["disk"])
    assert "no operations running" in frame.out
    assert "no recent failures" in frame.out


def test_it_ends_with_q_and_leaves_the_terminal_as_it_was(process: Any) -> None:
    started = process("top", "--interval", 0.2, terminal=True)
    started.until("hit rate")
    started.type("xq")
    done = started.end()
    assert done.code == 0
    assert done.out.endswith("\x1b[?25h\x1b[?1049l")  # the cursor is back, and the screen of before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_survives_a_restart_of_the_daemon(process: Any, daemon: Any, number: int) -> None:
    first = daemon(memory="1MiB")
    started = process("top", "--interval", 0.2, socket=first.socket, terminal=True)
    started.until(f"pid {first.process.pid}")
    first.stop(number)
    started.until("waiting for it to come back")
    second = daemon(memory="1MiB", socket=first.socket)
    started.until(f"pid {second.process.pid}")
    started.forget()
    started.until("hit rate")
    assert "waiting for it" not in started.text
    started.process.send_signal(signal.SIGINT)
    assert started.end().code == 0
