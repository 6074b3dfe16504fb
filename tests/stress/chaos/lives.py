# SPDX-License-Identifier: Apache-2.0
"""The lives of the daemon: how they end, what its disk goes through meanwhile, and what must be there afterwards."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from contents import payload_of
from crew import Crew
from faults import all_files, damage_file, damage_manifest, object_files
from house import Daemon, House, eventually
from ledger import Expectations
from workload import Place, own_name

from loracache import CacheClient
from loracache.errors import LoRACacheError

__all__ = ["ENDS", "Lives"]

ENDS = {"daemon killed": 4, "power cut": 4, "daemon ended": 2}
"""How often a life ends in which way."""
_ROOMY, _TIGHT = "4GiB", "3MiB"  # more than its file system has; less than what is stored
_QUIET_S = 75.0  # pages of a writer whose process could not be watched, without a descriptor, come back after 60
_END_S = 18.0  # 5 of draining, and what hangs
_MORE_DESCRIPTORS = 12  # connections to Redis and the like that are made when they are needed
_MORE_MEMORY = 128 << 20  # scratch of 8 MiB a thread, index, books


@dataclass(slots=True)
class Lives:
    """One life after the other, in one house. `found` is what must never be; `checked` counts what was looked at."""

    house: House
    crew: Crew
    place: Place
    expected: Expectations
    found: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)

    def begin(self, numbers: random.Random) -> None:
        """The next life; in one of five, and not in the first, the disk's budget is far too small."""
        tight = numbers.random() < 0.2 and self.house.lives > 0
        daemon = self.house.start(_TIGHT if tight else _ROOMY)
        daemon.loses = self.expected.loses = tight

    def end(self, how: str, numbers: random.Random) -> Counter[str]:
        """End it, and prove what is on disk. Answers the faults that the disk went through meanwhile. Whatever else was
        disturbed is undone by now."""
        daemon = self.house.daemon
        assert daemon is not None
        done: Counter[str] = Counter()
        if how == "daemon ended":
            self.crew.end()
            self._come_to_rest(daemon)
            done += self._terminate(daemon, numbers)
        else:
            daemon.kill()
        self.house.look_through(daemon)
        if daemon.loses:
            self.expected.void()
        if how == "power cut":
            self.checked["unsynced files lost or torn by power cuts"] += self._cut(numbers)
        if how != "daemon ended":
            done += self._damage(numbers)
        self.expected.loses = False
        self._audit()
        return done

    def _damage(self, numbers: random.Random) -> Counter[str]:
        """Of a disk that nobody uses."""
        done: Counter[str] = Counter()
        if numbers.random() < 0.5:
            damage_manifest(self.house.disk, numbers)
            done["manifest damaged, at rest"] += 1
        for _ in range(numbers.randrange(4)):
            if files := object_files(self.house.disk, numbers, self.expected.adapters):
                path = numbers.choice(files)
                self.expected.taint([bytes.fromhex(path.name)])
                damage_file(path, numbers.choice(("flip", "garbage", "cut", "gone")), numbers)
                done["object file damaged, at rest"] += 1
        return done

    def _cut(self, numbers: random.Random) -> int:
        """The daemon was killed; now the machine loses what was not synced. With `disk_sync` that is nothing that a
        flush spoke of, and any part of all else."""
        safe = {key.hex() for keys in [*self._due(), self.expected.adapters] for key in keys}
        lost = 0
        for path in itertools.chain(*map(all_files, (self.house.disk / "d" / "objects").iterdir())):
            if path.name in safe or numbers.random() < 0.5:
                continue
            self.expected.taint([bytes.fromhex(path.name)])
            lost += 1
            match numbers.randrange(3):
                case 0:
                    path.unlink()
                case 1:
                    os.truncate(path, numbers.randrange(path.stat().st_size + 1))
                case _:  # its length was known to the file system, and not all of its pages
                    size = path.stat().st_size
                    os.truncate(path, numbers.randrange(size + 1) >> 12 << 12)
                    os.truncate(path, size)
        for path in (self.house.disk / "d" / "tmp").iterdir():
            os.truncate(path, numbers.randrange(path.stat().st_size + 1))
        return lost

    def _due(self) -> list[list[bytes]]:
        owners = range(self.place.owners)
        return [*self.expected.due((owner, self.place.ledger(owner)) for owner in owners)]

    def _audit(self) -> None:
        """Read all that was acknowledged, from its disk alone."""
        due = self._due()
        auditor = self.house.auditor()
        try:
            with CacheClient(f"unix://{auditor.socket}", timeout=30.0, name="auditor") as client:
                for keys in due:
                    self._read(client, keys)
                for key in self.expected.to_read:
                    self._read_damaged(client, key)
                self.expected.to_read.clear()
        except LoRACacheError as error:
            self.found.append(f"the audit of life {self.house.lives} failed: {error!r}")
        finally:
            auditor.kill()
            self.house.look_through(auditor)
        self.checked["audits"] += 1

    def _read(self, client: CacheClient, keys: list[bytes]) -> None:
        with client.acquire(keys) as reading:
            data = [b"".join(slot.buffers) if slot is not None else None for slot in reading.slots]
        for key, held, cause in zip(keys, data, reading.causes, strict=True):
            self.checked["acknowledged objects read after a restart"] += 1
            if held is not None and not self._wrong(key, held):
                continue
            what = f"ACKNOWLEDGED AND LOST ({cause})" if held is None else "WRONG BYTES on disk"
            self.found.append(f"{what}: {key.hex()} after life {self.house.lives}")
            self.expected.taint([key])
        if keys[0] in self.expected.adapters:
            name = own_name(self.expected.adapters.index(keys[0]))
            self.checked["acknowledged names asked for after a restart"] += 1
            if client.find_adapter(name) != keys[0].hex():
                self.found.append(f"ACKNOWLEDGED AND LOST: the name {name} after life {self.house.lives}")

    def _wrong(self, key: bytes, data: bytes) -> bool:
        payload = self._adapters.get(key.hex())
        return data != payload_of(key) if payload is None else sha256(data).hexdigest() != payload

    def _read_damaged(self, client: CacheClient, key: bytes) -> None:
        """What is served is right, or nothing."""
        with client.acquire([key]) as reading:
            data = [b"".join(slot.buffers) for slot in reading.slots if slot is not None]
        self.checked["damaged objects asked for"] += 1
        if data and self._wrong(key, data[0]):
            self.found.append(f"WRONG BYTES of the damaged {key.hex()} after life {self.house.lives}")

    @property
    def _adapters(self) -> dict[str, str]:
        return {digest: payload for _, digest, payload in self.place.adapters}

    # -- leaks ----------

    def _come_to_rest(self, daemon: Daemon) -> None:
        """Nobody uses it any more: everything that was held has to come back."""
        at_rest = self._at_rest(daemon)
        if at_rest:
            self.found.append(f"LEAK in life {self.house.lives}: {at_rest}")
        descriptors, memory = daemon.open_descriptors(), daemon.anonymous_bytes() - daemon.anonymous
        self.worst["descriptors more than at its start"] = max(
            self.worst.get("descriptors more than at its start", 0), descriptors - daemon.descriptors
        )
        self.worst["MiB of memory more than at its start"] = max(
            self.worst.get("MiB of memory more than at its start", 0), round(memory / (1 << 20), 1)
        )
        if descriptors > daemon.descriptors + _MORE_DESCRIPTORS:
            self.found.append(
                f"LEAK in life {self.house.lives}: {descriptors} descriptors, {daemon.descriptors} before"
            )
        if memory > _MORE_MEMORY:
            self.found.append(f"LEAK in life {self.house.lives}: {memory >> 20} MiB of memory more than at its start")
        self.checked["lives that came to rest"] += 1

    def _terminate(self, daemon: Daemon, numbers: random.Random) -> Counter[str]:
        """It has to end in time, in every other case with a Redis that is there and silent."""
        redis, silent = self.house.redis, numbers.random() < 0.5
        if silent:
            redis.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        code = daemon.end(_END_S)
        took = time.monotonic() - began
        self.worst["seconds to end"] = max(self.worst.get("seconds to end", 0), round(took, 2))
        if code != 0:
            self.found.append(f"life {self.house.lives} ended with {code} after {took:.1f} s of SIGTERM")
            daemon.kill()
        if silent:
            redis.process.send_signal(signal.SIGCONT)
        if left := [path.name for path in (self.house.disk / "d" / "tmp").iterdir()]:
            self.found.append(f"LEAK in life {self.house.lives}: {left} in tmp")
        return Counter({"Redis stopped while the daemon ends": 1} if silent else {})

    def _at_rest(self, daemon: Daemon) -> str:
        """What is still held, or ""."""
        held: dict[str, Any] = {}

        def quiet() -> bool:
            nonlocal held
            status = daemon.status()
            if "leases" not in status:
                held = {"answers": "none"}
                return False
            tiers = status["tiers"]
            held = {
                "leases": status["leases"],
                "leased objects": status["leased_objects"],
                "quarantined bytes": status["quarantined_bytes"],
                "connections": max(0, status["connections"] - 2),  # REST's, and this one
                "writes to disk": tiers["disk"]["queued_writes"] + sum(tiers["disk"]["waiting"].values()),
                "writes to Redis": tiers["redis"]["queued_writes"] + sum(tiers["redis"]["waiting"].values()),
                "operations": status["operations"],
            }
            return not any(held.values())

        if not eventually(quiet, _QUIET_S):
            return str({name: value for name, value in held.items() if value})
        return "" if eventually(lambda: not self._pages(daemon), _QUIET_S) else self._pages(daemon)

    def _pages(self, daemon: Daemon) -> str:
        """Pages of the arena that are taken when all is cleared that nobody names or pins. Pins end by themselves."""
        with CacheClient(f"unix://{daemon.socket}", name="chaos", timeout=20.0) as client:
            client.clear(tiers=["cpu"])
            client.flush(timeout=20.0)
        status = daemon.status()
        cpu, named = status["tiers"]["cpu"], status["adapters"]["cpu"]
        most = cpu["bytes"] + 4096 * cpu["objects"]
        if cpu["objects"] == named and cpu["used_bytes"] <= most:
            return ""
        return f"{cpu['objects']} objects in {cpu['used_bytes']} bytes, of which {named} adapters"
