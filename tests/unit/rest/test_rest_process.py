# SPDX-License-Identifier: Apache-2.0
"""The process behind the port: it comes back, and goes with its daemon. The daemon goes on without it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from loracache.config import Config
from loracache.daemon import rest_process


def process_of(running: Any) -> int:
    """Its process id."""
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
    (found,) = [int(pid) for pid in children if b"loracache.rest" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_killed_process_is_started_again_on_its_port(daemon: Any, rest_is_up: Any, eventually: Any) -> None:
    running = daemon(http="127.0.0.1:0")
    eventually(lambda: rest_is_up(running))
    pid, client = process_of(running), running.client()
    os.kill(pid, signal.SIGKILL)
    assert client.status()["tiers"]
    eventually(lambda: rest_is_up(running) and process_of(running) != pid, "it is started again", 30)
    assert "the REST process ended with -9 and is started again" in running.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_daemon(daemon: Any, rest_is_up: Any, eventually: Any, number: int) -> None:
    running = daemon(http="127.0.0.1:0")
    eventually(lambda: rest_is_up(running))
    pid = process_of(running)
    running.stop(number)
    eventually(lambda: is_gone(pid))
    with socket.socket() as free:
        free.bind(("127.0.0.1", int(running.http.rpartition(":")[2])))


def test_the_next_daemon_waits_for_the_port_of_a_killed_one(daemon: Any, rest_is_up: Any, eventually: Any) -> None:
    running = daemon(http="127.0.0.1:0")
    eventually(lambda: rest_is_up(running))
    address, pid = running.http.removeprefix("http://"), process_of(running)
    os.kill(pid, signal.SIGSTOP)  # it takes its time to notice
    running.stop(signal.SIGKILL)
    threading.Timer(1.5, os.kill, (pid, signal.SIGCONT)).start()
    again = daemon(http=address)
    eventually(lambda: rest_is_up(again))


def test_a_silent_daemon_is_not_ready_and_no_request_hangs(daemon: Any, rest_is_up: Any, eventually: Any) -> None:
    running = daemon(http="127.0.0.1:0")
    eventually(lambda: rest_is_up(running))
    running.send(signal.SIGSTOP)
    answer = httpx.get(f"{running.http}/readyz", timeout=10)
    assert (answer.status_code, answer.json()["status"]) == (503, 503)
    assert answer.headers["retry-after"] == "1"
    assert httpx.get(f"{running.http}/healthz").status_code == 200
    running.send(signal.SIGCONT)
    eventually(lambda: rest_is_up(running))


def test_what_lies_in_the_daemons_folder_is_not_run(
    daemon: Any, rest_is_up: Any, eventually: Any, short_tmp: Path
) -> None:
    (short_tmp / "uvicorn.py").write_text("raise SystemExit('not ours')")
    running = daemon(http="127.0.0.1:0")  # which it starts in
    eventually(lambda: rest_is_up(running), "REST answers")
    assert "not ours" not in running.log()


def test_its_environment_holds_no_setting_of_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setenv("LORACACHE_INTEGRITY_KEY", "hunter2")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **options: started.append(options))
    process = rest_process.RestProcess(Config(socket=tmp_path / "lc.sock", http="127.0.0.1:0"))
    process.start()
    process._process = None
    process.close()
    assert not [name for name in started[0]["env"] if name.startswith("LORACACHE_")]
    assert "PATH" in started[0]["env"]


@pytest.mark.parametrize(
    ("http", "said"),
    [
        ("9400", "'9400' is not a HOST:PORT; write it like 127.0.0.1:9400"),
        ("127.0.0.1:http", "is not a HOST:PORT"),
        ("127.0.0.1:70000", "is not a HOST:PORT"),
        ("::1:9400", "is not a HOST:PORT; write it like 127.0.0.1:9400 or [::1]:9400"),
        ("[::1::2]:9400", "[::1::2]:9400"),
        ("a/b:9400", "is not a HOST:PORT"),
    ],
)
def test_a_port_that_cannot_be_is_refused_at_the_start(serve_fails: Any, http: str, said: str) -> None:
    code, message = serve_fails(http=http)
    assert (code, "Traceback" in message) == (2, False)
    assert said in message


def test_a_port_that_is_taken_is_refused_at_the_start(serve_fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_process, "_PORT_PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, message = serve_fails(http=f"127.0.0.1:{taken.getsockname()[1]}")
    assert code == 2
    assert "cannot be listened on: Address already in use; give another port" in message


def test_a_daemon_without_a_port_has_no_such_process(daemon: Any) -> None:
    running = daemon()
    assert "REST" not in running.log()
    assert not Path(f"{running.socket}.token").exists()
