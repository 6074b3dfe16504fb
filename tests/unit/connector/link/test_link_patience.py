# SPDX-License-Identifier: Apache-2.0
"""For how long a scheduler's link goes on asking a daemon that does not answer."""

from __future__ import annotations

import signal
import time
from typing import Any

from loracache.connectors.vllm.link.scheduler import SchedulerLink

LEASE, KEYS = bytes(16), [bytes(32)]


def test_a_daemon_is_not_silent_while_requests_have_patience_for_it(daemon: Any, eventually: Any) -> None:
    running = daemon()
    link = SchedulerLink(running.url, 30.0)
    eventually(link.begin, "the daemon greets")
    running.send(signal.SIGSTOP)
    number = link.ask_lookup(LEASE, KEYS, 1, 5.0)
    time.sleep(0.8)
    assert link.answering()
    assert link.ask_lookup(LEASE, KEYS, 1, 5.0)
    running.send(signal.SIGCONT)
    assert link.wait_lookup(number, 30.0) == ((), ())
    link.close()
