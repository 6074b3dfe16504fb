"""What the commands share: how the daemon is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from loracache.client import CacheClient
from loracache.errors import ConfigError

__all__ = ["SocketOption", "client_of", "socket_of"]

SocketOption = Annotated[
    Path | None, typer.Option("--socket", help="Unix socket of the daemon [LORACACHE_SOCKET].", show_default=False)
]


def socket_of(socket: Path | None) -> Path:
    """`socket`, or LORACACHE_SOCKET, as an absolute path. Raises ConfigError where neither is given."""
    path = socket or os.environ.get("LORACACHE_SOCKET")
    if not path:
        raise ConfigError("no daemon is named; give --socket PATH or set LORACACHE_SOCKET")
    return Path(path).absolute()


def client_of(socket: Path | None) -> CacheClient:
    """A client of the daemon at `socket_of(socket)`."""
    return CacheClient(f"unix://{socket_of(socket)}", name="cli")
