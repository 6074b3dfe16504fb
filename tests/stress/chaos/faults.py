# SPDX-License-Identifier: Apache-2.0
"""The faults that pass while the daemon runs, by kind. Each answers how it is undone, and after how many seconds, or
None where it cannot be done now. What ends the daemon is in lives.py.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import redis as redis_client
from crew import Crew
from house import House
from ledger import Expectations

from loracache import CacheClient
from loracache.errors import LoRACacheError
from loracache.results import OperationState

__all__ = ["KINDS", "Faults", "Undo", "all_files", "damage_file", "damage_manifest", "object_files"]

_NAME = re.compile("[0-9a-f]{64}")
Undo = tuple[Callable[[], None], float]


def object_files(disk: Path, numbers: random.Random, spared: Sequence[bytes]) -> list[Path]:
    """Those of one folder that has any."""
    names = {key.hex() for key in spared}
    for number in numbers.sample(range(256), 64):
        if files := [path for path in all_files(disk / "d" / "objects" / f"{number:02x}") if path.name not in names]:
            return files
    return []


def all_files(folder: Path) -> list[Path]:
    """Files that are named as objects are, which strays may be too."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def damage_file(path: Path, how: str, numbers: random.Random) -> None:
    """One object's file."""
    size = path.stat().st_size
    if how == "gone" or not size:
        path.unlink()
    elif how == "cut":
        os.truncate(path, numbers.randrange(size))
    else:
        with path.open("r+b") as file:
            at = numbers.randrange(size)
            file.seek(at)
            byte = (file.read(1) or b"\0")[0]  # a shorter one may have taken its place
            file.seek(at)
            file.write(bytes([byte ^ 1 << numbers.randrange(8)]) if how == "flip" else numbers.randbytes(5000))


def damage_manifest(disk: Path, numbers: random.Random) -> None:
    """Cut, flipped, overwritten or gone: it costs a start the time to look at the files, and nothing else."""
    path = disk / "d" / "manifest"
    if not path.exists():
        return
    size = path.stat().st_size
    match numbers.randrange(4):
        case 0:
            os.truncate(path, numbers.randrange(size + 1))
        case 1:
            path.unlink()
        case 2:
            path.write_bytes(numbers.randbytes(numbers.randrange(5000)))
        case _:
            with path.open("r+b") as file:
                for _ in range(20):
                    file.seek(numbers.randrange(size + 1))
                    file.write(numbers.randbytes(1))


@dataclass(slots=True)
class Faults:
    """What they are done to."""

    house: House
    crew: Crew
    expected: Expectations

    def do(self, kind: str, numbers: random.Random) -> Undo | None:
        """One of KINDS."""
        try:
            return KINDS[kind][1](self, numbers)
        except (OSError, redis_client.RedisError, LoRACacheError):
            return None  # what it was meant for went away meanwhile, or the disk is full

    # -- clients ----------

    def client_kill(self, numbers: random.Random) -> Undo:
        """In the middle of whatever it does."""
        self.crew.kill(numbers.randrange(self.crew.size))
        return _nothing, 0.0

    def client_stop(self, numbers: random.Random) -> Undo:
        """Sometimes for longer than its leases live."""
        number = numbers.randrange(self.crew.size)
        self.crew.stop(number)
        return lambda: self.crew.go_on(number), numbers.choice((0.05, 0.2, 1.0, 3.0))

    def silent_clients(self, numbers: random.Random) -> Undo:
        """Who connect and say half a message, or less."""
        sockets = []
        for _ in range(numbers.randrange(1, 30)):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            sockets.append(sock)
            try:
                sock.connect(f"{self.house.folder}/s")
                sock.send(struct.pack("<I", numbers.randrange(1000, 8 << 20)) + numbers.randbytes(500))
            except OSError:
                continue

        def close() -> None:
            for sock in sockets:
                sock.close()

        return close, numbers.random()

    # -- the daemon ----------

    def daemon_stop(self, numbers: random.Random) -> Undo | None:
        """Mostly for less time than its clients wait."""
        daemon = self.house.daemon
        assert daemon is not None
        os.kill(daemon.pid, signal.SIGSTOP)
        return lambda: _send(daemon.pid, signal.SIGCONT), numbers.choice((0.02, 0.1, 0.3, 0.6, 4.0))

    def rest_kill(self, numbers: random.Random) -> Undo | None:
        """It is started again."""
        assert self.house.daemon is not None
        pids = self.house.daemon.rest_pids()
        if not pids:
            return None
        os.kill(pids[0], signal.SIGKILL)
        return _nothing, 0.0

    def rest_stop(self, numbers: random.Random) -> Undo | None:
        """For a while."""
        assert self.house.daemon is not None
        pids = self.house.daemon.rest_pids()
        if not pids:
            return None
        os.kill(pids[0], signal.SIGSTOP)
        return lambda: _send(pids[0], signal.SIGCONT), numbers.choice((0.1, 0.5, 2.0))

    def descriptors(self, numbers: random.Random) -> Undo:
        """None, or a few, are left."""
        self.house.limit_descriptors(numbers.randrange(6) - 1)
        return lambda: self.house.limit_descriptors(None), numbers.choice((0.2, 0.5, 1.5))

    # -- the disk ----------

    def file_damage(self, numbers: random.Random) -> Undo | None:
        """Of one object, under a running daemon."""
        files = object_files(self.house.disk, numbers, self.expected.adapters)
        if not files:
            return None
        path = numbers.choice(files)
        self.expected.taint([bytes.fromhex(path.name)])
        damage_file(path, numbers.choice(("flip", "flip", "garbage", "cut", "gone")), numbers)
        return _nothing, 0.0

    def file_swap(self, numbers: random.Random) -> Undo | None:
        """Two whole objects, each under the other's name."""
        files = object_files(self.house.disk, numbers, self.expected.adapters) + object_files(
            self.house.disk, numbers, self.expected.adapters
        )
        one, other = numbers.choice(files or [Path()]), numbers.choice(files or [Path()])
        if one == other:
            return None
        self.expected.taint([bytes.fromhex(one.name), bytes.fromhex(other.name)])
        aside = one.rename(self.house.disk / "aside")
        other.rename(one)
        aside.rename(other)
        return _nothing, 0.0

    def file_stray(self, numbers: random.Random) -> Undo | None:
        """Something that is no object, where objects are."""
        folder = self.house.disk / "d" / "objects" / f"{numbers.randrange(256):02x}"
        name = numbers.choice((f"{folder.name}{numbers.randbytes(31).hex()}", "notes.txt", "x" * 64))
        (folder / name).write_bytes(numbers.randbytes(numbers.choice((0, 10, 9000))))
        return _nothing, 0.0

    def manifest(self, numbers: random.Random) -> Undo | None:
        """Under a running daemon, which appends to it."""
        damage_manifest(self.house.disk, numbers)
        return _nothing, 0.0

    def disk_full(self, numbers: random.Random) -> Undo | None:
        """But for a few pages."""
        if not self.house.can_fill:
            return None
        filler = self.house.disk / "filler"
        if filler.exists():
            return None
        free = os.statvfs(self.house.disk).f_bavail * os.statvfs(self.house.disk).f_frsize
        with (
            filler.open("wb") as file,
            contextlib.suppress(OSError),
        ):  # the daemon writes meanwhile: it is full all the same
            os.posix_fallocate(file.fileno(), 0, max(4096, free - numbers.choice((0, 4096, 20_000))))
        return lambda: filler.unlink(missing_ok=True), numbers.choice((0.1, 0.3, 1.0))

    def disk_clear(self, numbers: random.Random) -> Undo | None:
        """An operator empties it."""
        assert self.house.daemon is not None
        before, self.house.daemon.loses = self.house.daemon.loses, True  # for the rest of its life, if no answer comes
        self.expected.loses = True
        with CacheClient(f"unix://{self.house.folder}/s", timeout=3.0) as client:
            if client.clear(tiers=["disk"], wait=3.0).state is OperationState.DONE:
                self.house.daemon.loses = before
        self.expected.void()
        self.expected.loses = self.house.daemon.loses
        return _nothing, 0.0

    # -- Redis ----------

    def redis_kill(self, numbers: random.Random) -> Undo | None:
        """And what it had is gone."""
        redis = self.house.redis
        if not redis.usable:
            return None
        redis.kill()
        return redis.launch, numbers.choice((0.1, 0.5, 2.0))

    def redis_stop(self, numbers: random.Random) -> Undo | None:
        """It is there, and silent."""
        redis = self.house.redis
        if not redis.usable:
            return None
        redis.stopped = True
        redis.process.send_signal(signal.SIGSTOP)

        def go_on() -> None:
            redis.process.send_signal(signal.SIGCONT)
            redis.stopped = False

        return go_on, numbers.choice((0.05, 0.3, 2.5))

    def redis_pause(self, numbers: random.Random) -> Undo | None:
        """As its own administrators do."""
        if not self.house.redis.usable:
            return None
        self.house.redis.redis.client_pause(numbers.choice((20, 200, 1000)), all=numbers.random() < 0.5)
        return _nothing, 0.0

    def redis_flush(self, numbers: random.Random) -> Undo | None:
        """Everything in it is gone."""
        if not self.house.redis.usable:
            return None
        self.house.redis.redis.flushall()
        return _nothing, 0.0

    def redis_full(self, numbers: random.Random) -> Undo | None:
        """Over its maxmemory: it refuses, or evicts what it likes."""
        redis = self.house.redis
        if not redis.usable:
            return None
        redis.redis.config_set("maxmemory-policy", numbers.choice(("noeviction", "allkeys-random", "allkeys-lru")))
        redis.redis.config_set("maxmemory", "2mb")

        def enough() -> None:
            if redis.usable:
                redis.redis.config_set("maxmemory", "0")

        return enough, numbers.choice((0.3, 1.0))

    def redis_damage(self, numbers: random.Random) -> Undo | None:
        """One of its keys: overwritten in part, of another type, or gone."""
        redis = self.house.redis
        if not redis.usable or (key := redis.redis.randomkey()) is None:
            return None
        match numbers.randrange(4):
            case 0:
                redis.redis.delete(key)
            case 1:
                redis.redis.delete(key)
                redis.redis.rpush(key, "a list")
            case 2:
                redis.redis.set(key, numbers.randbytes(300))
            case _:
                if redis.redis.type(key) == b"string":
                    redis.redis.setrange(key, numbers.randrange(1000), numbers.randbytes(1))
        return _nothing, 0.0


def _nothing() -> None:
    pass


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


KINDS: dict[str, tuple[int, Callable[[Faults, random.Random], Undo | None]]] = {
    "client killed": (14, Faults.client_kill),
    "client stopped": (16, Faults.client_stop),
    "silent clients": (5, Faults.silent_clients),
    "daemon stopped": (5, Faults.daemon_stop),
    "REST process killed": (1, Faults.rest_kill),
    "REST process stopped": (2, Faults.rest_stop),
    "descriptors used up": (4, Faults.descriptors),
    "object file damaged": (12, Faults.file_damage),
    "object files swapped": (3, Faults.file_swap),
    "stray file": (3, Faults.file_stray),
    "manifest damaged, running": (4, Faults.manifest),
    "disk full": (6, Faults.disk_full),
    "disk cleared": (1, Faults.disk_clear),
    "Redis killed": (3, Faults.redis_kill),
    "Redis stopped": (4, Faults.redis_stop),
    "Redis paused": (4, Faults.redis_pause),
    "Redis flushed": (3, Faults.redis_flush),
    "Redis over its memory": (4, Faults.redis_full),
    "Redis key damaged": (8, Faults.redis_damage),
}
"""How often, and how."""
