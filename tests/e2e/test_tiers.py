# SPDX-License-Identifier: Apache-2.0
"""A real vLLM finds in every tier the KV it computed before, and the same tokens come out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.keys import Namespace, salt_digest

CHUNK = 128


@pytest.fixture(scope="module")
def serving(
    module_daemon: Any, module_redis: Any, engine_factory: Any, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """One engine on one daemon with a disk and a Redis."""
    disk = tmp_path_factory.mktemp("disk")
    redis = module_redis()
    patient = tmp_path_factory.mktemp("config") / "loracache.yaml"
    patient.write_text("redis_lookup_ms: 1000\n")  # a loaded machine answers late, and the tests want the hit
    daemon = module_daemon(memory="256MiB", disk_path=disk, disk="1GiB", redis=redis.url, config=patient)
    engine = engine_factory({"server": daemon.url})
    return SimpleNamespace(engine=engine, daemon=daemon, disk=disk, redis=redis)


def clear(serving: Any, *tiers: str) -> None:
    serving.engine.settle(serving.daemon)
    with serving.daemon.client() as client:
        client.clear(tiers=tiers)


def base_namespace(disk: Path) -> Namespace:
    found = [Namespace.parse(path.read_text().splitlines()[0]) for path in (disk / "namespaces").glob("*.json")]
    return next(namespace for namespace in found if not namespace.adapter and not namespace.salt)


def object_keys(disk: Path, tokens: list[int]) -> list[bytes]:
    return base_namespace(disk).object_keys(tokens)


def counters(daemon: Any) -> dict[str, int]:
    return dict(daemon.status()["counters"])


@pytest.mark.parametrize("emptied", [(), ("cpu",), ("cpu", "disk")], ids=["cpu", "disk", "redis"])
def test_the_same_tokens_come_from_every_tier(serving: Any, prompts: Callable[[int], list[int]], emptied: Any) -> None:
    tokens = prompts(700)
    cold = serving.engine.ask(tokens)
    clear(serving, *emptied)
    if "disk" in emptied:  # clearing asks Redis to forget nothing it was not told to
        assert serving.redis.redis.dbsize() > 0
    warm = serving.engine.ask(tokens)
    assert cold.cached == 0
    assert warm.cached == 640
    assert warm.tokens == cold.tokens


def test_corrupted_kv_changes_the_tokens(serving: Any, prompts: Callable[[int], list[int]]) -> None:
    """The control of all others: what is loaded really is what the model computes with."""
    tokens = prompts(600)
    cold = serving.engine.ask(tokens)
    serving.engine.settle(serving.daemon)
    keys = object_keys(serving.disk, tokens)
    namespace = base_namespace(serving.disk)
    with serving.daemon.client() as client:
        payloads = [client.get(key) for key in keys]
        assert all(payloads)
        client.evict(keys)
        client.register(namespace)
        with client.reserve(namespace.digest(), keys, [len(payload) for payload in payloads]) as reservation:
            for position, payload in enumerate(payloads):
                reservation.write(position, payload[len(payload) // 2 :] + payload[: len(payload) // 2])
    wrong = serving.engine.ask(tokens)
    assert wrong.cached == 512
    assert wrong.tokens != cold.tokens
    clear(serving, "cpu", "disk", "redis")
    assert serving.engine.ask(tokens).tokens == cold.tokens


def test_a_hit_reaches_the_last_whole_chunk(serving: Any, prompts: Callable[[int], list[int]]) -> None:
    for length, expected in ((127, 0), (128, 127), (129, 128), (256, 255), (300, 256)):
        tokens = prompts(length)
        cold = serving.engine.ask(tokens)
        serving.engine.settle(serving.daemon)
        warm = serving.engine.ask(tokens)
        assert (warm.cached in (expected, expected + 1)) if length % CHUNK == 0 else warm.cached == expected, length
        assert warm.tokens == cold.tokens


def test_the_next_turn_of_a_chat_hits_what_was_decoded(serving: Any, prompts: Callable[[int], list[int]]) -> None:
    tokens = prompts(200)
    first = serving.engine.ask(tokens, max_tokens=100)
    serving.engine.settle(serving.daemon)
    history = tokens + first.tokens + prompts(30)
    second = serving.engine.ask(history)
    assert second.cached == 256
    clear(serving, "cpu", "disk", "redis")
    assert serving.engine.ask(history).tokens == second.tokens


def test_prompt_logprobs_compute_everything_and_take_no_lease(
    serving: Any, prompts: Callable[[int], list[int]]
) -> None:
    tokens = prompts(400)
    serving.engine.ask(tokens)
    serving.engine.settle(serving.daemon)
    again = serving.engine.ask(tokens, prompt_logprobs=1)
    assert again.cached == 0
    assert again.logprobs == len(tokens)
    assert serving.daemon.status()["leases"] == 0


def test_an_orchestrators_hints_become_the_daemons_verbs(
    serving: Any, prompts: Callable[[int], list[int]], eventually: Any
) -> None:
    pytest.importorskip("vllm.v1.kv_hints", reason="vLLM 0.32 on")
    hints: dict[str, Any] = {
        "pin": ("pin", {"ttl": 60}), "retain": ("retain", {"ttl": 60}), "briefly": ("retain", {"ttl": 0.5}),
        "disk": ("demote", {}), "redis": ("demote", {"tier": "redis"}), "none": ("another's", {"ttl": 60}),
    }  # fmt: skip
    asked = {name: prompts(CHUNK + 9) for name in hints}
    with serving.daemon.client() as client:
        since, _, _ = client.events(wait=0)
        for name, tokens in asked.items():
            serving.engine.ask(tokens, hints=[hints[name]])
        serving.engine.settle(serving.daemon)
        names = {object_keys(serving.disk, tokens)[0].hex(): name for name, tokens in asked.items()}

        def told() -> set[tuple[str, str, str]]:
            """(event, tier, what was hinted) of these requests' objects."""
            events = client.events(since, wait=0)[2]
            wanted = ("pinned", "unpinned", "moved")
            return {
                (each["event"], each["tier"], names[each["key"]])
                for each in events
                if each["key"] in names and each["event"] in wanted
            }

        done = {("pinned", "cpu", name) for name in ("pin", "retain", "briefly")} | {
            ("unpinned", "cpu", "briefly"),
            ("moved", "disk", "disk"),
            ("moved", "redis", "redis"),
        }
        eventually(lambda: told() == done, "each hint is carried out", 60)

        def in_memory() -> set[str]:
            return {names[each["key"]] for each in client.objects(tier="cpu") if each["key"] in names}

        assert in_memory() == {"pin", "retain", "briefly", "none"}
        client.clear(tiers=("cpu",))
        assert in_memory() == {"pin", "retain"}


def test_what_a_request_asks_to_keep_outlasts_others_under_pressure(
    serving: Any, prompts: Callable[[int], list[int]], eventually: Any
) -> None:
    """Others' objects are more than the memory; of two chains alike the kept one stays, and is hit."""
    kept, plain = prompts(CHUNK * 2 + 9), prompts(CHUNK * 2 + 9)
    clear(serving, "cpu", "disk", "redis")
    cold = serving.engine.ask(kept, wishes={"keep": 300, "priority": "high"})
    serving.engine.ask(plain)
    serving.engine.settle(serving.daemon)
    eventually(lambda: counters(serving.daemon).get("keep.objects", 0) >= 2, "the daemon has been told", 60)
    namespace = Namespace("pressure", "float32", "layout", 16, salt=salt_digest("another"))
    with serving.daemon.client() as client:
        root = client.register(namespace, [])
        for _ in range(90):  # of 4 MiB: more than the memory
            keys = [os.urandom(32)]
            with client.reserve(root, keys, [4 << 20]) as reservation:
                if reservation.slots[0] is not None:
                    reservation.write(0, bytes(4 << 20))
        held = {each["key"] for each in client.objects(tier="cpu")}
    assert {key.hex() for key in object_keys(serving.disk, kept)} <= held
    assert not {key.hex() for key in object_keys(serving.disk, plain)} & held
    assert counters(serving.daemon).get("evict.cpu.kept", 0) == 0
    again = serving.engine.ask(kept)
    assert again.cached == 2 * CHUNK
    assert again.tokens == cold.tokens
    clear(serving, "cpu", "disk", "redis")


def test_what_is_hinted_to_be_prefetched_is_in_memory_before_its_turn(
    serving: Any, prompts: Callable[[int], list[int]], eventually: Any
) -> None:
    pytest.importorskip("vllm.v1.kv_hints", reason="vLLM 0.32 on")
    engine, hinted, plain = serving.engine, prompts(400), prompts(400)
    cold = [engine.ask(tokens).tokens for tokens in (hinted, plain)]
    clear(serving, "cpu")
    ahead = [engine.start(prompts(8), max_tokens=2000) for _ in range(8)]  # as many as run at a time
    waiting = engine.start(plain), engine.start(hinted, hints=[("prefetch", {})])
    with serving.daemon.client() as client:

        def tiers(tokens: list[int]) -> set[str]:
            return set(client.lookup(object_keys(serving.disk, tokens)).tiers)

        eventually(lambda: tiers(hinted) == {"cpu"}, "it is raised while it waits", 60)
        assert tiers(plain) == {"disk"}
    for call in ahead:
        engine.abort(call)
    assert all(engine.result(call).aborted for call in ahead)  # they ran until now
    assert [engine.result(call).tokens for call in reversed(waiting)] == cold


def test_a_wish_that_cannot_be_meant_is_raised_to_the_caller(serving: Any, prompts: Callable[[int], list[int]]) -> None:
    refused = serving.engine.ask(prompts(20), wishes={"store": "no"})
    assert (refused.reason, refused.tokens) == ("error", [])
    assert "kv_transfer_params: store='no' must be true or false" in refused.why
    assert serving.engine.ask(prompts(20), wishes={"store": False, "remote_host": "another's"}).tokens


def test_requests_side_by_side_get_their_own_kv(serving: Any, prompts: Callable[[int], list[int]]) -> None:
    shared = prompts(300)
    many = [shared + prompts(150) for _ in range(8)]
    cold = [serving.engine.ask(tokens).tokens for tokens in many]
    serving.engine.settle(serving.daemon)
    for _ in range(2):
        calls = [serving.engine.start(tokens) for tokens in many]
        answers = [serving.engine.result(call) for call in calls]
        assert [answer.tokens for answer in answers] == cold
        assert all(answer.cached == 384 for answer in answers)
    assert serving.daemon.status()["leases"] == 0


def test_aborted_requests_leave_nothing_behind(
    serving: Any, prompts: Callable[[int], list[int]], eventually: Any
) -> None:
    tokens = prompts(1500)
    cold = serving.engine.ask(tokens)
    clear(serving, "cpu")
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.05):
        call = serving.engine.start(tokens, max_tokens=200)
        time.sleep(delay)
        serving.engine.abort(call)
        serving.engine.result(call)
        clear(serving, "cpu")
    assert serving.engine.ask(tokens).tokens == cold.tokens
    eventually(lambda: serving.daemon.status()["leases"] == 0, "the leases end")


def test_a_requests_blocks_come_free_with_the_end_of_its_stores(
    serving: Any, prompts: Callable[[int], list[int]]
) -> None:
    serving.engine.ask(prompts(400))
    # Returns when vLLM has nothing left to do for it. No other request comes by whose steps could carry the news.
    serving.engine.pause(mode="wait", clear=False)
    assert serving.engine.reset()


def test_a_hanging_redis_delays_nobody(serving: Any, prompts: Callable[[int], list[int]]) -> None:
    held, new = prompts(700), prompts(700)
    cold = serving.engine.ask(held)
    serving.engine.settle(serving.daemon)
    serving.redis.send(signal.SIGSTOP)
    try:
        waits = [serving.engine.ask(held, max_tokens=1).ttft for _ in range(3)]
        assert serving.engine.ask(held).tokens == cold.tokens
        serving.engine.ask(new)  # nobody holds it: Redis is asked, and not waited for
        assert min(waits) < 2.0  # each would wait for Redis; a slow second is not one
    finally:
        serving.redis.send(signal.SIGCONT)


def test_a_corrupted_redis_value_is_a_counted_miss(
    serving: Any, prompts: Callable[[int], list[int]], eventually: Any
) -> None:
    eventually(lambda: serving.daemon.status()["tiers"]["redis"]["available"], "Redis is back", 30)
    tokens = prompts(500)
    cold = serving.engine.ask(tokens)
    clear(serving, "cpu", "disk")
    keys = object_keys(serving.disk, tokens)
    for name in serving.redis.redis.keys("*"):
        if keys[1].hex().encode() in name and serving.redis.redis.strlen(name) > 1000:
            serving.redis.redis.setrange(name, 900, b"not what was stored")
    before = counters(serving.daemon).get("failure.redis.corrupt", 0)
    warm = serving.engine.ask(tokens)
    assert warm.tokens == cold.tokens
    assert counters(serving.daemon)["failure.redis.corrupt"] > before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "swapped", "removed"])
def test_a_damaged_disk_file_is_a_counted_miss(serving: Any, prompts: Callable[[int], list[int]], damage: str) -> None:
    tokens = prompts(600)
    cold = serving.engine.ask(tokens)
    clear(serving, "cpu", "redis")
    keys = object_keys(serving.disk, tokens)
    first, second = (serving.disk / "objects" / key.hex()[:2] / key.hex() for key in keys[1:3])
    match damage:
        case "truncated":
            os.truncate(first, 5000)
        case "flipped":
            data = bytearray(first.read_bytes())
            data[9000] ^= 1
            first.write_bytes(data)
        case "swapped":
            spare = first.with_suffix(".spare")
            first.rename(spare)
            second.rename(first)
            spare.rename(second)
        case "removed":
            first.unlink()
    before = {name: count for name, count in counters(serving.daemon).items() if name.startswith("failure.disk")}
    again = serving.engine.ask(tokens)
    after = {name: count for name, count in counters(serving.daemon).items() if name.startswith("failure.disk")}
    assert again.tokens == cold.tokens
    assert after != before
    serving.engine.settle(serving.daemon)
    assert serving.engine.ask(tokens).cached == 512  # recomputed and stored anew


def test_an_engine_outlives_its_daemon_and_finds_the_next_ones_disk(
    serving: Any, prompts: Callable[[int], list[int]], module_daemon: Any, eventually: Any
) -> None:
    tokens = prompts(600)
    cold = serving.engine.ask(tokens)
    serving.engine.settle(serving.daemon)
    serving.daemon.stop(signal.SIGKILL)
    assert serving.engine.ask(tokens).tokens == cold.tokens
    assert serving.engine.ask(prompts(300)).cached == 0
    second = module_daemon(
        socket=serving.daemon.socket, memory="256MiB", disk_path=serving.disk, disk="1GiB", redis=serving.redis.url
    )
    serving.daemon = second
    eventually(lambda: serving.engine.ask(tokens).cached == 512, "the engine hits the next daemon's disk", 30)
    assert serving.engine.ask(tokens).tokens == cold.tokens


def test_a_chain_that_said_when_it_returns_is_in_memory_then(
    serving: Any, prompts: Callable[[int], list[int]], eventually: Any
) -> None:
    """The last test here: for half a minute the daemon holds what was announced."""
    tokens = prompts(600)
    serving.engine.ask(tokens, wishes={"returns_in": 6.0})
    clear(serving, "cpu")
    keys = object_keys(serving.disk, tokens)
    with serving.daemon.client() as client:
        assert set(client.lookup(keys).tiers) == {"disk"}
        eventually(lambda: set(client.lookup(keys).tiers) == {"cpu"}, "it is raised ahead of the request", 12.0)
        raised = serving.daemon.status()["counters"]["load.disk.objects"]
        assert client.evict(keys, tiers=["cpu"]).skipped == len(keys), "and held"
    assert serving.engine.ask(tokens).cached == 512
    assert serving.daemon.status()["counters"]["load.disk.objects"] == raised, "the request waited for no disk"
