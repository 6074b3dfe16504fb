# SPDX-License-Identifier: Apache-2.0
"""The scheduler's connection never waits, and one late answer does not turn the cache off."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loracache import Namespace
from loracache.client import link as client_link
from loracache.client import requests
from loracache.client.connection import Reply
from loracache.connectors.vllm.link import scheduler as link_module
from loracache.connectors.vllm.link.scheduler import SchedulerLink

MISS = ((), ())
KEYS = [bytes([number]) * 32 for number in range(4)]
LEASE = bytes(16)
NAMESPACE = Namespace("m" * 64, "float32", "layout", 16)


@pytest.fixture
def fast_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_SILENT_AFTER_S", 0.05)
    monkeypatch.setattr(client_link, "RETRY_S", 0.05)


@pytest.fixture
def link_of(eventually: Any) -> Iterator[Callable[[str], SchedulerLink]]:
    """A link that the daemon there has greeted; closed in the end, whatever comes of the test."""
    made: list[SchedulerLink] = []

    def make(url: str) -> SchedulerLink:
        made.append(link := SchedulerLink(url))
        eventually(lambda: link.begin() or link.answering(), "the daemon greets")
        return link

    yield make
    for link in made:
        link.close()


def test_an_answer_nobody_looks_for_is_a_sign_of_life(
    daemon: Any, link_of: Any, fast_silence: None, eventually: Any
) -> None:
    link = link_of(daemon().url)
    number = link.ask_lookup(LEASE, KEYS, 1, 5.0)
    assert number
    time.sleep(0.2)
    assert link.answering()
    assert link.ask_lookup(LEASE, KEYS, 1, 5.0)
    assert link.answer_lookup(number) == MISS  # and is there when it is asked for after all
    link.close()


def test_a_silent_daemon_is_asked_nothing_until_it_answers(
    daemon: Any, link_of: Any, fast_silence: None, eventually: Any, quickest: Any
) -> None:
    running = daemon()
    link = link_of(running.url)
    running.send(signal.SIGSTOP)
    first = link.ask_lookup(LEASE, KEYS, 1, 5.0)
    forgotten = link.ask_lookup(LEASE, KEYS, 1, 5.0)
    link.forget(forgotten)
    time.sleep(0.1)

    def took() -> float:
        started = time.monotonic()
        assert not link.answering()
        assert link.ask_lookup(LEASE, KEYS, 1, 5.0) == 0
        assert link.ask_adapter("/nowhere") is None
        assert link.answer_lookup(first) is None
        link.flush()
        return time.monotonic() - started

    link.count("lookup.late", 3)
    assert quickest(took, 0.5) < 0.5
    running.send(signal.SIGCONT)
    eventually(link.answering, "the daemon answers again")
    assert link.ask_lookup(LEASE, KEYS, 1, 5.0)
    eventually(lambda: running.status()["counters"].get("client.lookup.late") == 3, "the count arrives")
    link.close()


def test_an_answer_may_be_waited_for(daemon: Any, link_of: Any, fast_silence: None, eventually: Any) -> None:
    running = daemon()
    link = link_of(running.url)
    assert link.wait_lookup(link.ask_lookup(LEASE, KEYS, 1, 5.0), 30.0) == MISS  # and no longer than it takes
    running.send(signal.SIGSTOP)
    number = link.ask_lookup(LEASE, KEYS, 1, 5.0)
    assert link.wait_lookup(number, 0.002) is None
    running.send(signal.SIGCONT)
    assert link.wait_lookup(number, 30.0) == MISS
    running.send(signal.SIGSTOP)
    number = link.ask_lookup(LEASE, KEYS, 1, 5.0)
    running.stop(signal.SIGKILL)
    assert link.wait_lookup(number, 30.0) in (MISS, None)  # gone: a miss, at once
    link.close()


def test_a_daemon_that_died_is_a_miss_and_its_successor_is_found(
    daemon: Any, link_of: Any, fast_silence: None, eventually: Any
) -> None:
    running = daemon()
    link = link_of(running.url)
    running.send(signal.SIGSTOP)
    number = link.ask_lookup(LEASE, KEYS, 1, 5.0)
    running.stop(signal.SIGKILL)
    eventually(lambda: link.answer_lookup(number) == MISS, "the question ends as a miss")
    link.release(LEASE)
    link.prefetch(LEASE, KEYS, 5.0)
    assert link.ask_lookup(LEASE, KEYS, 1, 5.0) == 0
    daemon(socket=running.socket)
    number = eventually(lambda: link.ask_lookup(LEASE, KEYS, 1, 5.0), "the new daemon is asked")
    eventually(lambda: link.answer_lookup(number) == MISS)
    link.close()


def test_an_adapter_that_cannot_be_hashed_has_no_digest(daemon: Any, eventually: Any, tmp_path: Any) -> None:
    link = SchedulerLink(daemon().url)
    number = eventually(lambda: link.ask_adapter(str(tmp_path)), "the daemon is asked")
    done, digest = eventually(lambda: answer if (answer := link.answer_adapter(number))[0] else None)
    assert done
    assert digest is None
    link.close()


def test_a_daemon_that_hangs_before_it_greets_costs_milliseconds(
    daemon: Any, fast_silence: None, eventually: Any, quickest: Any
) -> None:
    running = daemon()
    running.send(signal.SIGSTOP)
    link = SchedulerLink(running.url)

    def took() -> float:
        started = time.monotonic()
        assert [link.ask_lookup(LEASE, KEYS, 1, 5.0) for _ in range(50)] == [0] * 50
        return time.monotonic() - started

    assert quickest(took, 1.0) < 1.0  # a connection that is waited for takes two seconds
    assert not link.answering()
    running.send(signal.SIGCONT)
    eventually(lambda: link.ask_lookup(LEASE, KEYS, 1, 5.0), "the daemon is asked as soon as it greets")
    link.close()


# -- many keys ----------


def test_a_long_lookup_is_asked_in_parts_as_far_as_hits_go(
    daemon: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "_PART_KEYS", 2)
    running = daemon()
    client = running.client()
    keys = [bytes([number]) * 32 for number in range(1, 10)]
    with client.reserve(client.register(NAMESPACE), keys[:5], [100] * 5) as reservation:
        for position in range(5):
            reservation.write(position, bytes(100))
    link = SchedulerLink(running.url)

    def answer(wanted: list[bytes], shards: int = 1) -> Any:
        number = eventually(lambda: link.ask_lookup(LEASE, wanted, shards, 5.0), "it is asked")
        return eventually(lambda: [found] if (found := link.answer_lookup(number)) is not None else None)[0].tiers

    assert answer(keys) == ("cpu",) * 5
    assert answer(keys[:4]) == ("cpu",) * 4
    assert answer(keys[:3], shards=3) == ("cpu",) * 3
    assert answer(keys[5:]) == ()
    assert running.status()["counters"]["lookup"] == 3 + 2 + 1 + 1
    assert running.status()["leases"] == 1
    link.close()


def test_keys_beside_a_chain_are_each_looked_for_in_the_same_parts(
    daemon: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chunks of a chain are held of three; of the two objects beside each, some."""
    monkeypatch.setattr(requests, "_PART_KEYS", 2)
    running = daemon()
    client = running.client()
    chain, beside = ([bytes([first + number]) * 32 for number in range(count)] for first, count in ((1, 3), (11, 6)))
    held = [*chain[:2], beside[0], beside[3]]
    with client.reserve(client.register(NAMESPACE), held, [100] * 4, parents=[b"", chain[0], b"", b""]) as reservation:
        for position in range(4):
            reservation.write(position, bytes(100))
    link = SchedulerLink(running.url)

    def answer(keys: list[bytes], shards: int) -> Any:
        number = eventually(lambda: link.ask_lookup(LEASE, keys, shards, 5.0, beside), "it is asked")
        return eventually(lambda: link.answer_lookup(number), "it is answered")

    assert answer(chain, 1) == (("cpu", "cpu"), ("cpu", "", "", "cpu", "", ""))
    assert answer([], 1) == ((), ("cpu", "", "", "cpu", "", ""))  # no chain: all of them are asked for
    link.close()


def test_a_lookup_of_more_keys_than_a_message_holds_is_answered(
    daemon: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    running = daemon()
    client = running.client()
    with client.reserve(client.register(NAMESPACE), [KEYS[1]], [100]) as reservation:
        reservation.write(0, bytes(100))
    link = SchedulerLink(running.url)
    number = eventually(lambda: link.ask_lookup(LEASE, [KEYS[1]] * 300_000, 1, 5.0), "it is asked")
    assert eventually(lambda: link.answer_lookup(number)) == (("cpu",) * 300_000, ())
    assert not caplog.messages  # nothing was wrong with the daemon
    link.close()


@pytest.mark.parametrize("payload", [[bytes([9])], ["cpu"], [7], [bytes([1] * 5)], {"a": 1}, [None]])
def test_what_is_no_answer_is_a_miss_and_no_error_of_the_engines_loop(
    daemon: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch, payload: Any
) -> None:
    """More tiers than keys would be more tokens than the prompt has."""
    link = SchedulerLink(daemon().url)
    number = eventually(lambda: link.ask_lookup(LEASE, KEYS, 1, 5.0), "it is asked")
    monkeypatch.setattr(link.connection, "take", lambda number: Reply(payload, True))
    assert link.answer_lookup(number) == MISS
    assert not link.connection.connected
    eventually(link.begin, "it is connected again")
    assert link.take_events() in (None, (True, []))
    assert link.take_events() is None
    link.close()


def test_a_long_lookup_that_is_forgotten_or_lost_between_parts_is_over(
    daemon: Any, fast_silence: None, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "_PART_KEYS", 1)
    running = daemon()
    client = running.client()
    with client.reserve(client.register(NAMESPACE), KEYS[1:], [100] * 3) as reservation:
        for position in range(3):
            reservation.write(position, bytes(100))
    link = SchedulerLink(running.url)
    number = eventually(lambda: link.ask_lookup(LEASE, KEYS[1:], 1, 5.0), "it is asked")
    link.forget(number)
    assert link.answer_lookup(number) == MISS
    lost = link.ask_lookup(LEASE, KEYS[1:], 1, 5.0)
    running.stop(signal.SIGKILL)
    # What was answered by then is what it knows.
    assert eventually(lambda: [tiers] if (tiers := link.answer_lookup(lost)) is not None else None)[0] in (
        MISS,
        (("cpu",), ()),
    )
    link.close()


# -- verbs and events ----------


def test_objects_are_pinned_for_a_time_and_moved_down(
    daemon: Any, link_of: Any, eventually: Any, tmp_path: Any
) -> None:
    running = daemon(disk_path=tmp_path / "disk")
    client = running.client()
    with client.reserve(client.register(NAMESPACE), KEYS[1:], [100] * 3) as reservation:
        for position in range(3):
            reservation.write(position, bytes(100))
    client.flush()
    link = link_of(running.url)
    link.pin(KEYS[1:3], 3600.0)
    eventually(lambda: client.operations() and client.operations()[0].objects == 2, "two are pinned")
    assert client.evict(KEYS[1:2], tiers=["cpu"]).skipped == 2  # the third goes, as what depends on it
    client.unpin(KEYS[1:3])
    link.demote(KEYS[1:3], "disk")
    eventually(lambda: client.lookup(KEYS[1:]).tiers == ("disk",) * 3, "they are on disk alone")
    link.close()


def test_more_keys_than_a_message_holds_are_told_in_parts(daemon: Any, link_of: Any, eventually: Any) -> None:
    running = daemon()
    link = link_of(running.url)
    link.pin([KEYS[1]] * 300_000, 5.0)
    link.demote([KEYS[1]] * 300_000, "disk")
    assert eventually(lambda: link.ask_lookup(LEASE, KEYS, 1, 5.0), "the connection is there still")
    link.close()


def test_what_enters_and_leaves_tiers_is_told_until_the_daemon_is_lost(
    daemon: Any, fast_silence: None, eventually: Any
) -> None:
    running = daemon()
    client = running.client()
    link = SchedulerLink(running.url)
    heard: list[tuple[str, str, bytes]] = []

    def listens(what: str, key: bytes) -> bool:
        told = link.take_events()
        assert told is None or not told[0]
        heard.extend(told[1] if told else ())
        return (what, "cpu", key) in heard

    eventually(lambda: link.begin() or link.answering(), "the daemon greets")
    assert link.take_events() is None
    assert running.status()["connections"]  # it has heard the question
    with client.reserve(client.register(NAMESPACE), KEYS[1:2], [100]) as reservation:
        reservation.write(0, bytes(100))
    eventually(lambda: listens("admitted", KEYS[1]), "it is told what was stored")
    client.evict(KEYS[1:2])
    eventually(lambda: listens("evicted", KEYS[1]), "and that it is gone")
    running.stop(signal.SIGKILL)
    lost = eventually(link.take_events, "the loss is told")
    assert lost == (True, [])
    daemon(socket=running.socket)
    eventually(link.begin, "the new daemon greets")
    assert link.take_events() is None
    link.close()


# -- what is said of an outage -----------------------------------------------------------------------------------------


def test_an_outage_is_said_once_and_so_is_its_end(
    daemon: Any, eventually: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_link, "RETRY_S", 0.0)
    caplog.set_level(logging.INFO, "loracache.connectors.vllm.link.scheduler")
    running = daemon()
    link = SchedulerLink(running.url)
    eventually(lambda: link.ask_lookup(LEASE, KEYS, 1, 30.0), "it is connected")
    assert not caplog.messages  # nothing was out
    running.stop(signal.SIGKILL)
    for _ in range(20):
        number = link.ask_lookup(LEASE, KEYS, 1, 30.0)
        if number:
            eventually(lambda: link.answer_lookup(number) is not None)  # noqa: B023
    (gone,) = caplog.messages
    assert "requests are computed without the cache until it is back" in gone
    daemon(socket=running.socket)
    eventually(lambda: link.ask_lookup(LEASE, KEYS, 1, 30.0), "it is connected again")
    assert [message.partition(" after")[0] for message in caplog.messages[1:]] == ["connected to the daemon again"]
    link.close()


def test_what_runs_is_reported_with_the_counts_and_the_hot_adapters_come_back(
    daemon: Any, link_of: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_REPORT_S", 0.05)
    running = daemon()
    link = link_of(running.url)
    link.count("adapter.miss", 2)
    link.report(3, 4, [KEYS[0]])

    def told(name: str) -> Any:
        return running.status()["swapper"][name]

    eventually(lambda: (told("batch"), told("waiting")) == (3, 4), "the daemon hears it")
    assert running.status()["counters"]["client.adapter.miss"] == 2
    assert not link.reports_now() or link.hot_adapters() == []
    eventually(link.reports_now, "the next report is due")
    assert link.hot_adapters() == []  # it is in no tier
    link.report(5, 0, [])
    eventually(lambda: told("waiting") == 0)
    link.close()
    eventually(lambda: told("batch") == 0, "an engine that is gone runs nothing")


def test_counts_wait_for_no_report_of_requests_and_the_last_for_nothing(
    daemon: Any, link_of: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_REPORT_S", 3600.0)
    running = daemon()
    link = link_of(running.url)

    def counted() -> Any:
        return running.status()["counters"].get("client.adapter.hit")

    link.report(1, 0, [])
    link.count("adapter.hit", 1)
    link.flush()
    eventually(lambda: counted() == 1, "the first")
    link.count("adapter.hit", 1)
    link.flush()
    time.sleep(0.2)
    assert counted() == 1
    link.flush(now=True)
    eventually(lambda: counted() == 2, "the last")
    link.close()


def test_a_chain_that_is_announced_in_parts_is_one(daemon: Any, link_of: Any, eventually: Any) -> None:
    running = daemon()
    link = link_of(running.url)
    link.announce([number.to_bytes(32, "big") for number in range(20_000)], 60.0, 5.0)

    def heard() -> bool:
        link.flush()  # a socket does not take so many at once; the rest leaves with the engine's later steps
        return bool(running.status()["swapper"]["returns"] == 1)

    eventually(heard, "the daemon hears it")
    assert running.status()["counters"]["return.announced"] == 1
    link.close()
