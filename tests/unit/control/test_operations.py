# SPDX-License-Identifier: Apache-2.0
"""Operations: how they end, who may see them, how long they are remembered."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loracache import Namespace
from loracache.control import jobs as module
from loracache.control.jobs import JobTurns, Operation, Operations
from loracache.errors import Unknown
from loracache.results import Cause


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = SimpleNamespace(at=1_000_000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: clock.at))
    return clock


def made() -> tuple[Operations, list[Operation]]:
    ended: list[Operation] = []
    return Operations(ended.append), ended


def test_one_that_ends_says_so_once_to_all_who_wait() -> None:
    async def play() -> None:
        operations, ended = made()
        operation = operations.begin("evict", "me", "")
        first, second, brief = (asyncio.create_task(operation.over(seconds)) for seconds in (60.0, 60.0, 0.01))
        await brief
        assert (operation.running, operations.running, first.done(), second.done()) == (True, 1, False, False)
        operations.end(operation)
        operations.end(operation, "too late")
        await asyncio.wait_for(asyncio.gather(first, second, operation.over(60.0)), 10)
        assert (ended, operation.state, operation.error, operation.waiting) == ([operation], "done", "", [])
        assert (operation.running, operations.running) == (False, 0)

    asyncio.run(play())


def test_one_that_fails_says_why(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        raise ZeroDivisionError("as ordered")

    operations, ended = made()
    operation = operations.begin("evict", "me", "")
    asyncio.run(operations.run(operation, work()))
    assert (operation.state, ended) == ("failed", [operation])
    assert "ZeroDivisionError" in operation.describe()["error"]
    assert "as ordered" in caplog.text


def test_a_cancelled_one_stays_cancelled_and_ends_with_its_last_step() -> None:
    operations, ended = made()
    operation = operations.begin("evict", "me", "")
    assert operations.cancel(operation.id, "") is operation
    assert (operation.state, operation.running, ended) == ("cancelled", False, [])
    operations.cancel(operation.id, "")
    operations.end(operation)
    assert (operation.state, ended) == ("cancelled", [operation])
    done = operations.begin("evict", "me", "")
    operations.end(done)
    assert operations.cancel(done.id, "").state == "done"


def test_a_description_counts_what_was_done_and_what_was_not(now: Any) -> None:
    operations, _ = made()
    operation = operations.begin("move", "me", "")
    operation.objects, operation.nbytes, operation.saved, operation.total = 3, 300, 20, 9
    operation.skip(Cause.ABSENT, 4)
    operation.skip(Cause.HELD)
    operation.skip(Cause.FULL, 0)
    now.at += 2.5
    told = operation.describe()
    assert told == {
        "id": operation.id, "verb": "move", "state": "running", "started": 1_000_000.0, "seconds": 2.5, "total": 9,
        "objects": 3, "bytes": 300, "saved": 20, "skipped": 5, "causes": {"absent": 4, "held": 1}, "error": "",
    }  # fmt: skip
    operations.end(operation)
    now.at += 100
    assert operation.describe()["seconds"] == 2.5


def test_a_tenant_sees_its_own_only() -> None:
    operations, _ = made()
    ours, theirs, free = (operations.begin("evict", "me", scope) for scope in ("a", "b", ""))
    assert operations.get(ours.id, "a") is ours
    for other in (theirs, free):
        for see in (operations.get, operations.cancel):
            with pytest.raises(Unknown, match="no operation"):
                see(other.id, "a")
    assert theirs.running
    assert operations.latest("a", 10) == [ours]
    assert operations.latest("", 2) == [free, theirs]
    with pytest.raises(Unknown, match="remembered for an hour"):
        operations.get("nobody", "")


def test_what_ended_is_remembered_for_an_hour_and_what_runs_for_as_long_as_it_does(now: Any) -> None:
    operations, _ = made()
    old, running = operations.begin("evict", "me", ""), operations.begin("evict", "me", "")
    operations.end(old)
    now.at += 3599
    assert operations.get(old.id, "") is old
    now.at += 2
    assert operations.latest("", 10) == [running]
    with pytest.raises(Unknown):
        operations.get(old.id, "")
    assert operations.get(running.id, "") is running


def test_the_last_thousand_that_ended_are_remembered() -> None:
    operations, _ = made()
    running = operations.begin("evict", "me", "")
    begun = []
    for _ in range(1100):
        begun.append(operations.begin("evict", "me", ""))
        operations.end(begun[-1])
    assert operations.latest("", 5000) == [*begun[:-1001:-1], running]
    with pytest.raises(Unknown):
        operations.get(begun[0].id, "")


def test_few_work_at_once_and_the_others_wait_in_their_order() -> None:
    async def play() -> None:
        operations, turns = Operations(lambda operation: None), JobTurns(2)
        begun: list[str] = []
        left: list[str] = []

        async def work(operation: Operation) -> None:
            (begun if await turns.take(operation) else left).append(operation.verb)

        async def begin(operation: Operation) -> None:
            tasks.append(asyncio.create_task(work(operation)))
            await asyncio.sleep(0)

        async def give_back() -> None:
            turns.give_back()
            await asyncio.sleep(0)

        tasks: list[asyncio.Task[None]] = []
        made = [operations.begin(f"move {number}", "", "") for number in range(5)]
        for operation in made:
            await begin(operation)
        assert begun == ["move 0", "move 1"]
        assert turns.leave(made[3])
        assert not turns.leave(made[3])
        assert not turns.leave(made[0])
        await give_back()
        await give_back()
        assert (begun, left) == (["move 0", "move 1", "move 2", "move 4"], ["move 3"])
        await give_back()
        await give_back()
        await begin(operations.begin("late", "", ""))
        assert begun[-1] == "late"

    asyncio.run(play())


def test_many_moves_at_once_all_come_to_their_end(daemon: Any, short_tmp: Path) -> None:
    client = daemon(memory="1MiB", page_size="4KiB", disk_path=short_tmp / "disk", disk="64MiB").client()
    root = client.register(Namespace("model", "float32", "layout", 16))
    keys = [bytes([number]) * 32 for number in range(100)]
    with client.reserve(root, keys, [4000] * 100) as reservation:
        assert reservation.causes == [""] * 100
    client.flush()
    client.evict(keys, tiers=["cpu"])
    begun = [client.admit(keys, wait=0.0) for _ in range(15)] + [client.compress(keys, wait=0.0) for _ in range(15)]
    cancelled = {client.cancel(begun[number].id).id for number in (20, 25)}
    for report in begun:
        ended = client.operation(report.id, wait=60.0)
        assert ended.state == ("cancelled" if ended.id in cancelled else "done"), ended
    assert client.lookup(keys).hits == 100
    assert client.status()["leases"] == 0
