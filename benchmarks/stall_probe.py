# SPDX-License-Identifier: Apache-2.0
"""A client that does next to nothing, in a process of its own: how long it waits is what others make it wait.

    python benchmarks/stall_probe.py SOCKET

Prints a line when it has begun. A line on standard input ends a measurement and begins the next: the waits until then
are printed, in milliseconds, as JSON.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

from loracache.client.connection import Connection
from loracache.wire import protocol

PAUSE_S = 0.001


def main() -> None:
    """See the module's docstring."""
    connection = Connection(f"unix://{sys.argv[1]}", name="probe")
    connection.connect()
    question = protocol.Renew(os.urandom(protocol.LEASE_BYTES), 1.0)  # of a lease that there is not
    waits: list[float] = []
    print("ready", flush=True)
    while True:
        started = time.perf_counter()
        connection.call(question, 120)
        waits.append(1e3 * (time.perf_counter() - started))
        if select.select([sys.stdin], [], [], PAUSE_S)[0]:
            if not sys.stdin.readline():
                return
            print(json.dumps(waits), flush=True)
            waits = []


if __name__ == "__main__":
    main()
