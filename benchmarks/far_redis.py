# SPDX-License-Identifier: Apache-2.0
"""A Redis that is some milliseconds away: a proxy that keeps what passes for a while, in either direction.

python benchmarks/far_redis.py HERE.sock THERE.sock 1.0        listens on the unix socket HERE, 1 ms each way
"""

from __future__ import annotations

import asyncio
import sys


async def far_redis(here: str, there: str, delay_s: float) -> None:
    """Pass on everything, until somebody ends the process."""
    loop = asyncio.get_running_loop()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            loop.call_later(delay_s, writer.write, data)
        loop.call_later(delay_s, writer.close)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(there)
        await asyncio.gather(pass_on(reader, far_writer), pass_on(far_reader, writer))

    async with await asyncio.start_unix_server(serve, here) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(far_redis(sys.argv[1], sys.argv[2], float(sys.argv[3]) / 1000))
