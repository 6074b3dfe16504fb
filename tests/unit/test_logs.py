# SPDX-License-Identifier: Apache-2.0
"""Logs as JSON: every line of the daemon and of its REST process is one object with the same keys."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loracache.logs import JsonFormatter


def record(message: str, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    trace = (type(error), error, error.__traceback__) if error is not None else None
    return logging.LogRecord("loracache.x", logging.WARNING, "x.py", 1, message, arguments, trace)


def test_a_record_is_one_line_with_time_level_logger_and_message() -> None:
    line = JsonFormatter().format(record('two\nlines and "%s"', "\u00fc\u2028\udc80"))
    assert "\n" not in line
    assert line.isascii()
    told = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told.pop("time"))
    assert told == {"level": "warning", "logger": "loracache.x", "message": 'two\nlines and "\u00fc\u2028\udc80"'}


def test_an_exception_is_a_string_of_its_record() -> None:
    try:
        raise ValueError("because")
    except ValueError as error:
        line = JsonFormatter().format(record("failed", error=error))
    told = json.loads(line)
    assert told["message"] == "failed"
    assert told["exception"].startswith("Traceback")
    assert told["exception"].endswith("ValueError: because")


def lines_of(running: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in running.log().splitlines()]


def test_every_line_of_daemon_and_rest_process_is_json(daemon: Any, eventually: Any, tmp_path: Path) -> None:
    running = daemon(log_format="json", http="127.0.0.1:0", disk_path=tmp_path / "disk")
    (port,) = [line["message"].split()[-1] for line in lines_of(running) if line["message"].startswith("REST on port")]

    def nonsense_is_told() -> bool:
        with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as caller:
            caller.sendall(b"\x00nonsense\r\n\r\n")
            caller.recv(100)
        return any(line["logger"].startswith("uvicorn") for line in lines_of(running))

    eventually(nonsense_is_told, "the REST process logs")
    assert running.stop() == 0
    lines = lines_of(running)
    assert {"level": "info", "logger": "loracache.daemon.daemon", "message": "ended"}.items() <= lines[-1].items()
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


@pytest.mark.parametrize("where", ["main", "thread"])
def test_what_would_end_as_a_traceback_is_json_too(where: str) -> None:
    code = f"""
import threading, warnings
from loracache.logs import set_up_logging
set_up_logging("warning", "json")
warnings.warn("careful")
def fail(): raise ValueError("because")
thread = threading.Thread(target=fail, name="filler")
thread.start() if {where == "thread"} else fail()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    warned, ended = [json.loads(line) for line in done.stderr.splitlines()]
    assert "careful" in warned["message"]
    assert ended["level"] == "critical"
    assert ended["exception"].endswith("ValueError: because")
    if where == "thread":
        assert ended["message"] == "thread filler ended by"


def test_text_is_the_default(daemon: Any) -> None:
    running = daemon()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} I loracache\.daemon\.daemon: ", running.log())


def test_an_unknown_format_is_refused_by_name(serve_fails: Any) -> None:
    code, said = serve_fails(environment={"LORACACHE_LOG_FORMAT": "xml"})
    assert code == 2
    assert "log_format='xml' (environment)" in said
