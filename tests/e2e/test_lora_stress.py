# SPDX-License-Identifier: Apache-2.0
"""10,000 operations on adapters beside requests that use them, with the daemon killed in between: no wrong token, and
at the end every page of the pool and of the arena is where it belongs.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.errors import LoRACacheError

CONTENTS, NAMES, OPERATIONS = 12, 8, 10_000
RANKS = (8, 16, 32, 64)


class Operator:
    """Adds, re-points, removes, evicts and looks, as fast as the daemon answers; starts over where it is gone."""

    def __init__(self, connect: Callable[[], Any], folders: list[Path]) -> None:
        self._connect = connect
        self._folders = folders
        self._rng = random.Random(17)
        self.done = 0
        self.lost = 0
        self.wrong: list[str] = []
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        client = None
        while self.done < OPERATIONS:
            try:
                client = client or self._connect()
                self._one(client)
                self.done += 1
            except (LoRACacheError, OSError) as error:
                if "taken into the cache" in str(error):  # the arena is full of what requests hold: said, and no harm
                    self.done += 1
                    continue
                self.lost += 1
                client = None
                time.sleep(0.05)
        if client is not None:
            client.close()

    def _one(self, client: Any) -> None:
        name, folder = f"name-{self._rng.randrange(NAMES)}", self._rng.choice(self._folders)
        kind = self._rng.random()
        if kind < 0.5:
            digest = client.add_adapter(str(folder), name)
            if client.find_adapter(name) != digest:
                self.wrong.append(f"{name} does not point to what it was pointed to")
        elif kind < 0.6:
            client.remove_adapter(name)
            if client.find_adapter(name) is not None:
                self.wrong.append(f"{name} is there although it was removed")
        elif kind < 0.8:
            found = client.find_adapter(name)
            if found:
                client.evict([bytes.fromhex(found)], tiers=("cpu",))
        else:
            client.show_adapter(name)


@pytest.fixture
def busy(
    daemon: Any, engine_factory: Any, tiny: Path, model_maker: Any, tmp_path: Path, load: Any, host_path: str
) -> SimpleNamespace:
    """An engine whose pool holds a third of the adapters, on a daemon with a disk."""
    folders = [tmp_path / str(number) for number in range(CONTENTS)]
    for number, folder in enumerate(folders):
        model_maker.make_adapter(folder, model_maker.PRESETS["tiny"], rank=RANKS[number % 4], seed=70 + number)
    options = {"memory": "64MiB", "disk_path": tmp_path / "disk", "disk": "256MiB"}
    running = daemon(**options)
    engine = engine_factory(
        {"server": running.url, "lora_pool": "2MiB"},
        {"PYTHONPATH": host_path},
        max_loras=8,
        max_lora_rank=64,
        max_num_seqs=16,
        worker_extension_cls="pool_extension.PoolExtension",
    )
    with running.client() as client:
        digests = {client.add_adapter(str(folder)): folder for folder in folders}
    return SimpleNamespace(
        engine=engine,
        daemons=[running],
        options=options | {"socket": running.socket},
        digests=digests,
        start=daemon,
        model=load.MergedModel(tiny / "model"),
        Adapter=load.Adapter,
    )


def clean(busy: Any) -> bool:
    """Nothing held, and every used page of the arena is an object's."""
    status = busy.daemons[-1].status()
    cpu = status["tiers"]["cpu"]
    return bool(status["leases"] == 0 and status["quarantined_bytes"] == 0 and cpu["used_bytes"] >= cpu["bytes"])


@pytest.mark.timeout(600)
def test_ten_thousand_operations_beside_requests_and_a_killed_daemon(
    busy: Any, prompts: Callable[[int], list[int]], eventually: Any
) -> None:

    def connect() -> Any:
        return busy.daemons[-1].client()

    operator = Operator(connect, list(busy.digests.values()))
    rng = random.Random(5)
    ids = {digest: number for number, digest in enumerate(busy.digests, 1)}
    answers: list[tuple[str, list[int], Any]] = []
    operator.thread.start()
    killed = False
    while operator.thread.is_alive() or len(answers) < 200:
        asked = []
        for digest in rng.choices(list(busy.digests), k=12):
            path = f"loracache:{digest}" if rng.random() < 0.5 else str(busy.digests[digest])
            lora = busy.Adapter(digest[:8], ids[digest], path)
            asked.append((digest, tokens := prompts(10 + rng.randrange(20)), busy.engine.start(tokens, lora=lora)))
        if operator.done > OPERATIONS // 2 and not killed:
            killed = True
            busy.daemons[-1].stop(signal.SIGKILL)
            busy.daemons.append(busy.start(**busy.options))
        answers += [(digest, tokens, busy.engine.result(call)) for digest, tokens, call in asked]
    assert killed
    assert not operator.wrong
    assert operator.done == OPERATIONS
    served = [answer for answer in answers if answer[2].reason != "error" and not answer[2].error]
    assert len(served) > len(answers) // 2
    for digest, tokens, answer in sorted(served, key=lambda one: one[0]):
        assert not busy.model.disagreements(busy.digests[digest], tokens, answer.tokens)
    state = busy.engine.rpc("pool_state")
    assert not state["problems"]
    eventually(lambda: clean(busy), "leases end and pages come free")
    with contextlib.closing(busy.daemons[-1].client()) as client:
        assert client.find_adapter("name-0") in {None, *busy.digests}
