# SPDX-License-Identifier: Apache-2.0
"""An engine of one or two ranks that waits for its loads layer by layer: vLLM's own scheduler and KV cache manager,
both sides of the connector, a real daemon. In the model's place stands one that never fails: what it computes upon
wrong bytes is wrong, on all ranks, in the layers above, and so is its token. Whoever asks later would see it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loracache.keys import object_key
from tests.unit.connector.hybrid.exact_model import HEAD, ExactModel, Hashes, Run

WRONG = np.uint64(0x0BADC0DE0BADC0DE)
TOKENS = 30000  # right tokens are below


class Rank:
    """A worker of ours, its memory, and vLLM's calls of it."""

    def __init__(self, number: int, vllm_config: Any, config: Any, patched: pytest.MonkeyPatch) -> None:
        import torch
        from vllm.distributed import parallel_state
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.v1.worker.gpu import kv_connector as runner
        from vllm.v1.worker.utils import allocate_kv_cache

        from loracache.connectors.vllm import LoRACacheConnector

        patched.setattr(parallel_state, "get_tp_group", lambda: SimpleNamespace(rank_in_group=number))
        self.connector = LoRACacheConnector(vllm_config, KVConnectorRole.WORKER, config)
        side: Any = self.connector._worker
        side.weights.bind(SimpleNamespace(model_runner=SimpleNamespace(model=torch.nn.Linear(2, 2))))
        patched.setattr(runner, "get_kv_transfer_group", lambda: self.connector)
        tensors = allocate_kv_cache(config, "cpu", vllm_config.cache_config.get_resolved_kv_cache_layout())
        self.runner = runner.ActiveKVConnector(vllm_config, tensors)
        self.memory = ExactModel(config, tensors)
        self.side = side


class StepModel:
    """Computes a step on all ranks. wrong: how often a request was computed upon wrong bytes."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self._ranks = ranks
        self._hashes = Hashes()
        self.wrong = 0

    def right_token(self, request: Any, end: int) -> int:
        """What follows the first `end` tokens of a request."""
        return int(self._hashes.of(Run(request, 0, end))[end - 1] % np.uint64(TOKENS))

    def compute(self, requests: Sequence[tuple[Any, int, int]]) -> list[int]:
        """(request, start, end) of each; answers what each says next."""
        spoilt: set[str] = set()
        memory = self._ranks[0].memory
        for group in memory._groups:
            for name in group.layer_names:
                for rank in self._ranks:
                    rank.connector.wait_for_layer_load(name)
                saw = set()
                for request, start, end in requests:
                    self._write(request, start, end, name, wrong=request.request_id in spoilt)
                for request, start, _ in requests:
                    if not all(self._reads_right(rank, request, start, name) for rank in self._ranks):
                        saw.add(request.request_id)
                spoilt |= saw
        self.wrong += len(spoilt)
        return [
            TOKENS + 1 if request.request_id in spoilt else self.right_token(request, end)
            for request, _, end in requests
        ]

    def _places(self, rank: Rank, request: Any, first: int, end: int, name: str) -> tuple[Any, Any, Any, Any]:
        """(pages, blocks, tokens in them, what has to stand there)."""
        memory = rank.memory
        (group,) = [each for each in memory._groups if name in each.layer_names]
        table = np.array(memory.tables[request.request_id][memory._groups.index(group)])
        at, pages = np.arange(first, end), memory._pages[name]
        values = self._hashes.of(Run(request, 0, end))[first:] ^ memory._marks[name]
        heads = np.array([head * HEAD % 2**64 for head in range(pages.shape[1])], dtype=np.uint64)[None, :, None]
        blocks, within = table[at // group.kv_cache_spec.block_size], at % group.kv_cache_spec.block_size
        return pages, blocks, within, values[:, None, None] ^ heads

    def _write(self, request: Any, start: int, end: int, name: str, *, wrong: bool) -> None:
        for rank in self._ranks:
            pages, blocks, within, values = self._places(rank, request, start, end, name)
            shape = pages[blocks, :, within].shape
            pages[blocks, :, within] = np.broadcast_to(values ^ WRONG if wrong else values, shape)

    def _reads_right(self, rank: Rank, request: Any, start: int, name: str) -> bool:
        if not start:
            return True
        pages, blocks, within, values = self._places(rank, request, 0, start, name)
        return bool((pages[blocks, :, within] == values).all())


class StepEngine:
    """One engine, step by step. during: called between what a step computes and what the scheduler hears of it, with
    the workers' answers. stats: what the connector counted."""

    def __init__(self, vllm_config: Any, specs: dict[str, Any], ranks: int, patched: pytest.MonkeyPatch) -> None:
        from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core import kv_cache_utils as utils
        from vllm.v1.core.sched.scheduler import Scheduler

        cache = vllm_config.cache_config
        groups = utils.get_kv_cache_groups(vllm_config, dict(specs))
        config = utils.get_kv_cache_config_from_groups(vllm_config, groups, 1 << 40)
        cache.num_gpu_blocks = config.num_blocks
        block, unit = utils.resolve_kv_cache_block_sizes(config, vllm_config)
        config.hash_block_size = unit
        config.cache_hit_alignment_tokens = utils.resolve_cache_hit_alignment_tokens(config, vllm_config, block, unit)
        scheduling = utils.generate_scheduler_kv_cache_config([config])
        scheduling.hash_block_size = unit
        hash_function = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
        utils.init_none_hash(hash_function)
        self._hasher = utils.get_request_block_hasher(unit, hash_function)
        grammars: Any = SimpleNamespace(accept_tokens=lambda request, tokens: True)
        self.scheduler = Scheduler(vllm_config, scheduling, grammars, block, unit)
        self.ranks = [Rank(number, vllm_config, config, patched) for number in range(ranks)]
        self.model = StepModel(self.ranks)
        self._aggregate = KVOutputAggregator(ranks).aggregate
        self.requests: list[Any] = []
        self.given: dict[str, list[int]] = {}
        self.external: dict[str, int] = {}
        self.steps = 0
        self.stats: Counter[str] = Counter()
        self.during: Callable[[list[Any]], object] = lambda answers: None
        self._names = 0
        for side in (self.side, *(rank.side for rank in self.ranks)):
            side.tally.take = self._counting(side.tally.take)

    def _counting(self, take: Callable[[], Any]) -> Callable[[], Any]:
        def counting() -> Any:
            counted = take()
            self.stats.update(counted.data if counted is not None else {})
            return counted

        return counting

    @property
    def side(self) -> Any:
        """The scheduler's side of the connector."""
        return self.scheduler.connector._scheduler

    def ask(self, tokens: Sequence[int], answer: int = 1) -> Any:
        """A request, not computed yet."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self._names += 1
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        params.update_from_generation_config({}, None)
        request = Request(f"r{self._names}", list(tokens), params, None, block_hasher=self._hasher)
        self.requests.append(request)
        self.scheduler.add_request(request)
        return request

    def await_lookups(self) -> None:
        """Until nothing keeps the requests that wait from being computed in the next step."""
        deadline = time.monotonic() + 10
        states = self.side._requests
        while not all([self.side._lookups.advance(state) for state in states.values()]):  # noqa: C419 - ask for each
            assert time.monotonic() < deadline, "no answer"
            time.sleep(0.002)

    def abort(self, request: Any) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """One of the engine's steps. Whatever is given out is right."""
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.scheduler.schedule()
        self.steps += 1
        for rank in self.ranks:
            rank.memory.take(output)
        scheduled = output.num_scheduled_tokens
        for rank in self.ranks:
            rank.runner.pre_forward(output)
        batch = []
        for request_id, count in scheduled.items():
            request = self.scheduler.requests[request_id]
            start = request.num_computed_tokens - count
            self.external.setdefault(request_id, start)
            batch.append((request, start, start + count))
        following = self.model.compute(batch)
        sampled = [
            [token] if end == request.num_tokens else []
            for token, (request, _, end) in zip(following, batch, strict=True)
        ]
        answers = []
        for rank in self.ranks:
            rank.runner.finish_forward()
            done = rank.runner.post_forward(output.finished_req_ids)
            names = list(scheduled)
            index = {name: at for at, name in enumerate(names)}
            answers.append(ModelRunnerOutput(names, index, [list(each) for each in sampled], kv_connector_output=done))
        self.during(answers)
        outputs = self.scheduler.update_from_output(output, self._aggregate(answers))
        self._check(outputs)
        if not scheduled:
            time.sleep(0.001)

    def _check(self, outputs: Any) -> None:
        for side in (self.side, *(rank.side for rank in self.ranks)):
            side.tally.take()
        for each in outputs.values():
            for output in each.outputs:
                self.given.setdefault(output.request_id, []).extend(output.new_token_ids)
        for request in self.requests:
            given = self.given.get(request.request_id, [])
            prompt = request.num_prompt_tokens
            right = [self.model.right_token(request, prompt + at) for at in range(len(given))]
            assert given == right, f"{request.request_id} was given wrong tokens"

    def run(self, seconds: float = 30) -> None:
        """Steps until all requests are over, and their stores."""
        deadline = time.monotonic() + seconds
        while self.scheduler.has_requests():
            assert time.monotonic() < deadline, f"still there: {self.scheduler.requests}"
            self.step()

    def answer(self, tokens: Sequence[int], answer: int = 1) -> int:
        """Run one request; answers how many tokens it had when it began to compute."""
        request = self.ask(tokens, answer)
        self.run()
        assert request.num_output_tokens == answer
        return self.external[request.request_id]

    def ready(self) -> StepEngine:
        """Once the scheduler's side knows its model and its workers."""
        identity: Any = self.scheduler.connector._identity
        deadline = time.monotonic() + 10
        while not (identity.value() and self.side.on):
            assert time.monotonic() < deadline, "the connector is off"
            self.step()
        return self

    def forget(self) -> None:
        """Empty vLLM's own prefix cache."""
        assert self.scheduler.reset_prefix_cache()

    def keys(self, request: Any, rank: int = 0) -> list[bytes]:
        """Of the objects of a request that is not over."""
        facts = self.ranks[rank].side.facts
        return [object_key(key, facts.groups[0].shard) for key in self.side._requests[request.request_id].chunk_keys]

    def close(self) -> None:
        self.scheduler.connector.shutdown()
        for rank in self.ranks:
            rank.connector.shutdown()


def settle(engine: Any, serving: Any) -> None:
    engine.run()
    engine.forget()
    with serving.client() as client:
        client.flush()


def stored(engine: Any, serving: Any, tokens: list[int]) -> None:
    """Have a prompt's chunks in the daemon's memory, and nowhere else."""
    engine.answer(tokens)
    settle(engine, serving)


def keys_of(engine: Any, serving: Any, tokens: list[int], rank: int = 0) -> list[bytes]:
    """The objects of a prompt's chunks."""
    request = engine.ask(tokens)
    found: list[bytes] = engine.keys(request, rank)
    engine.abort(request)
    return found


def counted(serving: Any, cause: str) -> int:
    return int(serving.status()["counters"].get(f"client.load.{cause}", 0))


def broken(serving: Any, key: bytes) -> None:
    with serving.client() as client, client.acquire([key]) as reading:
        assert reading.slots[0] is not None
        reading.slots[0].buffers[0][9] ^= 1


def held(serving: Any, keys: list[bytes]) -> list[bool]:
    with serving.client() as client:
        there = {bytes.fromhex(each["key"]) for each in client.objects(tier="cpu")}
    return [key in there for key in keys]
