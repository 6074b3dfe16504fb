# SPDX-License-Identifier: Apache-2.0
"""SIGTERM ends a daemon in bounded time whatever hangs; and one without descriptors says so to whoever comes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from loracache import CacheClient, Namespace
from loracache.client.connection import Connection
from loracache.errors import ProtocolError, Unavailable
from tests.unit.rest.conftest import up

_END_S = 8.0
_SLACK_S = 12.0  # of a machine whose cores are busy


def store(client: CacheClient, count: int) -> None:
    root = client.register(Namespace("model", "float32", "layout", 16))
    keys = [os.urandom(32) for _ in range(count)]
    with client.reserve(root, keys, [1000] * count, parents=[b""] * count) as reservation:
        for position in range(count):
            reservation.write(position, bytes(1000))


def end(running: Any) -> float:
    """Seconds from SIGTERM to the end of the process."""
    began = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(60)
    return time.monotonic() - began


def greeted(path: Path) -> Connection:
    """A connection to a daemon that is about to take one."""
    deadline = time.monotonic() + 30
    while True:
        connection = Connection(f"unix://{path}", name="patient")
        try:
            connection.connect()
            return connection
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_a_redis_that_does_not_answer_does_not_keep_it(daemon: Any, redis_server: Any) -> None:
    redis = redis_server()
    running = daemon(memory="8MiB", redis=redis.url)
    client = running.client()
    redis.send(signal.SIGSTOP)
    try:
        store(client, 50)
        assert end(running) < _END_S + _SLACK_S
    finally:
        redis.send(signal.SIGCONT)


def test_event_streams_and_a_client_that_reads_nothing_do_not_keep_it(daemon: Any, eventually: Any) -> None:
    running = daemon(memory="8MiB", http="127.0.0.1:0")
    eventually(lambda: up(running), "REST answers")
    stopped = subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys; from loracache.client.connection import Connection; from loracache.wire import protocol\n"
            "c = Connection(sys.argv[1], name='stopped'); c.connect()\n"
            "[c.send(protocol.Status()) for _ in range(2000)]; print(flush=True); sys.stdin.read()", running.url,
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with httpx.Client() as browser, browser.stream("GET", f"{running.http}/v1/events") as stream, stopped:
        assert stream.status_code == 200
        assert stopped.stdout is not None
        stopped.stdout.readline()
        stopped.send_signal(signal.SIGSTOP)
        took = end(running)
        stopped.send_signal(signal.SIGKILL)
    assert took < _END_S + _SLACK_S


def test_what_hangs_is_named_and_the_process_ends(short_tmp: Path) -> None:
    """A step of the end that never comes back: a tier whose backend cannot be closed."""
    script = short_tmp / "hangs.py"
    script.write_text(
        "import sys, time\n"
        "from loracache.storage_backends.disk.backend import DiskBackend\n"
        "DiskBackend.close = lambda self: time.sleep(1000)\n"
        "from loracache.cli.app import main\n"
        "sys.argv = ['loracache', *sys.argv[1:]]\n"
        "main()\n"
    )
    path = short_tmp / "s"
    command = [sys.executable, str(script), "serve", "--socket", str(path), "--memory", "8MiB"]
    command += ["--disk-path", str(short_tmp / "disk"), "--drain", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        greeted(path).close()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert time.monotonic() - began < 4 + _SLACK_S
    assert process.returncode == 1
    assert "tier disk hangs and is given up" in said
    assert not path.exists()


def test_the_soft_limit_of_descriptors_is_raised_and_whoever_is_too_many_is_told_why(short_tmp: Path) -> None:
    path = short_tmp / "s"
    serve = [sys.executable, "-m", "loracache", "serve", "--socket", str(path), "--memory", "8MiB"]
    bound = ["sh", "-c", 'ulimit -Sn 100 && ulimit -Hn 136 && exec "$@"', "sh"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    with subprocess.Popen([*bound, *serve], stderr=subprocess.PIPE, text=True, env=environment) as process:
        connections = []
        try:
            connections.append(greeted(path))
            for _ in range(19):  # (136 - 96) / 2
                connections.append(Connection(f"unix://{path}", name="one"))
                connections[-1].connect()
            for _ in range(3):
                with pytest.raises(Unavailable, match=r"20 clients are connected.*raise its limit"):
                    Connection(f"unix://{path}", name="one too many").connect()
            connections.pop().close()
            connections.append(greeted(path))
        finally:
            for each in connections:
                each.close()
            process.terminate()
            _, said = process.communicate(timeout=30)
    assert said.count("a client was refused") == 1  # and not once for each


def test_a_refusal_is_no_greeting_of_something_else(short_tmp: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_tmp / "s"))
        listener.listen()
        connection = Connection(f"unix://{short_tmp / 's'}", name="x")
        connection.begin()
        taken, _ = listener.accept()
        taken.close()
        with pytest.raises((ProtocolError, Unavailable), match="closed the connection or sent no arena"):
            connection.greeted(5.0)
