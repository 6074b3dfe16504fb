# SPDX-License-Identifier: Apache-2.0
"""No fault floods a log: of one kind of line a few are written, and how many more there were."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loracache import logs
from loracache.logs import LimitedHandler
from loracache.storage_backends.base import Outcome


class Lines(logging.Handler):
    """Keeps what it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def target() -> Lines:
    return Lines()


@pytest.fixture
def log(target: Lines) -> Iterator[logging.Logger]:
    """A logger with a limit upon it."""
    logger = logging.getLogger("loracache.limited")
    handler = LimitedHandler(target)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield logger
    logger.removeHandler(handler)
    handler.close()


def test_of_one_kind_five_are_written_and_how_many_more_there_were(
    log: logging.Logger, target: Lines, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    monkeypatch.setattr(logs, "_WINDOW_S", 0.5)
    for number in range(517):
        log.warning("%s is full", number)
    assert target.lines == [f"{number} is full" for number in range(5)]
    eventually(lambda: len(target.lines) == 6, "the count comes, though nothing is logged any more")
    assert target.lines[5] == "516 is full ... and 512 more like it in 1 s"
    log.warning("%s is full", "again")
    assert target.lines[6] == "again is full"


def test_a_later_window_begins_with_the_count_of_the_one_before(
    log: logging.Logger, target: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_WINDOW_S", 0.2)
    monkeypatch.setattr(threading.Timer, "start", lambda self: None)
    for _ in range(8):
        log.warning("full")
    time.sleep(0.25)
    log.warning("full")
    assert target.lines == ["full"] * 5 + ["full ... and 3 more like it in 1 s", "full"]


def test_kinds_are_told_apart_by_logger_level_and_format(log: logging.Logger, target: Lines) -> None:
    for number in range(100):
        log.warning("disk: %d", number)
        log.error("disk: %d", number)
        log.warning("redis: %d", number)
    assert len(target.lines) == 15
    log.error("something else")
    assert target.lines[-1] == "something else"


def test_what_is_left_out_is_said_when_the_process_ends(log: logging.Logger, target: Lines) -> None:
    for _ in range(7):
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("failed")
    assert "".join(target.lines).count("Traceback") == 5
    log.handlers[-1].close()  # as logging does at the end
    assert target.lines[-1] == "failed ... and 2 more like it in 1 s"


def test_the_audit_log_and_what_is_for_debugging_pass_whole(log: logging.Logger, target: Lines) -> None:
    audit = logging.getLogger("loracache.audit")
    audit.addHandler(log.handlers[-1])
    audit.setLevel(logging.INFO)
    try:
        for _ in range(50):
            audit.info("%s", "line")
            log.debug("detail")
    finally:
        audit.removeHandler(log.handlers[-1])
        audit.setLevel(logging.NOTSET)
    assert target.lines.count("line") == target.lines.count("detail") == 50


def test_formats_that_somebody_makes_up_take_no_memory_without_end(log: logging.Logger, target: Lines) -> None:
    for number in range(3000):
        log.warning(f"made up {number}")
    assert len(target.lines) < 600
    assert len(log.handlers[-1]._windows) <= logs._MOST_KINDS + 1  # type: ignore[attr-defined]


def test_a_disk_that_refuses_every_write_is_told_in_a_few_lines(rig_of: Callable[..., Any], target: Lines) -> None:
    """Seen in the field: 52,000 lines in 14 minutes, one a lost write."""
    logger = logging.getLogger("loracache")
    handler = LimitedHandler(target)
    logger.addHandler(handler)
    try:
        rig = rig_of(disk=1 << 20)
        rig.backend("disk").fails["store"] = Outcome.FULL
        for number in range(200):
            rig.store(f"object {number}")
            rig.settle()
        assert 0 < len(target.lines) <= 10
        handler.close()
        assert any(line.startswith("disk: store: full") and "more like it" in line for line in target.lines)
    finally:
        logger.removeHandler(handler)


def test_a_daemons_log_is_limited(daemon: Callable[..., Any], eventually: Callable[..., Any]) -> None:
    running = daemon()
    for _ in range(100):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(running.socket))
            client.sendall(b"\xff" * 64)
            while client.recv(1000):
                pass
    assert running.stop() == 0
    complaints = [line for line in running.log().splitlines() if " W " in line]
    assert len(complaints) == 6
    assert "... and 95 more like it in" in complaints[-1]
