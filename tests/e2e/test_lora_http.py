# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with a pool: model=NAME finds what only the cache knows, and a name stands for what it points to now."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loracache.adapters.payload import adapter_digest
from loracache.errors import Rejected


@pytest.fixture(scope="module")
def adapters_of_two(tiny: Path, model_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("two")
    for number, rank in enumerate((8, 32, 16, 24)):
        model_maker.make_adapter(folder / str(number), model_maker.PRESETS["tiny"], rank=rank, seed=900 + number)
    return [folder / str(number) for number in range(4)]


@pytest.fixture(scope="module")
def cache(module_daemon: Any, module_redis: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    options = {"memory": "64MiB", "disk_path": tmp_path_factory.mktemp("disk"), "disk": "256MiB"}
    options["redis"] = module_redis().url
    daemon = module_daemon(**options)
    return SimpleNamespace(daemon=daemon, options=options | {"socket": daemon.socket}, client=daemon.client)


@pytest.fixture(scope="module")
def server(
    cache: Any,
    tiny: Path,
    adapters_of_two: list[Path],
    eventually: Any,
    openai_server: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    transfer = {
        "kv_connector": "LoRACacheConnector", "kv_connector_module_path": "loracache.connectors.vllm",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"server": cache.daemon.url, "lora_pool": "1MiB"},
    }  # fmt: skip
    running = openai_server(
        tmp_path_factory.mktemp("server") / "log",
        tiny / "model",
        transfer,
        "--lora-modules",
        f"static={adapters_of_two[2]}",
    )
    try:
        eventually(running.ready, "the server answers", 180)
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def merged(load: Any, tiny: Path) -> Any:
    return load.MergedModel(tiny / "model")


@pytest.fixture
def serves(server: Any, merged: Any, prompts: Callable[[int], list[int]]) -> Callable[[str, Path | None], None]:
    """serves(name, folder): a request for `name` is answered with that adapter."""

    def check(name: str, folder: Path | None) -> None:
        tokens = prompts(20)
        status, answer = server.complete(name, tokens)
        assert status == 200, answer
        assert not merged.disagreements(folder, tokens, answer)

    return check


def test_lora_modules_given_by_path_go_through_the_cache(
    server: Any, cache: Any, serves: Any, adapters_of_two: list[Path], eventually: Any
) -> None:
    with cache.client() as client:
        eventually(lambda: client.show_adapter(adapter_digest(str(adapters_of_two[2]))), "it is fetched ahead")
    serves("base", None)
    serves("static", adapters_of_two[2])
    with cache.client() as client:
        held = client.status()["tiers"]["cpu"]["objects"]
        client.add_adapter(str(adapters_of_two[2]), "same")
        assert client.show_adapter("same").tiers[0] == "gpu" or "cpu" in client.show_adapter("same").tiers
        assert client.status()["tiers"]["cpu"]["objects"] == held


def test_a_name_that_only_the_cache_knows_is_served_and_repointed_between_two_requests(
    server: Any, cache: Any, serves: Any, adapters_of_two: list[Path]
) -> None:
    first, second, *_ = adapters_of_two
    with cache.client() as client:
        assert server.complete("team/assistant", [300, 301])[0] == 404
        client.add_adapter(str(first), "team/assistant")
        serves("team/assistant", first)
        for turn in range(6):
            client.add_adapter(str((second, first)[turn % 2]), "team/assistant")
            serves("team/assistant", (second, first)[turn % 2])
        client.remove_adapter("team/assistant")
        assert server.complete("team/assistant", [300, 301])[0] == 404


def test_requests_under_way_keep_the_content_they_began_with(
    server: Any, cache: Any, serves: Any, merged: Any, prompts: Any, adapters_of_two: list[Path]
) -> None:
    first, second, *_ = adapters_of_two
    tokens = prompts(20)
    with cache.client() as client:
        client.add_adapter(str(first), "busy")
        stream = server.stream("busy", tokens, 200)
        answer = next(stream)
        client.add_adapter(str(second), "busy")
        serves("busy", second)
        answer += [token for part in stream for token in part]
    assert len(answer) == 200
    assert not merged.disagreements(first, tokens, answer)


def test_a_name_given_on_another_machine_is_served_from_the_redis_that_they_share(
    server: Any, cache: Any, module_daemon: Any, serves: Any, model_maker: Any, tmp_path: Path
) -> None:
    for number in range(2):
        folder = tmp_path / str(number)
        model_maker.make_adapter(folder, model_maker.PRESETS["tiny"], rank=20, seed=950 + number)
        there = module_daemon(memory="64MiB", redis=cache.options["redis"])
        with there.client() as client:
            digest = client.add_adapter(str(folder), "from/elsewhere")
            client.flush()
        there.stop(signal.SIGKILL)
        kept = folder.rename(tmp_path / f"kept-{number}")  # no folder of that name is here
        serves("from/elsewhere", kept)
        with cache.client() as client:
            assert client.find_adapter("from/elsewhere") == digest


def test_a_folder_is_served_as_it_was_when_it_was_loaded_last(
    server: Any, merged: Any, prompts: Callable[[int], list[int]], adapters_of_two: list[Path], tmp_path: Path
) -> None:
    """The same tokens all the time: whatever vLLM's own prefix cache has of them must not be taken for the new."""
    first, second, third, fourth = adapters_of_two
    folder = Path(shutil.copytree(first, tmp_path / "changing"))
    tokens = prompts(400)

    def load(**more: Any) -> None:
        answer = server.call("/v1/load_lora_adapter", {"lora_name": "changing", "lora_path": str(folder)} | more)
        assert answer[0] == 200, answer

    def put(source: Path) -> None:
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    def check(content: Path) -> None:
        for _ in range(2):
            status, answer = server.complete("changing", tokens)
            assert status == 200, answer
            assert not merged.disagreements(content, tokens, answer)

    load()
    check(first)
    put(second)
    check(first)  # nobody asked for the new content
    load(load_inplace=True)
    check(second)
    put(third)
    check(second)  # and nobody did again
    server.call("/v1/unload_lora_adapter", {"lora_name": "changing"})
    load()
    check(third)
    put(fourth)
    load(load_inplace=True)
    check(fourth)


def test_why_an_adapter_is_not_served_stands_in_the_answer(
    server: Any, cache: Any, model_maker: Any, adapters_of_two: list[Path], serves: Any, tmp_path: Path
) -> None:
    """400 for what can never work: where it is loaded by path, and in a request for what only the cache knows."""
    spec = model_maker.PRESETS["tiny"]
    model_maker.make_adapter(tmp_path / "high", spec, rank=256, seed=1)
    model_maker.make_adapter(tmp_path / "endless", spec, rank=8, seed=2)
    weights = load_file(tmp_path / "endless" / "adapter_model.safetensors")
    name = sorted(weights)[0]
    weights[name][0, 0] = float("inf")
    save_file(weights, tmp_path / "endless" / "adapter_model.safetensors")
    for folder, why in (("high", "is over max_lora_rank=64; raise that"), ("endless", f"'{name}' has an infinity")):
        given = {"lora_name": folder, "lora_path": str(tmp_path / folder)}
        status, answer = server.call("/v1/load_lora_adapter", given)
        assert (status, why in answer) == (400, True), answer
        assert server.complete(folder, [300, 301])[0] == 404
    with cache.client() as client:
        with pytest.raises(Rejected, match=f"'{name}' has an infinity"):
            client.add_adapter(str(tmp_path / "endless"), "endless")
        client.add_adapter(str(tmp_path / "high"), "high")
    status, answer = server.complete("high", [300, 301])
    assert (status, "is over max_lora_rank=64; raise that" in answer) == (400, True), answer
    serves("static", adapters_of_two[2])


def test_what_is_no_name_is_not_found(server: Any) -> None:
    for name in ("unheard-of", "../../etc/passwd", "x" * 5000, "loracache:" + "ab" * 32, "\u2603", "a b"):
        assert server.complete(name, [300, 301])[0] in (400, 404), name
    assert server.complete("base", [300, 301])[0] == 200


def test_a_frozen_daemon_stops_no_request_for_a_name_that_was_served_before(
    server: Any, cache: Any, serves: Any, adapters_of_two: list[Path], prompts: Any
) -> None:
    first, second, *_ = adapters_of_two
    with cache.client() as client:
        client.add_adapter(str(first), "frozen")
        serves("frozen", first)
        cache.daemon.process.send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            with ThreadPoolExecutor(8) as pool:
                names = ["frozen", "base", "static", "unheard-of"] * 4
                found = list(pool.map(lambda name: server.complete(name, prompts(20))[0], names))
            assert time.monotonic() - began < 10
            assert found == [200, 200, 200, 404] * 4
            serves("frozen", first)
        finally:
            cache.daemon.process.send_signal(signal.SIGCONT)
        client.add_adapter(str(second), "frozen")
        time.sleep(4)  # by then its return is noticed
        serves("frozen", second)


def test_names_survive_the_daemon_and_its_successor_serves_what_they_point_to(
    server: Any, cache: Any, module_daemon: Any, serves: Any, adapters_of_two: list[Path]
) -> None:
    """Last: nobody else's requests fail for it."""
    with cache.daemon.client() as client:
        client.add_adapter(str(adapters_of_two[3]), "kept")
        client.flush()
    cache.daemon.stop(signal.SIGKILL)
    serves("base", None)
    serves("static", adapters_of_two[2])
    module_daemon(**cache.options)
    serves("kept", adapters_of_two[3])
