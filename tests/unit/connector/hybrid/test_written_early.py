# SPDX-License-Identifier: Apache-2.0
"""A step's first writes to a block come before vLLM calls the connector: new blocks are zeroed. A store that reads such
a block for the request that had it keeps nothing of it. Every later step looks at every byte that it reads
(exact_model.py).
"""

from __future__ import annotations

import inspect
import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.connectors.vllm.worker.runner_hook import hook_runner_class
from tests.unit.connector.hybrid.test_exact import settle

# vLLM zeroes blocks where layers keep states, or dtypes differ. So few blocks that the next request takes those.
BLOCKS = {"full, state": 24, "scales but for windows": 80}


@pytest.fixture(scope="module")
def serving(module_daemon: Any) -> Any:
    return module_daemon(memory="64MiB")


class SlowStores:
    """Has a worker's stores read their blocks once its next step has written to some."""

    def __init__(self, worker: Any, patched: pytest.MonkeyPatch) -> None:
        self._storer, self._gather = worker.side._storer, worker.side._storer._gather
        self.reading, self._written, self._read = threading.Event(), threading.Event(), threading.Event()
        update = worker.update_requests

        def update_requests(output: Any) -> None:
            update(output)
            if output.scheduled_new_reqs and self.reading.is_set():
                self._written.set()
                self._read.wait(1)

        patched.setattr(worker, "update_requests", update_requests)
        patched.setattr(self._storer, "_gather", self._waits)

    def _waits(self, job: Any, granted: Any) -> Any:
        self.reading.set()
        self._written.wait(3)
        sums = self._gather(job, granted)
        self._read.set()
        return sums


@pytest.mark.parametrize("is_over", [False, True], ids=["running", "finished"])
@pytest.mark.parametrize("kind", list(BLOCKS))
def test_a_store_of_blocks_that_a_step_zeroes_keeps_nothing(
    kind: str, is_over: bool, make_engine: Any, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random.Random(f"early {kind} {is_over}")
    tokens, others = ([source.randrange(32000) for _ in range(200)] for _ in range(2))
    engine = make_engine(kind, serving.url, step_tokens=131, blocks=BLOCKS[kind])
    (worker,) = engine.workers
    with monkeypatch.context() as patched:
        stores = SlowStores(worker, patched)
        request = engine.ask(tokens, 1 if is_over else 40)
        while not stores.reading.is_set() or (is_over and not request.is_finished()):
            engine.step()
        assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        engine.abort(request)
        engine.ask(others, 5)
        engine.run()
    settle(engine, serving)
    for length in (130, 200):  # behind each of the chunks that were being stored
        engine.answer(tokens[:length])
        settle(engine, serving)


def test_vllms_second_model_runner_writes_behind_our_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that GPUs have. A connector inside a MultiConnector gets its own plan, others' are not called twice."""
    from vllm.v1.worker.gpu import model_runner

    class Runner(model_runner.GPUModelRunner):  # type: ignore[misc]
        def __init__(self, connector: Any) -> None:
            self.kv_connector = SimpleNamespace(kv_connector=connector)

    step = inspect.getsource(model_runner.GPUModelRunner.execute_model)
    calls = [step.index(name) for name in (".update_requests(", ".preprocess_state(", ".kv_connector.pre_forward(")]
    assert calls == sorted(calls), "what it writes first is not behind our hook"
    said: list[Any] = []
    monkeypatch.setattr(model_runner.GPUModelRunner, "update_requests", lambda runner, output: said.append("written"))
    ours = SimpleNamespace(lets_go_first=True, handle_preemptions=said.append)
    other = SimpleNamespace(handle_preemptions=lambda plan: pytest.fail("called twice"))
    several = SimpleNamespace(_connectors=[other, ours])
    hook_runner_class(Runner)
    hook_runner_class(Runner)  # once a class
    Runner(ours).update_requests(SimpleNamespace(kv_connector_metadata="plan"))
    Runner(several).update_requests(SimpleNamespace(kv_connector_metadata=SimpleNamespace(metadata=["theirs", "own"])))
    assert said == ["plan", "written", "own", "written"]
