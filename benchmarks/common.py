# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: rows of results, timing, spreads, confidence intervals, daemons, temporary folders."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loracache import CacheClient
from loracache.errors import Unavailable
from loracache.keys import Namespace, checksum
from loracache.wire import protocol

__all__ = [
    "MIB", "Daemon", "Row", "acquire_objects", "aligned_buffer", "bootstrap_ratio", "commit_objects", "daemon",
    "free_room", "interleaved", "model_folder", "namespace", "rates", "ratio_row", "row", "seconds", "work_folder",
]  # fmt: skip

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[1]
_FEW = 10
_START_S = 60.0


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. spread: 10th to 90th percentile of the samples, their minimum and maximum where there are fewer than
    ten, or what `note` says. target and met are None where the figure is only there to understand another."""

    what: str
    unit: str
    median: float
    spread: tuple[float, float]
    samples: int
    target: str | None = None
    met: bool | None = None
    note: str = ""


def row(
    what: str,
    unit: str,
    samples: Sequence[float],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    note: str = "",
) -> Row:
    """A row of measured samples, its median held against a target where one is given."""
    values = np.asarray(samples, dtype=float)
    ends = (10, 90) if len(values) >= _FEW else (0, 100)
    low, high = (float(value) for value in np.percentile(values, ends))
    median = float(np.median(values))
    target = met = None
    if at_most is not None:
        target, met = f"<= {at_most:g} {unit}".strip(), median <= at_most
    elif at_least is not None:
        target, met = f">= {at_least:g} {unit}".strip(), median >= at_least
    return Row(what, unit, median, (low, high), len(values), target, met, note)


def ratio_row(what: str, upper: Sequence[float], lower: Sequence[float], **target: Any) -> Row:
    """The ratio of two interleaved series, round by round: what disturbs a round disturbs both."""
    return row(what, "x", [a / b for a, b in zip(upper, lower, strict=True)], **target)


def rates(nbytes: int, times: Sequence[float]) -> list[float]:
    """GB/s of moving `nbytes` in each of `times`."""
    return [nbytes / spent / 1e9 for spent in times]


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(rounds: int, timed: Mapping[str, Callable[[], float]], warm_up: int = 1) -> dict[str, list[float]]:
    """Run every timed call once a round, every other round in the reverse order; answers each one's seconds."""
    names = list(timed)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        for name in names if number % 2 else reversed(names):
            spent = timed[name]()
            if number >= 0:
                times[name].append(spent)
    return times


def bootstrap_ratio(
    upper: Sequence[float], lower: Sequence[float], resamples: int = 10_000
) -> tuple[float, float, float]:
    """(ratio of the medians, and the ends of its 95 % confidence interval), from resampled pairs: the percentile
    bootstrap, Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13."""
    pairs = np.column_stack([np.asarray(upper, dtype=float), np.asarray(lower, dtype=float)])
    picked = np.random.default_rng(0).integers(0, len(pairs), size=(resamples, len(pairs)))
    medians = np.median(pairs[picked], axis=1)
    low, high = np.percentile(medians[:, 0] / medians[:, 1], (2.5, 97.5))
    return float(np.median(pairs[:, 0]) / np.median(pairs[:, 1])), float(low), float(high)


# -- places ----------


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """A folder for sockets and files, short enough for a socket's path; removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lc-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_room(folder: Path, nbytes: int) -> None:
    """Raises OSError where the disk under `folder` has not so much room."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(f"{folder} has {free >> 20} MiB free; this benchmark needs {nbytes >> 20} MiB (set TMPDIR)")


def model_folder() -> Path:
    """The demo's model, made where it is not there yet."""
    import demo

    return demo.model_folder(Path(tempfile.gettempdir()) / f"loracache-demo-{os.getuid()}")


def aligned_buffer(nbytes: int, seed: int = 0) -> memoryview:
    """Random bytes in the kind of memory an arena is made of: on a page boundary, as direct I/O wants them."""
    fd = os.memfd_create("benchmark", os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    buffer = memoryview(mmap.mmap(fd, nbytes))
    os.close(fd)
    np.frombuffer(buffer, dtype=np.uint8)[:] = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
    return buffer


# -- daemons ----------


class Daemon:
    """A `loracache serve` process. Settings are those of loracache.config.Config."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self._folder = folder
        name = f"daemon-{time.monotonic_ns():x}"
        self.socket = folder / f"{name}.sock"
        self.url = f"unix://{self.socket}"
        self._log = folder / f"{name}.log"
        arguments = ["serve", "--socket", str(self.socket), "--log-level", "warning"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LORACACHE_")}
        environment |= {f"LORACACHE_{key.upper()}": str(value) for key, value in settings.items()}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "loracache", *arguments], cwd=folder, env=environment, stdout=log, stderr=log
            )

    def client(self) -> CacheClient:
        """A client, as soon as the socket answers."""
        deadline = time.monotonic() + _START_S
        while True:
            try:
                return CacheClient(self.url, name="bench", timeout=_START_S)
            except Unavailable:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the daemon does not answer: {self._log.read_text()}") from None
                time.sleep(0.001)

    def wait_populated(self) -> None:
        """Wait until the arena's pages exist: what runs before pays for them."""
        with self.client() as client:
            while True:
                tier: Any = client.status()["tiers"]
                if tier["cpu"]["populated_bytes"] >= tier["cpu"]["limit_bytes"]:
                    return
                time.sleep(0.02)

    def stop(self) -> None:
        """End the daemon."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def daemon(folder: Path, **settings: object) -> Iterator[Daemon]:
    """A daemon for as long as the block lasts, with its arena populated."""
    running = Daemon(folder, **settings)
    try:
        running.wait_populated()
        yield running
    finally:
        running.stop()


def namespace(model: str = "benchmark") -> Namespace:
    """A namespace to store under."""
    return Namespace(model=model, kv_dtype="bfloat16", layout="benchmark", chunk_tokens=128)


def commit_objects(client: CacheClient, keys: Sequence[bytes], payload: memoryview) -> Callable[[], list[Any]]:
    """Write one object of `payload` under each key, a chain; answers the call that commits them, to be timed alone."""
    digest = client.register(namespace())
    lease = os.urandom(protocol.LEASE_BYTES)
    parents = protocol.join_keys([protocol.NO_PARENT, *keys[:-1]])
    sizes = [len(payload)] * len(keys)
    reserve = protocol.Reserve(lease, digest, protocol.join_keys(keys), parents, sizes, 60.0)
    for answer in client.connection.call(reserve, 30).payload:
        if not isinstance(answer, list):
            raise RuntimeError(f"no space was reserved: {answer}")
        at = 0
        for buffer in client.connection.buffers(answer, len(payload)):
            buffer[:] = payload[at : at + len(buffer)]
            at += len(buffer)
    commit = protocol.Commit(lease, protocol.join_keys(keys), [checksum([payload])] * len(keys))
    return lambda: client.connection.call(commit, 30).payload


def acquire_objects(client: CacheClient, keys: Sequence[bytes]) -> None:
    """Raise all of them into the arena, and let go of them. Raises RuntimeError where one does not come."""
    with client.acquire(keys) as reading:
        if any(slot is None for slot in reading.slots):
            raise RuntimeError(f"not all objects came: {reading.causes}")
