# SPDX-License-Identifier: Apache-2.0
"""What a daemon says of the huge pages it was asked for."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.cli.tables import print_status
from loracache.config import load_config
from loracache.daemon import daemon as daemon_module
from loracache.daemon.daemon import Daemon
from loracache.errors import ConfigError

MIB = 1 << 20


def test_what_was_got_is_said_at_the_start_and_in_the_status(
    daemon: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = daemon(memory="9MiB", hugepages="transparent")
    eventually(lambda: "in huge pages" in running.log(), "it is said")
    status = running.client().status()
    cpu = status["tiers"]["cpu"]
    assert cpu["limit_bytes"] == 8 * MIB
    got = cpu["huge_bytes"]
    assert f"hugepages=transparent: {got >> 20} of 8 MiB lie in huge pages" in running.log()
    monkeypatch.setattr("sys.stdout", shown := io.StringIO())
    print_status(status)
    assert "cpu: 8.0 MiB in huge pages\n" in shown.getvalue() or got < 8 * MIB


def test_nothing_is_said_where_nobody_asked(daemon: Any, eventually: Any) -> None:
    running = daemon(memory="8MiB")
    eventually(lambda: "ready after" in running.log(), "the arena is ready")
    assert "huge_bytes" not in running.client().status()["tiers"]["cpu"]
    assert "huge pages" not in running.log()


@pytest.mark.parametrize(("got", "level"), [(6, "WARNING"), (0, "WARNING"), (8, "INFO")])
def test_fewer_than_asked_for_is_a_warning_with_what_to_look_at(
    monkeypatch: pytest.MonkeyPatch, caplog: Any, got: int, level: str
) -> None:
    caplog.set_level("INFO", logger=daemon_module.__name__)
    arena = SimpleNamespace(size=8 * MIB, huge_bytes=got * MIB, hugepages="transparent", populate=lambda stop: None)
    Daemon._populate(SimpleNamespace(cache=SimpleNamespace(arena=arena), _stopping=threading.Event()))  # type: ignore[arg-type]
    said = caplog.records[-1]
    assert said.levelname == level
    assert f"{got} of 8 MiB lie in huge pages" in said.getMessage()
    assert ("shmem_enabled" in said.getMessage()) is (got < 8)


def test_another_kind_is_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"hugepages='on'.*'transparent' or 'reserved'"):
        load_config({"socket": "/s", "hugepages": "on"})
