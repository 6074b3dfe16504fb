# SPDX-License-Identifier: Apache-2.0
"""The connector without an engine: real requests and specs of vLLM, a scripted link, steps taken by hand."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["*test_*.py"]

BLOCK = 16
BLOCKS = 8
CHUNK = 2 * BLOCK


class ScriptedLink:
    """Stands where the scheduler's connection is. `tiers` says what the daemon holds, `answers` whether it answers."""

    def __init__(self) -> None:
        self.connected = True
        self.answers = True
        self.arena_bytes = 1 << 30
        self.instance = b"a daemon"
        self.tiers: dict[bytes, str] = {}
        self.digests: dict[str, str | None] = {}
        self.leases: set[bytes] = set()
        self.prefetched: list[bytes] = []
        self.reported: list[tuple[int, int, list[bytes]]] = []
        self.wanted: list[bytes] = []  # in the last report
        self.prefill = 0
        self.flushed = 0
        self.hot: list[bytes] = []
        self.announced: list[tuple[list[bytes], float, float]] = []
        self.lookups: list[list[bytes]] = []
        self.forgotten: list[int] = []
        self.waits: list[float] = []
        self.pins: list[tuple[list[bytes], float]] = []
        self.keeps: list[tuple[list[bytes], float, str]] = []
        self.demoted: list[tuple[list[bytes], str]] = []
        self.told: list[tuple[bool, list[tuple[str, str, bytes]]]] = []
        self.on_wait: Callable[[float], object] = lambda seconds: None
        self.counts: Counter[str] = Counter()
        self._asked: dict[int, Any] = {}

    def begin(self) -> None:
        pass

    def answering(self) -> bool:
        return self.connected

    def ask_lookup(self, lease: bytes, keys: list[bytes], group: int, ttl: float, beside: Sequence[bytes] = ()) -> int:
        if not self.connected:
            return 0
        self.lookups.append(list(keys))
        self.leases.add(lease)
        held = []
        for key in keys:
            if key not in self.tiers:
                break
            held.append(self.tiers[key])
        leading = tuple(held[: len(held) // group * group])
        return self._ask((leading, tuple(self.tiers.get(key, "") for key in beside)))

    def answer_lookup(self, number: int) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        return self._asked.pop(number) if self.answers else None

    def wait_lookup(self, number: int, seconds: float) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        self.waits.append(seconds)
        self.on_wait(seconds)
        return self.answer_lookup(number)

    def ask_adapter(self, path: str) -> int | None:
        return self._ask(self.digests.get(path)) if self.connected else None

    def answer_adapter(self, number: int) -> tuple[bool, str | None]:
        return (True, self._asked.pop(number)) if self.answers else (False, None)

    def pin(self, keys: Sequence[bytes], ttl: float) -> None:
        self.pins.append((list(keys), ttl))

    def keep(self, keys: Sequence[bytes], ttl: float, priority: str) -> None:
        self.keeps.append((list(keys), ttl, priority))

    def announce(self, keys: Sequence[bytes], seconds: float, hold: float) -> None:
        self.announced.append((list(keys), seconds, hold))

    def demote(self, keys: Sequence[bytes], tier: str) -> None:
        self.demoted.append((list(keys), tier))

    def take_events(self) -> tuple[bool, list[tuple[str, str, bytes]]] | None:
        return self.told.pop(0) if self.told else None

    def prefetch(self, lease: bytes, keys: list[bytes], ttl: float) -> None:
        self.prefetched += keys
        self.leases.add(lease)

    def release(self, lease: bytes) -> None:
        self.leases.discard(lease)

    def abandon(self, number: int) -> None:
        """Of an adapter's question."""

    def forget(self, number: int) -> None:
        if number:
            self.forgotten.append(number)

    def count(self, cause: str, amount: int) -> None:
        self.counts[cause] += amount

    def flush(self, *, now: bool = False) -> None:
        if now:
            self.flushed += 1

    def reports_now(self) -> bool:
        return self.answers

    def report(
        self, running: int, waiting: int, adapters: Sequence[bytes], prefill: int, wanted: Sequence[bytes] = ()
    ) -> None:
        self.reported.append((running, waiting, list(adapters)))
        self.prefill = prefill
        self.wanted = list(wanted)

    def hot_adapters(self) -> list[bytes]:
        return self.hot

    def close(self) -> None:
        pass

    def _ask(self, answer: Any) -> int:
        number = len(self._asked) + len(self.lookups) + 1000
        self._asked[number] = answer
        return number


def engine_config(**changes: Any) -> SimpleNamespace:
    """The parts of a VllmConfig that the connector reads. changes: dotted names with __ for the dots."""
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=BLOCK, cache_dtype="auto"),
        model_config=SimpleNamespace(dtype="torch.bfloat16", use_mla=False, get_total_num_kv_heads=lambda: 2),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, decode_context_parallel_size=1
        ),
        kv_transfer_config=SimpleNamespace(is_kv_consumer=True, is_kv_producer=True, engine_id="engine"),
        speculative_config=None,
        lora_config=None,
    )
    for name, value in changes.items():
        *parents, last = name.split("__")
        target = config
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)
    return config


def full_attention() -> Any:
    """The group of a model whose layers need all of a prefix."""
    from loracache.connectors.vllm.common.groups import KVGroup, Member
    from loracache.groups import Need

    return KVGroup(Need.ALL, 0, (Member(0, BLOCK, ("layer",)),))


def tables_of(*blocks: Sequence[int]) -> Any:
    """KVCacheBlocks with these blocks, one table for each of vLLM's groups; -1: one of its prefix cache, 0: none."""
    block = {
        each: SimpleNamespace(block_id=abs(each), is_null=not each, block_hash=b"" if each < 0 else None)
        for t in blocks
        for each in t
    }
    tables = tuple([block[each] for each in table] for table in blocks)
    return SimpleNamespace(blocks=tables, get_block_ids=lambda: tuple(list(table) for table in blocks))


def _tables(blocks: Sequence[Any]) -> tuple[list[int], ...]:
    return tuple(map(list, blocks)) if blocks and not isinstance(blocks[0], int) else (list(blocks),)


class Driver:
    """A SchedulerSide, driven the way vLLM's scheduler drives it."""

    def __init__(
        self, link: Any, config: Any, shards: Sequence[str], groups: Sequence[Any] = (), **options: Any
    ) -> None:
        from loracache.connectors.vllm.common.messages import Facts, GroupFacts
        from loracache.connectors.vllm.common.options import Options
        from loracache.connectors.vllm.scheduler.side import SchedulerSide

        self.link = link
        chosen = Options(chunk_tokens=CHUNK, **options)
        self.side = SchedulerSide(config, chosen, lambda: "m" * 64, link, groups or [full_attention()])
        self.side.set_facts(
            [
                Facts(
                    tuple(
                        GroupFacts(
                            f"{shard}/{group.name}" if group.name else shard, "cpu/H.N.C", (4096,) * len(group.members)
                        )
                        for group in groups or [full_attention()]
                    )
                )
                for shard in shards
            ]
        )
        self._shards = shards

    def hold(self, request: Any, tiers: Iterable[str], *, shards: Iterable[str] = ()) -> None:
        """Let the daemon hold the request's leading chunks, one tier each (in `shards`; all where none is named)."""
        from loracache.keys import object_key

        for key, tier in zip(self.keys(request), tiers, strict=False):
            for shard in shards or self._shards:
                self.link.tiers[object_key(key, shard)] = tier

    def keys(self, request: Any) -> list[bytes]:
        """The keys of a request's whole chunks, as a fresh request like it has them; leaves no trace."""
        names = ("_requests", "_plan")
        kept = [getattr(self.side, name) for name in names]
        lookups, leases, connected = list(self.link.lookups), set(self.link.leases), self.link.connected
        self.side._requests = {}
        self.link.connected = True
        self.side.on_new_request(request)
        found = list(self.side._requests[request.request_id].chunk_keys)
        for name, value in zip(names, kept, strict=True):
            setattr(self.side, name, value)
        self.link.lookups, self.link.leases, self.link.connected = lookups, leases, connected
        return found

    tables_of = staticmethod(tables_of)

    def load(self, request: Any, blocks: Sequence[int], tokens: int) -> None:
        """vLLM has made room in these blocks of its first group."""
        self.side.planned_load(request, tables_of(blocks), tokens)

    def arrive(self, request: Any, local: int = 0) -> tuple[int | None, bool]:
        self.side.on_new_request(request)
        return self.side.matched_tokens(request, local)

    def step(
        self,
        new: Mapping[Any, list[int]] | None = None,
        more: Mapping[Any, list[int]] | None = None,
        *,
        resumed: Iterable[Any] = (),
        preempted: Iterable[Any] = (),
        scheduled: int = 1,
        states: Iterable[tuple[int, int, int]] = (),
    ) -> Any:
        """One step: `new` requests with all their blocks (a list for each of vLLM's groups where it has several),
        running ones with `more` blocks, `resumed` among them; each computes `scheduled` tokens. states: those of the
        one request that vLLM hands over.
        """
        new, more = new or {}, more or {}
        output = SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=each.request_id, block_ids=_tables(b)) for each, b in new.items()
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[each.request_id for each in more],
                new_block_ids=[_tables(blocks) if blocks else None for blocks in more.values()],
                resumed_req_ids={each.request_id for each in resumed},
            ),
            num_scheduled_tokens={each.request_id: scheduled for each in [*new, *more]},
            kv_connector_block_state=SimpleNamespace(
                resolve_block_ids=lambda name: self.side._requests[name].blocks,
                boundary_state_offloads={each.request_id: list(states) for each in [*new, *more]},
            ),
            preempted_req_ids={each.request_id for each in preempted},
        )
        return self.side.build_plan(output)


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """vLLM's configurations set variables for the processes of an engine; a test's daemon would inherit them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def link() -> ScriptedLink:
    return ScriptedLink()


@pytest.fixture(scope="session")
def make_config() -> Callable[..., SimpleNamespace]:
    return engine_config


@pytest.fixture
def make_driver(link: ScriptedLink) -> Callable[..., Driver]:
    def make(
        config: Any = None,
        *,
        shards: Sequence[str] = ("all",),
        link: Any = link,
        groups: Sequence[Any] = (),
        **options: Any,
    ) -> Driver:
        return Driver(link, config or engine_config(), shards, groups, **options)

    return make


@pytest.fixture
def driver(make_driver: Callable[..., Driver]) -> Driver:
    return make_driver()


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Any]:
    """make_request("a", 64) is a real vLLM request with 64 prompt tokens; `computed` of them computed."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    def make(name: str, prompt: int | list[int] | None, *, computed: int = 0, seed: int = 0, **rest: Any) -> Any:
        tokens = [(seed * 7919 + 31 * at) % 32000 for at in range(prompt)] if isinstance(prompt, int) else prompt
        rest.setdefault("sampling_params", SamplingParams(max_tokens=100))
        rest.setdefault("pooling_params", None)
        request = Request(name, tokens, **rest)
        request.num_computed_tokens = computed
        return request

    return make


@pytest.fixture
def make_side(monkeypatch: pytest.MonkeyPatch, make_config: Any) -> Iterator[Callable[..., Any]]:
    """make_side(url, ...) is a WorkerSide with `BLOCKS` blocks of 16 tokens, each of 2048 bytes."""
    import torch

    from loracache.connectors.vllm.common.options import Options
    from loracache.connectors.vllm.worker import objects as objects_module
    from loracache.connectors.vllm.worker.side import WorkerSide

    monkeypatch.setattr(objects_module, "shard_name", lambda config, layers, group, replicated: "all")
    monkeypatch.setattr(objects_module, "platform_name", lambda config, spec: "cpu-test")
    made: list[Any] = []

    def make(url: str, *, problem: str = "", tensors: dict[str, Any] | None = None, **options: Any) -> Any:
        spec = SimpleNamespace(block_size=16, head_size=8)
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layer"])
        kv_cache = SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=[group])
        side = WorkerSide(make_config(), kv_cache, Options(server=url, chunk_tokens=16, **options), problem)
        made.append(side)
        side.register_kv_caches(tensors or {"layer": torch.rand(BLOCKS, 2, 16, 16)})
        return side

    yield make
    for side in made:
        side.close()
