# SPDX-License-Identifier: Apache-2.0
"""Where an adapter's matrices stand in its pages, and how many pages that takes. Pure; numpy only.

What does not fit the model's modules is refused here, before it is given any page.

An adapter's address space holds, module after module, the A of all its slices and then their B, each as rank rows
(kernels/sgmv.py says how they are addressed). What an adapter does not adapt takes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from loracache.errors import UsageError
from loracache.kernels.tables import A_ADDRESS, A_FLAT, B_ADDRESS, B_FLAT, PLACE_FIELDS, RANK, round_up

if TYPE_CHECKING:
    from loracache.adapters.payload import ModuleSize

__all__ = ["ModuleShape", "Placement", "PoolShape", "choose_chunk", "choose_page", "is_within"]

_MOST_CHUNK, _LEAST_CHUNK = 1024, 64
_MOST_PAGE, _LEAST_PAGE = 64 << 10, 4 << 10
_WASTE = 0.01  # of a row, that rounding it up to chunks may add


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """One module of the model that adapters may adapt. parts: names of the modules that its slices are called in
    adapters, in order. width: elements of a row of A on this worker. widths: of a row of B, by slice. inputs, outputs:
    the same in the whole model, whose shapes adapters have; 0 and () where this worker has all of the module.
    """

    name: str
    parts: tuple[str, ...]
    width: int
    widths: tuple[int, ...]
    inputs: int = 0
    outputs: tuple[int, ...] = ()

    def sizes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) in the whole model, by part."""
        outputs = self.outputs or self.widths
        return {part: (self.inputs or self.width, out) for part, out in zip(self.parts, outputs, strict=True)}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one adapter's matrices are. places: int64 (all slices of all modules, PLACE_FIELDS), the flat ones not
    filled in yet. lengths: int64 (slices, 2), elements of A and of B. elements: of its address space."""

    places: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    elements: int


@dataclass(frozen=True, slots=True)
class PoolShape:
    """A worker's pool and what it is for. chunk and page in elements; a page holds whole chunks. elsewhere: modules of
    the model that are on other stages of a pipeline; what an adapter has for them, and for what is in them, is theirs.
    """

    modules: tuple[ModuleShape, ...]
    pages: int
    page: int
    chunk: int
    element_bytes: int
    most_rank: int
    elsewhere: tuple[str, ...] = ()

    @property
    def slices(self) -> int:
        """Of all modules together: the rows of `Placement.places`."""
        return sum(len(module.parts) for module in self.modules)

    def fit(self, sizes: Mapping[str, ModuleSize]) -> Placement:
        """Where an adapter of these shapes (by part) goes. Raises UsageError naming a part whose shapes are not those
        of the model, and as `place`."""
        placement = self.place({part: size.rank for part, size in sizes.items()})
        for module in self.modules:
            for part, (inputs, outputs) in module.sizes().items():
                size = sizes.get(part)
                if size is not None and (size.inputs, size.outputs) != (inputs, outputs):
                    rank = size.rank
                    raise UsageError(
                        f"module {part!r} of the adapter has lora_A ({rank}, {size.inputs}) and lora_B "
                        f"({size.outputs}, {rank}), this model needs ({rank}, {inputs}) and ({outputs}, {rank}): it "
                        f"was trained for another base model"
                    )
        return placement

    def place(self, ranks: Mapping[str, int]) -> Placement:
        """Where an adapter with these ranks (by part) goes; a surplus goes nowhere. Raises as `surplus`, and UsageError
        naming a rank that the engine does not allow."""
        self.surplus(ranks)
        places = np.zeros((self.slices, PLACE_FIELDS), dtype=np.int64)
        lengths = np.zeros((self.slices, 2), dtype=np.int64)
        row = end = 0
        for module in self.modules:
            count = len(module.parts)
            for number, part in enumerate(module.parts, row):
                rank = ranks.get(part, 0)
                if rank > self.most_rank:
                    raise UsageError(f"rank {rank} of {part!r} is over max_lora_rank={self.most_rank}; raise that")
                places[number, RANK], places[number, A_ADDRESS] = rank, end
                lengths[number, 0] = rank * round_up(module.width, self.chunk)
                end += int(lengths[number, 0])
            for number, width in enumerate(module.widths, row):
                places[number, B_ADDRESS] = end
                lengths[number, 1] = places[number, RANK] * round_up(width, self.chunk)
                end += int(lengths[number, 1])
            row += count
        return Placement(places, lengths, end)

    def surplus(self, parts: Iterable[str]) -> list[str]:
        """Those of an adapter's parts that are for layers beyond the model's. Raises UsageError naming a part that no
        layer has, or one of an adapter that has nothing else."""
        own, given = self.parts(), set(parts)
        nobodys = sorted(part for part in given - own if not is_within(part, self.elsewhere))
        known = {_layerless(part) for part in own} if nobodys else set()
        strange = [part for part in nobodys if _layerless(part) not in known]
        if strange or (nobodys and len(nobodys) == len(given)):
            raise UsageError(f"module {(strange or nobodys)[0]!r} of the adapter is none that this model can adapt")
        return nobodys

    def parts(self) -> frozenset[str]:
        """All modules, as adapters call them, that this worker has pages for."""
        return frozenset(part for module in self.modules for part in module.parts)

    def cost(self, elements: int) -> int:
        """Pages of an address space."""
        return -(-elements // self.page)

    def pages_of(self, ranks: Mapping[str, int]) -> int:
        """Pages of an adapter with these ranks. Raises as `place`."""
        return self.cost(self.place(ranks).elements)

    def flatten(self, placement: Placement, page_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """The placement's places with the flat ones filled in, for an adapter on these pages."""
        places = placement.places.copy()
        addresses, there = places[:, A_ADDRESS : B_ADDRESS + 1], placement.lengths > 0
        breaks = np.diff(page_ids) != 1
        if not len(page_ids):
            flat: npt.NDArray[np.int64] | int = -1
        elif not breaks.any():
            flat = addresses + int(page_ids[0]) * self.page
        else:
            runs = np.cumsum(np.r_[0, breaks])  # equal: one behind another in the pool
            first = np.minimum(addresses // self.page, len(page_ids) - 1)
            last = np.minimum((addresses + np.maximum(placement.lengths, 1) - 1) // self.page, len(page_ids) - 1)
            there &= runs[first] == runs[last]
            flat = page_ids[first].astype(np.int64) * self.page + addresses % self.page
        places[:, A_FLAT : B_FLAT + 1] = np.where(there, flat, -1)
        return places


def is_within(part: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of these, or inside one."""
    return any(part == module or part.startswith(f"{module}.") for module in modules)


def _layerless(part: str) -> str:
    """The part's name with a place in the layers of every number in it."""
    return ".".join("*" if piece.isdigit() else piece for piece in part.split("."))


def choose_chunk(widths: set[int]) -> int:
    """Elements of a chunk: the largest power of two that hardly lengthens the rows of these widths."""
    chunk = _MOST_CHUNK
    while chunk > _LEAST_CHUNK and any(round_up(width, chunk) > width * (1 + _WASTE) for width in widths):
        chunk //= 2
    return chunk


def choose_page(chunk: int, rank_elements: int, element_bytes: int) -> int:
    """Elements of a page: 64 KiB, less where an adapter of rank 8 would leave more than a percent of its pages unused.
    rank_elements: of one rank of all modules."""
    page = _MOST_PAGE
    while page > _LEAST_PAGE and page * 64 > 8 * rank_elements * element_bytes:
        page //= 2
    return max(page // element_bytes, chunk) // chunk * chunk
