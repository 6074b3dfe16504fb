# SPDX-License-Identifier: Apache-2.0
"""A Redis that is some milliseconds away: a proxy that keeps what passes for a while, in either direction.

python benchmarks/far_redis.py HERE.sock THERE.sock 1.0        listens on the unix socket HERE, 1 ms each way
python benchmarks/far_redis.py HERE.sock THERE.sock 1.0 30     and 30 MB/s each way, of all connections together
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

PIECE = 64 << 10  # that takes its turn on a link of a limited rate


class Way:
    """One direction of the link. rate: bytes a second; 0: as many as come."""

    def __init__(self, delay_s: float, rate: float) -> None:
        self._delay, self._rate = delay_s, rate
        self._free = 0.0  # when the last byte has left

    def arrives(self, nbytes: int) -> float:
        """When the last of so many bytes that are sent now arrives, by the loop's clock."""
        self._free = max(self._free, asyncio.get_running_loop().time())
        if self._rate:
            self._free += nbytes / self._rate
        return self._free + self._delay


async def far_redis(here: str, there: str, delay_s: float, rate: float = 0.0) -> None:
    """Pass on everything, until somebody ends the process."""
    loop = asyncio.get_running_loop()
    to, back = Way(delay_s, rate), Way(delay_s, rate)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        with contextlib.suppress(ConnectionError):  # one side hung up
            while data := await reader.read(PIECE if rate else 1 << 20):
                arrives = way.arrives(len(data))
                loop.call_at(arrives, writer.write, data)
                if rate:  # and no more is read than the link carries
                    await asyncio.sleep(arrives - delay_s - loop.time())
        loop.call_later(delay_s, writer.close)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(there)
        await asyncio.gather(pass_on(reader, far_writer, to), pass_on(far_reader, writer, back))

    async with await asyncio.start_unix_server(serve, here) as server:
        await server.serve_forever()


if __name__ == "__main__":
    mb_a_second = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    asyncio.run(far_redis(sys.argv[1], sys.argv[2], float(sys.argv[3]) / 1000, mb_a_second * 1e6))
