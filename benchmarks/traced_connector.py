# SPDX-License-Identifier: Apache-2.0
"""LoRACacheConnector with a clock around every method that vLLM's loop waits for.

vLLM loads it by `kv_connector_module_path`; the totals go to a file per process in the folder that BENCH_SPANS names,
and `Spans` reads them while the engine runs. `TracedConnector` is made when it is asked for: reading needs no vLLM.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["METHODS", "Spans"]

SCHEDULER_METHODS = (
    "on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta",
    "update_connector_output", "request_finished", "request_finished_all_groups",
)  # fmt: skip
WORKER_METHODS = (
    "handle_preemptions", "start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save", "get_finished",
    "get_block_ids_with_load_errors", "build_connector_worker_meta",
)  # fmt: skip
METHODS = SCHEDULER_METHODS + WORKER_METHODS


class Spans:
    """Reads the totals that an engine's processes write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def totals(self) -> dict[str, float]:
        """Seconds spent in each method so far, over all processes."""
        sums = sum((np.fromfile(path) for path in self._folder.glob("spans-*")), np.zeros(len(METHODS)))
        return dict(zip(METHODS, sums.tolist(), strict=True))


def _clocked(name: str, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.nested:
            return original(self, *arguments, **options)
        self.nested = True
        started = time.perf_counter()
        try:
            return original(self, *arguments, **options)
        finally:
            self.spent[number] += time.perf_counter() - started
            self.nested = False

    return method


def __getattr__(name: str) -> Any:
    if name != "TracedConnector":
        raise AttributeError(name)
    return _make()


@functools.cache
def _make() -> type:
    from loracache.connectors.vllm import LoRACacheConnector

    def start(self: Any, *arguments: Any, **options: Any) -> None:
        LoRACacheConnector.__init__(self, *arguments, **options)
        path = Path(os.environ["BENCH_SPANS"]) / f"spans-{os.getpid()}-{id(self)}"
        self.spent = np.memmap(path, dtype=np.float64, mode="w+", shape=(len(METHODS),))
        self.nested = False  # one method calling another counts once; each object is used by one thread

    body = {name: _clocked(name, number, getattr(LoRACacheConnector, name)) for number, name in enumerate(METHODS)}
    return type("TracedConnector", (LoRACacheConnector,), body | {"__init__": start, "__module__": __name__})
