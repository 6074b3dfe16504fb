# SPDX-License-Identifier: Apache-2.0
"""Namespaces of an earlier run are read behind the socket, asked for rightly meanwhile, and forgotten when empty."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loracache import Namespace, Selection
from loracache.cache.swap.demand import Demand
from loracache.daemon.session import Served, Session
from loracache.namespaces import Namespaces
from loracache.wire import protocol


def space(number: int, model: str = "model", adapter: str = "") -> Namespace:
    return Namespace(model, "float32", "layout", 16, salt=f"{number:064x}", adapter=adapter)


def write(folder: Path, spaces: list[Namespace], names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for each in spaces:
        (folder / f"{each.digest().hex()}.json").write_text(f"{each.descriptor()}\n{json.dumps(names)}\n")


def test_the_socket_answers_before_very_many_namespaces_are_read_and_none_is_missed(
    daemon: Any, tmp_path: Path, eventually: Any
) -> None:
    write(tmp_path / "disk" / "namespaces", [space(number) for number in range(6000)], ["served"])
    running = daemon(memory="8MiB", disk_path=tmp_path / "disk")
    client = running.client()
    first: Any = client.status()["namespaces"]
    assert first < 6000
    found = client.locate(Selection(model="served", tokens=range(16), salt=None))  # waits for its name
    assert found.asked in (0, 1)
    assert client.status()["namespaces"] == 6000
    eventually(lambda: client.status()["tiers"]["disk"]["scanned"], "it is scanned")


def test_a_namespace_that_is_not_read_yet_is_found_in_its_file(tmp_path: Path) -> None:
    write(tmp_path, [space(1)], ["served"])
    known = Namespaces(tmp_path, read=False)
    known.reading = True
    assert known.get(space(2).digest()) is None
    assert known.get(space(1).digest()) == space(1)
    again = Namespaces(tmp_path, read=False)
    again.reading = True
    again.register(space(1).descriptor(), ["other"])
    again.keep()
    assert sorted(Namespaces(tmp_path).names("model")) == ["other", "served"]  # what was in the file is not lost


@pytest.mark.parametrize("part", [1, 50])
def test_what_holds_nothing_is_forgotten_after_its_time_and_nothing_else(
    tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loracache.namespaces._FORGOTTEN", part)
    known = Namespaces(tmp_path)
    adapters = [os.urandom(32).hex() for _ in range(2)]
    kept = known.register(space(0, "kept", adapters[0]).descriptor(), ["a"]).digest()
    for number in range(1, 60):
        known.register(space(number, "gone", adapters[number % 2]).descriptor(), ["b"])
    known.keep()
    now = time.monotonic()
    gone: list[str] = []
    for _ in range(200):
        gone += known.collect(lambda digest: digest == kept, 60.0, now + 50.0)
    assert (len(known), gone) == (60, [])
    for _ in range(200):
        gone += known.collect(lambda digest: digest == kept, 60.0, now + 100.0)
    assert (len(known), gone) == (1, [adapters[1]])
    assert [path.stem for path in tmp_path.glob("*.json")] == [kept.hex()]
    assert known.matching("b", None, None) == known.matching("gone", None, None) == []
    assert known.matching("a", None, None) == known.matching("", adapters[0], None) == [kept]
    assert known.adapters() == [adapters[0]]
    known.register(space(3, "gone").descriptor(), ["b"])
    assert len(known.matching("b", None, None)) == 1


def test_namespaces_are_in_use_as_long_as_a_connection_that_registered_them(make_rig: Callable[..., Any]) -> None:
    rig, nothing = make_rig(), SimpleNamespace(engines=Counter(), demand=Demand(time.monotonic))
    used: Any = nothing
    served = Served(rig.cache, Namespaces(None), used, used, used, dict, lambda session: None, lambda: None, used, used)
    transport: Any = SimpleNamespace(write=lambda data: None, get_write_buffer_size=lambda: 0)
    sessions = []
    for owner in (1, 2):
        peer: Any = SimpleNamespace(pid=owner, uid=1)
        sessions.append(Session(served, owner, peer))
        sessions[-1].connection_made(transport)
        for _ in range(2):
            register = protocol.Register(space(1).descriptor(), []).encode(1)
            rig.loop.within(lambda register=register: sessions[-1].data_received(register))
            rig.answer()  # what did not end in its turn
    assert served.registered == {space(1).digest(): 2}
    sessions[0].connection_lost(None)
    assert served.registered == {space(1).digest(): 1}
    sessions[1].connection_lost(None)
    assert served.registered == {}
