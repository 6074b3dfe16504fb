# SPDX-License-Identifier: Apache-2.0
"""One rule for when a lost daemon is tried again, and one voice for what is said of it."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import pytest

from loracache.backoff import Backoff
from loracache.client import link as client_link
from loracache.client.link import Link, Outage, Retry
from loracache.errors import ConfigError, Unavailable

log = logging.getLogger("loracache.test")


def test_pauses_begin_anew_after_a_success() -> None:
    retry = Retry(Backoff(0.25, 2.0))
    assert [retry.tried() for _ in range(2)] == [0.25, 0.5]
    retry.succeeded()
    assert retry.tried() == 0.25


def test_who_waits_in_a_try_spends_a_fifth_of_its_time_so() -> None:
    retry = Retry(Backoff(0.0, 0.0))
    assert retry.due()
    assert retry.tried(spent=2.0) == pytest.approx(10.0)
    assert not retry.due()
    assert retry.tried() == 0.0
    assert retry.due()


def test_an_outage_is_said_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, log.name)
    outage = Outage(log, "it goes on so", "it is back")
    outage.over()
    for number in range(3):
        outage.goes_on(Unavailable(f"gone {number}"))
    outage.over()
    outage.over()
    assert caplog.messages == ["gone 0; it goes on so", "it is back after 0 s"]


@pytest.mark.parametrize("way", ["begin", "ready"])
def test_a_lost_daemon_is_tried_once_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(client_link, "RETRY_S", 60.0)
    tries = 0

    def prepare() -> None:
        nonlocal tries
        tries += 1

    link = Link(f"unix://{tmp_path}/nobody.sock", name="test", log=log, prepare=prepare)
    begin = link.connection.begin

    def counted() -> None:
        prepare()
        begin()

    link.connection.begin = counted if way == "begin" else begin  # type: ignore[method-assign]
    for _ in range(100):
        assert not getattr(link, way)()
    assert tries == 1


def test_a_link_finds_the_daemons_successor_and_tells_of_each_connection(
    daemon: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_link, "RETRY_S", 0.05)
    made: list[str] = []

    class Telling(Link):
        def _made(self) -> None:
            made.append("made")

    running = daemon()
    waiting, looking = (Telling(running.url, name="test", log=log) for _ in range(2))
    assert waiting.ready()
    eventually(looking.begin, "the daemon greets")
    assert waiting.ready()
    assert len(made) == 2
    running.stop(signal.SIGKILL)
    eventually(lambda: not waiting.ready() and not looking.begin(), "both know")
    daemon(socket=running.socket)
    eventually(lambda: waiting.ready() and looking.begin(), "both are back")
    assert len(made) == 4
    waiting.connection.close()
    looking.connection.close()


def test_what_cannot_be_prepared_is_an_outage_and_no_error(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    def prepare() -> None:
        raise ConfigError("the folder cannot be made")

    link = Link(f"unix://{tmp_path}/nobody.sock", name="test", log=log, prepare=prepare)
    assert not link.ready()
    assert "the folder cannot be made" in caplog.text
