# SPDX-License-Identifier: Apache-2.0
"""Adapters in a paged pool, as the LoRA kernels are handed them, and what they have to compute, in float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]

if TYPE_CHECKING:
    import torch

SPARE_PAGES = 3
# Largest error over largest value. float32: rounding of sums in another order; the others: of h and of y to 11 and 8
# bits (an operand of either type does it). Triton's interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {"float32": 4e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
_EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@dataclass
class PagedWeights:
    """Random adapters of given ranks: `ranks[slot][slice]`. What lies in no matrix (the ends of rows and of pages,
    pages of nobody) is NaN, and so is what page_ids name beyond an adapter's pages: whatever is read in error shows.

    layout: "contiguous" (pages in order), "scattered" (in any order), "strided" (in order, with a gap behind each) or
    "offset" (in order, in the midst of a larger storage).
    """

    ranks: Sequence[Sequence[int]]
    inputs: int
    widths: Sequence[int]
    chunk: int = 32
    page_elements: int = 512
    layout: str = "scattered"
    dtype: str = "float32"
    seed: int = 0
    pages: torch.Tensor = field(init=False)
    page_ids: torch.Tensor = field(init=False)
    places: torch.Tensor = field(init=False)
    scales: torch.Tensor = field(init=False)
    matrices: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        from loracache.kernels.tables import PLACE_FIELDS

        self.generator = torch.Generator().manual_seed(self.seed)
        slots, slices = len(self.ranks), len(self.widths)
        self.places = torch.zeros(slots, slices, PLACE_FIELDS, dtype=torch.int64)
        needed = [self._lay_out(slot) for slot in range(slots)]
        self.pages = self._pool(sum(needed) + SPARE_PAGES)
        numbers = torch.arange(1, len(self.pages), dtype=torch.int32)  # page 0, which every error leads to, is nobody's
        if self.layout == "scattered":
            numbers = numbers[torch.randperm(len(numbers), generator=self.generator)]
        self.page_ids = numbers[-1].repeat(slots, max(needed) + 1)
        for slot, count in enumerate(needed):
            self.page_ids[slot, :count] = numbers[sum(needed[:slot]) :][:count]
            self._fill(slot)
        self.scales = torch.rand(slots, slices, generator=self.generator) + 0.5

    @property
    def most_rank(self) -> int:
        return max(rank for ranks in self.ranks for rank in ranks)

    def tables(self, device: str = "cpu") -> tuple[torch.Tensor, ...]:
        """pages, page_ids, places, scales; the pool with the strides and the offset that it has."""
        if device == "cpu":
            return self.pages, self.page_ids, self.places, self.scales
        stride, offset = self.pages.stride(), self.pages.storage_offset()
        whole = self.pages.as_strided((self.pages.untyped_storage().nbytes() // self.pages.element_size(),), (1,), 0)
        pages = whole.to(device).as_strided(self.pages.shape, stride, offset)
        return pages, self.page_ids.to(device), self.places.to(device), self.scales.to(device)

    def _lay_out(self, slot: int) -> int:
        """Addresses of a slot's matrices, every A before every B; answers the pages they take."""
        from loracache.kernels.tables import A_ADDRESS, B_ADDRESS, RANK, round_up

        address = 0
        for column, widths in ((A_ADDRESS, [self.inputs] * len(self.widths)), (B_ADDRESS, self.widths)):
            for number, width in enumerate(widths):
                rank = self.ranks[slot][number]
                self.places[slot, number, RANK] = rank
                self.places[slot, number, column] = address
                address += rank * round_up(width, self.chunk)
        return -(-address // self.page_elements)

    def _pool(self, pages: int) -> torch.Tensor:
        import torch

        size = self.page_elements
        gap, offset = (48 if self.layout == "strided" else 0), (112 if self.layout == "offset" else 0)
        storage = torch.full((offset + pages * (size + gap),), torch.nan, dtype=getattr(torch, self.dtype))
        return storage[offset:].view(pages, size + gap)[:, :size]

    def _fill(self, slot: int) -> None:
        """Draw a slot's matrices, write them to its pages, and say where they lie side by side."""
        import torch

        from loracache.kernels.tables import A_ADDRESS, A_FLAT, B_ADDRESS, B_FLAT, round_up

        for number, width in enumerate(self.widths):
            rank = self.ranks[slot][number]
            pair = []
            for column, flat, length in ((A_ADDRESS, A_FLAT, self.inputs), (B_ADDRESS, B_FLAT, width)):
                matrix = torch.randn(rank, length, generator=self.generator).to(self.pages.dtype)
                row, address = round_up(length, self.chunk), int(self.places[slot, number, column])
                for each in range(rank):
                    at = address + each * row + torch.arange(length)
                    self.pages[self.page_ids[slot, at // self.page_elements].long(), at % self.page_elements] = matrix[
                        each
                    ]
                self.places[slot, number, flat] = self._flat(slot, address, rank * row)
                pair.append(matrix)
            self.matrices[slot, number] = (pair[0], pair[1])

    def _flat(self, slot: int, address: int, length: int) -> int:
        size, stride = self.page_elements, self.pages.stride(0)
        pages = self.page_ids[slot, address // size : -(-(address + length) // size)].tolist()
        together = pages == list(range(pages[0], pages[0] + len(pages))) if pages else False
        return pages[0] * stride + address % size if together and (stride == size or len(pages) == 1) else -1


@dataclass
class Batch:
    """Random inputs of rows that belong to the adapters in `slots` (-1: none), with NaN in the inputs of the others."""

    weights: PagedWeights
    slots: np.ndarray[Any, Any]
    dtype: str = "float32"
    y_dtype: str = ""  # dtype, where empty
    seed: int = 0
    embeds: bool = False
    x: torch.Tensor = field(init=False)
    y: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        rows, width = len(self.slots), self.weights.inputs
        used = torch.from_numpy(self.slots >= 0)
        if self.embeds:
            self.x = torch.randint(0, width, (rows,), generator=generator)
            self.x[~used] = -(1 << 40)
        else:
            self.x = (torch.randn(rows, width, generator=generator) / width**0.5).to(getattr(torch, self.dtype))
            self.x[~used] = torch.nan
        self.y = torch.randn(rows, sum(self.weights.widths), generator=generator)
        self.y = self.y.to(getattr(torch, self.y_dtype or self.dtype))

    def expected(self, magnitude: bool = False) -> torch.Tensor:
        """y afterwards, in float64; its magnitude: what all terms add up to without their signs, which rounding errors
        grow with where they cancel each other out.
        """
        plain: Callable[[Any], Any] = abs if magnitude else lambda value: value
        want = plain(self.y.double()).clone()
        for row, slot in enumerate(self.slots.tolist()):
            left = 0
            for number, width in enumerate(self.weights.widths):
                if slot >= 0:
                    a, b = (plain(matrix.double()) for matrix in self.weights.matrices[slot, number])
                    hidden = a[:, self.x[row]] if self.embeds else a @ plain(self.x[row].double())
                    scale = float(plain(self.weights.scales[slot, number]))
                    want[row, left : left + width] += scale * (hidden @ b)
                left += width
        return want

    def check(self, result: torch.Tensor) -> None:
        """`result` is what is expected; rows without an adapter are as they were, to the bit."""
        want, idle = self.expected(), self.slots < 0
        assert (result.cpu()[idle] == self.y[idle]).all()
        names = {str(each.dtype).removeprefix("torch.") for each in (self.weights.pages, self.x, self.y)}
        tolerance = max(TOLERANCE.get(name, 0) for name in names)
        largest = want.abs().max()
        error = (result.cpu().double() - want).abs().max() / largest
        if error > tolerance:  # unless terms cancel each other out, and it is one rounding of these
            eps = max(_EPS[name] for name in names if name in _EPS)
            tolerance = max(tolerance, eps * float(self.expected(magnitude=True).max() / largest))
        assert error <= tolerance, f"error {error:.2g} of the largest value, {tolerance:.2g} is allowed"


@pytest.fixture(scope="session")
def paged() -> Callable[..., PagedWeights]:
    """Makes PagedWeights."""
    return PagedWeights


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., Batch]:
    """Makes a Batch."""
    return Batch


@pytest.fixture
def alone(tmp_path: Path) -> Callable[[str, str], None]:
    """alone(tests, variable) runs tests in a process of their own, which the variable tells that it is that."""

    def run(tests: str, variable: str) -> None:
        # -P: the repository's root, where `kernels` lies, stays off sys.path.
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", tests]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
        environment |= {variable: "1", "TRITON_CACHE_DIR": str(tmp_path)}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert " passed" in ran.stdout.splitlines()[-1]

    return run
