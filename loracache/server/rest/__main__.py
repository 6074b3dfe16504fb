"""`python -m loracache.server.rest SOCKET HOSTS LISTENER LIFE`: the process that a daemon starts for its HTTP port.

HOSTS: what the Host header may say, comma-separated. LISTENER and LIFE are inherited descriptors: the listening
socket, and a pipe whose other end closes with the daemon, however that ends.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

import uvicorn
import uvloop

from loracache.server.rest.access import Access, make_token, token_path
from loracache.server.rest.app import make_app

_MOST_BODY = 8 << 20
_KEEP_ALIVE_S = 30
_MOST_CONNECTIONS = 512
_END_S = 5


async def _serve(path: str, hosts: str, listener: int, life: int) -> None:
    app = Access(make_app(f"unix://{path}"), frozenset(hosts.split(",")), make_token(token_path(path)), _MOST_BODY)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=_END_S,
        )
    )

    def end() -> None:
        server.should_exit = True
        asyncio.get_running_loop().remove_reader(life)

    asyncio.get_running_loop().add_reader(life, end)
    await server.serve(sockets=[socket.socket(fileno=listener)])


if __name__ == "__main__":
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname).1s %(name)s: %(message)s", stream=sys.stderr
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
