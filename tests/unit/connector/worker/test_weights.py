# SPDX-License-Identifier: Apache-2.0
"""A worker knows which weights it computes with, and both sides keep KV of others away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from loracache.connectors.vllm.scheduler.resets import KnownWeights
from loracache.connectors.vllm.worker.fingerprint import weights_fingerprint
from loracache.connectors.vllm.worker.weights import WeightsWatch, hook_worker_class


class Model(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 2048)
        self.second = nn.Linear(2048, 64)
        self.register_buffer("scale", torch.ones(()))

    def load_weights(self, weights: Any) -> None:
        for name, value in weights:
            self.get_parameter(name).data.copy_(value)


class Runner:
    def __init__(self) -> None:
        self.model = Model()

    def get_model(self) -> Model:
        return self.model


def make_worker() -> Any:
    """A worker of a class of its own, as vLLM's is named, with methods that users mixed in, an inherited one too."""

    class Base:
        def push_from_afar(self: Any) -> None:
            self.model_runner.model.second.weight.data.add_(1)

    class Mixin(Base):
        def push(self: Any) -> None:
            self.model_runner.model.second.weight.data.add_(1)

        def peek(self: Any) -> float:
            return float(self.model_runner.model.second.weight.detach().sum())

    class Worker(Mixin):
        def __init__(self) -> None:
            self.model_runner = Runner()
            self._weight_update_active = False
            self.seen: list[Any] = []

        def compile_or_warm_up_model(self) -> None:
            pass

        def reload_weights(self, fail: bool = False) -> None:
            self.model_runner.model.load_weights([("first.bias", torch.zeros(2048))])
            if fail:
                raise ValueError("half of them")

        def start_weight_update(self) -> None:
            self._weight_update_active = True

        def update_weights(self, fail: bool = False) -> None:
            if fail:
                self._weight_update_active = False
                raise ValueError("half of them")

        def finish_weight_update(self) -> None:
            self._weight_update_active = False

        def sleep(self, level: int = 1) -> None:
            self.seen.append(("asleep", level))

        def wake_up(self, tags: Any = None) -> None:
            self.seen.append(("awake", tags))

    hook_worker_class(Worker, "somewhere.Mixin")
    hook_worker_class(Worker, "somewhere.Mixin")  # once a class
    return Worker()


@pytest.fixture
def worker() -> Any:
    return make_worker()


@pytest.fixture
def watch(worker: Any, monkeypatch: pytest.MonkeyPatch) -> WeightsWatch:
    from loracache.connectors.vllm.worker import weights

    monkeypatch.setattr(weights, "_watches", set())
    watch = WeightsWatch(
        3,
        lambda: worker.seen.append("changed"),
        lambda: worker.seen.append("slept"),
        lambda: worker.seen.append("woke"),
    )
    weights._watches.add(watch)
    worker.compile_or_warm_up_model()
    watch.begin_step(1, check=False)
    return watch


def settled(watch: WeightsWatch) -> bool:
    """Whether the scheduler, told now, may load and store under these weights."""
    return watch.believes({3: watch.version})


def test_weights_are_the_first_until_something_changes(watch: WeightsWatch) -> None:
    assert watch.believes({})
    assert watch.take_news() == {}
    watch.begin_step(2, check=True)
    assert watch.believes({})
    assert watch.take_news() == {}


def test_reloaded_weights_are_others_from_before_the_first_byte(worker: Any, watch: WeightsWatch) -> None:
    during: list[bool] = []
    load = worker.model_runner.model.load_weights
    worker.model_runner.model.load_weights = lambda weights: (during.append(settled(watch)), load(weights))
    worker.reload_weights()
    assert during == [False]
    assert worker.seen == ["changed"]
    assert not watch.believes({})
    assert settled(watch)
    assert watch.take_news() == {3: (watch.version, 1)}
    assert watch.take_news() == {}


def test_weights_that_were_half_replaced_are_others(worker: Any, watch: WeightsWatch) -> None:
    with pytest.raises(ValueError, match="half"):
        worker.reload_weights(fail=True)
    assert not watch.believes({})
    assert settled(watch)


@pytest.mark.parametrize("fails", [False, True])
def test_a_weight_update_is_one_change_from_its_start_to_its_end(worker: Any, watch: WeightsWatch, fails: bool) -> None:
    worker.start_weight_update()
    watch.begin_step(2, check=True)  # requests are served meanwhile
    assert not settled(watch)
    started = watch.take_news()
    if fails:
        with pytest.raises(ValueError, match="half"):
            worker.update_weights(fail=True)
    else:
        worker.update_weights()
        assert not settled(watch)
        worker.finish_weight_update()
    assert settled(watch)
    ended = watch.take_news()
    assert ended[3][0] > started[3][0]
    assert ended[3][1] == 2  # the last step that was computed with what was there before


def test_whoever_calls_the_models_load_weights_changes_them(worker: Any, watch: WeightsWatch) -> None:
    worker.model_runner.model.load_weights([("first.bias", torch.zeros(2048))])
    assert not watch.believes({})
    assert settled(watch)


@pytest.mark.parametrize("method", ["push", "push_from_afar"])
def test_what_a_mixed_in_method_changed_is_seen_before_the_next_step(
    worker: Any, watch: WeightsWatch, method: str
) -> None:
    worker.peek()
    watch.begin_step(2, check=False)
    assert watch.believes({})
    getattr(worker, method)()
    watch.begin_step(3, check=False)
    assert not watch.believes({})
    assert watch.take_news() == {3: (watch.version, 2)}


def test_what_was_changed_past_all_hooks_is_seen_after_a_reset(worker: Any, watch: WeightsWatch) -> None:
    worker.model_runner.model.first.weight.data.mul_(1.01)
    watch.begin_step(2, check=False)
    assert watch.believes({})  # nobody said that it may have
    watch.begin_step(3, check=True)
    assert not watch.believes({})
    watch.begin_step(4, check=True)
    assert settled(watch)
    assert worker.seen == ["changed"]


def test_sleep_keeps_the_weights_and_looks_at_none_until_they_are_back(
    worker: Any, watch: WeightsWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loracache.connectors.vllm.worker import weights

    worker.sleep(1)
    assert worker.seen == ["slept", ("asleep", 1)]  # blocks are left before their memory goes
    with monkeypatch.context() as patch:
        patch.setattr(weights, "weights_fingerprint", lambda models: pytest.fail("reads memory that is not there"))
        watch.begin_step(2, check=True)
        worker.wake_up(tags=["kv_cache"])
        watch.begin_step(3, check=True)
    worker.wake_up(tags=["weights"])
    assert worker.seen[2:] == [("awake", ["kv_cache"]), "woke", ("awake", ["weights"])]
    watch.begin_step(4, check=False)
    assert watch.believes({})


def test_sleep_of_level_two_forgets_the_weights(worker: Any, watch: WeightsWatch) -> None:
    worker.sleep(level=2)
    assert worker.seen[:2] == ["slept", "changed"]
    worker.wake_up()
    watch.begin_step(2, check=False)
    assert not watch.believes({})
    assert settled(watch)


def test_a_model_that_cannot_be_looked_at_changes_with_every_reset() -> None:
    watch = WeightsWatch(0, lambda: None, lambda: None, lambda: None)
    watch.begin_step(1, check=False)
    assert watch.believes({})
    watch.begin_step(2, check=True)
    assert not watch.believes({})


def test_a_worker_whose_model_is_somewhere_else_starts_all_the_same() -> None:
    watch = WeightsWatch(0, lambda: None, lambda: None, lambda: None)
    watch.bind(object())

    class Runner:
        def get_model(self) -> Any:
            raise AttributeError("moved")

    class Worker:
        model_runner = Runner()

    watch.bind(Worker())
    watch.begin_step(1, check=True)
    assert not watch.believes({})


def test_the_installed_vllm_has_what_is_hooked() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    for name in ("reload_weights", "update_weights", "start_weight_update", "finish_weight_update", "apply_model"):
        assert callable(getattr(CPUWorker, name)), name
    for name in ("load_model", "compile_or_warm_up_model", "sleep", "wake_up"):
        assert callable(getattr(CPUWorker, name)), name


# -- fingerprints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_one_element_in_a_thousand_is_seen(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    for number in range(20):
        weight = torch.randn(1024, 1024).to(dtype)
        model.register_parameter(f"weight{number}", nn.Parameter(weight, requires_grad=False))
    before = weights_fingerprint([model])
    assert weights_fingerprint([model]) == before
    for parameter in model.parameters():
        where = torch.rand(1024, 1024) < 1e-3
        parameter.data.copy_(torch.where(where, 3.0, parameter.float()).to(dtype))
    assert weights_fingerprint([model]) != before


def test_any_strides_and_shapes_have_a_fingerprint() -> None:
    model = nn.Module()
    model.register_buffer("transposed", torch.arange(4096.0).reshape(64, 64).t())
    model.register_buffer("strided", torch.arange(4096.0)[::2])
    model.register_buffer("empty", torch.empty(0))
    model.register_buffer("flags", torch.zeros(8, dtype=torch.bool))
    model.register_buffer("nowhere", torch.empty(8, device="meta"))
    before = weights_fingerprint([model])
    for name in ("transposed", "strided", "flags"):
        buffer = model.get_buffer(name)
        kept = buffer.clone()
        buffer.copy_(~buffer if buffer.dtype is torch.bool else buffer + 1)
        assert weights_fingerprint([model]) != before, name
        buffer.copy_(kept)
    assert weights_fingerprint([model]) == before


def test_a_look_at_two_hundred_million_weights_takes_milliseconds(quickest: Callable[..., float]) -> None:
    model = nn.Module()
    for number in range(200):
        model.register_parameter(f"w{number}", nn.Parameter(torch.empty(1000, 1000), requires_grad=False))
    weights_fingerprint([model])  # the memory is touched for the first time

    def took() -> float:
        started = time.perf_counter()
        weights_fingerprint([model])
        return time.perf_counter() - started

    assert quickest(took, 0.1) < 0.1  # to read all of them takes longer


# -- what the scheduler believes ---------------------------------------------------------------------------------------


def test_any_workers_change_is_news_once() -> None:
    known = KnownWeights()
    assert not known.take_news({})
    assert known.take_news({1: (2, 5)})
    assert not known.take_news({1: (2, 5)})
    assert known.take_news({0: (2, 5), 1: (2, 5)})
    assert known.versions == {0: 2, 1: 2}


def test_vllms_own_prefix_cache_is_trusted_once_it_was_emptied_after_the_last_step_with_old_weights() -> None:
    known = KnownWeights()
    assert known.trust_local_prefix
    known.prefix_cache_reset(4)  # steps 5 and 6 were computed with the old weights
    known.take_news({0: (2, 6)})
    assert not known.trust_local_prefix
    known.prefix_cache_reset(6)  # right after the change, or right before: nothing was computed in between
    assert known.trust_local_prefix
    known.take_news({0: (4, 9)})
    assert not known.trust_local_prefix
