# SPDX-License-Identifier: Apache-2.0
"""An engine's blocks of a chunk each, and the loader that fills them; a device whose copies come late."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loracache.kernels.page_copy import Copy, CopyError, Move, PageCopier
from loracache.keys import Namespace

SIZE = 4096  # of a RowsEngine's blocks
_SPACE = Namespace("m" * 64, "float32", "rows", 1)
_LONGEST_S = 20.0


class LateCopy:
    """Moves nothing before somebody waits for it, and not before it may."""

    def __init__(self, apply: Callable[[], object], may: threading.Event) -> None:
        self._apply = apply
        self._may = may
        self._lock = threading.Lock()
        self.error = ""
        self.ended = False
        self.waiters: set[threading.Thread] = set()

    def done(self) -> bool:
        self.waiters.add(threading.current_thread())
        return self.ended

    def wait(self) -> None:
        self.waiters.add(threading.current_thread())
        assert self._may.wait(_LONGEST_S)
        with self._lock:
            if not self.ended and not self.error:
                self._apply()
            self.ended = True
        if self.error:
            raise CopyError(self.error)

    def hold(self, stream: Any) -> None:
        """A device without streams."""


class LateCopier(PageCopier):
    """A device whose copies end as late as they may: when they are waited for, and while `may` is set. `gathers` and
    `scatters`: (moves, copy) of all that was submitted; where `refuses` says so, a submission fails instead, and where
    `fails` does, its copy."""

    device_type = "late"

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        super().__init__(layers)
        self.may = threading.Event()
        self.may.set()
        self.gathers: list[tuple[list[Move], LateCopy]] = []
        self.scatters: list[tuple[list[Move], LateCopy]] = []
        self.refuses: Callable[[Sequence[Move]], bool] = lambda moves: False
        self.fails: Callable[[Sequence[Move]], bool] = lambda moves: False

    def gather(self, moves: Sequence[Move], after: Any = None) -> Copy:
        return self._late(self.gathers, moves, super().gather)

    def scatter(self, moves: Sequence[Move], after: Any = None) -> Copy:
        return self._late(self.scatters, moves, super().scatter)

    def _late(self, log: list[tuple[list[Move], LateCopy]], moves: Sequence[Move], apply: Any) -> Copy:
        if self.refuses(moves):
            raise CopyError("CUDA error: invalid argument")
        copy = LateCopy(lambda: apply(moves), self.may)
        copy.error = "CUDA error: an illegal memory access was encountered" if self.fails(moves) else ""
        log.append((list(moves), copy))
        return copy


@pytest.fixture
def late_copier() -> type[LateCopier]:
    return LateCopier


def _plain(size: int) -> tuple[Any, ...]:
    """Objects of one group of layers that need all of a prefix: blocks of one token and of `size` bytes."""
    from loracache.connectors.vllm.common.groups import KVGroup, Member
    from loracache.connectors.vllm.worker.objects import GroupObjects  # which imports vLLM
    from loracache.groups import Need

    return (GroupObjects(KVGroup(Need.ALL, 0, (Member(0, 1, ()),)), "s", (size,)),)


@pytest.fixture
def plain_objects() -> Callable[[int], tuple[Any, ...]]:
    """plain_objects(size): one group's, of blocks of one token and of `size` bytes; their shard is "s"."""
    return _plain


class RowsWorker:
    """Blocks of `size` bytes, one for each of `chunks` (keys), and their loader."""

    def __init__(
        self,
        chunks: Sequence[bytes],
        size: int,
        url: str,
        timeout: float = 20.0,
        copier: type[PageCopier] = PageCopier,
    ) -> None:
        from loracache.connectors.vllm.worker.loader import Loader  # which imports vLLM

        self.chunks = chunks
        self.rows = torch.zeros(len(chunks), size // 8, dtype=torch.int64)
        self.done: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.copier = copier((self.rows,))
        finished = lambda *what: self.done.put(what)  # noqa: E731
        self.loader = Loader(url, lambda: None, self.copier, _plain(size), timeout, lambda load: True, finished)

    def load(self, positions: Sequence[int] | None = None, name: str = "r") -> None:
        """Each chunk into the block of its number; all of them unless told which."""
        from loracache.connectors.vllm.common.messages import ChunkBlocks, Load

        wanted = range(len(self.chunks)) if positions is None else positions
        self.loader.submit(Load(name, tuple(ChunkBlocks(self.chunks[at], (at,)) for at in wanted), None, 1))

    def loaded(self) -> tuple[list[int], dict[str, int]]:
        _, failed, causes = self.done.get(timeout=60)
        return failed, causes


@pytest.fixture
def make_rows_worker() -> Iterator[Callable[..., RowsWorker]]:
    made: list[RowsWorker] = []

    def make(*arguments: Any, **options: Any) -> RowsWorker:
        made.append(RowsWorker(*arguments, **options))
        return made[-1]

    yield make
    for worker in made:
        worker.loader.close()
        assert worker.done.empty()
        assert not worker.loader._thread.is_alive()


class RowsEngine:
    """Sixteen blocks of a chunk each, loader and storer with a copier each. `done` gets what they report."""

    def __init__(self, url: str, copier: Callable[[Any], PageCopier], timeout: float = 20.0) -> None:
        from loracache.connectors.vllm.worker.loader import Loader  # which imports vLLM
        from loracache.connectors.vllm.worker.storer import Storer

        self.rows = torch.zeros(16, SIZE // 8, dtype=torch.int64)
        self.keys = [os.urandom(32) for _ in range(8)]
        self.done: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.into: Any = copier((self.rows,))
        self.out: Any = copier((self.rows,))
        self.may = True
        put = lambda *what: self.done.put(what)  # noqa: E731
        ensure = lambda: None  # noqa: E731
        self.loader = Loader(url, ensure, self.into, _plain(SIZE), timeout, lambda load: self.may, put)
        self.storer = Storer(url, ensure, self.out, _plain(SIZE), lambda store: True, put)
        self.storer._flight_bytes = SIZE  # as if the chunks were large

    def fill(self) -> None:
        self.rows.copy_(torch.randint(1, 1 << 60, self.rows.shape, generator=torch.Generator().manual_seed(5)))

    def store(self, *numbers: int, after: Any = None) -> Any:
        """Chunks out of the blocks of their numbers."""
        from loracache.connectors.vllm.common.messages import ChunkBlocks, Store
        from loracache.connectors.vllm.worker.storer import StoreJob

        plan = tuple(ChunkBlocks(self.keys[number], (number,)) for number in numbers)
        job = StoreJob(Store("s", _SPACE, self.keys[numbers[0] - 1] if numbers[0] else b"", plan, None, 1), after)
        self.storer.submit(job)
        return job

    def load(self, *numbers: int, name: str = "l", after: Any = None) -> None:
        """Chunks into the blocks eight behind."""
        from loracache.connectors.vllm.common.messages import ChunkBlocks, Load

        plan = tuple(ChunkBlocks(self.keys[number], (number + 8,)) for number in numbers)
        self.loader.submit(Load(name, plan, None, 1), after)

    def ended(self) -> tuple[Any, ...]:
        return self.done.get(timeout=20)[1:]

    def close(self) -> None:
        for copier in (self.into, self.out):
            if isinstance(copier, LateCopier):
                copier.may.set()
        self.storer.close()
        self.loader.close()
        assert self.done.empty()
        assert not self.loader._thread.is_alive()
        assert not self.storer._thread.is_alive()


@pytest.fixture
def make_engine() -> Iterator[Callable[..., RowsEngine]]:
    made: list[RowsEngine] = []

    def make(*arguments: Any, **options: Any) -> RowsEngine:
        made.append(RowsEngine(*arguments, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


MIXED_BLOCKS, MIXED_CHUNK = 12, 32  # blocks of an engine's pool, and tokens of a chunk


class Mixed:
    """The memory of an engine whose layers differ in what they need of a prefix, as vLLM's own code lays it out: two of
    full attention, and four more in two groups: "window" (of 17 tokens; blocks of 16), or "state" (blocks of 32).
    """

    def __init__(self, kind: str, config: Any, layout: str = "LBNHC", seed: int = 1, **changes: Any) -> None:
        from vllm.v1 import kv_cache_interface as specs
        from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
        from vllm.v1.kv_cache_layout import KVCacheLayout
        from vllm.v1.worker.utils import allocate_kv_cache

        order = KVCacheLayout[layout]
        shape = {"block_size": 16 if kind == "window" else 32, "num_kv_heads": 2, "head_size": 32}
        full = specs.FullAttentionSpec(**shape, dtype=torch.bfloat16)
        other: Any = specs.SlidingWindowSpec(**shape, dtype=torch.bfloat16, sliding_window=17)
        if kind == "state":
            state = {"shapes": ((3, 48), (5, 5)), "dtypes": (torch.float32, torch.bfloat16)} | changes
            padded = full.page_size_bytes
            other = specs.MambaSpec(block_size=32, page_size_padded=padded, mamba_cache_mode="align", **state)
        names = [["full.0", "full.1"], [f"{kind}.0", f"{kind}.1"], [f"{kind}.2", f"{kind}.3"]]
        groups = [specs.KVCacheGroupSpec(each, spec) for each, spec in zip(names, (full, other, other), strict=True)]
        cache = SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: order,
            num_gpu_blocks_override=MIXED_BLOCKS,
            prefix_cache_retention_interval=None,
        )
        engine: Any = SimpleNamespace(cache_config=cache, attention_config=SimpleNamespace(hisparse_config=None))
        self.config = config
        self.kv_cache_config: Any = get_kv_cache_config_from_groups(engine, groups, 1 << 30)
        self.caches: dict[str, Any] = dict(allocate_kv_cache(self.kv_cache_config, torch.device("cpu"), order))
        self.memory = torch.empty(0, dtype=torch.uint8).set_(self.caches["full.0"].untyped_storage())
        self.memory.copy_(torch.randint(0, 255, self.memory.shape, generator=torch.Generator().manual_seed(seed)))
        self.names = names

    def read(self) -> Any:
        from loracache.connectors.vllm.worker.objects import read_groups

        return read_groups(self.config, self.kv_cache_config, self.caches)

    def content(self, member: int, block: int) -> list[bytes]:
        """What a member's layers have in a block."""
        pages = (self.caches[name][block].contiguous() for name in self.names[member])
        return [page.view(-1).view(torch.uint8).numpy().tobytes() for page in pages]


@pytest.fixture
def make_mixed(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mixed]:
    """make_mixed("window" or "state", ...) is a Mixed; rank: of tensor parallelism, of ranks."""
    from vllm.distributed import parallel_state

    def make(kind: str, *, rank: int = 0, ranks: int = 1, **options: Any) -> Mixed:
        monkeypatch.setattr(parallel_state, "get_tp_group", lambda: SimpleNamespace(rank_in_group=rank))
        monkeypatch.setattr(parallel_state, "get_pp_group", lambda: SimpleNamespace(rank_in_group=0))
        config = make_config(parallel_config__tensor_parallel_size=ranks)
        return Mixed(kind, config, **options)

    return make
