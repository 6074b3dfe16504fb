# SPDX-License-Identifier: Apache-2.0
"""Lookup of 500 chunks over the daemon's socket, as a scheduler asks when a request of 64,000 tokens arrives."""

from __future__ import annotations

import os

import numpy as np
from common import Row, aligned_buffer, commit_objects, daemon, row, seconds, work_folder

CHUNKS = 500
TARGET_MS = 1.0


def run(quick: bool) -> list[Row]:
    """All 500 are held, then none: the first key decides."""
    calls = 500 if quick else 5000
    keys = [os.urandom(32) for _ in range(CHUNKS)]
    absent = [os.urandom(32) for _ in range(CHUNKS)]
    with (
        work_folder() as folder,
        daemon(folder, memory="64MiB", page_size=4096) as running,
        running.client() as client,
    ):
        commit_objects(client, keys, aligned_buffer(4096))()
        assert client.lookup(keys).hits == CHUNKS
        times = [1e3 * seconds(lambda: client.lookup(keys)) for _ in range(calls)]
        misses = [1e3 * seconds(lambda: client.lookup(absent)) for _ in range(calls)]
    # The tail's spread: percentiles of ten parts of the run.
    tails = [float(np.percentile(part, 99)) for part in np.array_split(times, 10)]
    return [
        row(f"lookup of {CHUNKS} chunks, all held: median", "ms", times, at_most=TARGET_MS),
        row(f"lookup of {CHUNKS} chunks, all held: 99th percentile", "ms", tails, at_most=TARGET_MS),
        row(f"lookup of {CHUNKS} chunks, none held: median", "ms", misses),
    ]
