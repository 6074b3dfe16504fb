# SPDX-License-Identifier: Apache-2.0
"""Adapters of any rank share a pool that cannot hold them all, and every token is the merged weights'."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loracache.wire.protocol import Report

RANKS = (8, 12, 16, 32, 48, 64, 1, 24)
MANY = 64
OPTIONS = {
    "enable_lora": True, "max_loras": 8, "max_lora_rank": 64, "max_num_seqs": 16, "max_model_len": 1024,
    "max_num_batched_tokens": 1024, "worker_extension_cls": "pool_extension.PoolExtension",
}  # fmt: skip


@pytest.fixture(scope="module")
def many(tiny: Path, model_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """64 adapters of mixed ranks, some of a few modules only, some scaled as rsLoRA or by patterns."""
    folder = tmp_path_factory.mktemp("many")
    spec = model_maker.PRESETS["tiny"]
    made = []
    for number in range(MANY):
        path = folder / f"adapter-{number}"
        targets = {"targets": ("q_proj", "v_proj")} if number % 7 == 3 else {}
        model_maker.make_adapter(path, spec, rank=RANKS[number % len(RANKS)], seed=500 + number, **targets)
        if number % 5 == 2:
            configure(path, use_rslora=True, lora_alpha=3)
        if number % 9 == 4:
            configure(path, alpha_pattern={"v_proj": 5}, lora_alpha=24)
        made.append(path)
    return made


def configure(path: Path, **settings: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def own_bytes(paths: list[Path]) -> int:
    return sum(tensor.nbytes for path in paths for tensor in load_file(path / "adapter_model.safetensors").values())


@pytest.fixture(scope="module")
def pooled(
    module_daemon: Any, engine_factory: Any, many: list[Path], tiny: Path, load: Any, host_path: str
) -> SimpleNamespace:
    """An engine whose pool holds half of the 64 adapters, on a daemon with a disk."""
    daemon = module_daemon(memory="256MiB")
    engine = engine_factory(
        {"server": daemon.url, "lora_pool": str(own_bytes(many) // 2), "lora_prefetch": 8},
        {"PYTHONPATH": host_path},
        **OPTIONS,
    )
    adapters = [load.Adapter(f"many-{number}", 100 + number, str(path)) for number, path in enumerate(many)]
    return SimpleNamespace(engine=engine, daemon=daemon, adapters=adapters, model=load.MergedModel(tiny / "model"))


def check(pooled: Any, prompt: list[int], adapter: Any, answer: Any) -> None:
    assert not answer.error, answer.error
    path = Path(adapter.path) if adapter is not None else None
    wrong = pooled.model.disagreements(path, prompt, answer.tokens)
    assert not wrong, f"{adapter}: {wrong}"


def audit(pooled: Any) -> dict[str, Any]:
    state = pooled.engine.rpc("pool_state")
    assert not state["problems"], state
    return dict(state)


def test_an_adapter_that_others_ask_for_is_on_free_pages_ahead_of_its_request(
    pooled: Any, prompts: Callable[[int], list[int]], eventually: Any
) -> None:
    """The first test here: the pool is empty still. The other engine is a client that reports as one does."""
    adapter = pooled.adapters[5]
    busy = pooled.engine.start(prompts(8), max_tokens=900)
    with pooled.daemon.client() as client:
        digest = client.add_adapter(adapter.path)
        client.connection.call(Report({}, 1, 0, bytes.fromhex(digest) * 9), 10.0)
        eventually(lambda: pooled.daemon.status()["adapters"]["gpu"] == 1, "it comes onto pages by itself", 60)

    def counted(name: str) -> int:
        return int(pooled.daemon.status()["counters"].get(f"client.adapter.{name}", 0))

    eventually(lambda: counted("prefetch") == 1, "the engine reports it")
    assert counted("load") == 1
    prompt = prompts(20)
    check(pooled, prompt, adapter, pooled.engine.ask(prompt, lora=adapter, max_tokens=6))
    pooled.engine.abort(busy)
    assert pooled.engine.result(busy).aborted
    eventually(lambda: counted("hit") + counted("miss") == 1, "it reports the request")
    assert counted("load") == 1, "nothing was copied in for the request"


def test_tokens_of_64_adapters_in_mixed_batches_are_those_of_merged_weights(
    pooled: Any, prompts: Callable[[int], list[int]]
) -> None:
    work = [*pooled.adapters, *[None] * 16, *pooled.adapters]
    random.Random(3).shuffle(work)
    asked = [prompts(20 + place % 30) for place in range(len(work))]
    calls = [
        pooled.engine.start(tokens, lora=adapter, max_tokens=6) for tokens, adapter in zip(asked, work, strict=True)
    ]
    for call, tokens, adapter in zip(calls, asked, work, strict=True):
        check(pooled, tokens, adapter, pooled.engine.result(call))
    state = audit(pooled)
    assert state["dense_bytes"] == 0
    assert len(state["resident"]) < MANY


def test_a_full_pool_takes_little_more_than_its_adapters_own_bytes(pooled: Any, prompts: Any) -> None:
    for adapter in pooled.adapters[:20]:
        pooled.engine.ask(prompts(8), lora=adapter, max_tokens=1)
    state = audit(pooled)
    with pooled.daemon.client() as client:
        kept = [client.show_adapter(digest) for digest in state["resident"]]
    used = (state["pages"] - state["free"]) * state["page_bytes"]
    assert used <= 1.05 * sum(adapter.size for adapter in kept)


def test_what_is_said_of_an_adapter_names_the_engine_and_the_kv_that_depends_on_it(
    pooled: Any, prompts: Any, eventually: Any
) -> None:
    adapter = pooled.adapters[1]
    tokens = prompts(300)
    cold = pooled.engine.ask(tokens, lora=adapter)
    pooled.engine.settle(pooled.daemon)
    with pooled.daemon.client() as client:
        client.add_adapter(adapter.path, "said")
        found = client.show_adapter("said")
        assert "cpu" in found.tiers
        assert found.kv["cpu"][0] == 2
        eventually(lambda: "gpu" in client.show_adapter("said").tiers, "the engine tells what it holds")
    again = pooled.engine.ask(tokens, lora=adapter)
    assert again.tokens == cold.tokens
    assert again.cached == 256


def test_a_rank_over_the_engines_is_refused_where_it_is_added_and_where_it_is_used(
    pooled: Any, prompts: Any, model_maker: Any, tmp_path: Path, load: Any
) -> None:
    model_maker.make_adapter(tmp_path, model_maker.PRESETS["tiny"], rank=256, seed=9)
    high = load.Adapter("high", 900, str(tmp_path))
    assert "max_lora_rank=64" in pooled.engine.add_lora(high)
    answer = pooled.engine.result(pooled.engine.start(prompts(8), lora=high))
    assert answer.reason == "error"
    assert "is over max_lora_rank=64; raise that" in answer.why
    check(pooled, tokens := prompts(8), pooled.adapters[0], pooled.engine.ask(tokens, lora=pooled.adapters[0]))


def spoiled(folder: Path, source: Path) -> dict[str, str]:
    """Adapters that cannot be served, and what is said of each."""

    def copy(name: str) -> Path:
        shutil.copytree(source, folder / name)
        return folder / name

    weights = load_file(source / "adapter_model.safetensors")
    first = sorted(weights)[0]
    (copy("pickle") / "adapter_model.safetensors").rename(folder / "pickle" / "adapter_model.bin")
    save_file(weights | {first: weights[first] * float("nan")}, copy("nan") / "adapter_model.safetensors")
    save_file(
        {name.replace("q_proj", "unheard_of"): tensor for name, tensor in weights.items()},
        copy("unknown") / "adapter_model.safetensors",
    )
    configure(folder / "unknown", target_modules=None)
    configure(copy("dora"), use_dora=True)
    data = (source / "adapter_model.safetensors").read_bytes()
    (copy("truncated") / "adapter_model.safetensors").write_bytes(data[:-100])
    return {
        "pickle": "pickle", "nan": "NaN", "unknown": "unheard_of", "dora": "use_dora", "truncated": "not a safetensors",
        "missing": "missing",
    }  # fmt: skip


def test_adapters_that_cannot_be_served_end_their_own_requests_only(
    pooled: Any, prompts: Any, many: list[Path], tmp_path: Path, load: Any
) -> None:
    for number, (name, reason) in enumerate(spoiled(tmp_path, many[0]).items()):
        bad = load.Adapter(name, 950 + number, str(tmp_path / name))
        tokens = prompts(16)
        calls = [pooled.engine.start(tokens, lora=adapter) for adapter in (bad, pooled.adapters[2])]
        bad_answer, good_answer = [pooled.engine.result(call) for call in calls]
        assert bad_answer.reason == "error", name
        assert reason in bad_answer.why
        check(pooled, tokens, pooled.adapters[2], good_answer)
        assert reason in pooled.engine.add_lora(bad)
    assert not audit(pooled)["problems"]


def with_ends(folder: Path, source: Path, spec: Any) -> Path:
    """The adapter at `source`, with the embedding and the head adapted too."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    weights, rank = load_file(folder / "adapter_model.safetensors"), config["r"]
    rng = torch.Generator().manual_seed(5)
    embedding, head = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
    weights |= {
        f"{embedding}.lora_embedding_A": torch.randn(rank, spec.vocab, generator=rng) * 0.3,
        f"{embedding}.lora_embedding_B": torch.randn(spec.hidden, rank, generator=rng) * 0.3,
        f"{head}.lora_A.weight": torch.randn(rank, spec.hidden, generator=rng) * 0.1,
        f"{head}.lora_B.weight": torch.randn(spec.vocab, rank, generator=rng) * 0.3,
    }
    save_file(weights, folder / "adapter_model.safetensors")
    configure(folder, target_modules=[*config["target_modules"], "embed_tokens", "lm_head"])
    return folder


def test_adapters_of_another_base_are_refused_with_both_shapes_and_harm_nobody(
    pooled: Any, prompts: Any, model_maker: Any, tmp_path: Path, load: Any
) -> None:
    spec = model_maker.PRESETS["tiny"]
    neighbour, tokens = pooled.adapters[6], prompts(24)
    before = pooled.engine.ask(tokens, lora=neighbour)
    check(pooled, tokens, neighbour, before)
    model_maker.make_adapter(tmp_path / "wider", replace(spec, hidden=2 * spec.hidden), rank=64)
    model_maker.make_adapter(tmp_path / "narrower", replace(spec, hidden=spec.hidden // 2), rank=8)
    model_maker.make_adapter(tmp_path / "plain", spec, rank=8)
    with_ends(tmp_path / "resized", tmp_path / "plain", replace(spec, vocab=spec.vocab + 8))
    for number, (name, width) in enumerate(
        {"wider": 2 * spec.hidden, "narrower": spec.hidden // 2, "resized": spec.vocab + 8}.items()
    ):
        bad = load.Adapter(name, 930 + number, str(tmp_path / name))
        said = pooled.engine.add_lora(bad)
        assert f"{width})" in said or f"({width}," in said, said
        assert "this model needs" in said
        answer = pooled.engine.result(pooled.engine.start(prompts(8), lora=bad))
        assert answer.reason == "error"
        assert "this model needs" in answer.why
    assert pooled.engine.ask(tokens, lora=neighbour, salt="again").tokens == before.tokens
    assert not audit(pooled)["problems"]


def test_adapters_of_embeddings_and_of_the_head_work(
    pooled: Any, prompts: Any, model_maker: Any, tmp_path: Path, load: Any
) -> None:
    spec = model_maker.PRESETS["tiny"]
    model_maker.make_adapter(tmp_path / "plain", spec, rank=8, seed=77, targets=("o_proj",))
    with_ends(tmp_path / "ends", tmp_path / "plain", spec)
    ends = load.Adapter("ends", 970, str(tmp_path / "ends"))
    asked = [(prompts(30), adapter) for adapter in (ends, None, pooled.adapters[4], ends)]
    calls = [pooled.engine.start(tokens, lora=adapter) for tokens, adapter in asked]
    for call, (tokens, adapter) in zip(calls, asked, strict=True):
        check(pooled, tokens, adapter, pooled.engine.result(call))


def test_a_pinned_adapter_stays_on_its_pages(pooled: Any, prompts: Any) -> None:
    pinned = pooled.adapters[5]
    assert "on no pages" in pooled.engine.pin_lora(4242)
    pooled.engine.ask(prompts(8), lora=pinned)
    assert not pooled.engine.pin_lora(pinned.id)
    with pooled.daemon.client() as client:
        digest = client.add_adapter(pinned.path)
    for adapter in pooled.adapters:
        pooled.engine.ask(prompts(8), lora=adapter, max_tokens=1)
    assert digest in audit(pooled)["resident"]


def test_requests_aborted_at_any_time_leave_no_page_behind(pooled: Any, prompts: Any) -> None:
    rng = random.Random(8)
    for _ in range(6):
        calls = [pooled.engine.start(prompts(60), lora=rng.choice(pooled.adapters), max_tokens=40) for _ in range(12)]
        for call in calls[::2]:
            pooled.engine.abort(call)
        for call in calls:
            pooled.engine.result(call)
    check(pooled, tokens := prompts(9), pooled.adapters[9], pooled.engine.ask(tokens, lora=pooled.adapters[9]))
    audit(pooled)


def test_a_pool_for_two_gives_everybody_a_turn(
    engine_factory: Any,
    many: list[Path],
    prompts: Any,
    pooled: Any,
    load: Any,
    host_path: str,
    model_maker: Any,
    tmp_path: Path,
) -> None:
    """Small adapters keep coming; the large one, which needs most of the pool, is served all the same. What is larger
    than the pool is refused where it is added and where it is used."""
    small, larger = many[0], many[5]  # ranks 8 and 64
    pool = own_bytes([small, larger])
    oversized = load.Adapter(
        "oversized", 3, str(with_ends(tmp_path / "oversized", larger, model_maker.PRESETS["tiny"]))
    )
    engine = engine_factory(
        {"server": pooled.daemon.url, "lora_pool": str(pool * 9 // 10)}, {"PYTHONPATH": host_path}, **OPTIONS
    )
    small_ones = [load.Adapter(f"small-{number}", 10 + number, str(many[number])) for number in (0, 8, 16, 24, 32)]
    big = load.Adapter("large", 2, str(larger))
    calls = [(tokens := prompts(20), lora, engine.start(tokens, lora=lora, max_tokens=30)) for lora in small_ones * 2]
    calls.append((tokens := prompts(20), big, engine.start(tokens, lora=big)))
    calls += [(tokens := prompts(20), lora, engine.start(tokens, lora=lora, max_tokens=30)) for lora in small_ones * 6]
    for tokens, lora, call in calls:
        check(pooled, tokens, lora, engine.result(call))
    assert "make lora_pool larger" in engine.add_lora(oversized)
    assert engine.result(engine.start(prompts(8), lora=oversized)).reason == "error"
    check(pooled, tokens := prompts(8), big, engine.ask(tokens, lora=big))
    engine.close()


def test_a_killed_daemon_stops_nobody(pooled: Any, prompts: Any, many: list[Path], load: Any) -> None:
    """Last: those that are resident go on, those that are not come from their folders."""
    pooled.daemon.stop(signal.SIGKILL)
    numbers = itertools.count(2000)
    for adapter in [
        *pooled.adapters[:12],
        *(load.Adapter(path.name, next(numbers), str(path)) for path in many[12:24]),
    ]:
        tokens = prompts(12)
        check(pooled, tokens, adapter, pooled.engine.ask(tokens, lora=adapter))
    nobody = load.Adapter("nobody", 3000, f"loracache:{'ab' * 32}")
    answer = pooled.engine.result(pooled.engine.start(prompts(8), lora=nobody))
    assert answer.reason == "error"
    audit(pooled)
