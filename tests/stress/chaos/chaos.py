# SPDX-License-Identifier: Apache-2.0
"""Faults by the second under load, then mutated frames, then made-up calls of REST; says what was reached.

    python tests/stress/chaos/chaos.py --minutes 15 [--seed N] [--report FILE]

`make chaos MINUTES=15` runs it. Ends with 0 where nothing was found that must never be, else with 1. The seed settles
which faults come, in which order and with what pauses; what the processes do meanwhile is as it happens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import secrets
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from calls import fuzz_calls
from contents import ADAPTERS, adapter_folder
from crew import Crew
from faults import KINDS, Faults
from house import Daemon, House
from ledger import Expectations
from lives import ENDS, Lives
from mutants import fuzz_frames
from workload import Place

from loracache import CacheClient

OWNERS, USERS = 3, 1
_FAULTS_A_SECOND = 12.0
_LIFE_S = (4.0, 25.0)
_SHARES = {"faults": 0.7, "frames": 0.15, "calls": 0.15}


def place_of(folder: Path) -> Place:
    """The adapters, as a cache that nothing disturbs has them."""
    folders = [adapter_folder(folder / "adapters" / str(number), number) for number in range(ADAPTERS)]
    daemon = Daemon(folder / "calm.log", folder / "c", memory="16MiB")
    known = []
    try:
        daemon.ready(scanned=False)
        with CacheClient(f"unix://{daemon.socket}") as client:
            for path in folders:
                digest = client.add_adapter(str(path))
                known.append((str(path), digest, sha256(client.get(bytes.fromhex(digest)) or b"").hexdigest()))
    finally:
        daemon.kill()
    return Place(folder, OWNERS, tuple(known))


class Chaos:
    """The first part: faults under load."""

    def __init__(self, house: House, seed: str) -> None:
        self._numbers = random.Random(seed)
        self.house = house
        self.place = place_of(house.folder)
        self.crew = Crew(self.place, USERS, seed)
        expected = Expectations([bytes.fromhex(digest) for _, digest, _ in self.place.adapters[:OWNERS]])
        self.lives = Lives(self.house, self.crew, self.place, expected)
        self._faults = Faults(self.house, self.crew, expected)
        self._undo: list[tuple[float, Callable[[], None]]] = []
        self.counts: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        """So long, and then until the last life has come to rest."""
        until = time.monotonic() + seconds
        self.lives.begin(self._numbers)
        self.crew.start()
        while True:
            self._live(min(until, time.monotonic() + self._numbers.uniform(*_LIFE_S)))
            last = time.monotonic() >= until
            (how,) = self._numbers.choices([*ENDS], [*ENDS.values()])
            if last:
                how = "daemon ended"
            self._undo_all()
            self.counts[how] += 1
            self.counts += self.lives.end(how, self._numbers)
            if last:
                return
            self.lives.begin(self._numbers)
            if not self.crew.working:
                self.crew.start()

    def _live(self, until: float) -> None:
        kinds, weights = [*KINDS], [weight for weight, _ in KINDS.values()]
        following = time.monotonic()
        while (now := time.monotonic()) < until:
            for due in [item for item in self._undo if item[0] <= now]:
                self._undo.remove(due)
                due[1]()
            self.crew.watch()
            if now >= following:
                following = now + self._numbers.expovariate(_FAULTS_A_SECOND)
                (kind,) = self._numbers.choices(kinds, weights)
                done = self._faults.do(kind, random.Random(self._numbers.random()))
                if done is not None:
                    self.counts[kind] += 1
                    self._undo.append((now + done[1], done[0]))
            assert self.house.daemon is not None
            if self.house.daemon.process.poll() is not None:
                self.lives.found.append(f"the daemon ended by itself: {self.house.daemon.log.read_text()[-2000:]}")
                return
            time.sleep(0.005)

    def _undo_all(self) -> None:
        for _, undo in sorted(self._undo, key=lambda item: item[0]):
            undo()
        self._undo.clear()

    def findings(self) -> list[str]:
        """What must never be."""
        wrong = self.place.wrong.read_text().splitlines() if self.place.wrong.exists() else []
        hangs = [f"HANG: {hang}" for hang in self.crew.hangs]
        hung = sum(pulse.counts()["hung"] for pulse in self.crew.pulses)
        hangs += [f"HANG: {hung} calls ended too late; see the longest"] if hung else []
        return [*wrong, *hangs, *self.lives.found, *self.house.tracebacks]

    def summary(self) -> dict[str, Any]:
        """Figures of this part."""
        did: Counter[str] = Counter()
        worst: dict[str, float] = {}
        for pulse in self.crew.pulses:
            did.update(pulse.counts())
            for name, took in pulse.worst().items():
                worst[name] = max(worst.get(name, 0.0), round(took, 2))
        return {
            "faults": sum(self.counts.values()),
            "faults by kind": dict(self.counts.most_common()),
            "lives": self.house.lives,
            "workload": {name: count for name, count in did.most_common() if count},
            "longest call in seconds": {name: took for name, took in worst.items() if took >= 0.01},
            "checked": dict(self.lives.checked),
            "at rest, at most": self.lives.worst,
            "disk could be filled": self.house.can_fill,
        }

    def close(self) -> None:
        """End the workload."""
        self._undo_all()
        self.crew.close()


def main() -> int:
    """Run it; 0 where nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", default=str(secrets.randbelow(10**9)))
    parser.add_argument("--report", type=Path, help="where to write it, as JSON")
    parser.add_argument("--only", choices=[*_SHARES], help="this part alone")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminated)  # everything that was started ends in a `finally`
    shares = {given.only: 1.0} if given.only else _SHARES
    print(f"chaos for {given.minutes:g} minutes, seed {given.seed}", flush=True)
    report: dict[str, Any] = {
        "seed": given.seed,
        "minutes": given.minutes,
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
    }
    found: list[str] = []
    for part, share in shares.items():
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="lc-") as folder:
            figures, wrong = _PARTS[part](Path(folder), given.seed, given.minutes * 60 * share)
        report[part] = figures | {"seconds": round(time.monotonic() - began)}
        found += wrong
        print(f"{part}: {json.dumps(report[part], indent=1)}", flush=True)
    report["found"] = found
    if given.report is not None:
        given.report.write_text(json.dumps(report, indent=1) + "\n")
    print(f"found that must never be: {len(found)}")
    for each in found[:40]:
        print(f"- {each[:2000]}")
    return 1 if found else 0


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _chaos(folder: Path, seed: str, seconds: float) -> tuple[dict[str, Any], list[str]]:
    with contextlib.closing(House(folder)) as house, contextlib.closing(Chaos(house, seed)) as chaos:
        chaos.run(seconds)
        return chaos.summary(), chaos.findings()


_PARTS: dict[str, Callable[[Path, str, float], tuple[dict[str, Any], list[str]]]] = {
    "faults": _chaos,
    "frames": fuzz_frames,
    "calls": fuzz_calls,
}

if __name__ == "__main__":
    raise SystemExit(main())
