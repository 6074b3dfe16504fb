# SPDX-License-Identifier: Apache-2.0
"""The workload's processes: started, watched, killed and started again.

They are forked from a server that has imported what they need, so that one costs milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.context import ForkServerProcess

from house import environment
from workload import Place, run_owner
from workload_http import run_http

__all__ = ["Crew"]

_END_S = 40.0


class Crew:
    """`place.owners` processes on the socket, and behind them `users` that use REST."""

    def __init__(self, place: Place, users: int, seed: str) -> None:
        self._place = place
        self._seed = seed
        self._context = multiprocessing.get_context("forkserver")
        os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]  # where the server looks for what it imports
        self._context.set_forkserver_preload(["calls", "lives", "mutants", "workload_http"])  # all of chaos.py's
        self.size = place.owners + users
        self.pulses = [place.pulse(number) for number in range(self.size)]
        self._processes: dict[int, ForkServerProcess] = {}
        self._stopped: dict[int, float] = {}
        self._generation = 0
        self.hangs: list[str] = []
        self.working = False

    def start(self) -> None:
        """Have all of them work."""
        self.working = True
        for number in range(self.size):
            self._spawn(number)

    def _spawn(self, number: int) -> None:
        self._generation += 1
        work = run_owner if number < self._place.owners else run_http
        process = self._context.Process(
            target=work, args=(self._place, number, self._generation, self._seed), daemon=True
        )
        process.start()
        self._processes[number] = process

    def watch(self) -> None:
        """Start again who has ended; who hangs is noted, and ended."""
        for number, process in list(self._processes.items()):
            if not process.is_alive():
                process.join()
                if self.working:
                    self._spawn(number)
            elif number not in self._stopped and (hang := self.pulses[number].hang()):
                self.hangs.append(f"process {number}: {hang}")
                self._kill(process)

    def kill(self, number: int) -> None:
        """Wherever it is in its work."""
        self._stopped.pop(number, None)
        self._kill(self._processes[number])

    def stop(self, number: int) -> None:
        """Hold it where it is."""
        if number not in self._stopped and self._processes[number].is_alive():
            self._stopped[number] = time.monotonic()
            os.kill(self._pid(number), signal.SIGSTOP)

    def go_on(self, number: int) -> None:
        """Let it."""
        began = self._stopped.pop(number, None)
        if began is not None:
            self.pulses[number].was_stopped(time.monotonic() - began)
            os.kill(self._pid(number), signal.SIGCONT)

    def end(self) -> None:
        """All of them, in order; who does not end hangs."""
        self.working = False
        for number in list(self._stopped):
            self.go_on(number)
        deadline = time.monotonic() + _END_S
        while any(process.is_alive() for process in self._processes.values()) and time.monotonic() < deadline:
            for pulse in self.pulses:  # again and again: one that has just been started begins anew
                pulse.end()
            self.watch()
            time.sleep(0.02)
        for number, process in self._processes.items():
            if process.is_alive():
                self.hangs.append(f"process {number} did not end")
                self._kill(process)
        self._processes.clear()

    def close(self) -> None:
        """Whatever happened."""
        self.working = False
        for process in self._processes.values():
            self._kill(process)

    def _pid(self, number: int) -> int:
        pid = self._processes[number].pid
        assert pid is not None
        return pid

    def _kill(self, process: ForkServerProcess) -> None:
        process.kill()
        process.join(30)
