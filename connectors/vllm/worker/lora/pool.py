# SPDX-License-Identifier: Apache-2.0
"""The worker's pool: equal pages of engine memory, which adapters are on them, and the tables the kernels read.

An adapter is resident from the moment its last byte is on its pages until it is evicted. A slot is a row of the
tables: an adapter of the current batch. Being resident costs pages, having a slot costs a row.

What is copied in reaches the pages through `matrix` alone: views of one matrix of an adapter that holds its pages, as
long as its placement says. So a copy cannot touch another adapter's pages, whatever the payload it comes from claims.

Threading: `reserve` and `settle` are called by the thread that copies adapters in, everything else by the worker's
main thread; `_lock` guards the free pages and who is resident.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loracache.connectors.vllm.lora.layout import Placement, PoolShape
from loracache.errors import UsageError
from loracache.free_pages import FreePages
from loracache.kernels.tables import A_ADDRESS, PLACE_FIELDS

__all__ = ["PagePool", "PagedAdapter", "SlotTables"]


@dataclass(frozen=True, slots=True)
class PagedAdapter:
    """An adapter on its pages. runs: (first page, pages). lengths: elements of the A and the B of every slice.
    page_ids, places, scales: a row of the tables, in pinned memory where the tables are on a GPU: it comes there in the
    midst of a step, which must not wait for that."""

    runs: tuple[tuple[int, int], ...]
    lengths: tuple[tuple[int, int], ...]
    page_ids: torch.Tensor
    places: torch.Tensor
    scales: torch.Tensor


class PagePool:
    """Pages of shape (pages, elements) on `device`, and the adapters (by digest) that are on them."""

    def __init__(self, shape: PoolShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.pages = torch.zeros((shape.pages, shape.page), dtype=dtype, device=device)
        if device.type == "cpu":
            self.bytes: npt.NDArray[np.uint8] = self.pages.view(-1).view(torch.uint8).numpy()
        self._free = FreePages(shape.pages)
        self._lock = threading.Lock()
        self._resident: dict[str, PagedAdapter] = {}
        self._reserved: dict[int, PagedAdapter] = {}  # all that have pages, by id()
        self._wanted: set[str] = set()

    @property
    def free_pages(self) -> int:
        """Pages that no adapter is on."""
        return self._free.free

    def get(self, digest: str) -> PagedAdapter | None:
        """A resident adapter."""
        with self._lock:
            return self._resident.get(digest)

    def digests(self) -> list[str]:
        """Who is resident."""
        with self._lock:
            return list(self._resident)

    def reserve(self, placement: Placement, scales: npt.NDArray[np.float32]) -> PagedAdapter | None:
        """Pages for an adapter, in runs as long as can be; None where too few are free."""
        count = self.shape.cost(placement.elements)
        with self._lock:
            runs = self._free.allocate(count) if count else []
        if runs is None:
            return None
        runs.sort()
        ids = np.concatenate([np.arange(first, first + pages) for first, pages in runs] or [np.empty(0, np.int64)])
        ids = ids.astype(np.int32)
        tables = [torch.from_numpy(each) for each in (ids, self.shape.flatten(placement, ids), scales)]
        if self.pages.device.type != "cpu":
            tables = [each.pin_memory() for each in tables]
        lengths = tuple((a, b) for a, b in placement.lengths.tolist())
        adapter = PagedAdapter(tuple(runs), lengths, *tables)
        self._reserved[id(adapter)] = adapter
        return adapter

    def want(self, digest: str) -> None:
        """The adapter is to be copied in, until it is evicted."""
        with self._lock:
            self._wanted.add(digest)

    def settle(self, digest: str, adapter: PagedAdapter) -> bool:
        """The adapter is on its pages. False, and the pages are free again, where it was evicted meanwhile."""
        with self._lock:
            if digest not in self._wanted or digest in self._resident:
                self._release(adapter)
                return digest in self._resident
            self._resident[digest] = adapter
            return True

    def give_back(self, adapter: PagedAdapter) -> None:
        """Pages reserved for nothing."""
        with self._lock:
            self._release(adapter)

    def evict(self, digest: str) -> None:
        """Free an adapter's pages."""
        with self._lock:
            self._wanted.discard(digest)
            adapter = self._resident.pop(digest, None)
            if adapter is not None:
                self._release(adapter)

    def matrix(self, adapter: PagedAdapter, row: int, matrix: int) -> list[torch.Tensor]:
        """Views of the pages that hold A (`matrix` 0) or B (1) of slice `row` of an adapter, in order. Raises
        UsageError where the adapter has no pages (any more), or no room for it on them."""
        self.check_holds(adapter)
        if matrix not in (0, 1):
            raise UsageError(f"an adapter's slice has matrices 0 and 1, not {matrix}")
        return self._pieces(adapter, int(adapter.places[row, A_ADDRESS + matrix]), adapter.lengths[row][matrix])

    def check_holds(self, adapter: PagedAdapter) -> None:
        """Raises UsageError where the adapter has no pages (any more)."""
        if self._reserved.get(id(adapter)) is not adapter:
            raise UsageError("an adapter was to be copied to pages that are not its own")

    def _pieces(self, adapter: PagedAdapter, address: int, elements: int) -> list[torch.Tensor]:
        """Views of the pages that hold `elements` of an adapter's address space from `address` on."""
        page, found = self.shape.page, []
        if address < 0 or address + elements > len(adapter.page_ids) * page:
            own = len(adapter.page_ids)
            raise UsageError(f"{elements} elements from {address} on are not on an adapter's own {own} pages")
        flat = self.pages.view(-1)
        while elements:
            number, at = divmod(address, page)
            first = int(adapter.page_ids[number])
            count = 1  # pages that follow each other are one piece
            while number + count < len(adapter.page_ids) and int(adapter.page_ids[number + count]) == first + count:
                if count * page - at >= elements:
                    break
                count += 1
            take = min(elements, count * page - at)
            found.append(flat[first * page + at : first * page + at + take])
            address, elements = address + take, elements - take
        return found

    def audit(self) -> list[str]:
        """What is wrong with the books, in words; empty where every page is held exactly once or free."""
        with self._lock:
            return self._free.audit(run for adapter in self._resident.values() for run in adapter.runs)

    def _release(self, adapter: PagedAdapter) -> None:
        del self._reserved[id(adapter)]
        for first, pages in adapter.runs:
            self._free.release(first, pages)


class SlotTables:
    """What the kernels read: a row a slot. The tensors keep their addresses for ever."""

    def __init__(self, slots: int, shape: PoolShape, device: torch.device) -> None:
        largest = {part: shape.most_rank for module in shape.modules for part in module.parts}
        most_pages = max(1, min(shape.pages, shape.pages_of(largest)))
        self.page_ids = torch.zeros((slots, most_pages), dtype=torch.int32, device=device)
        self.places = torch.zeros((slots, shape.slices, PLACE_FIELDS), dtype=torch.int64, device=device)
        self.scales = torch.zeros((slots, shape.slices), dtype=torch.float32, device=device)

    def fill(self, slot: int, adapter: PagedAdapter) -> None:
        """Put an adapter into a slot."""
        self.page_ids[slot, : len(adapter.page_ids)].copy_(adapter.page_ids, non_blocking=True)
        self.places[slot].copy_(adapter.places, non_blocking=True)
        self.scales[slot].copy_(adapter.scales, non_blocking=True)

    def clear(self, slot: int) -> None:
        """An adapter without any weights."""
        self.places[slot].zero_()
