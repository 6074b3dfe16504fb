# SPDX-License-Identifier: Apache-2.0
"""How adapters of one structure (settings, modules, shapes, dtypes) come onto the pages of a pool: worked out once for
all of them, since hundreds differ in their numbers only.

Threading: used by the activator's thread alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from loracache.adapters.payload import ModuleWeights, Packed, payload_header
from loracache.connectors.vllm.common.recent import Recent
from loracache.connectors.vllm.lora.layout import Placement
from loracache.connectors.vllm.worker.lora.filling import DTYPES
from loracache.connectors.vllm.worker.lora.pool import PagedAdapter, PagePool
from loracache.errors import UsageError
from loracache.kernels.tables import A_FLAT, round_up

__all__ = ["Recipe", "Recipes", "copy_plain"]

_KEPT = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """header: of the payloads. parts: the adapter's modules by the model's names. plain: (offset in the payload, bytes,
    slice, matrix) of every matrix in the payload's order, where all of them are copied byte by byte; None where rows
    are cast, cut or lengthened.
    """

    header: bytes
    parts: Mapping[str, ModuleWeights]
    placement: Placement
    scales: npt.NDArray[np.float32]
    plain: tuple[tuple[int, int, int, int], ...] | None


class Recipes:
    """The recipes of one worker's pool, the last used kept. manager: the PagedLoRAModelManager."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._pool: PagePool = manager.pool
        self._known: Recent[tuple[bytes, int], Recipe] = Recent()
        self._sharded = any(getattr(layer, "tp_size", 1) > 1 for layer in manager.layers)

    def of(self, payload: list[memoryview]) -> Recipe:
        """The recipe for a payload. Raises UsageError where the pool's model cannot use it."""
        structure = payload_header(payload), sum(map(len, payload))
        recipe = self._known.used(structure)
        if recipe is None:
            recipe = self._known[structure] = self._make(structure[0], Packed(payload, structure[0]))
            self._known.drop_oldest(most=_KEPT)
        return recipe

    def _make(self, header: bytes, packed: Packed) -> Recipe:
        shape = self._pool.shape
        parts = self._manager.by_model_name(packed.modules())
        placement = shape.fit({part: module.size for part, module in parts.items()})
        names = [part for module in shape.modules for part in module.parts]
        scales = np.array([parts[part].scaling if part in parts else 0.0 for part in names], dtype=np.float32)
        return Recipe(header, parts, placement, scales, None if self._sharded else self._plain(parts))

    def _plain(self, parts: Mapping[str, ModuleWeights]) -> tuple[tuple[int, int, int, int], ...] | None:
        shape, copies, row = self._pool.shape, [], 0
        for module in shape.modules:
            for part, out in zip(module.parts, module.widths, strict=True):
                found = parts.get(part)
                matrices = [(found.a, module.width), (found.b, out)] if found is not None else []
                for matrix, (tensor, width) in enumerate(matrices):
                    same = DTYPES[tensor.dtype] is self._pool.pages.dtype
                    if not same or round_up(width, shape.chunk) != width:
                        return None
                    copies.append((tensor.offset, tensor.nbytes, row, matrix))
                row += 1
        return tuple(sorted(copies))


def copy_plain(pool: PagePool, adapter: PagedAdapter, recipe: Recipe, payload: memoryview) -> int:
    """Copy a payload that is one buffer onto pages in host memory; answers the checksum of what is there then, with
    what stands between: where that is the payload's, the pages hold it, whatever became of the payload meanwhile. One
    pass: what was copied is read for the checksum while it is in the processor's cache. Raises UsageError where a
    matrix is not as long as its place; nothing beside the adapter's pages is ever touched.
    """
    assert recipe.plain is not None
    pool.check_holds(adapter)
    source, target = np.frombuffer(payload, np.uint8), pool.bytes
    size = pool.shape.element_bytes
    places = adapter.places.tolist()
    state, at = xxhash.xxh3_64(recipe.header), len(recipe.header)
    update = state.update
    for offset, nbytes, row, matrix in recipe.plain:
        if nbytes != adapter.lengths[row][matrix] * size:
            raise UsageError(f"{nbytes} bytes have no place that is for {adapter.lengths[row][matrix] * size}")
        if at != offset:
            update(payload[at:offset])
        at = offset + nbytes
        first = places[row][A_FLAT + matrix] * size
        if first >= 0:
            copied = target[first : first + nbytes]
            copied[:] = source[offset:at]
            update(copied.data)
            continue
        for piece in pool.matrix(adapter, row, matrix):
            copied = piece.view(torch.uint8).numpy()
            copied[:] = source[offset : offset + len(copied)]
            update(copied.data)
            offset += len(copied)
    update(payload[at:])
    return int(state.intdigest())
