"""The daemon of an engine that names none: started once, ended with its last client."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient
from loracache.connection import socket_path
from loracache.connectors.vllm import private
from loracache.connectors.vllm.options import Options
from loracache.connectors.vllm.private import ensure_private_daemon, private_server
from loracache.errors import ConfigError

SMALL = Options(memory="16MiB")


@pytest.fixture
def home(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where private daemons live; whatever still runs there at the end is killed."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_tmp))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, filter(None, sys.path))))
    yield short_tmp
    for pid in processes(short_tmp):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes(home: Path) -> list[int]:
    """Daemons whose socket lies in `home`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            zombie = " Z " in (folder / "stat").read_text()
            if b"serve" in arguments and any(each.startswith(bytes(home)) for each in arguments) and not zombie:
                found.append(int(folder.name))
    return found


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


def test_many_at_once_start_one_daemon_that_ends_with_its_last_client(home: Path, eventually: Any) -> None:
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
    assert processes(home) == [pid]
    for client in clients:
        client.close()
    time.sleep(0.1)
    assert processes(home) == [pid]  # the other process is there still
    other.communicate("")
    eventually(lambda: not processes(home), "the daemon ends")
    ensure_private_daemon(server, SMALL)  # and may be started again
    with CacheClient(server) as client:
        assert client.status()["pid"] != pid


def test_asking_whether_it_runs_does_not_end_it(home: Path) -> None:
    server = private_server("asked")
    ensure_private_daemon(server, SMALL)
    for _ in range(300):
        ensure_private_daemon(server, SMALL)
    assert len(processes(home)) == 1
    with CacheClient(server) as client:
        assert client.status()["connections"] == 1


def test_who_connects_and_never_says_who_it_is_keeps_no_daemon_alive(home: Path, eventually: Any) -> None:
    server = private_server("silent")
    ensure_private_daemon(server, SMALL)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(socket_path(server))
        with CacheClient(server) as client:
            eventually(lambda: client.status()["connections"] == 2, "both are there")
        eventually(lambda: not processes(home), "the daemon ends")


def test_the_end_of_one_who_never_said_who_it_was_ends_no_daemon_that_has_a_client(home: Path, eventually: Any) -> None:
    server = private_server("kept")
    ensure_private_daemon(server, SMALL)
    with CacheClient(server) as client:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(socket_path(server))
            eventually(lambda: client.status()["connections"] == 2, "both are there")
        eventually(lambda: client.status()["connections"] == 1, "the silent one has left")
        uptime: Any = client.status()["uptime_s"]
        eventually(lambda: float(str(client.status()["uptime_s"])) > uptime + 1.5, "longer than a daemon lingers")
        assert len(processes(home)) == 1


def test_a_daemon_that_logs_nothing_is_found_ready(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = private._DETACH.replace("sys.argv[1:])", "[*sys.argv[1:], '--log-level', 'error'])")
    assert quiet != private._DETACH
    monkeypatch.setattr(private, "_DETACH", quiet)
    server = private_server("quiet")
    ensure_private_daemon(server, SMALL)
    with CacheClient(server) as client:
        assert client.lookup([]).hits == 0
    assert Path(f"{socket_path(server)}.log").read_text() == ""


def test_settings_of_the_engines_environment_are_not_its_daemons(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORACACHE_LOG_LEVEL", "nonsense")
    monkeypatch.setenv("LORACACHE_MEMORY", "9000GiB")
    server = private_server("own")
    ensure_private_daemon(server, SMALL)
    with CacheClient(server) as client:
        tiers: Any = client.status()["tiers"]
        assert tiers["cpu"]["limit_bytes"] == 16 << 20


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


def test_what_the_daemon_said_is_what_the_engine_says(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"did not start.*memory"):
        ensure_private_daemon(private_server("tiny"), Options(memory="64KiB"))
    with pytest.raises(ConfigError, match=r"did not start.*redis"):
        ensure_private_daemon(private_server("broken"), Options(memory="16MiB", redis="nonsense://host"))
    assert not processes(home)


def test_a_folder_of_somebody_else_is_not_trusted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = private_server("engine")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        ensure_private_daemon(server, SMALL)


def test_a_redis_password_is_not_in_the_process_list(home: Path, redis_server: Any) -> None:
    redis = redis_server()
    redis.redis.config_set("requirepass", "hunter2")
    server = private_server("secret")
    url = f"unix://:hunter2@{redis.socket}"
    ensure_private_daemon(server, Options(memory="16MiB", redis=url))
    with CacheClient(server) as client:
        status: Any = client.status()
        assert "redis" in status["tiers"]
        shown = Path(f"/proc/{status['pid']}/cmdline").read_bytes()
    assert b"hunter2" not in shown
    assert b"hunter2" not in Path(f"{socket_path(server)}.log").read_bytes()
    redis.redis.execute_command("AUTH", "hunter2")
