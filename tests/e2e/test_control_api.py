# SPDX-License-Identifier: Apache-2.0
"""REST beside a real vLLM: every endpoint does what it says while requests go on, and their tokens stay right."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

CHUNK = 128


class Traffic:
    """Requests without pause: a few prompts over and over. Each must get the tokens that it got first."""

    def __init__(self, server: Any, prompts: list[tuple[str, list[int]]]) -> None:
        self._server = server
        self._prompts = prompts
        self._first: dict[int, list[int]] = {}
        self._stop = threading.Event()
        self.wrong: list[str] = []
        self.answered = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            for number, (model, tokens) in enumerate(self._prompts):
                status, answer = self._server.complete(model, tokens, 4)
                if status != 200 or self._first.setdefault(number, answer) != answer:
                    self.wrong.append(f"{model} {number}: {status} {answer}, first {self._first.get(number)}")
                self.answered += 1

    def end(self) -> None:
        self._stop.set()
        self._thread.join(60)


class Calls:
    """HTTP calls that remember which endpoints they reached."""

    def __init__(self, base: str, token: str) -> None:
        self._client = httpx.Client(base_url=base, headers={"authorization": f"Bearer {token}"}, timeout=60)
        self.made: set[tuple[str, str]] = set()

    def __call__(self, method: str, path: str, template: str = "", **options: Any) -> Any:
        answer = self._client.request(method, path, **options)
        assert answer.status_code in (200, 202), (method, path, answer.text)
        self.made.add((method, template or path.partition("?")[0]))
        return answer.json() if "json" in answer.headers["content-type"] else answer.text

    def change(self, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        """An operation, waited for to its end."""
        done: dict[str, Any] = self("POST", f"/v1/{verb}", json=body, params={"wait": 30})
        assert done["state"] == "done", done
        return done

    def events(self, about: Callable[[], object], wanted: set[str]) -> set[str]:
        """What kinds of events are told while `about` happens, until all that are wanted have come."""
        seen: set[str] = set()
        with self._client.stream("GET", "/v1/events") as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith(":")
            about()
            deadline = time.monotonic() + 30
            while not wanted <= seen and time.monotonic() < deadline:
                kind, _, value = next(lines).partition(": ")
                if kind == "event":
                    seen.add(value)
        self.made.add(("GET", "/v1/events"))
        return seen

    def close(self) -> None:
        self._client.close()

    def document(self) -> set[tuple[str, str]]:
        paths = self._client.get("/openapi.json").json()["paths"]
        return {(method.upper(), path) for path, methods in paths.items() for method in methods}


@pytest.fixture(scope="module")
def adapter_folder(model_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("adapter") / "a"
    model_maker.make_adapter(folder, model_maker.PRESETS["tiny"], rank=8, seed=4711)
    return folder


@pytest.fixture(scope="module")
def world(
    module_daemon: Any,
    module_redis: Any,
    openai_server: Any,
    tiny: Path,
    eventually: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SimpleNamespace]:
    """A daemon with all tiers and REST, an OpenAI server on it, and traffic."""
    patient = tmp_path_factory.mktemp("config") / "loracache.yaml"
    patient.write_text("redis_lookup_ms: 1000\n")  # a loaded machine answers late, and the tests want the hit
    daemon = module_daemon(
        config=patient,
        http="127.0.0.1:0",
        memory="128MiB",
        disk_path=tmp_path_factory.mktemp("disk"),
        disk="512MiB",
        redis=module_redis().url,
    )
    transfer = {
        "kv_connector": "LoRACacheConnector", "kv_connector_module_path": "loracache.connectors.vllm",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "server": daemon.url, "lora_pool": "1MiB", "chunk_tokens": CHUNK, "recompute_if_faster": 0,
        },
    }  # fmt: skip
    more = ("--no-enable-prefix-caching",)
    server = openai_server(tmp_path_factory.mktemp("server") / "log", tiny / "model", transfer, *more)
    traffic = calls = None
    try:
        eventually(server.ready, "the server answers", 180)
        calls = Calls(daemon.http, Path(f"{daemon.socket}.token").read_text().strip())
        traffic = Traffic(server, [("base", [seed * 7 % 500 + n % 300 for n in range(600)]) for seed in range(3)])
        eventually(lambda: traffic.answered >= 3, "traffic flows", 60)
        yield SimpleNamespace(daemon=daemon, server=server, call=calls, traffic=traffic)
    finally:
        if traffic is not None:
            traffic.end()
        server.close()
        if calls is not None:
            calls.close()


@pytest.fixture(autouse=True)
def _traffic_stays_right(world: SimpleNamespace, eventually: Any) -> Iterator[None]:
    yield
    before = world.traffic.answered
    eventually(lambda: world.traffic.answered > before + 1, "requests go on", 60)
    assert not world.traffic.wrong


@pytest.fixture
def prompt(world: SimpleNamespace, prompts: Callable[[int], list[int]], eventually: Any) -> dict[str, Any]:
    """A selector of a prompt of 5 chunks that is in cpu, disk and redis."""
    tokens = prompts(5 * CHUNK + 3)
    world.server.complete("base", tokens)
    selector = {"model": "base", "tokens": tokens}
    eventually(lambda: found(world, selector)["hits"] == 5, "it is stored", 30)
    with world.daemon.client() as client:
        client.flush()
    return selector


def found(world: SimpleNamespace, selector: dict[str, Any]) -> Any:
    return world.call("POST", "/v1/lookup", json={"selector": selector})


def test_a_prompt_is_found_moved_compressed_and_served_from_every_tier(
    world: SimpleNamespace, prompt: dict[str, Any]
) -> None:
    expected = world.server.complete("base", prompt["tokens"])
    assert found(world, prompt)["tokens"] == 5 * CHUNK
    compressed = world.call.change("compress", {"selector": prompt, "tier": "disk"})
    assert compressed["objects"] + compressed["causes"].get("already", 0) == 5
    assert compressed["saved"] > 0
    assert world.call.change("evict", {"selector": prompt, "tiers": ["cpu"]})["objects"] == 5
    assert set(found(world, prompt)["tiers"]) == {"disk"}
    assert world.server.complete("base", prompt["tokens"]) == expected
    assert world.call.change("decompress", {"selector": prompt, "tier": "disk"})["objects"] == 5
    world.call.change("evict", {"selector": prompt, "tiers": ["cpu", "redis"]})
    copied = world.call.change("move", {"selector": prompt, "source": "disk", "tier": "redis"})
    assert copied["objects"] == 5
    world.call.change("evict", {"selector": prompt, "tiers": ["cpu"]})
    assert set(found(world, prompt)["tiers"]) == {"redis"}
    assert world.call.change("admit", {"selector": prompt})["objects"] == 5
    assert set(found(world, prompt)["tiers"]) == {"cpu"}
    assert world.server.complete("base", prompt["tokens"]) == expected


def test_what_is_pinned_outlives_a_clear(world: SimpleNamespace, prompt: dict[str, Any]) -> None:
    pinned = {"selector": prompt, "tier": "cpu"}
    seen = world.call.events(
        lambda: (world.call.change("pin", pinned), world.call.change("clear", {"tiers": ["cpu"]})),
        {"pinned", "evicted"},
    )
    assert seen >= {"pinned", "evicted"}
    assert set(found(world, prompt)["tiers"]) == {"cpu"}
    assert world.call.change("unpin", pinned)["objects"] == 5


def test_an_uploaded_adapter_is_served_by_the_engine_and_leaves_with_its_kv(
    world: SimpleNamespace,
    adapter_folder: Path,
    load: Any,
    tiny: Path,
    prompts: Callable[[int], list[int]],
    eventually: Any,
) -> None:
    name, template = "team/uploaded", "/v1/adapters/{name}"
    parts = [("files", (path.name, path.read_bytes())) for path in sorted(adapter_folder.iterdir())]
    digest = world.call("PUT", f"/v1/adapters/{name}", template, files=parts)["digest"]
    tokens = prompts(3 * CHUNK)
    status, answer = world.server.complete(name, tokens)
    assert status == 200
    merged = load.MergedModel(tiny / "model")
    assert not merged.disagreements(adapter_folder, tokens, answer)
    selector = {"adapter": name, "model": "base", "tokens": tokens}
    eventually(lambda: found(world, selector)["hits"] == 3, "its KV is stored", 30)
    eventually(lambda: found(world, {"adapter": name})["tiers"] == ["gpu"], "the engine says that it serves it", 30)
    shown = world.call("GET", f"/v1/adapters/{name}", template)
    assert (shown["digest"], shown["engines"]) == (digest, 1)
    assert [item["name"] for item in world.call("GET", "/v1/adapters")["adapters"]] == [name]
    nodes = world.call("GET", "/v1/tree")["nodes"]
    (node,) = [node for node in nodes if node["digest"] == digest]
    assert (node["names"], node["engines"]) == ([name], 1)
    (space,) = world.call("GET", "/v1/tree", params={"under": node["id"]})["nodes"]
    assert space["names"] == ["base"]
    (chunk,) = world.call("GET", "/v1/tree", params={"under": space["id"]})["nodes"]
    assert "cpu" in chunk["tiers"]
    held = world.call("GET", "/v1/objects", params={"adapter": name, "model": "*"})["objects"]
    assert chunk["key"] in [item["key"] for item in held]
    assert world.call("POST", f"/v1/adapters/{name}", template, json={"priority": "high"})["priority"] == "high"
    with world.daemon.client() as client:
        client.flush()  # what is being written would stay
    assert world.call("DELETE", f"/v1/adapters/{name}", template)["objects"] >= 4
    assert found(world, selector | {"adapter": digest})["hits"] == 0


def test_operations_are_listed_shown_and_cancelled(world: SimpleNamespace, prompt: dict[str, Any]) -> None:
    template = "/v1/operations/{operation}"
    started = world.call("POST", "/v1/admit", json={"selector": prompt})
    place = f"/v1/operations/{started['id']}"
    assert world.call("GET", place, template, params={"wait": 10})["state"] == "done"
    assert started["id"] in [item["id"] for item in world.call("GET", "/v1/operations")["operations"]]
    assert world.call("DELETE", place, template)["state"] == "done"
    flushed = world.call("POST", "/v1/flush")
    assert flushed["durable"].keys() == flushed["given_up"].keys() == {"disk", "redis"}


def test_health_statistics_metrics_and_settings(world: SimpleNamespace) -> None:
    page = world.call("GET", "/")
    for asset in re.findall(r'(?:src|href)="/?(assets/[^"]+)"', page):
        assert world.call("GET", f"/{asset}", "/assets/{name}")
    assert world.call("GET", "/healthz") == world.call("GET", "/readyz") == {"status": "ok"}
    stats = world.call("GET", "/v1/stats")
    assert stats["tiers"]["cpu"]["objects"] > 0
    assert 'loracache_hits_total{tier="cpu"}' in world.call("GET", "/metrics")
    settings = world.call("GET", "/v1/config")
    assert settings["redis"] == "(set)"
    assert "unix://" not in json.dumps(settings)


def test_a_quota_counts_what_the_engine_has_stored(world: SimpleNamespace) -> None:
    quota = {"kind": "model", "name": "base"}
    assert world.call("PUT", "/v1/quotas", json=quota | {"soft": "1MiB"})["soft"] == 1 << 20
    (row,) = world.call("GET", "/v1/quotas")["quotas"]
    assert row["bytes"] > 0
    world.call("DELETE", "/v1/quotas", params=quota)
    assert world.call("GET", "/v1/quotas") == {"quotas": []}


def test_every_endpoint_was_called(world: SimpleNamespace) -> None:
    """The last: what the tests above called is all there is."""
    assert world.call.made == world.call.document()
