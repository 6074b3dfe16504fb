# SPDX-License-Identifier: Apache-2.0
"""What a daemon tells its REST process: one JSON argument. Paths and names; a secret has no place on a command line.

Standard library and pydantic only: the daemon imports this too.
"""

from __future__ import annotations

import ipaddress

from pydantic import BaseModel, ConfigDict

from loracache.config import Config, http_address, on_loopback
from loracache.errors import ConfigError
from loracache.logs import LogFormat
from loracache.rest.certificate import load_certificate
from loracache.rest.tokens import own_token_path, read_private, read_tokens, tokens_path

__all__ = ["RestSettings", "check", "rest_settings"]

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_RATE_ON_LOOPBACK, _RATE_OFF_LOOPBACK = 5000.0, 100.0


class RestSettings(BaseModel):
    """socket: the daemon's. hosts: what the Host header may say. open_reading: reading needs no token. listener, life:
    inherited descriptors: the listening socket, and a pipe whose other end closes with the daemon, however that ends.
    uploads: the folder for uploaded files; none: the system's for temporary ones. traces: an OTLP collector.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    socket: str
    hosts: frozenset[str]
    open_reading: bool
    tls_cert: str | None
    tls_key: str | None
    rate: float
    upload: int
    uploads: str | None
    traces: str | None
    log_format: LogFormat
    listener: int
    life: int


def rest_settings(config: Config, port: int, listener: int, life: int) -> RestSettings:
    """The settings of the process behind `port`, from the daemon's."""
    assert config.http is not None
    host = http_address(config.http)[0]
    near = on_loopback(host)
    rate = config.http_rate if config.http_rate is not None else (_RATE_ON_LOOPBACK if near else _RATE_OFF_LOOPBACK)
    return RestSettings(
        socket=str(config.socket.absolute()),
        hosts=_hosts(host, config.http_hosts, port, config.tls_cert is not None),
        open_reading=near,
        tls_cert=str(config.tls_cert) if config.tls_cert else None,
        tls_key=str(config.tls_key) if config.tls_key else None,
        rate=rate,
        upload=config.http_upload,
        traces=config.traces,
        log_format=config.log_format,
        uploads=str(config.disk_path.absolute() / "uploads") if config.disk_path else None,
        listener=listener,
        life=life,
    )


def check(config: Config) -> None:
    """Raises ConfigError where REST could not be served safely: a certificate, or tokens, that are not what they
    should be.
    """
    assert config.http is not None
    if config.tls_cert is not None and config.tls_key is not None:
        load_certificate(str(config.tls_cert), str(config.tls_key))
    own, path = own_token_path(config.socket), tokens_path(config.socket)
    try:
        if own.exists():
            read_private(own)
        known = read_tokens(path)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}; remove it") from None
    if not known and not on_loopback(http_address(config.http)[0]):
        raise ConfigError(
            f"http={config.http} is not on loopback, where nothing is open without a token, and {path} has none; make "
            f"one: loracache tokens add NAME --role operate --socket {config.socket}"
        )


def _hosts(host: str, names: tuple[str, ...], port: int, tls: bool) -> frozenset[str]:
    """What Host may say: loopback, the address listened on unless it is all of them, and `names`. A name without a
    port stands for ours; at the scheme's own port clients leave it out.
    """
    found = set()
    own = [] if _is_any(host) else [f"[{host}]" if ":" in host else host]
    for name in (*_LOOPBACK_NAMES, *own, *names):
        bare, _, given = name.rpartition(":")
        if not bare or name.endswith("]"):
            bare, given = name, str(port)
        found.add(f"{bare}:{given}".lower())
        if given == ("443" if tls else "80"):
            found.add(bare.lower())
    return frozenset(found)


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
