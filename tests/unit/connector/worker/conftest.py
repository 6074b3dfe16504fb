# SPDX-License-Identifier: Apache-2.0
"""An engine's blocks of a chunk each, and the loader that fills them."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from loracache.kernels.page_copy import PageCopier


class RowsWorker:
    """Blocks of `size` bytes, one for each of `chunks` (keys), and their loader."""

    def __init__(self, chunks: Sequence[bytes], size: int, url: str, timeout: float = 20.0) -> None:
        from loracache.connectors.vllm.worker.loader import Loader  # which imports vLLM

        self.chunks = chunks
        self.rows = torch.zeros(len(chunks), size // 8, dtype=torch.int64)
        self.done: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.copier = PageCopier((self.rows,))
        finished = lambda *what: self.done.put(what)  # noqa: E731
        self.loader = Loader(url, lambda: None, self.copier, "s", size, timeout, lambda load: True, finished)

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
