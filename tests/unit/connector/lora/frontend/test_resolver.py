# SPDX-License-Identifier: Apache-2.0
"""Names that only the cache knows, on a front end whose daemon answers, is frozen, and dies."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.connectors.vllm.frontend.questions import ANSWER_S, KNOCK_S, _Asker
from loracache.connectors.vllm.frontend.resolver import resolve_names_through_the_cache
from loracache.connectors.vllm.lora.paths import digest_in

SLACK_S = 10.0  # below what one timeout a name takes
AT_ONCE_S = 0.3
NAMES = [f"team/{number}" for number in range(5)]


class Models:
    """What we use of vLLM's OpenAIServingModels, with our names in it."""

    def __init__(self, url: str) -> None:
        transfer = SimpleNamespace(
            kv_connector="LoRACacheConnector", kv_connector_extra_config={"server": url}, engine_id="e"
        )
        self.added: list[Any] = []
        self.engine_client = SimpleNamespace(
            vllm_config=SimpleNamespace(kv_transfer_config=transfer), add_lora=self._add
        )
        self.lora_requests: dict[str, Any] = {}
        numbers = itertools.count(1)
        self.lora_id_counter = SimpleNamespace(inc=lambda by: next(numbers))
        self.lora_resolver_lock: Any = defaultdict(asyncio.Lock)
        self.questions = resolve_names_through_the_cache(self)

    async def resolve_lora(self, name: str) -> Any:
        return "404"

    async def _add(self, request: Any) -> None:
        await asyncio.sleep(0.01)
        self.added.append(request)

    async def digests(self, *names: str) -> list[str | None]:
        """What each of these is served with, asked for at once."""
        found = await asyncio.gather(*(self.resolve_lora(name) for name in names))
        return [each if each == "404" else digest_in(each.lora_path) for each in found]


@pytest.fixture
def adapters(make_adapter: Any) -> list[Any]:
    return [make_adapter(f"names-{number}") for number in range(6)]


@pytest.fixture
def cache(daemon: Any, adapters: list[Any]) -> Any:
    """A daemon that has all of NAMES."""
    running = daemon(memory="16MiB")
    with running.client() as client:
        for name, adapter in zip(NAMES, adapters, strict=False):
            client.add_adapter(adapter.path, name)
    return running


def played(url: str, part: Callable[[Models], Awaitable[None]]) -> None:
    async def play() -> None:
        models = Models(url)
        try:
            await part(models)
        finally:
            models.questions.close()

    asyncio.run(play())


async def seconds(what: Awaitable[Any]) -> tuple[float, Any]:
    began = time.monotonic()
    answer = await what
    return time.monotonic() - began, answer


def test_requests_for_a_new_name_at_once_ask_once_and_become_one_adapter(
    cache: Any, adapters: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()
    ask = _Asker.ask
    monkeypatch.setattr(_Asker, "ask", lambda self, name: asked.update([name]) or time.sleep(0.1) or ask(self, name))

    async def part(models: Models) -> None:
        assert await models.digests(*NAMES[:1] * 20) == [adapters[0].digest] * 20
        assert asked == {NAMES[0]: 1}
        assert len(models.added) == 1

    played(cache.url, part)


def test_a_name_stands_for_what_it_points_to_when_a_request_comes(cache: Any, adapters: list[Any]) -> None:
    async def part(models: Models) -> None:
        for turn in range(4):
            with cache.client() as client:
                client.add_adapter(adapters[turn % 2].path, NAMES[0])
            assert await models.digests(NAMES[0]) == [adapters[turn % 2].digest]
        with cache.client() as client:
            client.remove_adapter(NAMES[0])
        assert await models.digests(NAMES[0], "unheard-of", "../etc/passwd") == ["404"] * 3

    played(cache.url, part)


def test_a_frozen_daemon_costs_one_timeout_then_nothing_and_is_noticed_when_it_is_back(
    cache: Any, adapters: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    known = [adapter.digest for adapter in adapters[:5]]

    async def part(models: Models) -> None:
        assert await models.digests(*NAMES) == known
        cache.process.send_signal(signal.SIGSTOP)
        took, found = await seconds(models.digests(*NAMES * 4))
        assert found == known * 4
        assert took < ANSWER_S + SLACK_S
        times = []
        for _ in range(3):
            took, found = await seconds(models.digests(*NAMES * 4, "never seen"))
            assert found == [*known * 4, "404"]
            times.append(took)
            await asyncio.sleep(0.3)
        assert min(times) < AT_ONCE_S
        assert models.lora_id_counter.inc(1) == 6, "nothing became another adapter"
        cache.process.send_signal(signal.SIGCONT)
        with cache.client() as client:
            client.add_adapter(adapters[5].path, NAMES[0])
        await asyncio.wait_for(until(models, NAMES[0], adapters[5].digest), KNOCK_S + ANSWER_S + SLACK_S)

    with caplog.at_level(logging.INFO, "loracache.connectors.vllm"):
        played(cache.url, part)
    said = [record.getMessage() for record in caplog.records]
    assert sum("until it is back" in each for each in said) == 1
    assert sum("says again" in each for each in said) == 1
    assert any("'never seen'" in each for each in said)


async def until(models: Models, name: str, digest: str) -> None:
    while await models.digests(name) != [digest]:
        await asyncio.sleep(0.05)


def test_the_front_ends_own_threads_are_not_taken_by_names(cache: Any) -> None:
    async def part(models: Models) -> None:
        cache.process.send_signal(signal.SIGSTOP)
        waiting = asyncio.gather(*(models.resolve_lora(f"name-{number}") for number in range(60)))
        await asyncio.sleep(0.1)
        others = asyncio.gather(*(asyncio.to_thread(time.sleep, 0.01) for _ in range(20)))
        first, _ = await asyncio.wait([waiting, others], return_when=asyncio.FIRST_COMPLETED)
        assert others in first
        took, found = await seconds(waiting)
        assert took < ANSWER_S + SLACK_S
        assert set(found) == {"404"}
        cache.process.send_signal(signal.SIGCONT)

    played(cache.url, part)


def test_a_request_that_is_gone_takes_nobody_elses_answer_with_it(cache: Any, adapters: list[Any]) -> None:
    async def part(models: Models) -> None:
        cache.process.send_signal(signal.SIGSTOP)
        first, second = (asyncio.ensure_future(models.digests(NAMES[0])) for _ in range(2))
        await asyncio.sleep(0.1)
        first.cancel()
        await asyncio.sleep(0.1)
        cache.process.send_signal(signal.SIGCONT)
        assert await second == [adapters[0].digest]

    played(cache.url, part)


def test_a_daemon_that_was_started_anew_answers_the_first_question(
    cache: Any, daemon: Any, adapters: list[Any]
) -> None:
    async def part(models: Models) -> None:
        assert await models.digests(NAMES[0]) == [adapters[0].digest]
        cache.stop(signal.SIGKILL)
        successor = daemon(memory="16MiB", socket=cache.socket)
        with successor.client() as client:
            client.add_adapter(adapters[1].path, NAMES[0])
        assert await models.digests(NAMES[0]) == [adapters[1].digest]

    played(cache.url, part)


def test_names_stand_for_what_they_did_while_no_daemon_lives(cache: Any, adapters: list[Any]) -> None:
    async def part(models: Models) -> None:
        assert await models.digests(NAMES[0]) == [adapters[0].digest]
        cache.stop(signal.SIGKILL)
        times = []
        for _ in range(3):
            took, found = await seconds(models.digests(NAMES[0], "never seen"))
            assert found == [adapters[0].digest, "404"]
            times.append(took)
        assert min(times) < AT_ONCE_S

    played(cache.url, part)
