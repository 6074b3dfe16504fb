# SPDX-License-Identifier: Apache-2.0
"""A process that uses the cache over the socket, in random order, and proves every byte that it reads.

It owns chains that it alone stores and evicts, and reads everybody's. It may be killed or stopped anywhere. What must
never happen goes into the file `wrong`, a line each.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contents import Chain, namespace, payload_of, size_of
from ledger import OWN_ADAPTER, Ledger
from pulse import Pulse

from loracache import CacheClient, Selection
from loracache.errors import LeaseLost, Rejected, Unavailable

__all__ = ["Place", "own_name", "run_owner"]

CALL_S = 3.0
_CONNECT_S = 2.0
_FLUSH_S = 12.0
_ADD_S = 8.0
_TTL_S = 2.0
_MOST_CHAINS = 60
_REFUSALS = (
    "is not registered", "cannot be read", "cannot be kept", "Too many open files", "redis unix://",
    "the disk does not take it",
    "No such file or directory: /proc/self/fd",  # what safetensors makes of having no descriptor left
)  # fmt: skip
_GENERATION = 1_000_000  # chains that one process may store


@dataclass(frozen=True, slots=True)
class Place:
    """Where things are, for every process of the run."""

    folder: Path
    owners: int
    adapters: tuple[tuple[str, str, str], ...]
    """(folder, hex digest, sha256 of the payload) each; the first are each an owner's own, the others everybody's."""

    @property
    def url(self) -> str:
        """Of the daemon."""
        return f"unix://{self.folder}/s"

    @property
    def wrong(self) -> Path:
        """What must never happen."""
        return self.folder / "wrong"

    def ledger(self, owner: int) -> Path:
        """Of one owner."""
        return self.folder / f"ledger-{owner}"

    def pulse(self, number: int) -> Pulse:
        """Of one process."""
        return Pulse(self.folder / f"pulse-{number}")

    def say(self, what: str) -> None:
        """Something went wrong."""
        with self.wrong.open("a") as file:
            file.write(what.replace("\n", " | ") + "\n")


def own_name(owner: int) -> str:
    """Of the adapter that this owner alone adds and removes."""
    return f"own-{owner}"


def run_owner(place: Place, owner: int, generation: int, seed: str) -> None:
    """Work until told to end."""
    try:
        Owner(place, owner, generation, seed).run()
    except Exception:  # noqa: BLE001 - top of a process
        place.say(f"owner {owner}: {traceback.format_exc()}")


class Owner:
    """One process's work."""

    def __init__(self, place: Place, owner: int, generation: int, seed: str) -> None:
        self._place = place
        self._owner = owner
        self._random = random.Random(f"{seed}.{owner}.{generation}")
        self._serial = generation * _GENERATION
        self._ledger = Ledger(place.ledger(owner), owner)
        self._pulse = place.pulse(owner)
        self._pulse.begin()
        self._others = [place.pulse(other) for other in range(place.owners)]
        self._client: CacheClient | None = None
        self._root = b""
        self._instance = b""
        self._work: dict[Callable[[CacheClient], None], int] = {
            self._store: 24, self._get: 24, self._lookup: 14, self._store_durably: 10, self._hold: 8, self._pin: 4,
            self._evict: 4, self._evict_part: 3, self._store_again: 2, self._change: 4, self._look_around: 4,
            self._adapter: 3, self._slow_store: 1, self._clear: 1,
        }  # fmt: skip

    def run(self) -> None:
        """Until told to end."""
        while not self._pulse.ends:
            try:
                client = self._connected()
                (work,) = self._random.choices([*self._work], [*self._work.values()])
                work(client)
                self._pulse.count("done")
            except Unavailable:
                self._pulse.count("unavailable")
                time.sleep(0.05)
            except LeaseLost:
                self._pulse.count("lease_lost")
            except Rejected as error:
                self._pulse.count("rejected")
                self._expect_refusal(error)
        if self._client is not None:
            self._client.close()

    def _expect_refusal(self, error: Rejected) -> None:
        """A fault may be told, in the words of whatever failed."""
        self._root = b""  # of a daemon that has not heard of the namespace
        if not any(words in str(error) for words in _REFUSALS):
            self._place.say(f"owner {self._owner}: refused: {error}")

    def _connected(self) -> CacheClient:
        if self._client is None:
            with self._pulse.call("connect", _CONNECT_S):
                self._client = CacheClient(self._place.url, timeout=CALL_S, name=f"owner-{self._owner}")
        client = self._client
        if not self._root or client.connection.instance != self._instance:
            with self._pulse.call("connect", _CONNECT_S + CALL_S):
                self._root = client.register(namespace(self._owner), [f"chaos-{self._owner}"])
            self._instance = client.connection.instance
        if self._random.random() < 0.01:  # come anew: a client in the middle of nothing
            client.close()
        return client

    # -- storing ----------

    def _write(self, client: CacheClient, chain: Chain, name: str) -> bool:
        """Whether all of it is committed, and was new."""
        keys, new = chain.keys, True
        cut = self._random.randint(0, len(keys))
        for start, part in ((0, keys[:cut]), (cut, keys[cut:])):
            if not part:
                continue
            parents = [keys[start - 1] if start else b"", *part[:-1]]
            with (
                self._pulse.call(name, _CONNECT_S + 2 * CALL_S),
                client.reserve(self._root, part, [*map(size_of, part)], parents=parents, ttl=_TTL_S) as reservation,
            ):
                for position, key in enumerate(part):
                    if reservation.slots[position] is not None:
                        reservation.write(position, payload_of(key))
            new = new and not any(reservation.causes)
        return new

    def _chains(self) -> list[int]:
        return [serial for serial in self._ledger.chains if serial != OWN_ADAPTER]

    def _fresh(self) -> Chain:
        self._serial += 1
        if len(self._chains()) >= _MOST_CHAINS:
            self._take_away(min(self._chains()))
        self._ledger.store(self._serial)
        self._pulse.stored(self._serial)
        return Chain(self._owner, self._serial)

    def _store(self, client: CacheClient) -> None:
        self._write(client, self._fresh(), "store")

    def _store_durably(self, client: CacheClient) -> None:
        chain = self._fresh()
        with self._pulse.call("flush", _CONNECT_S + _FLUSH_S):
            client.flush(timeout=_FLUSH_S)  # what it says is of what this client stores from now on
        began = time.monotonic()
        new = self._write(client, chain, "store")
        with self._pulse.call("flush", _CONNECT_S + _FLUSH_S):
            flushed = client.flush(timeout=_FLUSH_S)
        if new and not flushed.given_up["disk"]:
            self._ledger.acknowledge(chain.serial, began)
            self._pulse.count("acknowledged")
        else:
            self._pulse.count("not_durable")

    def _store_again(self, client: CacheClient) -> None:
        """What is there, or is no more; where a tier could not read it, the new one takes the place of the old."""
        if chains := self._chains():
            serial = self._random.choice(chains)
            self._ledger.drop(serial, forget=False)
            self._write(client, Chain(self._owner, serial), "store_again")

    def _slow_store(self, client: CacheClient) -> None:
        """A writer whose lease ends before it is done, and who goes on to write all the same."""
        keys = self._fresh().keys[:1]
        with (
            self._pulse.call("slow_store", _CONNECT_S + 2 * CALL_S + 1.0),
            client.reserve(self._root, keys, [*map(size_of, keys)], ttl=0.3) as reservation,
        ):
            time.sleep(0.6)
            if reservation.slots[0] is not None:
                reservation.write(0, payload_of(keys[0]))

    # -- reading ----------

    def _some(self) -> Chain:
        """A chain that is, was, or is going to be."""
        owner = self._random.randrange(self._place.owners)
        last = self._others[owner].last
        return Chain(owner, last - self._random.randrange(80))

    def _lookup(self, client: CacheClient) -> None:
        keys = self._some().keys
        with self._pulse.call("lookup", _CONNECT_S + CALL_S):
            hits = client.lookup(keys).hits
        if hits > len(keys):
            self._place.say(f"a lookup of {len(keys)} keys has {hits} hits")

    def _get(self, client: CacheClient) -> None:
        key = self._random.choice(self._some().keys)
        with self._pulse.call("get", _CONNECT_S + 2 * CALL_S):
            data = client.get(key)
        if data is not None:
            self._prove(key, data, "get")

    def _prove(self, key: bytes, data: bytes, how: str) -> None:
        if data == payload_of(key):
            self._pulse.count("bytes_proven", len(data))
        else:
            self._place.say(f"WRONG BYTES: {how} of {key.hex()}: {len(data)} bytes, {data[:16].hex()}...")

    def _hold(self, client: CacheClient) -> None:
        """What is held does not change; what was read under a lost lease is nobody's business."""
        seen: list[tuple[bytes, bytes]] = []
        with (
            self._pulse.call("hold", _CONNECT_S + 2 * CALL_S + 0.1),
            client.acquire(self._some().keys, ttl=_TTL_S) as reading,
        ):
            for _ in range(2):
                seen += [(slot.key, b"".join(slot.buffers)) for slot in reading.slots if slot is not None]
                time.sleep(self._random.random() * 0.05)
        for key, data in seen:
            self._prove(key, data, "hold")

    def _adapter(self, client: CacheClient) -> None:
        number = self._random.choice((self._owner, *range(self._place.owners, len(self._place.adapters))))
        folder, digest, payload = self._place.adapters[number]
        own = number == self._owner
        name = own_name(self._owner) if own else f"tenant-{number % 2}"
        match self._random.randrange(5):
            case 0 | 1:
                began = time.monotonic()
                with self._pulse.call("adapter_add", _CONNECT_S + _ADD_S):
                    got = client.add_adapter(folder, name, timeout=_ADD_S)
                if got != digest:
                    self._place.say(f"adapter {folder} has digest {got} and not {digest}")
                if own:
                    self._ledger.acknowledge(OWN_ADAPTER, began)
            case 2 if not own or self._random.random() < 0.2:
                if own:
                    self._ledger.drop(OWN_ADAPTER, forget=True)
                with self._pulse.call("adapter_remove", _CONNECT_S + CALL_S):
                    client.remove_adapter(name)
            case _:
                with self._pulse.call("adapter_get", _CONNECT_S + 2 * CALL_S):
                    data = client.get(bytes.fromhex(digest))
                if data is not None and hashlib.sha256(data).hexdigest() != payload:
                    self._place.say(f"WRONG BYTES: adapter {digest}")

    # -- changing ----------

    def _take_away(self, serial: int) -> None:
        self._ledger.drop(serial, forget=True)
        with self._pulse.call("evict", _CONNECT_S + CALL_S + 10):
            self._require().evict(Chain(self._owner, serial).keys, wait=CALL_S)

    def _require(self) -> CacheClient:
        assert self._client is not None
        return self._client

    def _evict(self, client: CacheClient) -> None:
        if len(chains := self._chains()) > _MOST_CHAINS // 2:
            self._take_away(self._random.choice(chains))

    def _evict_part(self, client: CacheClient) -> None:
        """From tiers that the promise of durability is not about."""
        with self._pulse.call("evict_part", _CONNECT_S + CALL_S + 10):
            client.evict(
                self._some().keys, tiers=self._random.choice((["cpu"], ["redis"], ["cpu", "redis"])), wait=CALL_S
            )

    def _pin(self, client: CacheClient) -> None:
        keys, tier = self._some().keys, self._random.choice(("cpu", "disk"))
        with self._pulse.call("pin", 2 * (_CONNECT_S + CALL_S) + 20):
            client.pin(keys, tier=tier, ttl=0.1 + self._random.random() * 3)
            if self._random.random() < 0.5:
                client.unpin(keys, tier=tier)

    def _change(self, client: CacheClient) -> None:
        """Bring it elsewhere, or keep it in another way."""
        selection = Selection(keys=self._some().keys)
        name = self._random.choice(("raise", "compress", "decompress", "copy"))
        with self._pulse.call(name, _CONNECT_S + CALL_S + 10):
            match name:
                case "raise":
                    client.admit(selection, tier=self._random.choice(("cpu", "disk", "redis")), wait=CALL_S)
                case "compress":
                    client.compress(selection, tier=self._random.choice(("disk", "redis")), wait=CALL_S)
                case "decompress":
                    client.decompress(selection, tier=self._random.choice(("disk", "redis")), wait=CALL_S)
                case _:
                    client.move(selection, "disk", "redis", keep=True, wait=CALL_S)

    def _clear(self, client: CacheClient) -> None:
        with self._pulse.call("clear_cpu", _CONNECT_S + CALL_S + 10):
            client.clear(tiers=["cpu"], wait=CALL_S)

    def _look_around(self, client: CacheClient) -> None:
        match self._random.randrange(4):
            case 0:
                with self._pulse.call("status", _CONNECT_S + CALL_S):
                    client.status()
            case 1:
                with self._pulse.call("list", 4 * CALL_S):
                    for _ in client.objects(Selection(model=f"chaos-{self._owner}")):
                        pass
            case 2:
                with self._pulse.call("tree", 4 * CALL_S):
                    for _ in client.tree():
                        pass
            case _:
                with self._pulse.call("events", _CONNECT_S + 10):
                    client.events(count=10, wait=0.0)


if __name__ == "__main__":
    raise SystemExit(f"run chaos.py, of which process {os.getpid()} would be a part")
