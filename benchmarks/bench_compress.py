# SPDX-License-Identifier: Apache-2.0
"""`compress` on a running daemon: what it saves on disk, how fast it is, and what loading costs afterwards.

Numbers are normally distributed, as keys and values of random weights roughly are; there is no other model here.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from common import MIB, Row, acquire_objects, daemon, free_room, interleaved, ratio_row, row, seconds, work_folder

from loracache import CacheClient, Namespace

OBJECTS, BYTES = 128, MIB


def run(quick: bool) -> list[Row]:
    """bfloat16, then float32."""
    rounds = 2 if quick else 7
    rows: list[Row] = []
    with work_folder() as folder:
        free_room(folder, 4 * OBJECTS * BYTES)
        for dtype in ("bfloat16", "float32"):
            rows += _measure(folder / dtype, dtype, rounds)
    return rows


def _numbers(dtype: str, seed: int) -> bytes:
    values = np.random.default_rng(seed).standard_normal(BYTES // (2 if dtype == "bfloat16" else 4)).astype(np.float32)
    if dtype == "float32":
        return values.tobytes()
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _measure(folder: Path, dtype: str, rounds: int) -> list[Row]:
    folder.mkdir()
    memory = 3 * OBJECTS * BYTES
    with daemon(folder, memory=memory, disk_path=folder / "disk", disk=memory) as running, running.client() as client:
        root = client.register(Namespace("benchmark", dtype, "benchmark", 128))
        plain, packed = ([os.urandom(32) for _ in range(OBJECTS)] for _ in range(2))
        for keys in (plain, packed):
            with client.reserve(root, keys, [BYTES] * OBJECTS) as reservation:
                for position in range(OBJECTS):
                    reservation.write(position, _numbers(dtype, position))
        client.flush()
        times: dict[str, list[float]] = {"compress": [], "decompress": []}
        saved = 0
        for _ in range(rounds):
            times["compress"].append(seconds(lambda: client.compress(packed)))
            saved = client.operations(1)[0].saved
            times["decompress"].append(seconds(lambda: client.decompress(packed)))
        client.compress(packed)
        loads = interleaved(rounds, {"plain": lambda: _load(client, plain), "packed": lambda: _load(client, packed)})
    total = OBJECTS * BYTES
    return [
        row(f"{dtype}: kept on disk of {total // MIB} MiB", "", [1 - saved / total]),
        row(f"{dtype}: compress, objects in the arena", "MB/s", [total / spent / 1e6 for spent in times["compress"]]),
        row(f"{dtype}: decompress", "MB/s", [total / spent / 1e6 for spent in times["decompress"]]),
        ratio_row(f"{dtype}: loading compressed / plain objects from disk", loads["packed"], loads["plain"]),
    ]


def _load(client: CacheClient, keys: list[bytes]) -> float:
    client.evict(keys, tiers=["cpu"])
    return seconds(lambda: acquire_objects(client, keys))
