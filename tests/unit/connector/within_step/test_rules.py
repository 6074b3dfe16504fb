# SPDX-License-Identifier: Apache-2.0
"""Which engines may load within a step, and which loads do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loracache.connectors.vllm import LoRACacheConnector
from loracache.connectors.vllm.common import synchronous
from loracache.connectors.vllm.common.groups import KVGroup, Member
from loracache.connectors.vllm.common.options import Options
from loracache.connectors.vllm.common.stats import Tally
from loracache.connectors.vllm.common.synchronous import check_alone, check_synchronous
from loracache.connectors.vllm.plugin import _patch_scheduler
from loracache.connectors.vllm.scheduler.chunks import Chunks, Part
from loracache.connectors.vllm.scheduler.load_or_compute import LoadTimes
from loracache.connectors.vllm.scheduler.within_step import WithinStep
from loracache.errors import ConfigError
from loracache.groups import Need

MIB = 1 << 20


def engine(policy: str = "recompute", stages: int = 1, *, ahead: bool = False) -> Any:
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        scheduler_config=SimpleNamespace(async_scheduling=ahead),
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (engine(ahead=True), "start it with --no-async-scheduling"),
        (engine("fail"), 'kv_load_failure_policy is "fail"; set it to "recompute"'),
        (engine(stages=2), "pipeline_parallel_size is 2"),
    ],
)
def test_an_engine_that_could_not_be_exact_is_refused_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, config: Any, said: str
) -> None:
    monkeypatch.setattr(synchronous, "problem", lambda: "")
    check_synchronous(config, Options())
    with pytest.raises(ConfigError, match="leave layer_by_layer out") as refused:
        check_synchronous(config, Options(layer_by_layer=True))
    assert said in str(refused.value)


def test_releases_that_do_not_show_their_prefix_cache_and_a_plugin_that_is_out_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(synchronous, "problem", lambda: "vLLM did not load the plugin")
    with pytest.raises(ConfigError, match="did not load the plugin"):
        check_synchronous(engine(), Options(layer_by_layer=True))
    monkeypatch.setattr(synchronous, "binds_kv_cache_manager", lambda: False)
    with pytest.raises(ConfigError, match=r"take 0\.32 or later"):
        check_synchronous(engine(), Options(layer_by_layer=True))


def test_beside_others_that_store_it_is_refused() -> None:
    ours = SimpleNamespace(layer_by_layer=True)
    check_alone(ours, ours)
    check_alone(SimpleNamespace(), SimpleNamespace(layer_by_layer=False))

    class Scheduler:
        def __init__(self, connector: Any) -> None:
            self.connector = connector

    module = SimpleNamespace(Scheduler=Scheduler)
    _patch_scheduler(module)
    module.Scheduler(ours)
    with pytest.raises(ConfigError, match="inside a SimpleNamespace: others may store"):
        module.Scheduler(SimpleNamespace(_connectors=[SimpleNamespace(), ours]))


@pytest.mark.parametrize("value", ["yes", 1, 1.0, None])
def test_the_option_is_true_or_false(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"layer_by_layer=.* must be a bool"):
        Options.parse({"layer_by_layer": value})
    assert Options.parse({"layer_by_layer": True}).layer_by_layer
    with pytest.raises(ConfigError, match="chunk_tokens=True must be a int"):
        Options.parse({"chunk_tokens": True})


def test_a_manager_that_is_not_as_we_know_it_is_refused() -> None:
    storing = SimpleNamespace(kept=SimpleNamespace(pool=None))
    connector = object.__new__(LoRACacheConnector)
    connector.layer_by_layer = True
    connector._scheduler = SimpleNamespace(within_step=WithinStep(LoadTimes(), Tally()), storing=storing)  # type: ignore[assignment]
    manager = SimpleNamespace(enable_caching=True, block_pool=None)
    with pytest.raises(ConfigError, match=r"prefix cache is not as we know it.*leave layer_by_layer out"):
        connector.bind_kv_cache_manager(manager)


def chunks_of(*groups: KVGroup, drafts: bool = False) -> Chunks:
    parts = [Part(group, ("s",), 4096) for group in groups]
    chain = parts[0] if groups[0].need is Need.ALL else None
    return Chunks(32, chain, tuple(parts[chain is not None :]), "layout", drafts)


@pytest.mark.parametrize(
    ("chunks", "may"),
    [
        (chunks_of(KVGroup(Need.ALL, 0, (Member(0, 16, ("a",)),))), True),
        (chunks_of(KVGroup(Need.ALL, 0, (Member(0, 16, ("a",)),)), drafts=True), False),
        (chunks_of(KVGroup(Need.WINDOW, 64, (Member(0, 16, ("a",)),), "w")), False),
        (chunks_of(KVGroup(Need.ALL, 0, (Member(0, 16, ("a",)), Member(1, 16, ("b",))), "f")), False),
        (
            chunks_of(
                KVGroup(Need.ALL, 0, (Member(0, 16, ("a",)),), "f"),
                KVGroup(Need.STATE, 0, (Member(1, 16, ("b",)),), "s"),
            ),
            False,
        ),
    ],
    ids=["plain", "drafts", "windows", "two groups", "states"],
)
@pytest.mark.parametrize("image", [False, True])
def test_which_loads_may_be_within_a_step(
    monkeypatch: pytest.MonkeyPatch, chunks: Chunks, may: bool, image: bool
) -> None:
    within = WithinStep(LoadTimes(), Tally())
    monkeypatch.setattr(within, "_pays", lambda nbytes: True)
    state: Any = SimpleNamespace(
        request=SimpleNamespace(num_tokens=100, mm_features=["an image"] if image else []),
        local_tokens=16,
        hits=("cpu",) * 3,
    )
    assert within.tokens(state, chunks, 80, MIB) == 0, "nothing is known of the prefix cache"
    within.prefix_cache = SimpleNamespace()  # type: ignore[assignment]
    assert within.tokens(state, chunks, 80, MIB) == (80 if may and not image else 0)
    assert state.within_step == (may and not image)
    assert within.tokens(state, chunks, 80, 4 * 3 * 4096 - 1) == 0, "it is more than a quarter of the memory"
    state.hits = ("cpu", "cpu", "disk")
    assert within.tokens(state, chunks, 80, MIB) == 0
    assert not state.within_step


def test_whoever_found_what_a_failed_step_computed_when_it_was_planned_does_not_store_it() -> None:
    """vLLM hands on what a step computes to requests of the same step."""

    def state(start: int, blocks: list[int]) -> Any:
        request = SimpleNamespace(num_computed_tokens=start)
        return SimpleNamespace(request=request, blocks=[blocks], sound_tokens=1000)

    states = {"loads": state(32, [1, 2, 3]), "computes": state(16, [4, 5, 6, 7]), "found": state(48, [4, 5, 6, 8])}
    out: set[int] = set()
    no_more: list[str] = []
    within = WithinStep(LoadTimes(), Tally())
    within.prefix_cache = SimpleNamespace(take_out=out.update, put_in_no_more=no_more.append)  # type: ignore[assignment]
    plan: Any = SimpleNamespace(step=5, loads=[SimpleNamespace(request_id="loads", within_step=True)])
    within.begin_step(plan, list(states), states)
    for each in states.values():
        each.request.num_computed_tokens += 16
    states["loads"].request.num_computed_tokens = 16  # vLLM has taken it back
    chunks = chunks_of(KVGroup(Need.ALL, 0, (Member(0, 16, ("a",)),)))
    result = within.end_step(states, chunks, 1)
    assert result is not None
    assert result.spoilt == states.keys()
    assert out == {3, 5, 6, 7, 8}
    assert {name: each.sound_tokens for name, each in states.items()} == {"loads": 1000, "computes": 16, "found": 16}
    assert no_more == ["computes", "found"]


def step_of(within: WithinStep, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from loracache.connectors.vllm.scheduler import within_step

    clock = [1.0]
    monkeypatch.setattr(within_step, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    within.begin_step(SimpleNamespace(loads=[], step=1), ["r"], {})  # type: ignore[arg-type]
    clock[0] += seconds
    within.end_step({}, None, 1)


def test_a_load_is_within_a_step_where_it_takes_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    times = LoadTimes()
    within = WithinStep(times, Tally())
    assert not within._pays(40 * MIB)  # nothing was seen: 10 ms at 5 GB/s
    assert within._pays(60 * MIB)
    for _ in range(5):
        step_of(within, 0.030, monkeypatch)
    assert not within._pays(60 * MIB)
    assert within._pays(200 * MIB)
    step_of(within, 3.0, monkeypatch)  # one long step changes little
    assert within._pays(200 * MIB)
    for number in range(1, 5):
        times.began(f"r{number}", ["cpu"] * number, 64 * MIB)
        times.took(f"r{number}", 0.001 * number)
        times.over(f"r{number}")
    assert not within._pays(200 * MIB), "loads are faster than was thought"
