# SPDX-License-Identifier: Apache-2.0
"""What a private daemon is told by the connector's configuration and by the engine's environment; no password shows."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from loracache import CacheClient
from loracache.client.connection import socket_path
from loracache.connectors.vllm.common.options import Options
from loracache.connectors.vllm.common.private import ensure_private_daemon, private_server
from loracache.errors import ConfigError

SMALL = Options(memory="16MiB")
pytestmark = pytest.mark.usefixtures("processes")


def test_what_the_daemon_is_stands_in_the_configuration_whatever_the_environment_says(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORACACHE_MEMORY", "9000GiB")
    monkeypatch.setenv("LORACACHE_SOCKET", str(home / "other.sock"))
    monkeypatch.setenv("LORACACHE_DISK_PATH", str(home / "other"))
    monkeypatch.setenv("LORACACHE_OF_A_LATER_RELEASE", "1")
    server = private_server("own")
    ensure_private_daemon(server, SMALL)
    with CacheClient(server) as client:
        tiers: Any = client.status()["tiers"]
        assert tiers["cpu"]["limit_bytes"] == 16 << 20
        assert "disk" not in tiers
    assert not list(home.glob("other*"))


def test_how_it_is_watched_may_stand_in_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("LORACACHE_LOG_FORMAT", "json")
    monkeypatch.setenv("LORACACHE_AUDIT_LOG", "audit")  # of the engine's working directory, not of the daemon's
    server = private_server("watched")
    ensure_private_daemon(server, SMALL)
    with CacheClient(server) as client:
        client.clear()
        log = Path(f"{socket_path(server)}.log").read_text()
    assert all(json.loads(line)["level"] for line in log.splitlines())
    assert json.loads((home / "audit").read_text())["verb"] == "clear"


@pytest.mark.parametrize("where", ["configuration", "environment"])
def test_a_private_daemon_has_rest_where_it_is_asked_for_and_ends_all_the_same(
    home: Path,
    processes: Any,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Any,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    options = SMALL if where == "environment" else replace(SMALL, http="127.0.0.1:0")
    if where == "environment":
        monkeypatch.setenv("LORACACHE_HTTP", "127.0.0.1:0")
    server = private_server("watched")
    with caplog.at_level("INFO"):
        ensure_private_daemon(server, options)
    log = Path(f"{socket_path(server)}.log")
    assert f"listens on {socket_path(server)} and logs to {log}" in caplog.text  # for `loracache top --socket`
    with CacheClient(server):
        port = log.read_text().partition("REST on port ")[2].split()[0]

        def answer() -> Any:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"http://127.0.0.1:{port}/v1/stats")

        assert eventually(answer, "REST answers", 30).status_code == 200  # and is a client of the daemon from now on
    eventually(lambda: not processes(), "the daemon ends with the engine", 30)
    assert not list(Path(socket_path(server)).parent.glob("*"))


def test_an_engine_that_asks_for_another_address_of_rest_is_told(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Options(memory="16MiB", disk_path=str(tmp_path))
    server = private_server("one", first.disk_path)
    ensure_private_daemon(server, first)
    with CacheClient(server):
        ensure_private_daemon(server, replace(first, http="127.0.0.1:9400"))
    assert "runs with http=none, and http=127.0.0.1:9400 is asked for here" in caplog.text


@pytest.mark.parametrize("where", ["environment", "file", "file of the environment"])
def test_a_redis_password_comes_by_file_or_environment_and_is_in_no_process_list_or_log(
    home: Path, redis_server: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    redis = redis_server()
    redis.redis.config_set("requirepass", "hunter2")
    monkeypatch.chdir(home)
    (home / "password").write_text("hunter2\n")
    options = replace(SMALL, redis=f"unix://{redis.socket}")
    if where == "environment":
        monkeypatch.setenv("LORACACHE_REDIS", f"unix://:hunter2@{redis.socket}")
        options = SMALL
    elif where == "file":
        options = replace(options, redis_password_file="password")
    else:
        monkeypatch.setenv("LORACACHE_REDIS_PASSWORD_FILE", "password")
    server = private_server("secret")
    ensure_private_daemon(server, options)
    with CacheClient(server) as client:
        status: Any = client.status()
        assert status["tiers"]["redis"]["available"]
        shown = Path(f"/proc/{status['pid']}/cmdline").read_bytes()
        kept = b"".join(path.read_bytes() for path in Path(socket_path(server)).parent.iterdir() if path.is_file())
    assert b"hunter2" not in shown + kept
    redis.redis.execute_command("AUTH", "hunter2")


def test_engines_that_find_their_redis_in_the_environment_are_told_apart_by_it_too(
    home: Path, tmp_path: Path, redis_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(memory="16MiB", disk_path=str(tmp_path))
    server = private_server("one", options.disk_path)
    monkeypatch.setenv("LORACACHE_REDIS", f"unix://{redis_server().socket}")
    ensure_private_daemon(server, options)
    with CacheClient(server):
        ensure_private_daemon(server, options)
        monkeypatch.setenv("LORACACHE_REDIS", "redis://:hunter2@elsewhere")
        with pytest.raises(ConfigError, match="redis is another one") as caught:
            ensure_private_daemon(server, options)
    assert "hunter2" not in str(caught.value)
