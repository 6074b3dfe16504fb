# SPDX-License-Identifier: Apache-2.0
"""Runs a command that ends with whoever started it: an engine must not outlive a run that was killed.

`python -m loracache.batch.keeper PARENT COMMAND...` is a process between the two. An interrupt, which a program that is
still starting may lose, is repeated until the command has ended; at last its whole process group is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

__all__ = ["kept"]

_PR_SET_PDEATHSIG = 1
_AGAIN_S, _END_S = 10.0, 30.0  # vLLM ends at once, and not in order, at a second interrupt
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)


def kept(command: Sequence[str]) -> list[str]:
    """The command line that keeps `command` as long as this process lives. Start it in a session of its own."""
    return [sys.executable, "-m", __name__, str(os.getpid()), *command]


def _main() -> int:
    parent, *command = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    _at_the_parents_end(signal.SIGTERM)
    if os.getppid() != int(parent):
        return 1
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a script's jobs in the background are born ignoring it
    process = subprocess.Popen(command, preexec_fn=_begin)  # noqa: PLW1509 - there is one thread
    orphaned, kill_at = False, 0.0
    while process.poll() is None:
        got = signal.sigtimedwait(_SIGNALS, _AGAIN_S)
        if got is not None and got.si_signo == signal.SIGCHLD:
            continue
        if got is not None:
            orphaned = orphaned or got.si_signo == signal.SIGTERM
            kill_at = kill_at or time.monotonic() + _END_S
        if kill_at:
            process.send_signal(signal.SIGINT)
        if orphaned and time.monotonic() > kill_at:
            break
    if orphaned:
        process.kill()
        process.wait()
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # what it has left behind, and this
    return process.returncode if process.returncode >= 0 else 128 - process.returncode  # as a shell says it


def _begin() -> None:
    """In the command's process, before it is the command."""
    _at_the_parents_end(signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _at_the_parents_end(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


if __name__ == "__main__":
    sys.exit(_main())
