# SPDX-License-Identifier: Apache-2.0
"""A load that fails, of whatever group and for whatever reason, on one worker of several, ends in a recompute: nobody
computes upon what came of it. Every step of these engines looks at every byte that it reads (exact_model.py).
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from loracache.connectors.vllm.worker import loader as loader_module
from loracache.kernels.page_copy import CopyError
from tests.unit.connector.hybrid.test_exact import settle

_numbers = itertools.count()
KINDS = {"full, two windows": [0, 1, 2], "full, span": [0, 1], "full, window, state": [0, 1, 2], "window": [0]}
STAGES = {"full, two windows": [[0, 1], [2]], "full, window, state": [[0, 1], [2]]}
FAULTS = ["checksum", "copy_failed", "lease_lost", "deadline", "bug"]
CASES = [(kind, group, None) for kind, groups in KINDS.items() for group in groups] + [
    (kind, group, stages) for kind, stages in STAGES.items() for group in (0, 2)
]


@pytest.fixture(scope="module")
def serving(module_daemon: Any) -> Any:
    return module_daemon(memory="64MiB")


@pytest.fixture
def prompt() -> Callable[..., list[int]]:
    source = random.Random(f"failing {next(_numbers)}")
    text = [source.randrange(32000) for _ in range(1000)]
    return lambda length: text[:length]


def breaks(patched: pytest.MonkeyPatch, worker: Any, group: int, fault: str) -> None:
    """The worker's next copy of an object of this group goes wrong."""
    landing = worker.side._loader._landing
    submit = landing._submit

    def submits(job: Any, chunks: Any) -> Any:
        hit = any(job.load.chunks[chunk.position].group == group for chunk in chunks)
        if not hit:
            return submit(job, chunks)
        match fault:
            case "copy_failed":
                patched.setattr(landing, "_submit", submit)
                landing._not_copied(job, chunks, CopyError("on order"))
                return None
            case "bug":
                patched.setattr(landing, "_submit", submit)
                raise RuntimeError("on order")
            case "lease_lost":
                time.sleep(0.6)
        return submit(job, chunks)

    patched.setattr(landing, "_submit", submits)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("kind", "group", "stages"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_a_request_whose_load_fails_is_computed_anew(
    kind: str,
    group: int,
    stages: Any,
    fault: str,
    make_engine: Any,
    serving: Any,
    prompt: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(kind, serving.url, stages=stages or ())
    tokens = prompt(250)
    assert engine.answer(tokens, answer=3) == 0
    settle(engine, serving)
    worker = next(each for each in reversed(engine.workers) if any(each.side._objects[group].block_bytes))
    with monkeypatch.context() as patched:
        if fault == "checksum":
            key = worker.side._objects[group].key(engine.chunk_keys(tokens)[6])
            with serving.client() as client, client.acquire([key]) as reading:
                assert reading.slots[0] is not None
                reading.slots[0].buffers[0][9] ^= 1
        elif fault == "deadline":
            connection = worker.side._loader._link.connection
            patched.setattr(worker.side._loader, "_timeout", 0.2)
            patched.setattr(connection, "take", lambda number: None)  # no answer arrives
        else:
            patched.setattr(loader_module, "_LEASE_MARGIN_S", -9.9 if fault == "lease_lost" else 5.0)
            breaks(patched, worker, group, fault)
        request = engine.ask(tokens, 3)
        engine.run()
    assert request.num_output_tokens == 3
    assert engine.external[request.request_id] == 0
    assert engine.failures[f"load.{fault}"] > 0
    settle(engine, serving)
    assert engine.answer(tokens) == 224, "it is not loaded again"
    assert serving.status()["leases"] == 0
