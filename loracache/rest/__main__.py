# SPDX-License-Identifier: Apache-2.0
"""`python -m loracache.rest SETTINGS`: the process that a daemon starts for its HTTP port (settings.py)."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path

import uvicorn
import uvloop

from loracache import __version__
from loracache.logs import set_up_logging
from loracache.rest.access import Access
from loracache.rest.app import make_app
from loracache.rest.certificate import Certificate
from loracache.rest.connections import LimitedConnection
from loracache.rest.gate import GatedServer
from loracache.rest.limits import Limits, Rates
from loracache.rest.settings import RestSettings
from loracache.rest.tokens import TokenStore
from loracache.rest.upload import remove_leftovers
from loracache.tracing import start_traces, stop_traces

_KEEP_ALIVE_S = 30
_END_S = 3
_REFRESH_S = 1.0
_HEADERS = [  # for browsers: no guessing of types, no frame, no use by other sites, no address told to them
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("cross-origin-resource-policy", "same-origin"),
    ("referrer-policy", "no-referrer"),
]


_NICE = 15  # on a busy machine what engines wait for goes first


async def _serve(settings: RestSettings) -> None:
    tokens = TokenStore(settings.socket)
    certificate = None
    if settings.tls_cert is not None and settings.tls_key is not None:
        certificate = Certificate(settings.tls_cert, settings.tls_key)
    if settings.traces is not None:
        start_traces(settings.traces, "loracache-rest", __version__)
    uploads = Path(settings.uploads) if settings.uploads is not None else None
    if uploads is not None:
        remove_leftovers(uploads)
    app = make_app(f"unix://{settings.socket}", Limits(upload=settings.upload), uploads)
    access = Access(app, settings.hosts, tokens, Rates(settings.rate), open_reading=settings.open_reading)
    config = uvicorn.Config(
        access,
        http=LimitedConnection,
        ws="none",
        log_config=None,
        access_log=False,  # its lines hold query strings
        proxy_headers=False,  # whoever calls would name their own address
        server_header=False,
        headers=_HEADERS,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_END_S,
    )
    config.load()
    tls = certificate.context if certificate is not None else None
    config.ssl = tls  # says which scheme URLs have
    server = GatedServer(config, socket.socket(fileno=settings.listener), tls)

    def end() -> None:
        server.should_exit = True
        asyncio.get_running_loop().remove_reader(settings.life)

    async def follow_files() -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            tokens.refresh()
            if certificate is not None:
                certificate.refresh()

    asyncio.get_running_loop().add_reader(settings.life, end)
    following = asyncio.create_task(follow_files())
    await server.serve()
    following.cancel()
    await asyncio.to_thread(stop_traces)


if __name__ == "__main__":
    os.nice(_NICE)
    _settings = RestSettings.model_validate_json(sys.argv[1])
    set_up_logging("warning", _settings.log_format)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(_settings))
