# SPDX-License-Identifier: Apache-2.0
"""The daemon of an engine that names none: started once, ended with its last client."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace
from loracache.client.connection import socket_path
from loracache.connectors.vllm.common import private
from loracache.connectors.vllm.common.options import Options
from loracache.connectors.vllm.common.private import ensure_private_daemon, private_server
from loracache.connectors.vllm.link.worker import WorkerLink
from loracache.errors import ConfigError

SMALL = Options(memory="16MiB")
pytestmark = pytest.mark.usefixtures("processes")


def store(client: CacheClient, count: int) -> list[bytes]:
    namespace = Namespace("model", "float32", "layout", 16)
    keys = [os.urandom(32) for _ in range(count)]
    with client.reserve(client.register(namespace), keys, [5000] * count) as reservation:
        for number in range(count):
            reservation.write(number, os.urandom(5000))
    return keys


def test_the_address_is_the_engines_and_fits_a_socket(home: Path) -> None:
    one, two = private_server("engine/1 ü" + "x" * 200 + "-a"), private_server("engine/1 ü" + "x" * 200 + "-b")
    assert one != two
    assert private_server("same") == private_server("same")
    for server in (one, two):
        assert len(os.fsencode(socket_path(server))) <= 107


def test_where_the_runtime_folder_is_too_deep_the_address_is_in_the_temporary_one(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = short_tmp / ("x" * 100)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_tmp))
    monkeypatch.setattr(tempfile, "tempdir", str(short_tmp / "tmp"))
    assert socket_path(private_server("e")) == f"{short_tmp}/loracache-{os.getuid()}/e.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    assert socket_path(private_server("e")) == f"{short_tmp}/tmp/loracache-{os.getuid()}/e.sock"
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(ConfigError, match=rf"TMPDIR='{deep}' is too long .* set XDG_RUNTIME_DIR to a shorter one"):
        private_server("e")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(ConfigError, match="set XDG_RUNTIME_DIR"):
        private_server("e")


def test_engines_that_name_one_folder_have_one_address_and_others_their_own(home: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "deep" / "cache", tmp_path / "other"
    address = private_server("one", str(folder))
    (tmp_path / "link").symlink_to(folder)
    assert private_server("two_dp1", str(tmp_path / "link")) == address
    assert private_server("three", os.path.relpath(folder)) == address
    assert private_server("one", str(other)) != address
    assert private_server("one") not in (address, private_server("two"))
    other.joinpath("file").write_text("")
    assert private_server("one", str(other / "file" / "below")) == private_server("two", str(other / "file" / "below"))


def test_data_parallel_ranks_and_the_front_end_have_one_address(home: Path) -> None:
    """vLLM adds the rank to the id where the engine runs, and not in the front end."""
    assert {private_server(f"e{suffix}") for suffix in ("", "_dp0", "_dp11", "_dp1_dp1")} == {private_server("e")}
    assert private_server("e_dp") != private_server("e")


def test_engines_that_start_at_once_on_one_folder_share_its_daemon(home: Path, processes: Any, tmp_path: Path) -> None:
    options = Options(memory="16MiB", disk_path=str(tmp_path / "disk"), disk="64MiB")
    clients: list[CacheClient] = []

    def start(rank: int) -> None:
        server = private_server(f"engine_dp{rank}", options.disk_path)
        ensure_private_daemon(server, options)
        clients.append(CacheClient(server))

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clients) == 4
    (pid,) = {int(str(client.status()["pid"])) for client in clients}
    assert processes() == [pid]
    for client in clients:
        client.close()


def test_an_engine_that_starts_while_the_daemon_before_it_ends_waits_for_it(
    home: Path, processes: Any, tmp_path: Path, redis_server: Any, eventually: Any
) -> None:
    redis = redis_server()
    options = Options(memory="16MiB", disk_path=str(tmp_path / "disk"), redis=f"unix://{redis.socket}")
    server = private_server("one", options.disk_path)
    ensure_private_daemon(server, options)
    with CacheClient(server) as client:
        before = client.status()["pid"]
        redis.send(signal.SIGSTOP)  # what is queued for it makes the end take its time
        keys = list(store(client, 20))
    stopped = Path(socket_path(server))
    eventually(lambda: not private._bound(stopped), "the daemon takes no more clients", 10)
    assert processes() == [before]
    redis.send(signal.SIGCONT)
    ensure_private_daemon(server, options)
    with CacheClient(server) as client:
        assert client.status()["pid"] != before
        eventually(lambda: client.lookup(keys).hits == 20, "what it saved is found")
    eventually(lambda: not processes(), "the next daemon ends", 30)
    assert not list(stopped.parent.glob("*"))


def test_the_sizes_of_the_first_engine_hold_and_the_second_is_told(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Options(memory="16MiB", disk_path=str(tmp_path), disk="1GiB")
    server = private_server("one", first.disk_path)
    ensure_private_daemon(server, first)
    with CacheClient(server):
        ensure_private_daemon(server, replace(first, memory="16384KiB", disk="1024MiB"))
        assert not caplog.records
        ensure_private_daemon(server, replace(first, memory="32MiB"))
        assert "runs with memory=16MiB, and memory=32MiB is asked for here" in caplog.text


def test_an_engine_with_another_redis_is_not_given_to_the_folders_daemon(
    home: Path, tmp_path: Path, redis_server: Any
) -> None:
    first = Options(memory="16MiB", disk_path=str(tmp_path), redis=f"unix://{redis_server().socket}")
    server = private_server("one", first.disk_path)
    ensure_private_daemon(server, first)
    with CacheClient(server):
        ensure_private_daemon(server, replace(first, redis=first.redis.replace("://", "://:changed-password@")))
        with pytest.raises(ConfigError, match=r"redis is another one .* or this one another disk_path") as caught:
            ensure_private_daemon(server, replace(first, redis="redis://:hunter2@elsewhere"))
    assert "hunter2" not in str(caught.value)


def test_a_folder_of_a_daemon_that_was_started_by_hand_is_refused_with_its_address(
    home: Path, processes: Any, tmp_path: Path, daemon: Any
) -> None:
    serving = daemon(disk_path=tmp_path / "disk")
    began = time.monotonic()
    with pytest.raises(
        ConfigError, match=rf"in use by the LoRACache daemon at {serving.url}; give server='{serving.url}'"
    ):
        ensure_private_daemon(
            private_server("one", str(tmp_path / "disk")), Options(memory="16MiB", disk_path=str(tmp_path / "disk"))
        )
    assert time.monotonic() - began < 20  # of the 40 that a start may take
    assert processes() == [serving.process.pid]


def test_an_engine_starts_while_its_redis_is_down(home: Path) -> None:
    server = private_server("engine")
    ensure_private_daemon(server, Options(memory="16MiB", redis=f"unix://{home}/nothing.sock"))
    with CacheClient(server) as client:
        keys = store(client, 3)
        assert client.lookup(keys).hits == 3


def test_many_at_once_start_one_daemon_that_ends_with_its_last_client(
    home: Path, processes: Any, eventually: Any
) -> None:
    server = private_server("shared")
    clients: list[CacheClient] = []

    def start() -> None:
        ensure_private_daemon(server, SMALL)
        clients.append(CacheClient(server))

    threads = [threading.Thread(target=start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    program = (
        "import sys, loracache; c = loracache.CacheClient(sys.argv[1]); print(flush=True); sys.stdin.read(); c.close()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, server], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline()
    (pid,) = {int(str(client.status()["pid"])) for client in clients}
    assert len(clients) == 5
    assert processes() == [pid]
    for client in clients:
        client.close()
    time.sleep(0.1)
    assert processes() == [pid]  # the other process is there still
    other.communicate("")
    eventually(lambda: not processes(), "the daemon ends")
    ensure_private_daemon(server, SMALL)  # and may be started again
    with CacheClient(server) as client:
        assert client.status()["pid"] != pid


def test_asking_whether_it_runs_does_not_end_it(home: Path, processes: Any) -> None:
    server = private_server("asked")
    ensure_private_daemon(server, SMALL)
    for _ in range(300):
        ensure_private_daemon(server, SMALL)
    assert len(processes()) == 1
    with CacheClient(server) as client:
        assert client.status()["connections"] == 1


def test_who_connects_and_never_says_who_it_is_keeps_no_daemon_alive(
    home: Path, processes: Any, eventually: Any
) -> None:
    server = private_server("silent")
    ensure_private_daemon(server, SMALL)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(socket_path(server))
        with CacheClient(server) as client:
            eventually(lambda: client.status()["connections"] == 2, "both are there")
        eventually(lambda: not processes(), "the daemon ends")


def test_the_end_of_one_who_never_said_who_it_was_ends_no_daemon_that_has_a_client(
    home: Path, processes: Any, eventually: Any
) -> None:
    server = private_server("kept")
    ensure_private_daemon(server, SMALL)
    with CacheClient(server) as client:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(socket_path(server))
            eventually(lambda: client.status()["connections"] == 2, "both are there")
        eventually(lambda: client.status()["connections"] == 1, "the silent one has left")
        uptime: Any = client.status()["uptime_s"]
        eventually(lambda: float(str(client.status()["uptime_s"])) > uptime + 1.5, "longer than a daemon lingers")
        assert len(processes()) == 1


def test_a_daemon_that_logs_nothing_is_found_ready(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = private._DETACH.replace("sys.argv[1:])", "[*sys.argv[1:], '--log-level', 'error'])")
    assert quiet != private._DETACH
    monkeypatch.setattr(private, "_DETACH", quiet)
    server = private_server("quiet")
    ensure_private_daemon(server, SMALL)
    with CacheClient(server) as client:
        assert client.lookup([]).hits == 0
    assert Path(f"{socket_path(server)}.log").read_text() == ""


def test_a_stale_socket_file_is_no_daemon(home: Path, eventually: Any) -> None:
    server = private_server("stale")
    ensure_private_daemon(server, SMALL)
    with CacheClient(server) as client:
        pid = int(str(client.status()["pid"]))
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{pid}").exists(), "the engine reaps it")
    assert Path(socket_path(server)).exists()
    ensure_private_daemon(server, SMALL)
    with CacheClient(server) as client:
        assert client.status()["pid"] != pid


def test_what_the_daemon_said_is_what_the_engine_says(home: Path, processes: Any) -> None:
    with pytest.raises(ConfigError, match=r"did not start.*memory"):
        ensure_private_daemon(private_server("tiny"), Options(memory="64KiB"))
    with pytest.raises(ConfigError, match=r"did not start.*redis"):
        ensure_private_daemon(private_server("broken"), Options(memory="16MiB", redis="nonsense://host"))
    assert not processes()


@pytest.mark.parametrize("full", ["write_text", "open", "mkdir"])
def test_a_runtime_folder_that_takes_no_files_is_said_as_what_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    server = private_server("engine")
    link = WorkerLink(server, "test", lambda: ensure_private_daemon(server, SMALL), "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(Path, full, refuse)
        with pytest.raises(ConfigError, match=r"engine.sock cannot be started: .*No space left.*XDG_RUNTIME_DIR"):
            ensure_private_daemon(server, SMALL)
        assert not link.ready()  # an engine that runs goes on without


def test_a_folder_of_somebody_else_is_not_trusted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = private_server("engine")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        ensure_private_daemon(server, SMALL)
