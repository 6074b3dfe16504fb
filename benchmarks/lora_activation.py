# SPDX-License-Identifier: Apache-2.0
"""Activation of adapters that are in the arena, against a plain copy of as many bytes. No engine runs."""

from __future__ import annotations

import itertools
import queue
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import Row, aligned_buffer, daemon, interleaved, ratio_row, row, seconds
from lora_adapters import RANKS, SPEC
from make_model import linear_shapes

from loracache.connectors.vllm.lora.layout import ModuleShape, PoolShape, choose_chunk, choose_page
from loracache.connectors.vllm.worker.lora.activation import Activator, Order
from loracache.connectors.vllm.worker.lora.pool import PagePool

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def activation_rows(work: Path, folder: Path, rounds: int) -> list[Row]:
    """Rank 8 and rank 64, from the order to resident; one of several each time, as no processor's cache holds them."""
    rows = []
    with daemon(work, memory="512MiB") as running, running.client() as client:
        for first, count in ((0, 20), (3, 4)):  # rank 8, rank 64
            digests = [client.add_adapter(str(folder / f"a{first + len(RANKS) * number}")) for number in range(count)]
            size = client.show_adapter(digests[0]).size  # type: ignore[union-attr]
            turns = _Turns(running.url, digests, size)
            times = interleaved(rounds, {"activate": turns.activate, "copy": turns.copy}, warm_up=count)
            turns.activator.close()
            rank = RANKS[first]
            rows.append(ratio_row(f"activation of rank {rank} / memcpy", times["activate"], times["copy"], at_most=2))
            rows.append(row(f"  activation of rank {rank}, {size / 1e6:.1f} MB", "ms", _ms(times["activate"])))
            rows.append(row(f"  memcpy of {size / 1e6:.1f} MB", "ms", _ms(times["copy"])))
    return rows


def _ms(times: list[float]) -> list[float]:
    return [each * 1000 for each in times]


class _Turns:
    """Activations, and copies of as many bytes, of one adapter after another."""

    def __init__(self, server: str, digests: list[str], size: int) -> None:
        self._digests = itertools.cycle(digests)
        self._pool = make_pool(64 << 20)
        manager = SimpleNamespace(pool=self._pool, layers=[SimpleNamespace(tp_size=1)] * (4 * SPEC.layers))
        manager.by_model_name = dict
        self._done: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.activator = Activator(server, lambda: None, manager, lambda order, cause, why: self._done.put(cause), 60)
        self._sources = itertools.cycle(np.frombuffer(aligned_buffer(size, n), np.uint8) for n in range(len(digests)))
        self._target = np.frombuffer(aligned_buffer(size), np.uint8)

    def activate(self) -> float:
        digest = next(self._digests)
        self._pool.evict(digest)
        self._pool.want(digest)

        def order() -> None:
            self.activator.submit(Order(0, digest, ""))
            if cause := self._done.get(timeout=60):
                raise RuntimeError(f"the adapter was not activated: {cause}")

        spent = seconds(order)
        self._pool.evict(digest)
        return spent

    def copy(self) -> float:
        source = next(self._sources)
        return seconds(lambda: np.copyto(self._target, source))


def make_pool(nbytes: int) -> PagePool:
    """As an engine's for the 190 M model, in bfloat16."""
    modules = []
    for layer in range(SPEC.layers):
        shapes = {name.rpartition(".")[2]: (name, shape) for name, shape in linear_shapes(SPEC).items()}
        packed = {part for parts in PACKED.values() for part in parts}
        groups = [*PACKED.items(), *((name, (name,)) for name in shapes if name not in packed)]
        for group, parts in groups:
            names = tuple(f"model.layers.{layer}.{shapes[part][0]}" for part in parts)
            widths = tuple(shapes[part][1][0] for part in parts)
            modules.append(ModuleShape(group, names, shapes[parts[0]][1][1], widths))
    chunk = choose_chunk({width for module in modules for width in (module.width, *module.widths)})
    page = choose_page(chunk, sum(len(m.parts) * m.width + sum(m.widths) for m in modules), 2)
    return PagePool(
        PoolShape(tuple(modules), nbytes // (page * 2), page, chunk, 2, 64), torch.bfloat16, torch.device("cpu")
    )
