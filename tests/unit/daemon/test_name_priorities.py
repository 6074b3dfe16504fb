# SPDX-License-Identifier: Apache-2.0
"""Priorities of adapters' names, at running daemons: what they do to KV, and that they are kept with the names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loracache.adapters.names import NameRecord
from loracache.errors import UsageError
from tests.unit.daemon.test_daemon_adapter_names import peft, store_kv


def test_a_names_priority_outlives_a_restart_and_a_new_content(daemon: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    first = daemon(memory="4MiB", disk_path=disk)
    client = first.client()
    one, other = peft(tmp_path / "one", 1), peft(tmp_path / "other", 2)
    client.add_adapter(one, "first", priority="high")
    client.add_adapter(one, "plain")
    assert client.prioritize_adapter("plain", "low")
    assert not client.prioritize_adapter("nobody", "low")
    with pytest.raises(UsageError, match="path='' names no folder"):
        client.add_adapter("", "plain", priority="high")
    before = {adapter.name: adapter for adapter in client.adapters()}
    assert {name: adapter.priority for name, adapter in before.items()} == {"first": "high", "plain": "low"}
    client.add_adapter(other, "first")
    first.stop()
    client = daemon(memory="4MiB", disk_path=disk).client()
    after = {adapter.name: adapter for adapter in client.adapters()}
    assert {name: adapter.priority for name, adapter in after.items()} == {"first": "high", "plain": "low"}
    assert after["first"].digest != before["first"].digest
    assert after["plain"].added == before["plain"].added
    client.remove_adapter("first")
    client.add_adapter(one, "first")
    shown = client.show_adapter("first")
    assert shown is not None
    assert shown.priority == "normal"
    with pytest.raises(UsageError, match="priority='highest': give one of low, normal, high"):
        client.prioritize_adapter("first", "highest")


@pytest.mark.parametrize("restarted", [False, True])
def test_kv_of_a_name_of_high_priority_outlasts_others(daemon: Any, tmp_path: Path, restarted: bool) -> None:
    """The KV of two adapters, of which one is called high by one of its names, under a flood of a third's."""
    disk = tmp_path / "disk"
    running = daemon(memory="2MiB", page_size="4KiB", disk_path=disk, disk="64MiB")
    client = running.client()
    high, plain, flood = (client.add_adapter(peft(tmp_path / name, seed), name) for seed, name in enumerate("hpf"))
    client.add_adapter(str(tmp_path / "h"), "low", priority="low")
    client.add_adapter(str(tmp_path / "h"), "high", priority="high")
    if restarted:
        client.flush()
        running.stop()
        client = daemon(memory="2MiB", page_size="4KiB", disk_path=disk, disk="64MiB").client()
    precious, others = store_kv(client, high, 20), store_kv(client, plain, 20)
    for _ in range(20):
        store_kv(client, flood, 50)
        client.flush()  # what waits to be written goes for nobody
    assert set(client.lookup(precious).tiers) == {"cpu"}
    assert "cpu" not in client.lookup(others).tiers


def test_records_without_a_priority_are_read_and_written_as_before() -> None:
    plain = NameRecord("a", "ab" * 32, "{}", 1.5, 7)
    body = '{"added": 1.5, "config": "{}", "digest": "%s", "name": "a", "version": 7}' % ("ab" * 32)
    assert plain.encode(None) == json.dumps([body, ""]).encode()
    assert NameRecord.decode(json.dumps([body, ""]).encode(), None) == plain
    high = replace(plain, priority="high")
    assert NameRecord.decode(high.encode(b"key"), b"key") == high
    with pytest.raises(ValueError, match="its priority is highest"):
        NameRecord.decode(replace(plain, priority="highest").encode(None), None)
