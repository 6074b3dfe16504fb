# SPDX-License-Identifier: Apache-2.0
"""Both sides of the connector on a real daemon, whose Redis is behind a slow link: what is loaded from there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loracache import CacheClient
from loracache.connectors.vllm.common.groups import KVGroup, Member
from loracache.connectors.vllm.common.messages import Load
from loracache.connectors.vllm.common.options import Options
from loracache.connectors.vllm.link.scheduler import SchedulerLink
from loracache.groups import Need
from loracache.keys import object_key
from loracache.results import Cause

PROXY = Path(__file__).parents[3] / "benchmarks" / "far_redis.py"
CHUNK, CHUNKS = 16, 8
GROUPS = (KVGroup(Need.ALL, 0, (Member(0, CHUNK, ("layer",)),)),)
DELAY_MS, MB_A_SECOND = 2, 0.05  # a chunk of 4 KiB takes 80 ms
TOKEN_S = 0.001  # and 16 ms to compute


@pytest.fixture
def far(redis_server: Any, short_tmp: Path, eventually: Any) -> Iterator[tuple[str, str]]:
    """URLs of one Redis: at hand, and behind the link."""
    server = redis_server()
    here = short_tmp / "far.sock"
    arguments = [str(here), str(server.socket), str(DELAY_MS), str(MB_A_SECOND)]
    proxy = subprocess.Popen([sys.executable, str(PROXY), *arguments])
    try:
        eventually(here.exists, "the proxy listens", 30)
        yield server.url, f"unix://{here}"
    finally:
        proxy.kill()
        proxy.wait(30)


@pytest.fixture
def engine(make_side: Any, make_config: Any) -> Iterator[Callable[..., Engine]]:
    """engine(daemon, ...options) makes one; all end with the test."""
    made: list[Engine] = []

    def make(running: Any, **options: Any) -> Engine:
        made.append(Engine(running.url, make_side(running.url), make_config(), **options))
        return made[-1]

    yield make
    for each in made:
        each.side.close()


class Engine:
    """Both sides, and steps between them. It computes a token in TOKEN_S."""

    def __init__(self, url: str, worker: Any, config: Any, **options: Any) -> None:
        from loracache.connectors.vllm.scheduler.side import SchedulerSide

        self.worker = worker
        self.link = SchedulerLink(url)
        options = {"chunk_tokens": CHUNK, "lookup_wait": 10.0} | options
        self.side = SchedulerSide(config, Options(**options), lambda: "m" * 64, self.link, GROUPS)
        self.side.set_facts([worker.facts])
        self.side._patience.steps.planned(0.0, 1000)
        self.side._patience.steps.done(1000 * TOKEN_S)

    def loads(self, request: Any) -> int:
        """Chunks that are loaded for a request."""
        deadline = time.monotonic() + 60
        self.side.on_new_request(request)
        while (answer := self.side.matched_tokens(request, 0))[0] is None and time.monotonic() < deadline:
            time.sleep(0.001)
        tokens = answer[0]
        assert tokens is not None
        self.side.planned_load(request, SimpleNamespace(get_block_ids=lambda: (list(range(CHUNKS)),)), tokens)
        nothing = SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=set())
        output = SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=nothing, num_scheduled_tokens={})
        plan = self.side.build_plan(output)
        self.worker.handle_preemptions(plan)
        self.worker.start_loads(plan)
        loaded: set[str] = set()
        while tokens and not loaded and time.monotonic() < deadline:
            time.sleep(0.001)
            _, loaded = self.worker.take_finished()
        assert not self.worker.take_load_errors()
        news = self.worker.take_news()
        if news is not None:
            self.side.take_news(news)
        self.side.finished_loading(loaded, set())
        self.side.finished(request, [[]])
        return int(tokens) // CHUNK


def requests(make_request: Any, count: int) -> list[Any]:
    return [make_request(f"r{seed}", CHUNKS * CHUNK, seed=seed) for seed in range(1, count + 1)]


def fill(client: CacheClient, engine: Engine, asked: list[Any]) -> None:
    """Have Redis hold all of these requests' chunks."""
    for request in asked:
        engine.side.on_new_request(request)
        state = engine.side._requests.pop(request.request_id)
        assert state.namespace is not None
        root = client.register(state.namespace)
        keys = [object_key(key, "all") for key in state.chunk_keys]
        assert len(keys) == CHUNKS
        with client.reserve(root, keys, [engine.worker.facts.groups[0].block_bytes[0]] * CHUNKS) as reservation:
            for position in range(CHUNKS):
                reservation.write(position, os.urandom(engine.worker.facts.groups[0].block_bytes[0]))
    client.flush()


def test_what_is_behind_a_slow_link_is_computed(
    daemon: Any, far: tuple[str, str], short_tmp: Path, engine: Callable[..., Engine], make_request: Any
) -> None:
    patient = short_tmp / "patient.yaml"
    patient.write_text("redis_lookup_ms: 1000\n")
    near = daemon(memory="4MiB", redis=far[0], config=patient)
    others = [daemon(memory="4MiB", redis=url, config=patient) for url in (far[1], far[0], far[1])]
    asked = requests(make_request, 5)
    with near.client() as client:
        fill(client, engine(near), asked)
    slow, fast, trusting = engine(others[0]), engine(others[1]), engine(others[2], recompute_if_faster=0.0)
    assert [slow.loads(request) for request in asked] == [CHUNKS] * 3 + [0] * 2  # three tell how fast it is
    assert [fast.loads(request) for request in asked] == [CHUNKS] * 5
    assert [trusting.loads(request) for request in asked[:4]] == [CHUNKS] * 4
    hits: Callable[[Any], int] = lambda running: running.status()["hits"]["redis"]  # noqa: E731
    assert hits(others[0]) == hits(others[1]) == 5 * CHUNKS  # found is found, loaded or not
    assert others[0].status()["counters"]["load.redis.objects"] == 3 * CHUNKS  # and nothing else was raised


def test_loads_that_failed_tell_nothing_but_for_those_that_took_too_long(daemon: Any, make_side: Any) -> None:
    worker = make_side(daemon().url)
    worker.take_news()
    outcomes = {"came": {}, "late": {Cause.DEADLINE: 1}, "lost": {Cause.UNAVAILABLE: 1}}
    for name, causes in outcomes.items():
        worker._load_began[name] = time.monotonic() - 10.0
        worker._loaded(Load(name, (), None, 1), [], causes)
    assert worker.take_news().loaded == {"came": pytest.approx(10.0, 0.1), "late": pytest.approx(10.0, 0.1)}
    assert worker.take_news() is None
