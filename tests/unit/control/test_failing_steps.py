# SPDX-License-Identifier: Apache-2.0
"""A step that raises ends its operation as failed: nobody hangs, nothing stays held. No step does the work of many."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.cache.state.events import Events
from loracache.cache.tiered import TieredCache
from loracache.control import service as module
from loracache.control.audit import Audit
from loracache.control.service import Control
from loracache.errors import LoRACacheError
from loracache.keys import Namespace
from loracache.namespaces import Namespaces
from loracache.tiers import Tier
from loracache.wire import control_messages as messages

LARGE = 1 << 20
CPU, DISK, REDIS = Tier.CPU, Tier.DISK, Tier.REDIS
Make = Callable[..., Any]


class Oops(Exception):
    pass


def failing(after: int = 0) -> Callable[..., Any]:
    """Raises from the call behind `after` on."""
    left = after

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Oops("as ordered")
        return None

    return call


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("cache", "acquire"), ("cache", "drop"), ("disk", "queue_write"), ("redis", "enqueue"),
        ("redis.io", "contains"), ("redis.io", "delete"), ("disk", "rewrite"),
    ],
)  # fmt: skip
def test_whatever_raises_in_a_move_it_ends_as_failed_and_holds_nothing(
    operated: Make, part: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = operated(pages=64, disk=LARGE, redis=True)
    made.rig.chain(*range(9))
    made.rig.settle()
    made.rig.evict(*range(9), tiers=[CPU])
    if name == "queue_write":
        made.rig.evict(0, tiers=[DISK])
    owner: Any = made.cache
    for each in part.split("."):
        owner = owner if each == "cache" else getattr(owner, each)
    way = {"enqueue": (DISK, REDIS), "queue_write": (REDIS, DISK), "contains": (DISK, REDIS), "delete": (REDIS, DISK)}
    source, target = (DISK, DISK) if name == "rewrite" else way.get(name, (DISK, CPU))
    if type(owner).__name__ == "WriteBehind" or hasattr(type(owner), "__slots__"):
        monkeypatch.setattr(type(owner), name, failing())
    else:
        monkeypatch.setattr(owner, name, failing())
    planes = (lambda node: 2) if name == "rewrite" else None
    operation = made.begin(range(9), target, source=source, keep=name == "rewrite", planes=planes)
    made.rig.settle()
    made.check(operation)
    assert (operation.state, "Oops" in operation.error) == ("failed", True)


class Served:
    """Control over a Rig, with a loop that never runs: what waits would have to be answered by steps."""

    def __init__(self, rig: Any, namespaces: Namespaces | None = None) -> None:
        self.rig = rig
        self.cache: TieredCache = rig.cache
        self.namespaces = namespaces or Namespaces(None)
        adapters: Any = SimpleNamespace(names=dict, engines={}, show=self.no_adapter, find=self.no_adapter)
        finder: Any = None
        self.control = Control(rig.cache, self.namespaces, adapters, finder, Audit(None), dict)

    async def no_adapter(self, name: str) -> list[Any]:
        return []

    def ask(self, request: Any) -> Any:
        """The answer, or what was raised instead: at once."""
        (end,) = self.rig.start(self.control.serve(request, "test"))
        return end


def selector(rig: Any, *names: object) -> dict[str, Any]:
    return {"keys": b"".join(rig.info(name).key for name in names)}


@pytest.mark.parametrize("verb", ["pin", "evict", "clear"])
def test_other_operations_end_as_failed_too(make_rig: Make, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(pages=64)
    rig.chain(*range(9))
    served = Served(rig)
    monkeypatch.setattr(module, "_PART", 3)
    if verb == "pin":
        monkeypatch.setattr(Events, "add", failing(4))
        request: Any = messages.Pin("", "", selector(rig, *range(9)), "cpu", 0.0, 0.0)
    else:
        monkeypatch.setattr(Events, "changed", failing())
        rig.cache.index.on_change = rig.cache.events.changed
        evict = messages.Evict("", "", selector(rig, *range(9)), ["cpu"], 0.0)
        request = evict if verb == "evict" else messages.Clear("", "", ["cpu"], 0.0)
    (begun,) = served.ask(request)
    rig.settle()
    (shown,) = served.ask(messages.OperationShow("", "", begun["id"], 0.0))
    assert (shown["state"], "Oops" in shown["error"]) == ("failed", True)
    assert served.control.operations.running == 0


def test_a_selector_of_200000_keys_is_worked_through_a_few_hundred_at_a_time(make_rig: Make) -> None:
    rig = make_rig(pages=4, disk=LARGE, redis=True)
    served = Served(rig)
    looked = 0
    get = rig.cache.index.get

    def counting(key: bytes) -> Any:
        nonlocal looked
        looked += 1
        return get(key)

    rig.cache.index.get = counting
    keys = {"keys": b"".join(number.to_bytes(32, "little") for number in range(200_000))}
    scope = Namespace("m", "float32", "l", 16, salt="a" * 64).salt
    for request in (
        messages.Admit("", "", keys, "cpu", 0.0),
        messages.Move("", "", keys, "cpu", "disk", False, 0.0),
        messages.Evict("", scope, keys, ["cpu"], 0.0),
        messages.Pin("", scope, keys, "cpu", 0.0, 0.0),
    ):
        looked = 0
        (begun,) = served.ask(request)
        assert begun["total"] == 200_000
        assert looked <= 2 * module._PART
        for _ in range(5):
            looked = 0
            if rig.posted:
                rig.posted.popleft()()
            else:
                assert any(thread.run_one() for thread in rig.threads())
            assert looked <= 2 * module._PART
        served.ask(messages.Cancel("", "", begun["id"]))
        rig.settle()
    assert served.control.operations.running == 0


def test_a_namespace_that_empties_meanwhile_ends_the_operation(make_rig: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART", 3)
    rig = make_rig(pages=64)
    namespaces = Namespaces(None)
    space = Namespace("model", "float32", "layout", 16)
    namespaces.register(space.descriptor())
    for name in range(9):
        rig.store(name)
    index = rig.cache.index
    index.spaces[space.digest()] = index.spaces[bytes(32)]  # as if they had been stored there
    served = Served(rig, namespaces)
    (begun,) = served.ask(messages.Pin("", "", {"model": "model"}, "cpu", 0.0, 0.0))
    assert (begun["total"], begun["objects"]) == (None, 3)
    rig.evict(*range(9))
    del index.spaces[space.digest()]
    assert len(index) == 3
    rig.settle()
    (shown,) = served.ask(messages.OperationShow("", "", begun["id"], 0.0))
    assert shown["state"] == "done"


def test_a_daemon_that_stops_ends_its_operations(make_rig: Make) -> None:
    rig = make_rig(pages=64, disk=LARGE)
    rig.chain(*range(9))
    served = Served(rig)
    (first,) = served.ask(messages.Move("", "", selector(rig, *range(9)), "cpu", "disk", False, 0.0))
    served.control.stop()
    rig.settle()
    assert served.ask(messages.OperationShow("", "", first["id"], 0.0))[0]["state"] == "cancelled"
    (second,) = served.ask(messages.Move("", "", selector(rig, *range(9)), "cpu", "disk", False, 0.0))
    served.control.close()
    (shown,) = served.ask(messages.OperationShow("", "", second["id"], 0.0))
    assert (shown["state"], shown["error"]) == ("failed", "the daemon ended")
    rig.settle()
    assert rig.cache.audit() == []


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (messages.Compress("", "", {"keys": bytes(32)}, "cpu", 0.0), "compress disk or redis"),
        (messages.Compress("", "", {"keys": bytes(32)}, "redis", 0.0), "not configured here"),
        (messages.Admit("", "", {"keys": bytes(32)}, "gpu", 0.0), "belongs to the engines"),
        (messages.Move("", "", {"keys": bytes(32)}, "cpu", "cpu", False, 0.0), "give two tiers"),
        (messages.Pin("", "", {"keys": bytes(32)}, "redis", 0.0, 0.0), "cannot pin"),
        (messages.Evict("", "", {"keys": bytes(32)}, ["gpu"], 0.0), "belongs to the engines"),
        (messages.Clear("", "a" * 64, ["cpu"], 0.0), "a tenant clears nothing"),
        (messages.Evict("", "", {}, ["cpu"], 0.0), "empty"),
        (messages.Evict("", "", {"model": "nobody's"}, ["cpu"], 0.0), "no engine has registered"),
        (messages.ObjectList("", "", {}, "redis", "", 10), "list cpu or disk"),
        (messages.OperationShow("", "", "x", 0.0), "no operation"),
        (messages.Evict("", "", {"adapter": "nobody's"}, ["cpu"], 0.0), "no adapter has the name"),
    ],
    ids=lambda value: value.operation if hasattr(value, "operation") else "",
)
def test_what_cannot_be_meant_is_refused_with_words(make_rig: Make, request_: Any, said: str) -> None:
    answer = Served(make_rig(disk=LARGE)).ask(request_)
    assert isinstance(answer, LoRACacheError)
    assert said in str(answer)
