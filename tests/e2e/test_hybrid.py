# SPDX-License-Identifier: Apache-2.0
"""Models whose layers do not all read all of a prompt, on a real vLLM: windows, chunks, states, shared KV, images.

One engine a model, on a daemon with a disk and a Redis that is restarted below it. A model a kind runs every test, the
others those that show what is their own. LORACACHE_HYBRID_TESTS=all runs every test on every model.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.groups import Need
from loracache.keys import Namespace, chunk_keys, object_key

THOROUGH = ("gemma3", "gpt_oss", "mistral", "granite_hybrid")
OTHERS = ("llama4", "gemma3n", "gemma4", "qwen3_next", "lfm2", "deepseek_v2", "llava")
ALL = os.environ.get("LORACACHE_HYBRID_TESTS") == "all"
EVERY = (*THOROUGH, *OTHERS)
STEPWISE = ("qwen3_next", "lfm2", "deepseek_v2")  # equal tokens only from equal steps, alone
IMAGE_AT = 40
CHUNKS = 7  # of the prompts whose objects are damaged: the last ends within a span, so each group has a part in it
ENGINE = {
    "enable_lora": False,
    "enable_prefix_caching": True,
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 163,
    "disable_hybrid_kv_cache_manager": False,
}


def on(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("serving", names, indirect=True, scope="module")


every = on(*EVERY)
exact = on(*(name for name in EVERY if name not in STEPWISE))
thorough = on(*(EVERY if ALL else THOROUGH))


@pytest.fixture(scope="module")
def serving(
    request: pytest.FixtureRequest,
    hybrid_models: Any,
    model_maker: Any,
    module_daemon: Any,
    module_redis: Any,
    engine_factory: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SimpleNamespace]:
    """One model's engine on one daemon."""
    missing = hybrid_models.MODELS[request.param].flags - cpu_flags()
    if missing:
        pytest.skip(f"vLLM computes {request.param} on CPUs with {', '.join(sorted(missing))} alone")
    folder = tmp_path_factory.mktemp(request.param)
    model = hybrid_models.make_hybrid_model(folder / "model", request.param, model_maker)
    patient = folder / "loracache.yaml"
    patient.write_text("redis_lookup_ms: 1000\n")  # a loaded machine answers late, and the tests want the hit
    redis = module_redis()
    tiers = {"memory": "128MiB", "disk_path": folder / "disk", "disk": "1GiB", "redis": redis.url}
    options = tiers | {"config": patient}
    daemon = module_daemon(**options)
    arguments = ENGINE | {"model": str(folder / "model"), "num_gpu_blocks_override": model.blocks} | model.engine
    engine = engine_factory({"server": daemon.url, "chunk_tokens": model.block, "lookup_wait": 5.0}, **arguments)
    serving = SimpleNamespace(
        engine=engine, model=model, daemon=daemon, redis=redis, disk=folder / "disk", options=options
    )
    yield serving
    engine.close()
    serving.daemon.stop()
    redis.kill()


def cpu_flags() -> frozenset[str]:
    """What this machine's CPU can do."""
    _, _, flags = Path("/proc/cpuinfo").read_text().partition("flags\t\t:")
    return frozenset(flags.splitlines()[0].split()) if flags else frozenset()


def ask(serving: Any, tokens: list[int], *, image: int = 1, **options: Any) -> Any:
    """A prompt of so many tokens; where the model sees, some of them are an image's."""
    if not serving.model.image:
        return serving.engine.ask(tokens, **options)
    return serving.engine.ask(_with_image(serving, tokens), image=image, **options)


def _with_image(serving: Any, tokens: list[int], at: int = IMAGE_AT) -> list[int]:
    return [*tokens[:at], serving.model.image_token, *tokens[at + serving.model.image_tokens :]]


def reach(serving: Any, length: int) -> int:
    """How far a hit of a prompt that was computed reaches: the last boundary before its last token, or that token where
    full attention is all there is (which vLLM counts as cached)."""
    last = length if serving.model.kinds == ("all",) else length - 1
    return int(last // serving.model.block * serving.model.block)


def clear(serving: Any, *tiers: str) -> None:
    serving.engine.settle(serving.daemon)
    if tiers:
        with serving.daemon.client() as client:
            client.clear(tiers=tiers)


def restart_daemon(serving: Any, module_daemon: Any) -> None:
    serving.engine.settle(serving.daemon)
    assert serving.daemon.stop() == 0
    serving.daemon = module_daemon(socket=serving.daemon.socket, **serving.options)


def namespace_of(serving: Any) -> Namespace:
    (found,) = (serving.disk / "namespaces").glob("*.json")
    return Namespace.parse(found.read_text().splitlines()[0])


def objects_of(serving: Any, tokens: list[int]) -> dict[Need, list[list[bytes]]]:
    """Of every group, for every chunk of a prompt without an image, the keys of its objects."""
    namespace = namespace_of(serving)
    groups = {group.need: group.shards for group in namespace.groups}
    if Need.ALL in serving.model.kinds:
        groups[Need.ALL] = namespace.shards
    keys = chunk_keys(namespace.digest(), tokens, namespace.chunk_tokens)
    return {need: [[object_key(key, shard) for shard in shards] for key in keys] for need, shards in groups.items()}


@every
def test_its_groups_are_those_that_were_expected(serving: Any, prompts: Callable[[int], list[int]]) -> None:
    """The models here really are of the kinds that they stand for."""
    ask(serving, prompts(200))
    serving.engine.settle(serving.daemon)
    assert "LoRACache is off" not in serving.engine.log()
    namespace = namespace_of(serving)
    found = tuple(str(group.need) for group in namespace.groups)
    assert found == tuple(kind for kind in serving.model.kinds if kind != "all")
    assert bool(namespace.shards) is ("all" in serving.model.kinds)


@every
def test_the_same_tokens_come_from_every_tier(
    serving: Any, prompts: Callable[[int], list[int]], module_daemon: Any, eventually: Any
) -> None:
    """Of prompts that end before, on and after boundaries, from memory, from the disk of a daemon that was restarted,
    and from Redis. All are computed in pieces of an odd size, unless the model's own tokens depend on the pieces."""
    chunk, engine = serving.model.block, serving.engine
    lengths = [2 * chunk - 1, 2 * chunk, 2 * chunk + 1, 7 * chunk - 1, 7 * chunk + 1, 300]
    if serving.model.name in STEPWISE:  # of a prompt that is hit to its end the last token is a step of its own
        lengths = [length for length in lengths if reach(serving, length) < length]
    asked = [prompts(length) for length in lengths]
    cold = [ask(serving, tokens) for tokens in asked]
    assert all(answer.cached == 0 for answer in cold)
    assert len({tuple(answer.tokens) for answer in cold}) == len(cold)

    def compare(tier: str) -> None:
        for tokens, before in zip(asked, cold, strict=True):
            warm = ask(serving, tokens)
            assert warm.tokens == before.tokens, (tier, len(tokens), warm.cached)
            assert warm.cached == reach(serving, len(tokens)), (tier, len(tokens))

    clear(serving)
    compare("cpu")
    restart_daemon(serving, module_daemon)
    first = prompts(2 * chunk)
    ask(serving, first)

    def again() -> bool:
        assert engine.reset()
        return bool(ask(serving, first).cached)

    eventually(again, "the engine has found the next daemon", 30)
    assert serving.daemon.status()["tiers"]["cpu"]["objects"] < 20
    compare("disk")
    clear(serving, "cpu", "disk")
    compare("redis")
    assert serving.daemon.status()["counters"]["load.redis.objects"] > 0


@thorough
def test_what_was_decoded_is_hit_by_the_next_turn(serving: Any, prompts: Callable[[int], list[int]]) -> None:
    chunk = serving.model.block
    tokens = prompts(3 * chunk - 10)
    first = serving.engine.ask(tokens, max_tokens=2 * chunk)
    serving.engine.settle(serving.daemon)
    history = tokens + first.tokens + prompts(17)
    second = serving.engine.ask(history)
    assert second.cached == reach(serving, len(tokens + first.tokens))
    clear(serving, "cpu", "disk", "redis")
    if serving.model.name not in STEPWISE:  # what was decoded was computed in other steps than here
        assert serving.engine.ask(history).tokens == second.tokens


@exact
def test_requests_side_by_side_preempt_each_other_and_answer_the_same(
    serving: Any, prompts: Callable[[int], list[int]], eventually: Any
) -> None:
    many = [prompts(260 + 9 * number) for number in range(10)]
    if serving.model.image:
        many = [_with_image(serving, tokens) for tokens in many]
    options: dict[str, Any] = {"max_tokens": serving.model.answer} | ({"image": 1} if serving.model.image else {})
    alone = [serving.engine.ask(tokens, **options).tokens for tokens in many]
    before = serving.engine.preemptions()

    def preempted() -> bool:
        """Whether any was; those that come one by one, to a busy machine, find room."""
        serving.engine.settle(serving.daemon)
        for emptied in ((), ("cpu", "disk", "redis")):
            clear(serving, *emptied)
            calls = [serving.engine.start(tokens, **options) for tokens in many]
            answers = [serving.engine.result(call) for call in calls]
            assert [answer.tokens for answer in answers] == alone
            assert all(answer.cached for answer in answers) is (not emptied)
        # A window never needs more blocks than at first.
        return serving.model.kinds == ("window",) or bool(serving.engine.preemptions() > before)

    eventually(preempted, "they preempt each other", 60)
    serving.engine.settle(serving.daemon)
    assert serving.daemon.status()["leases"] == 0


@thorough
def test_a_group_whose_object_is_gone_shortens_the_hit(serving: Any, prompts: Callable[[int], list[int]]) -> None:
    whole = CHUNKS * serving.model.block
    tokens = prompts(whole + 20)
    cold = serving.engine.ask(tokens)
    for need, chunks in objects_of(serving, tokens).items():
        clear(serving)
        with serving.daemon.client() as client:
            assert client.evict(chunks[CHUNKS - 1]).counts[0] >= 1, need
        shorter = serving.engine.ask(tokens)
        assert shorter.cached < whole, need
        assert shorter.tokens == cold.tokens
        clear(serving)
        assert serving.engine.ask(tokens).cached == whole  # stored anew


@every
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_broken_object_of_any_group_is_a_counted_miss(
    serving: Any, prompts: Callable[[int], list[int]], place: str
) -> None:
    tokens = prompts(CHUNKS * serving.model.block + 20)
    cold = serving.engine.ask(tokens)
    for need, chunks in objects_of(serving, tokens).items():
        clear(serving, *(() if place == "memory" else ("cpu", "redis")))
        (key,) = chunks[CHUNKS - 1]
        if place == "memory":
            with serving.daemon.client() as client, client.acquire([key]) as reading:
                assert reading.slots[0] is not None, need
                reading.slots[0].buffers[0][100] ^= 1
        else:
            _flip(serving.disk / "objects" / key.hex()[:2] / key.hex())
        before = sum(serving.daemon.status()["failures"].values())
        again = serving.engine.ask(tokens)
        assert again.tokens == cold.tokens, need
        assert sum(serving.daemon.status()["failures"].values()) > before, need


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 + 100] ^= 1  # behind the header
    path.write_bytes(data)


@every
def test_objects_of_another_prompt_change_the_tokens(serving: Any, prompts: Callable[[int], list[int]]) -> None:
    """The control of all others: what is loaded of every group really is what the model computes with."""
    last, engine = CHUNKS - 1, serving.engine
    tokens, others = prompts(CHUNKS * serving.model.block + 3), prompts(CHUNKS * serving.model.block + 3)
    cold = engine.ask(tokens, max_tokens=24)
    engine.ask(others)
    engine.settle(serving.daemon)
    with serving.daemon.client() as client:
        theirs = {need: client.get(chunks[last][0]) for need, chunks in objects_of(serving, others).items()}
    mine = objects_of(serving, tokens)
    for need, payload in theirs.items():
        assert payload is not None, need
        clear(serving, "disk", "redis")
        with serving.daemon.client() as client:
            client.register(namespace_of(serving))
            _exchange(client, namespace_of(serving), mine, need, payload)
        wrong = engine.ask(tokens, max_tokens=24)
        assert wrong.cached == CHUNKS * serving.model.block, need
        assert wrong.tokens != cold.tokens, need
        clear(serving, "cpu", "disk", "redis")
        assert engine.ask(tokens, max_tokens=24).tokens == cold.tokens


def _exchange(
    client: Any, namespace: Namespace, mine: dict[Need, list[list[bytes]]], need: Need, payload: bytes
) -> None:
    """Put another payload in the place of one group's last object. What is beside a chain's object goes with it, and
    is written again."""
    (key,), parent = mine[need][CHUNKS - 1], b""
    beside = {}
    if need is Need.ALL:
        (parent,) = mine[need][CHUNKS - 2]
        last = [chunks[CHUNKS - 1][0] for other, chunks in mine.items() if other is not need]
        beside = {each: client.get(each) for each in last}
    client.evict([key])
    _write(client, namespace, key, payload, parent)
    for each, own in beside.items():
        _write(client, namespace, each, own, key)


def _write(client: Any, namespace: Namespace, key: bytes, payload: bytes, parent: bytes) -> None:
    with client.reserve(namespace.digest(), [key], [len(payload)], parents=[parent]) as reservation:
        assert reservation.slots[0] is not None
        reservation.write(0, payload)


@on("llava")
def test_an_image_is_hit_by_itself_where_it_was(serving: Any, prompts: Callable[[int], list[int]]) -> None:
    text = prompts(150)  # so short that the last token sees the image, by way of two windows
    cold = {image: ask(serving, text, image=image).tokens for image in (1, 2)}
    assert cold[1] != cold[2]
    moved = _with_image(serving, text, IMAGE_AT + 1)
    elsewhere = serving.engine.ask(moved, image=1)
    clear(serving)
    for image in (1, 2):
        again = ask(serving, text, image=image)
        assert (again.cached, again.tokens) == (reach(serving, 150), cold[image])
    assert ask(serving, text, image=3).cached <= IMAGE_AT
    again = serving.engine.ask(moved, image=1)
    assert (again.cached, again.tokens) == (reach(serving, 150), elsewhere.tokens)


@thorough
def test_an_engine_outlives_its_daemon(
    serving: Any, prompts: Callable[[int], list[int]], module_daemon: Any, eventually: Any
) -> None:
    tokens = prompts(400)
    cold = ask(serving, tokens)
    serving.engine.settle(serving.daemon)
    serving.daemon.stop(signal.SIGKILL)
    assert ask(serving, tokens).tokens == cold.tokens
    assert serving.engine.reset()
    assert ask(serving, tokens).tokens == cold.tokens
    serving.daemon = module_daemon(socket=serving.daemon.socket, **serving.options)

    def again() -> Any:
        assert serving.engine.reset()
        found = ask(serving, tokens)
        assert found.tokens == cold.tokens
        return found.cached

    eventually(again, "the engine hits the next daemon's disk", 30)
