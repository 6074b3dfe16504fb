# SPDX-License-Identifier: Apache-2.0
"""Clients that call REST without pause: `python rest_clients.py HOST PORT CLIENTS SECONDS`, the request's body on
standard input; prints one line when it begins, and at the end how many calls were answered and their latencies (ms).

A process of its own, on bare sockets, so that what is measured is the server and not an HTTP library.
"""

from __future__ import annotations

import asyncio
import sys
import time

import numpy as np

PATH = "/v1/lookup"


async def client(host: str, port: int, request: bytes, end: float, times: list[float]) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    while (started := time.perf_counter()) < end:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head[:16]:
            raise RuntimeError(head.decode())
        fields = (line.partition(b":") for line in head.lower().split(b"\r\n"))
        length = next(int(value) for name, _, value in fields if name == b"content-length")
        await reader.readexactly(length)
        times.append(1e3 * (time.perf_counter() - started))
    writer.close()


async def main() -> None:
    host, port, clients, seconds = sys.argv[1], *map(int, sys.argv[2:5])
    body = sys.stdin.buffer.read()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    times: list[float] = []
    print("ready", flush=True)
    end = time.perf_counter() + seconds
    await asyncio.gather(*(client(host, port, f"{head}\r\n\r\n".encode() + body, end, times) for _ in range(clients)))
    print(len(times), *(round(float(value), 3) for value in np.percentile(times, (50, 99))))


asyncio.run(main())
