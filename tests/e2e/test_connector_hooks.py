# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` beside a daemon whose memory is smaller than a prompt's KV: our numbers in its /metrics, our tiers in
its KV events, and what requests ask for themselves.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.keys import Namespace

CHUNK, LONG = 128, 1900  # fourteen whole chunks, of which the memory holds some


@pytest.fixture(scope="module")
def cache(module_daemon: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    disk = tmp_path_factory.mktemp("disk")
    running = module_daemon(memory="1MiB", page_size="4KiB", disk_path=disk, disk="256MiB")
    running.disk = disk
    return running


@pytest.fixture(scope="module")
def server(
    cache: Any, tiny: Path, eventually: Any, openai_server: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    transfer = {
        "kv_connector": "LoRACacheConnector", "kv_connector_module_path": "loracache.connectors.vllm",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "server": cache.url, "chunk_tokens": CHUNK, "lookup_wait": 5.0, "recompute_if_faster": 0,
        },
    }  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    published = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}", "topic": "kv"}
    log = tmp_path_factory.mktemp("server") / "log"
    running = openai_server(
        log,
        tiny / "model",
        transfer,
        "--max-model-len",
        "2048",
        "--no-enable-prefix-caching",
        "--kv-events-config",
        json.dumps(published),
    )
    try:
        eventually(running.ready, "the server answers", 300)
        yield SimpleNamespace(http=running, events=f"tcp://127.0.0.1:{port}", log=log)
    finally:
        running.close()


@pytest.fixture
def heard(server: SimpleNamespace) -> Iterator[list[Any]]:
    """KV events as they come, as msgpack gives them: lists of names and values."""
    import msgspec
    import zmq

    events: list[Any] = []
    over = threading.Event()
    subscriber: Any = zmq.Context.instance().socket(zmq.SUB)
    subscriber.connect(server.events)
    subscriber.setsockopt_string(zmq.SUBSCRIBE, "kv")

    def listen() -> None:
        while not over.is_set():
            if subscriber.poll(100):
                *_, batch = subscriber.recv_multipart()
                events.extend(msgspec.msgpack.decode(batch)[1])

    thread = threading.Thread(target=listen)
    thread.start()
    yield events
    over.set()
    thread.join(10)
    subscriber.close(0)


def number(server: SimpleNamespace, name: str) -> float:
    """A counter of ours in vLLM's /metrics, over all its labels."""
    text = server.http.call("/metrics", None)[1]
    return sum(float(value) for value in re.findall(rf"^vllm:loracache_{name}_total{{.*}} (\S+)$", text, re.MULTILINE))


def ask(server: SimpleNamespace, tokens: list[int], **params: Any) -> list[int]:
    body = {
        "model": "base", "prompt": tokens, "max_tokens": 8, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    status, answer = server.http.call("/v1/completions", body | ({"kv_transfer_params": params} if params else {}))
    assert status == 200, answer
    return list(answer["choices"][0]["token_ids"])


def on_disk(cache: Any) -> int:
    return int(cache.status()["tiers"]["disk"]["objects"])


def held(cache: Any, tokens: list[int]) -> int:
    """Leading chunks that some tier has."""
    (path,) = (cache.disk / "namespaces").glob("*.json")
    keys = Namespace.parse(path.read_text().splitlines()[0]).object_keys(tokens)
    with cache.client() as client:
        return int(client.lookup(keys).hits)


def test_kv_larger_than_the_memory_is_stored_loaded_and_counted(
    server: SimpleNamespace, cache: Any, prompts: Callable[[int], list[int]], eventually: Any
) -> None:
    tokens = prompts(LONG)
    cold = ask(server, tokens)
    eventually(lambda: on_disk(cache) == LONG // CHUNK or not ask(server, prompts(8)), "it is on disk", 60)
    with cache.client() as client:
        held = client.status()["tiers"]
        assert held["cpu"]["objects"] < held["disk"]["objects"] == LONG // CHUNK
    nbytes = held["disk"]["bytes"]
    assert ask(server, tokens) == cold
    eventually(lambda: number(server, "load_bytes") >= nbytes, "the load is counted")
    assert nbytes > 1 << 20  # the memory
    assert number(server, "store_bytes") >= nbytes
    assert number(server, "loads") == 1
    assert number(server, "lookups") >= 2
    assert number(server, "load_failures") == 0


def test_routers_hear_what_the_tiers_hold(
    server: SimpleNamespace, prompts: Callable[[int], list[int]], eventually: Any, heard: list[Any]
) -> None:
    tokens = prompts(3 * CHUNK)

    def told(kind: str, tier: str) -> bool:
        ask(server, prompts(8))  # events leave with steps
        return any(
            event["type"] == kind and event["medium"] == tier and event.get("token_ids") in (None, tokens[:CHUNK])
            for event in list(heard)
        )

    eventually(lambda: bool(heard) or not ask(server, prompts(CHUNK)), "the subscription is there", 60)
    ask(server, tokens)
    eventually(lambda: told("BlockStored", "cpu"), "it is in memory", 60)
    eventually(lambda: told("BlockStored", "disk"), "it is on disk", 60)
    ask(server, prompts(LONG))
    eventually(lambda: told("BlockRemoved", "cpu"), "it has made room", 60)


def test_a_request_says_what_becomes_of_its_kv(
    server: SimpleNamespace, cache: Any, prompts: Callable[[int], list[int]], eventually: Any
) -> None:
    secret, kept = prompts(2 * CHUNK + 9), prompts(CHUNK + 9)
    loads = number(server, "loads")
    cold = ask(server, secret, store=False)
    assert ask(server, secret, store=False) == cold
    assert number(server, "loads") == loads
    with cache.client() as client:
        since, _, _ = client.events(wait=0)
        ask(server, kept, pin=60)

        def pinned() -> list[Any]:
            ask(server, prompts(8))  # a step, in which vLLM learns that the stores are done
            return [event for event in client.events(since, wait=0.5)[2] if event["event"] == "pinned"]

        [event] = eventually(pinned, "what is to be kept is pinned", 60)
        assert event["tier"] == "cpu"
    eventually(lambda: held(cache, kept) == 1, "the other is stored")
    assert held(cache, secret) == 0
    answer = ask(server, kept, load=False)
    assert number(server, "loads") == loads
    assert ask(server, kept) == answer
    eventually(lambda: number(server, "loads") == loads + 1, "it is loaded again")


def test_a_wrong_wish_is_answered_with_400_and_the_fix(
    server: SimpleNamespace, prompts: Callable[[int], list[int]]
) -> None:
    def answer(params: Any, **more: Any) -> tuple[int, str]:
        body = {"model": "base", "max_tokens": 2, "kv_transfer_params": params} | more
        status, said = server.http.call("/v1/completions", body)
        return status, said if isinstance(said, str) else json.dumps(said)

    computed = number(server, "lookups")
    for params, words in (
        ({"store": "no"}, "store='no' must be true or false"),
        ({"pin": -5}, "pin=-5 must be seconds, more than 0 and at most 3600"),
        ({"loads": False}, "'loads' is not known; did you mean 'load'?"),
    ):
        for more in ({"prompt": prompts(20)}, {"prompt": [prompts(20), prompts(20)], "n": 2, "temperature": 1}):
            status, said = answer(params, **more)
            assert (status, words in said) == (400, True), said
        status, said = answer(params, prompt=prompts(20), stream=True)
        assert words in said
        assert '"code": 400' in said.replace('":400', '": 400')
    assert number(server, "lookups") == computed
    assert ask(server, prompts(20), remote_host="of another connector")
    assert "it is served without that" not in server.log.read_text()  # the engine has heard of none
