# SPDX-License-Identifier: Apache-2.0
"""Models whose layers do not all need all of a prefix: how far a hit reaches, what is loaded, what is kept.

Full attention, and a window of 32 tokens: behind each chunk of 32 it is the chunk before. Or states.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loracache.connectors.vllm.common.groups import KVGroup, Member
from loracache.connectors.vllm.common.messages import NOT_LOADED, ChunkBlocks, WorkerNews
from loracache.groups import Need
from loracache.keys import object_key

BLOCK, CHUNK = 16, 32
FULL = KVGroup(Need.ALL, 0, (Member(0, BLOCK, ("a",)),), "all")
WINDOW = KVGroup(Need.WINDOW, 32, (Member(1, BLOCK, ("b",)), Member(2, BLOCK, ("c",))), "window")
STATE = KVGroup(Need.STATE, 0, (Member(1, CHUNK, ("b",)),), "state")


class Pool:
    """vLLM's BlockPool, as far as references go."""

    def __init__(self) -> None:
        self.num_gpu_blocks = 800
        self.blocks = [SimpleNamespace(block_id=number, references=0) for number in range(800)]

    def touch(self, blocks: Any) -> None:
        for block in blocks:
            block.references += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            block.references -= 1
            assert block.references >= 0

    @property
    def held(self) -> set[int]:
        return {block.block_id for block in self.blocks if block.references}


@pytest.fixture
def windows(make_driver: Any) -> Any:
    driver = make_driver(groups=[FULL, WINDOW])
    driver.side.storing.kept.pool = Pool()
    return driver


@pytest.fixture
def states(make_driver: Any) -> Any:
    driver = make_driver(groups=[FULL, STATE])
    driver.side.storing.kept.pool = Pool()
    return driver


def hold(driver: Any, request: Any, chain: int, beside: dict[int, str], name: str = "window") -> list[bytes]:
    """The daemon holds so many chunks of full attention, and these objects beside them."""
    keys: list[bytes] = driver.keys(request)
    for key in keys[:chain]:
        driver.link.tiers[object_key(key, "all/all")] = "cpu"
    for number, tier in beside.items():
        driver.link.tiers[object_key(keys[number], f"all/{name}")] = tier
    return keys


@pytest.mark.parametrize(
    ("chain", "beside", "hit"),
    [
        (5, [0, 1, 2, 3, 4], 5),
        (5, [0, 1, 3], 4),  # behind 5 chunks the window is chunk 4, which is not there
        (5, [4], 5),
        (3, [4], 0),
        (5, [], 0),
        (0, [0, 1, 2, 3, 4], 0),
    ],
)
def test_a_hit_reaches_to_the_last_chunk_behind_which_all_layers_can_go_on(
    windows: Any, make_request: Any, chain: int, beside: list[int], hit: int
) -> None:
    request = make_request("a", 5 * CHUNK + 3)
    hold(windows, request, chain, dict.fromkeys(beside, "cpu"))
    assert windows.arrive(request) == ((hit * CHUNK, True) if hit else (0, False))
    assert bool(windows.link.leases) == bool(hit)


def test_the_last_token_is_computed_whatever_is_held(windows: Any, make_request: Any) -> None:
    """A state behind it, or a window that has moved, cannot be taken back by a token."""
    request = make_request("a", 5 * CHUNK)
    hold(windows, request, 5, dict.fromkeys(range(5), "cpu"))
    assert windows.arrive(request) == (4 * CHUNK, True)


def test_only_what_is_loaded_is_held(windows: Any, make_request: Any) -> None:
    request = make_request("a", 5 * CHUNK + 3)
    keys = hold(windows, request, 5, {0: "cpu", 1: "cpu", 2: "cpu"})
    assert windows.arrive(request) == (3 * CHUNK, True)
    chain = [object_key(key, "all/all") for key in keys[:3]]
    assert windows.link.prefetched == [*chain, object_key(keys[2], "all/window")]


def test_a_load_has_the_chain_and_the_last_window(windows: Any, make_request: Any) -> None:
    """The engine has the first block itself: of the chain its blocks in the prefix cache, of the windows none."""
    request = make_request("a", 3 * CHUNK + 3)
    keys = hold(windows, request, 3, {2: "disk"})
    assert windows.arrive(request, BLOCK) == (3 * CHUNK - BLOCK, True)
    tables = [-1, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 14, 15, 16], [0, 0, 0, 0, 24, 25, 26]
    windows.side.planned_load(request, windows.tables_of(*tables), 3 * CHUNK - BLOCK)
    (load,) = windows.step().loads
    assert [(chunk.key, chunk.blocks, chunk.first, chunk.group) for chunk in load.chunks] == [
        (keys[0], (1,), BLOCK, 0),
        (keys[1], (2, 3), 0, 0),
        (keys[2], (4, 5), 0, 0),
        (keys[2], (14, 15, 24, 25), 0, 1),
    ]
    assert windows.side.load_tiers("a") == ("cpu", "cpu", "cpu", "disk")
    assert windows.link.prefetched[-1:] == [object_key(keys[2], "all/window")]


def test_what_the_engine_has_of_a_window_is_not_loaded(windows: Any, make_request: Any) -> None:
    request = make_request("a", 3 * CHUNK + 3)
    keys = hold(windows, request, 3, {2: "cpu"})
    windows.arrive(request, 5 * BLOCK)
    tables = [-1, -1, -1, -1, -1, 5, 6], [0, 0, 0, 0, -1, 15, 16], [0, 0, 0, 0, -1, 25, 26]
    windows.side.planned_load(request, windows.tables_of(*tables), BLOCK)
    (load,) = windows.step().loads
    assert [(chunk.key, chunk.blocks, chunk.first, chunk.group) for chunk in load.chunks] == [
        (keys[2], (5,), BLOCK, 0),
        (keys[2], (15, 25), BLOCK, 1),
    ]


@pytest.mark.parametrize("window", [[-1, 15], [15, -1]])
def test_a_load_that_lacks_blocks_cannot_come(window: list[int], windows: Any, make_request: Any) -> None:
    """Better computed again than written where others read."""
    request = make_request("a", 3 * CHUNK + 3)
    hold(windows, request, 3, {2: "cpu"})
    windows.arrive(request)
    tables = [1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, *window, 16], [0, 0, 0, 0, 24, 25, 26]
    windows.side.planned_load(request, windows.tables_of(*tables), 3 * CHUNK)
    plan = windows.step()
    assert [load.chunks for load in plan.loads] == [()]
    assert plan.void == {"a"}
    windows.side.take_news(WorkerNews(loaded={"a": 0.1}))
    windows.side.finished_loading({"a"}, set(), {"a"})  # and nothing is learnt from it


def test_of_smaller_blocks_those_are_loaded_that_are_needed(make_driver: Any, make_request: Any) -> None:
    """vLLM keeps none of the first one where another member's block begins in it that is kept."""
    wide = Member(1, CHUNK, ("wide",))
    driver = make_driver(groups=[FULL, KVGroup(Need.WINDOW, 20, (wide, Member(2, BLOCK, ("narrow",))), "window")])
    request = make_request("a", 2 * CHUNK + 3)
    keys = hold(driver, request, 2, {1: "cpu"})
    driver.arrive(request)
    driver.side.planned_load(request, driver.tables_of([1, 2, 3, 4, 5], [0, 12, 13], [0, 0, 0, 24, 25]), 2 * CHUNK)
    (load,) = driver.step().loads
    assert load.chunks[-1] == ChunkBlocks(keys[1], (12, NOT_LOADED, 24), 0, 1)
    assert load.blocks == [1, 2, 3, 4, 12, 24]


def prefill(driver: Any, request: Any, tables: Any, *, tokens: int, states: Any = ()) -> Any:
    """The next step computes so many tokens of the request."""
    known = request.request_id in driver.side._requests and driver.side._requests[request.request_id].blocks
    plan = (
        driver.step(more={request: []}, scheduled=tokens, states=states)
        if known
        else driver.step({request: tables}, scheduled=tokens, states=states)
    )
    request.num_computed_tokens += tokens
    return plan


TABLES = [1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26]


def test_blocks_are_kept_from_the_step_that_completes_them_until_they_are_stored(
    windows: Any, make_request: Any
) -> None:
    pool, request = windows.side.storing.kept.pool, make_request("a", 3 * CHUNK)
    windows.arrive(request)
    assert not prefill(windows, request, TABLES, tokens=CHUNK + 5).stores
    assert pool.held == {11, 12, 21, 22}
    plan = prefill(windows, request, TABLES, tokens=2 * CHUNK - 5)
    (store,) = plan.stores
    keys = windows.keys(request)
    assert [(chunk.key, chunk.blocks, chunk.group) for chunk in store.chunks] == [
        (keys[0], (1, 2), 0),
        (keys[0], (11, 12, 21, 22), 1),
    ]
    assert pool.held == {11, 12, 21, 22, 13, 14, 15, 16, 23, 24, 25, 26}
    news(windows, {store.number: 1})
    assert pool.held == {13, 14, 15, 16, 23, 24, 25, 26}
    assert windows.side.finished(request, TABLES) is True
    (last,) = windows.side._plan.stores
    assert [chunk.group for chunk in last.chunks] == [0, 1, 0, 1]
    news(windows, {last.number: 1})
    assert not pool.held


def news(driver: Any, stored: dict[int, int]) -> None:
    driver.side.take_news(WorkerNews(stored=stored))


def test_a_store_is_over_when_all_workers_say_so(make_driver: Any, make_request: Any) -> None:
    driver = make_driver(groups=[FULL, WINDOW], shards=["one", "two"])
    pool = driver.side.storing.kept.pool = Pool()
    request = make_request("a", 2 * CHUNK)
    driver.arrive(request)
    prefill(driver, request, TABLES, tokens=CHUNK)
    (store,) = prefill(driver, request, TABLES, tokens=5).stores
    news(driver, {store.number: 1})
    assert pool.held == {11, 12, 21, 22}
    assert driver.side.storing.frees_soon
    news(driver, {store.number: 1})
    assert not pool.held
    assert not driver.side.storing.frees_soon


def test_a_request_that_ends_or_is_preempted_keeps_nothing(windows: Any, make_request: Any) -> None:
    pool = windows.side.storing.kept.pool
    for number in range(2):
        request = make_request(f"{number}", 2 * CHUNK + 1)
        windows.arrive(request)
        prefill(windows, request, TABLES, tokens=CHUNK)
        assert pool.held
        if number:
            windows.step(preempted=[request])
        else:
            windows.side._requests["0"].cacheable = False
            windows.side.finished(request, TABLES)
        assert not pool.held


def test_a_reset_gives_every_block_back_and_ends_the_stores_first(windows: Any, make_request: Any) -> None:
    pool, request = windows.side.storing.kept.pool, make_request("a", 3 * CHUNK + 1)
    windows.arrive(request)
    prefill(windows, request, TABLES, tokens=CHUNK)
    (store,) = prefill(windows, request, TABLES, tokens=CHUNK).stores
    windows.side.free_blocks(SimpleNamespace(free=lambda request: None))
    assert not pool.held
    assert windows.step().freed == {"a"}
    news(windows, {store.number: 1})  # and nothing is given back twice


def test_what_is_kept_is_stored_though_its_request_cannot_run(windows: Any, make_request: Any) -> None:
    """vLLM waits for blocks that are free soon, and those are what it lacks: it schedules nothing meanwhile."""
    pool, request = windows.side.storing.kept.pool, make_request("a", 3 * CHUNK)
    windows.arrive(request)
    prefill(windows, request, TABLES, tokens=CHUNK)
    assert windows.side.storing.frees_soon
    (store,) = windows.step().stores
    news(windows, {store.number: 1})
    assert not windows.side.storing.frees_soon
    assert not pool.held


def test_what_wrong_drafts_completed_is_not_kept_where_nothing_runs(windows: Any, make_request: Any) -> None:
    """Nothing would confirm it: vLLM waits for these blocks before it computes, and would for ever."""
    pool, request = windows.side.storing.kept.pool, make_request("a", 3 * CHUNK)
    windows.arrive(request)
    prefill(windows, request, TABLES, tokens=CHUNK)
    request.num_computed_tokens -= 3
    assert not windows.step().stores
    assert not pool.held
    assert not windows.side.storing.frees_soon
    prefill(windows, request, TABLES, tokens=5)
    assert pool.held == {11, 12, 21, 22}  # completed anew


def test_what_could_not_be_stored_is_not_kept_for_another_try(windows: Any, make_request: Any) -> None:
    pool, request = windows.side.storing.kept.pool, make_request("a", 3 * CHUNK)
    windows.arrive(request)
    prefill(windows, request, TABLES, tokens=CHUNK)
    windows.side.take_news(WorkerNews(unstored={"a"}))
    assert not pool.held


def test_what_is_kept_is_bounded_and_the_last_goes_before_the_first(windows: Any, make_request: Any) -> None:
    pool = windows.side.storing.kept.pool
    pool.num_gpu_blocks = 4 * 4
    request = make_request("a", 3 * CHUNK)
    windows.arrive(request)
    prefill(windows, request, TABLES, tokens=3 * CHUNK)
    assert pool.held == {15, 16, 25, 26}
    assert windows.link.counts["store.engine_full"] == 2


def test_a_state_is_kept_where_a_step_ends_behind_its_chunk(states: Any, make_request: Any) -> None:
    pool, request = states.side.storing.kept.pool, make_request("a", 4 * CHUNK)
    tables = [1, 2, 3, 4, 5, 6, 7, 8], [0, 12, 13, 14]
    states.arrive(request)
    prefill(states, request, tables, tokens=2 * CHUNK)
    assert pool.held == {12}  # behind the first chunk no step ended
    (store,) = prefill(states, request, tables, tokens=CHUNK + 5).stores
    assert [(chunk.blocks, chunk.group) for chunk in store.chunks] == [((1, 2), 0), ((3, 4), 0), ((12,), 1)]
    assert pool.held == {12}


def test_states_that_vllm_hands_over_are_kept(states: Any, make_request: Any) -> None:
    """Those in the middle of a step, which are in no table."""
    pool, request = states.side.storing.kept.pool, make_request("a", 4 * CHUNK)
    tables = [1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 13, 14]
    states.arrive(request)
    handed = [(1, 99, CHUNK), (1, 98, 2 * CHUNK), (1, 97, 2 * CHUNK + BLOCK)]
    prefill(states, request, tables, tokens=3 * CHUNK, states=handed)
    assert pool.held == {99, 98, 13}


def test_a_hit_ends_behind_a_state(states: Any, make_request: Any) -> None:
    request = make_request("a", 5 * CHUNK + 3)
    hold(states, request, 5, {1: "cpu", 3: "redis"}, "state")
    assert states.arrive(request) == (4 * CHUNK, True)
    tables = list(range(1, 12)), [0, 0, 0, 44, 45, 46]
    states.side.planned_load(request, states.tables_of(*tables), 4 * CHUNK)
    (load,) = states.step().loads
    assert [(chunk.blocks, chunk.group) for chunk in load.chunks][-1] == ((44,), 1)
    assert [chunk.group for chunk in load.chunks] == [0, 0, 0, 0, 1]


def test_vllm_ends_a_step_where_a_prompt_leaves_what_others_have_in_common(states: Any, make_request: Any) -> None:
    """The chain is held to there, and no state: the next that begins so shall find one."""
    request = make_request("a", 6 * CHUNK)
    hold(states, request, 4, {1: "cpu"}, "state")
    assert states.arrive(request) == (2 * CHUNK, True)
    assert request.shared_prefix_boundary == 4 * CHUNK
    whole = make_request("b", 3 * CHUNK, seed=1)
    hold(states, whole, 3, {}, "state")
    assert states.arrive(whole) == (0, False)
    assert whole.shared_prefix_boundary == 2 * CHUNK  # the last token is computed in any case
    known = make_request("c", 6 * CHUNK, seed=2)
    hold(states, known, 4, {3: "cpu"}, "state")
    known.shared_prefix_boundary = 16
    states.arrive(known)
    assert known.shared_prefix_boundary == 16  # vLLM's own, which stays


def test_of_a_prompt_whose_windows_are_too_much_those_at_its_end_are_stored(windows: Any, make_request: Any) -> None:
    nbytes = next(iter(windows.side._chunks.beside)).nbytes
    windows.link.arena_bytes = 4 * 4 * nbytes  # four windows of a prompt
    request = make_request("a", 20 * CHUNK + 3)
    windows.arrive(request)
    tables = [list(range(at, at + 42)) for at in (1, 101, 201)]
    prefill(windows, request, tables, tokens=20 * CHUNK)
    assert sorted(windows.side._requests["a"].kept) == [4, 9, 14, 19]


@pytest.mark.parametrize(("groups", "tokens"), [([FULL], 64), ([FULL, WINDOW], 32), ([FULL, STATE], 32), ([STATE], 32)])
def test_a_chunk_is_large_enough_with_all_its_objects_and_no_larger(groups: list[Any], tokens: int) -> None:
    """A worker has 16 KiB a token of each of vLLM's groups; a state stands at the end of a block."""
    from loracache.connectors.vllm.common.messages import Facts, GroupFacts
    from loracache.connectors.vllm.scheduler.chunks import Chunks

    facts = [GroupFacts(group.name, "x", tuple(each.block_tokens << 14 for each in group.members)) for group in groups]
    chunks = Chunks.of([Facts(tuple(facts))], groups, 0, drops_last_block=False)
    assert chunks is not None
    assert chunks.tokens == tokens


def test_without_full_attention_the_windows_alone_decide(make_driver: Any, make_request: Any) -> None:
    driver = make_driver(groups=[KVGroup(Need.WINDOW, 40, (Member(0, BLOCK, ("a",)),), "window")])
    request = make_request("a", 5 * CHUNK + 3)
    keys = driver.keys(request)
    for number in (1, 2, 4):
        driver.link.tiers[object_key(keys[number], "all/window")] = "cpu"
    assert driver.arrive(request) == (3 * CHUNK, True)  # chunks 1 and 2 hold its 40 tokens
    driver.side.planned_load(request, driver.tables_of([0, 0, 0, 4, 5, 6, 7]), 3 * CHUNK)
    (load,) = driver.step().loads
    assert [(chunk.key, chunk.blocks, chunk.first) for chunk in load.chunks] == [
        (keys[1], (4,), BLOCK),
        (keys[2], (5, 6), 0),
    ]
