# SPDX-License-Identifier: Apache-2.0
"""The arena: no page is handed out twice or lost, and nobody who maps it can take it away from the others."""

from __future__ import annotations

import mmap
import os
import random
import threading
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from loracache.cache.state import arena as arena_module
from loracache.cache.state.arena import Arena
from loracache.cache.state.huge_pages import huge_bytes, reserved_pages
from loracache.errors import ConfigError
from loracache.free_pages import FreePages
from loracache.mapping import HUGE_PAGE, address, aligned, fill_page_tables, map_arena

PAGES = 61
PAGE = 4096


class PagesMachine(RuleBasedStateMachine):
    """FreePages beside the plainest model there is: the set of free page numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = FreePages(PAGES)
        self.free = set(range(PAGES))
        self.held: list[tuple[int, int]] = []

    @rule(pages=st.integers(1, PAGES + 1))
    def allocate(self, pages: int) -> None:
        longest = max((length for _, length in self.model_runs()), default=0)
        runs = self.pages.allocate(pages)
        if pages > len(self.free):
            assert runs is None
            return
        assert runs is not None
        taken = [page for start, length in runs for page in range(start, start + length)]
        assert len(taken) == len(set(taken)) == pages
        assert self.free.issuperset(taken)
        # A run of the next size class fits without looking; within its own class the search is bounded.
        if pages <= longest and 1 << pages.bit_length() <= longest:
            assert len(runs) == 1
        self.free.difference_update(taken)
        self.held.extend(runs)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            start, length = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pages.release(start, length)
            self.free.update(range(start, start + length))

    @rule(data=st.data())
    def release_in_parts(self, data: st.DataObject) -> None:
        if self.held:
            start, length = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            cut = data.draw(st.integers(0, length))
            for first, pages in ((start + cut, length - cut), (start, cut)):
                if pages:
                    self.pages.release(first, pages)
            self.free.update(range(start, start + length))

    @rule(start=st.integers(0, PAGES - 1), length=st.integers(1, PAGES))
    def release_what_is_free(self, start: int, length: int) -> None:
        if not self.free.isdisjoint(range(start, start + length)) and start + length <= PAGES:
            before = self.pages.runs()
            with pytest.raises(AssertionError, match="free already"):
                self.pages.release(start, length)
            assert self.pages.runs() == before

    def model_runs(self) -> list[tuple[int, int]]:
        """Maximal runs of the free pages: neighbours are merged, or they would be two."""
        runs: list[tuple[int, int]] = []
        for page in sorted(self.free):
            if runs and sum(runs[-1]) == page:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((page, 1))
        return runs

    @invariant()
    def free_runs_are_the_models(self) -> None:
        assert self.pages.free == len(self.free)
        assert self.pages.runs() == self.model_runs()


@pytest.mark.timeout(300)  # a failure takes long to shrink
def test_pages_are_never_handed_out_twice_and_never_lost() -> None:
    run_state_machine_as_test(PagesMachine, settings=settings(max_examples=80, stateful_step_count=40))


def test_allocation_gives_all_or_nothing() -> None:
    pages = FreePages(8)
    assert pages.allocate(9) is None
    assert pages.runs() == [(0, 8)]
    assert FreePages(0).allocate(1) is None


def test_scattered_pages_are_used_where_no_run_is_long_enough() -> None:
    pages = FreePages(9)
    singles = [pages.allocate(1) for _ in range(9)]
    for page in (1, 3, 4, 7):
        assert [(page, 1)] in singles
        pages.release(page, 1)
    runs = pages.allocate(4)
    assert runs is not None
    assert sorted(runs) == [(1, 1), (3, 2), (7, 1)]


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(16 * PAGE, PAGE)
    yield made
    os.close(made.fd)


@pytest.mark.parametrize("size", [0, PAGE, 15 * PAGE, 17 * PAGE, 1 << 30])
def test_no_client_can_shrink_or_grow_the_arena(arena: Arena, size: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, size)
    assert os.fstat(arena.fd).st_size == 16 * PAGE
    with pytest.raises(PermissionError):
        os.pwrite(arena.fd, b"x", 16 * PAGE)
    arena.view[-1] = 7  # no SIGBUS


def test_every_map_sees_the_same_bytes(arena: Arena) -> None:
    other = mmap.mmap(arena.fd, arena.size)
    extents = arena.allocate(3 * PAGE + 5)
    assert extents is not None
    data = random.Random(1).randbytes(3 * PAGE + 5)
    at = 0
    for view in arena.buffers(extents, len(data)):
        view[:] = data[at : at + len(view)]
        at += len(view)
    assert at == len(data)
    assert b"".join(other[offset : offset + length] for offset, length in extents)[: len(data)] == data
    other.close()


def test_buffers_of_scattered_extents_cover_the_object_exactly(arena: Arena) -> None:
    held = [arena.allocate(PAGE) for _ in range(16)]
    for extents in held[1::3]:
        arena.free(extents or ())
    extents = arena.allocate(2 * PAGE + 1)
    assert extents is not None
    assert len(extents) == 3
    assert [len(view) for view in arena.buffers(extents, 2 * PAGE + 1)] == [PAGE, PAGE, 1]
    assert [len(view) for view in arena.buffers(extents, PAGE)] == [PAGE]


def test_a_size_that_is_no_multiple_of_the_page_is_rounded_down_and_objects_up() -> None:
    arena = Arena(5 * PAGE + 100, PAGE)
    try:
        assert arena.size == arena.free_bytes == 5 * PAGE
        assert [arena.rounded(size) for size in (1, PAGE, PAGE + 1)] == [PAGE, PAGE, 2 * PAGE]
    finally:
        os.close(arena.fd)


def test_audit_names_pages_that_are_lost_or_held_twice(arena: Arena) -> None:
    first, second = arena.allocate(2 * PAGE), arena.allocate(PAGE)
    assert first is not None
    assert second is not None
    assert arena.audit([*first, *second]) == []
    assert "lost" in arena.audit(first)[0]
    assert "lost" in arena.audit(second)[0]
    assert "held twice" in arena.audit([*first, *first, *second])[0]
    assert "held twice" in arena.audit([*first, *second, (15 * PAGE, PAGE)])[0]


def test_memory_beyond_the_machine_is_refused_with_both_figures() -> None:
    with pytest.raises(ConfigError, match=r"1048576\.0 GiB.*--memory less"):
        Arena(1 << 50, 64 << 10)


def test_populating_touches_every_page_and_stops_when_told(arena: Arena) -> None:
    arena.populate()
    assert arena.populated in (0, arena.size)  # 0: a kernel without MADV_POPULATE_WRITE
    told = threading.Event()
    told.set()
    other = Arena(16 * PAGE, PAGE)
    try:
        other.populate(told.is_set)
        assert other.populated == 0
    finally:
        os.close(other.fd)


def in_huge_pages(mapped: mmap.mmap) -> int:
    return huge_bytes(address(mapped))


def can_join() -> bool:
    """Whether this kernel joins pages of a file in memory when asked to."""
    fd = os.memfd_create("arena")
    os.ftruncate(fd, 4 << 20)
    mapped = aligned(lambda: mmap.mmap(fd, 4 << 20))
    os.close(fd)
    mapped[::PAGE] = bytes(len(mapped) // PAGE)
    try:
        mapped.madvise(25)  # MADV_COLLAPSE
    except OSError:
        return False
    return True


def test_transparent_huge_pages_hold_the_arena_here_and_in_who_maps_it_and_it_stays_sealed() -> None:
    if not can_join():
        pytest.skip("this kernel makes no huge pages of shared memory (MADV_COLLAPSE, Linux 6.1)")
    arena = Arena((9 << 20) + 3 * PAGE, PAGE, "transparent")
    spacer = mmap.mmap(-1, (8 << 20) + 3 * PAGE)  # so that the next would begin elsewhere
    client = map_arena(arena.fd, arena.size, b"a client's")
    spacer.close()
    try:
        assert arena.size == 8 << 20
        assert arena.huge_bytes == 0
        arena.populate()
        assert arena.populated == arena.huge_bytes == in_huge_pages(arena.map) == arena.size
        assert fill_page_tables(lambda: client) == in_huge_pages(client) == arena.size
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, arena.size // 2)
        client[-1] = arena.view[0] = 7
        assert (arena.view[-1], client[0]) == (7, 7)
    finally:
        os.close(arena.fd)


def test_small_pages_are_what_nobody_asked_to_join() -> None:
    arena = Arena(4 << 20, PAGE)
    arena.populate()
    os.close(arena.fd)
    assert arena.huge_bytes == in_huge_pages(arena.map) == 0


@pytest.mark.parametrize("size", [1 << 20, 4 << 20, (64 << 20) + PAGE])
def test_large_mappings_begin_where_huge_pages_can(size: int) -> None:
    fd = os.memfd_create("arena")
    os.ftruncate(fd, size)
    spacer = mmap.mmap(-1, 12 * PAGE)
    gaps = [mmap.mmap(-1, max(size, HUGE_PAGE) + each * PAGE) for each in range(8)]
    for gap in gaps[::2]:
        gap.close()
    mapped = [aligned(lambda: mmap.mmap(fd, size)) for _ in range(20)]
    os.close(fd)
    assert all(len(each) == size for each in mapped)
    assert size < HUGE_PAGE or not any(address(each) % HUGE_PAGE for each in mapped)
    spacer.close()


def test_reserved_pages_that_are_not_there_are_refused_with_both_figures_and_the_fix() -> None:
    page, free = reserved_pages()
    if not page:
        pytest.skip("a kernel without reserved pages")
    descriptors = len(os.listdir("/proc/self/fd"))
    pages = free + 8
    with pytest.raises(
        ConfigError, match=f"takes {pages} pages of {page >> 10} KiB, of which {free} are free.*nr_huge"
    ):
        Arena(pages * page, PAGE, "reserved")
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(ConfigError, match="less than a huge page"):
        Arena(page // 2, PAGE, "reserved")


def test_reserved_pages_that_a_limit_withholds_are_found_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control group's limit counts at the first touch, whose failure is a SIGBUS."""
    monkeypatch.setattr(os, "MFD_HUGETLB", 0)  # so that the mapping succeeds
    monkeypatch.setattr(arena_module, "fill_page_tables", lambda arena: len(arena()) // 2)
    with pytest.raises(ConfigError, match="limit or the memory policy leaves fewer"):
        Arena(4 << 20, PAGE, "reserved")


def test_reserved_pages_hold_the_arena_and_its_seals() -> None:
    page, free = reserved_pages()
    if not page or free < 2:
        pytest.skip("fewer than two reserved pages are free (sysctl vm.nr_hugepages)")
    arena = Arena(2 * page + PAGE, PAGE, "reserved")
    client = map_arena(arena.fd, arena.size, b"another client's")
    try:
        assert arena.size == 2 * page
        arena.populate()
        assert arena.huge_bytes == arena.size
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, page)
        client[-1] = 7
        assert arena.view[-1] == 7
    finally:
        os.close(arena.fd)
