# SPDX-License-Identifier: Apache-2.0
"""What a request asks for itself: not to be stored or loaded, to be kept, raised or moved down. What cannot be meant is
said, and never a failure.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams

from loracache.connectors.vllm.common.wishes import Wishes, wishes_of
from loracache.connectors.vllm.scheduler import afterwards

CHUNK = 32
CHUNK_BYTES = 8192
OFF = (0, False)


def hint(kind: str, version: str = "1", **payload: Any) -> SimpleNamespace:
    return SimpleNamespace(action_id="x", action_type=kind, action_version=version, payload=payload)


def brings(params: Any = None, *hints: Any) -> tuple[Wishes, list[str]]:
    envelope = SimpleNamespace(protocol_version="1", message_id="m", actions=list(hints)) if hints else None
    return wishes_of(SimpleNamespace(kv_transfer_params=params, kv_hints=envelope))


@pytest.mark.parametrize(
    ("params", "wishes"),
    [
        (None, Wishes()),
        ({}, Wishes()),
        ({"do_remote_decode": True, "remote_engine_id": "x"}, Wishes()),  # another connector's
        ({"store": False}, Wishes(store=False)),
        ({"store": 384}, Wishes(store=384)),
        ({"load": False, "store": True}, Wishes(load=False)),
        ({"pin": 600}, Wishes(pin=600)),
        ({"keep": 300, "priority": "high"}, Wishes(keep=300, priority="high")),
        ({"pin": 0.5, "remote_host": "x"}, Wishes(pin=0.5)),
        ({"returns_in": 30}, Wishes(returns_in=30)),
        (["store"], Wishes()),  # a release that checks nothing
    ],
)
def test_wishes_stand_in_kv_transfer_params(params: Any, wishes: Wishes) -> None:
    assert brings(params) == (wishes, [])


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"store": "no"}, ["store='no'", "must be true or false"]),
        ({"store": -1}, ["store=-1", "or how many of its tokens, 0 or more"]),
        ({"store": 3.5}, ["store=3.5", "or how many of its tokens"]),
        ({"load": 0}, ["load=0", "must be true or false"]),
        ({"pin": True}, ["pin=True", "must be seconds, more than 0 and at most 3600"]),
        ({"pin": -1}, ["pin=-1", "more than 0"]),
        ({"keep": 0}, ["keep=0", "must be seconds, more than 0 and at most 3600"]),
        ({"priority": "urgent"}, ["priority='urgent'", "must be one of low, normal, high"]),
        ({"priority": ["high"]}, ["priority=['high']", "must be one of"]),
        ({"pin": 1e9}, ["pin=1000000000.0", "at most 3600"]),
        ({"pin": float("nan")}, ["pin=nan"]),
        ({"returns_in": 0}, ["returns_in=0", "must be seconds, more than 0 and at most 3600"]),
        ({"returns_in": "soon"}, ["returns_in='soon'", "must be seconds"]),
        ({"return_in": 30}, ["'return_in' is not known", "did you mean 'returns_in'?"]),
        ({"stores": False}, ["'stores' is not known", "did you mean 'store'?"]),
        ({7: 1, "pinn": 5}, ["'pinn' is not known", "did you mean 'pin'?"]),
    ],
)
def test_a_wrong_value_names_itself_and_the_fix_and_changes_nothing(params: Any, words: list[str]) -> None:
    wishes, [problem] = brings(params)
    assert wishes == Wishes()
    assert all(word in problem for word in words)


def test_a_wrong_value_leaves_the_others_as_they_are() -> None:
    wishes, problems = brings({"pin": "long", "store": False})
    assert (wishes, len(problems)) == (Wishes(store=False), 1)


@pytest.mark.parametrize(
    ("hints", "wishes"),
    [
        ([hint("retain", ttl=60)], Wishes(pin=60)),
        ([hint("pin", "1.2", ttl=1.5)], Wishes(pin=1.5)),
        ([hint("prefetch")], Wishes(prefetch=True)),
        ([hint("prefetch", returns_in=30)], Wishes(returns_in=30)),
        ([hint("prefetch"), hint("prefetch", returns_in=0.5)], Wishes(prefetch=True, returns_in=0.5)),
        ([hint("demote")], Wishes(demote="disk")),
        ([hint("demote", tier="redis"), hint("prefetch", "1")], Wishes(demote="redis", prefetch=True)),
        ([hint("share", "7", what={})], Wishes()),  # somebody else's
    ],
)
def test_hints_become_wishes(hints: list[Any], wishes: Wishes) -> None:
    assert brings(None, *hints) == (wishes, [])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (hint("pin"), ["pin", "ttl=None", "must be seconds"]),
        (hint("retain", ttl="1h"), ["retain", "ttl='1h'"]),
        (hint("demote", tier="gpu"), ["demote", "tier='gpu'", "disk, redis"]),
        (hint("prefetch", "2"), ["prefetch has version '2'", "send version 1"]),
        (hint("prefetch", returns_in=0), ["prefetch: returns_in=0 must be seconds, more than 0"]),
        (hint("prefetch", returns_in="soon"), ["prefetch: returns_in='soon' must be seconds"]),
        (SimpleNamespace(action_type="pin", action_version="1", payload=None), ["ttl=None"]),
    ],
)
def test_a_wrong_hint_names_itself_and_the_fix(bad: Any, words: list[str]) -> None:
    wishes, [problem] = brings({"store": False}, hint("prefetch"), bad)
    assert wishes == Wishes(store=False, prefetch=True)
    assert all(word in problem for word in words)


def test_hints_as_vllm_makes_them_are_understood() -> None:
    kv_hints = pytest.importorskip("vllm.v1.kv_hints", reason="vLLM 0.32 on")
    action = kv_hints.KvHintAction(action_id="a", action_type="retain", action_version="1", payload={"ttl": 5})
    envelope = kv_hints.KvHintsEnvelope(protocol_version="1", message_id="m", actions=[action])
    assert wishes_of(SimpleNamespace(kv_hints=envelope)) == (Wishes(pin=5), [])


# -- in the scheduler --------------------------------------------------------------------------------------------------


@pytest.fixture
def wishing(make_request: Any) -> Any:
    """wishing(name, prompt, params) is a real request with such kv_transfer_params."""

    def make(name: str, prompt: int, params: Any, *hints: Any, **rest: Any) -> Any:
        extra = {"kv_transfer_params": params} if params is not None else None
        request = make_request(name, prompt, sampling_params=SamplingParams(max_tokens=100, extra_args=extra), **rest)
        if hints:
            request.kv_hints = SimpleNamespace(actions=list(hints))
        return request

    return make


def run(driver: Any, request: Any, chunks: int) -> Any:
    """The request computes its chunks; answers the plan that stores them."""
    driver.arrive(request)
    driver.step({request: list(range(2 * chunks))})
    request.num_computed_tokens = chunks * CHUNK
    return driver.step(more={request: []})


def test_a_request_that_is_not_to_be_stored_is_not(driver: Any, wishing: Any) -> None:
    request = wishing("a", 2 * CHUNK, {"store": False})
    assert not run(driver, request, 2).stores
    assert driver.side.finished(request, [[0, 1, 2, 3]]) is False
    assert not driver.step().stores


@pytest.mark.parametrize(("tokens", "chunks"), [(0, 0), (CHUNK - 1, 0), (CHUNK, 1), (2 * CHUNK + 5, 2), (1000, 3)])
def test_of_a_request_no_more_is_stored_than_it_says(driver: Any, wishing: Any, tokens: int, chunks: int) -> None:
    request = wishing("a", 3 * CHUNK, {"store": tokens})
    stores = run(driver, request, 3).stores
    assert [len(store.chunks) for store in stores] == ([chunks] if chunks else [])
    assert driver.side.finished(request, [[0, 1, 2, 3, 4, 5]]) is bool(chunks)
    assert not driver.step().stores


def test_one_that_is_not_to_be_stored_may_be_loaded(driver: Any, wishing: Any) -> None:
    request = wishing("a", 2 * CHUNK, {"store": False})
    driver.hold(request, ["cpu"])
    assert driver.arrive(request) == (CHUNK, True)


def test_a_request_that_is_not_to_be_loaded_asks_nothing_and_is_stored(driver: Any, wishing: Any) -> None:
    request = wishing("a", 2 * CHUNK, {"load": False})
    driver.hold(request, ["cpu", "cpu"])
    assert driver.arrive(request) == OFF
    assert not driver.link.lookups
    driver.step({request: [0, 1, 2, 3]})
    request.num_computed_tokens = 2 * CHUNK
    [store] = driver.step(more={request: []}).stores
    assert len(store.chunks) == 2


def test_what_is_to_be_kept_is_pinned_when_it_is_stored(driver: Any, wishing: Any) -> None:
    request = wishing("a", 2 * CHUNK, {"pin": 60})
    run(driver, request, 2)
    keys = driver.side._chunks.object_keys(driver.side._requests["a"].chunk_keys)
    assert driver.side.finished(request, [[0, 1, 2, 3]]) is True
    driver.step()
    assert not driver.link.pins
    driver.side.storing.done({"a"})
    assert driver.link.pins == [(keys, 60)]
    driver.side.storing.done({"a"})
    assert len(driver.link.pins) == 1


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ({"keep": 300, "priority": "high"}, (300, "high")),
        ({"keep": 300}, (300, "")),
        ({"priority": "low"}, (0.0, "low")),
    ],
)
def test_the_daemon_is_told_what_to_keep_when_it_is_stored(driver: Any, wishing: Any, wish: Any, told: Any) -> None:
    request = wishing("a", 2 * CHUNK, wish)
    run(driver, request, 2)
    keys = driver.side._chunks.object_keys(driver.side._requests["a"].chunk_keys)
    driver.side.finished(request, [[0, 1, 2, 3]])
    driver.step()
    assert not driver.link.keeps
    driver.side.storing.done({"a"})
    assert driver.link.keeps == [(keys, *told)]
    assert not driver.link.pins


def test_what_needed_no_store_is_pinned_at_the_end(driver: Any, wishing: Any) -> None:
    request = wishing("a", CHUNK, {"pin": 60})
    driver.hold(request, ["cpu"])
    driver.arrive(request)
    driver.side.finished(request, [[0, 1]])
    [(keys, _)] = driver.link.pins
    assert len(keys) == 1


def test_requests_pin_a_quarter_of_the_memory_together(
    driver: Any, wishing: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever can send a request can pin: the rest of the memory is everybody's."""
    now = [1000.0]
    monkeypatch.setattr(afterwards, "time", SimpleNamespace(monotonic=lambda: now[0]))
    driver.link.arena_bytes = 4 * 3 * CHUNK_BYTES

    def pin(name: str, chunks: int) -> int:
        request = wishing(name, chunks * CHUNK, {"pin": 60}, seed=ord(name))
        driver.arrive(request)
        driver.side.finished(request, [[]])
        return len(driver.link.pins)

    assert [pin("a", 2), pin("b", 2), pin("c", 1)] == [1, 1, 2]
    assert "ask for fewer or shorter pins" in caplog.text
    assert driver.link.counts["wish.no_room"] == 1
    now[0] += 61
    assert pin("d", 3) == 3
    assert pin("e", 3) == 3
    driver.link.instance = b"the next daemon, which has nothing pinned"
    assert pin("f", 3) == 4


def test_what_is_to_be_demoted_moves_down_when_it_is_stored(driver: Any, wishing: Any) -> None:
    request = wishing("a", 2 * CHUNK, None, hint("demote"))
    run(driver, request, 2)
    driver.side.finished(request, [[0, 1, 2, 3]])
    assert not driver.link.demoted
    driver.side.storing.done({"a"})
    [(keys, tier)] = driver.link.demoted
    assert (len(keys), tier) == (2, "disk")


def test_what_returns_is_announced_when_it_is_stored_beside_its_other_wishes(driver: Any, wishing: Any) -> None:
    request = wishing("a", 2 * CHUNK, {"returns_in": 30}, hint("demote"))
    run(driver, request, 2)
    keys = driver.side._chunks.object_keys(driver.side._requests["a"].chunk_keys)
    driver.side.finished(request, [[0, 1, 2, 3]])
    assert not driver.link.announced
    driver.side.storing.done({"a"})
    assert driver.link.announced == [(keys, 30, afterwards._RETURN_HOLD_S)]
    assert driver.link.demoted == [(keys, "disk")]


def test_what_is_to_be_prefetched_is_raised_before_its_turn(driver: Any, wishing: Any) -> None:
    """An engine that is full asks about nobody who waits."""
    request, plain = wishing("a", 4 * CHUNK, None, hint("prefetch")), wishing("b", 2 * CHUNK, None, seed=3)
    driver.hold(request, ["cpu", "disk", "redis"])
    driver.hold(plain, ["disk", "disk"])
    driver.link.answers = False
    driver.side.on_new_request(request)
    driver.side.on_new_request(plain)
    driver.step()
    assert not driver.link.prefetched
    driver.link.answers = True
    driver.step()
    assert driver.link.prefetched == driver.side._chunks.object_keys(driver.keys(request)[1:3])
    driver.step()
    assert len(driver.link.prefetched) == 2
    assert not driver.side._ahead


def test_a_wrong_wish_is_said_once_counted_and_served_without(
    driver: Any, wishing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for name in "abc":
        request = wishing(name, 2 * CHUNK, {"store": "never"}, seed=ord(name))
        assert len(run(driver, request, 2).stores) == 1
    [said] = [message for message in caplog.messages if "store='never'" in message]
    assert "must be true or false" in said
    assert driver.link.counts["wish.refused"] == 3
