# SPDX-License-Identifier: Apache-2.0
"""Loading 124 MB (31 chunks of 4 MiB) from L1 into an engine's blocks, against a plain copy of as many bytes.

No engine runs: the worker's Loader and PageCopier move chunks from a daemon's arena into tensors of the shape and
strides that vLLM registers on a CPU for the 190 M model (16 layers of bfloat16, 8 heads of 128).
"""

from __future__ import annotations

import os
import queue
from dataclasses import replace

import numpy as np
import torch
from common import (
    MIB,
    Row,
    aligned_buffer,
    commit_objects,
    daemon,
    interleaved,
    rates,
    ratio_row,
    row,
    seconds,
    work_folder,
)

from loracache import CacheClient
from loracache.connectors.vllm.common.groups import KVGroup, Member
from loracache.connectors.vllm.common.messages import ChunkBlocks, Load
from loracache.connectors.vllm.link.pinned import prepare_mapping
from loracache.connectors.vllm.worker.layout import read_layout
from loracache.connectors.vllm.worker.loader import Loader
from loracache.connectors.vllm.worker.objects import GroupObjects
from loracache.groups import Need
from loracache.kernels.page_copy import Move, PageCopier
from loracache.keys import checksum, object_key

CHUNKS, LAYERS, BLOCKS, SHARD = 31, 16, 64, "benchmark"
BLOCK_SHAPE = (8, 128, 128)  # KV heads, tokens, K and V of 64: 256 KiB a layer in bfloat16, 4 MiB over all layers
CHUNK_BYTES = 4 * MIB
TARGET = 2.5


def run(quick: bool) -> list[Row]:
    """See the module's docstring."""
    caches = {f"layer.{number}": torch.zeros(BLOCKS, *BLOCK_SHAPE, dtype=torch.bfloat16) for number in range(LAYERS)}
    layout = read_layout(caches, BLOCKS)
    copier = PageCopier(layout.rows)
    payload = aligned_buffer(CHUNK_BYTES)
    keys = [os.urandom(32) for _ in range(CHUNKS)]
    places = np.random.default_rng(1).permutation(BLOCKS)[:CHUNKS].tolist()  # blocks of an engine lie anywhere
    chunks = tuple(ChunkBlocks(key, (block,)) for key, block in zip(keys, places, strict=True))
    with work_folder() as folder, daemon(folder, memory="256MiB") as running, running.client() as client:
        commit_objects(client, [object_key(key, SHARD) for key in keys], payload)()
        ended: queue.SimpleQueue[tuple[list[int], dict[str, int]]] = queue.SimpleQueue()
        loader = Loader(
            running.url,
            lambda: None,
            PageCopier(layout.rows),
            (GroupObjects(KVGroup(Need.ALL, 0, (Member(0, 1, ()),)), SHARD, (layout.block_bytes,)),),
            10.0,
            lambda load: True,
            lambda load, failed, causes: ended.put((failed, causes)),
        )
        try:
            return _measure(40 if quick else 200, loader, ended, Load("request", chunks, None, 1), client, copier)
        finally:
            loader.close()


def _measure(
    rounds: int,
    loader: Loader,
    ended: queue.SimpleQueue[tuple[list[int], dict[str, int]]],
    load: Load,
    client: CacheClient,
    copier: PageCopier,
) -> list[Row]:
    source = np.random.default_rng(2).integers(0, 1 << 60, CHUNKS * CHUNK_BYTES // 8)
    target = np.zeros_like(source)
    assert client.connection.map is not None
    prepare_mapping(client.connection.map, None)
    with client.acquire([object_key(chunk.key, SHARD) for chunk in load.chunks], ttl=600) as reading:
        payloads = [list(slot.buffers) for slot in reading.slots if slot is not None]
        assert len(payloads) == CHUNKS

        def through_the_loader() -> None:
            loader.submit(replace(load))
            failed, causes = ended.get()
            if failed or causes:
                raise RuntimeError(f"the load failed: {causes}")

        def scatter() -> None:
            copier.scatter([Move(chunk.blocks, each, 0, 1) for chunk, each in zip(load.chunks, payloads, strict=True)])

        times = interleaved(
            rounds,
            {
                "load": lambda: seconds(through_the_loader),
                "memcpy": lambda: seconds(lambda: np.copyto(target, source)),
                "scatter": lambda: seconds(scatter),
                "checksum": lambda: seconds(lambda: [checksum(payload) for payload in payloads]),
            },
            warm_up=5,
        )
    nbytes = CHUNKS * CHUNK_BYTES
    return [
        ratio_row("load from L1 / np.copyto", times["load"], times["memcpy"], at_most=TARGET),
        row("load from L1", "ms", [spent * 1e3 for spent in times["load"]]),
        row("np.copyto", "ms", [spent * 1e3 for spent in times["memcpy"]]),
        row("np.copyto", "GB/s", rates(nbytes, times["memcpy"])),
        row("  of the load: PageCopier.scatter", "ms", [spent * 1e3 for spent in times["scatter"]]),
        row("  of the load: checksums", "ms", [spent * 1e3 for spent in times["checksum"]]),
    ]
