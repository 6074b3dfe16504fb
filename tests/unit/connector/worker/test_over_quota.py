# SPDX-License-Identifier: Apache-2.0
"""A store beyond its tenant's limit: what fits is kept, the rest is counted, and nothing fails or waits."""

from __future__ import annotations

import queue
from typing import Any

import torch

from loracache.connectors.vllm.common.groups import KVGroup, Member
from loracache.connectors.vllm.common.messages import ChunkBlocks, Store
from loracache.connectors.vllm.worker.objects import GroupObjects
from loracache.connectors.vllm.worker.storer import StoreJob, Storer
from loracache.groups import Need
from loracache.kernels.page_copy import PageCopier
from loracache.keys import Namespace, chunk_keys, object_key, salt_digest

SIZE = 64 << 10
SPACE = Namespace("m" * 64, "float32", "rows", 1, salt=salt_digest("acme"))
CHUNKS = chunk_keys(SPACE.digest(), range(48), 1)
OBJECTS = (GroupObjects(KVGroup(Need.ALL, 0, (Member(0, 1, ()),)), "s", (SIZE,)),)


def test_the_part_of_a_chain_beyond_the_limit_is_counted_once_each(daemon: Any) -> None:
    running = daemon(memory="4MiB", page_size="4KiB")  # a store goes in parts of four chunks
    client = running.client()
    client.set_quota("tenant", SPACE.salt, hard=6 * SIZE)
    done: queue.Queue[tuple[int, dict[str, int]]] = queue.Queue()
    finished = lambda job, causes: done.put((job.nbytes, causes))  # noqa: E731
    rows = torch.zeros(48, SIZE // 8, dtype=torch.int64)
    storer = Storer(running.url, lambda: None, PageCopier((rows,)), OBJECTS, lambda store: True, finished)
    chunks = tuple(ChunkBlocks(each, (at,)) for at, each in enumerate(CHUNKS))
    storer.submit(StoreJob(Store("r", SPACE, b"", chunks, None, 1)))
    assert done.get(timeout=60) == (6 * SIZE, {"over_quota": 42})
    assert client.lookup([object_key(chunk, "s") for chunk in CHUNKS]).hits == 6
    storer.close()
