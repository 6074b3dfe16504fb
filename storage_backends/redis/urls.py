# SPDX-License-Identifier: Apache-2.0
"""What a Redis URL says, and the connections that redis-py makes by it.

    redis://  rediss://                        one server; rediss is TLS, its certificate and host name verified
    unix://                                    one server on this machine
    redis+sentinel://  rediss+sentinel://      the master of a service, as the sentinels named know it
    redis+cluster://  rediss+cluster://        a cluster, found by way of the nodes named

The only place that sees passwords: whatever is said of a server goes through `Target.said` or `Target.hide`.
Threading: any number of threads.
"""

from __future__ import annotations

import logging
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs

import redis
from redis.backoff import NoBackoff
from redis.connection import SSLConnection, parse_url
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from loracache.errors import ConfigError

__all__ = ["Address", "RedisConnection", "Lost", "Target", "parse_target"]

_URL = re.compile(
    r"(?P<scheme>[a-z]+(\+[a-z]+)?)://((?P<login>[^/?#]*)@)?(?P<hosts>[^@/?#]*)(?P<path>/[^@?#]*)?(\?(?P<query>[^@#]*))?"
)
_HOST = re.compile(r"(\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[\w.-]+))(:(?P<port>[0-9]{1,5}))?")
_PATHS = {
    **dict.fromkeys(("redis", "rediss"), r"(/[0-9]*)?"),
    **dict.fromkeys(("redis+cluster", "rediss+cluster"), r"(/0?)?"),
    **dict.fromkeys(("redis+sentinel", "rediss+sentinel"), r"/[\w.-]+(/[0-9]*)?"),
    "unix": r"/.+",
}
_OPTIONS = {"db", "username", "password", "client_name"}
_TLS_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
_TLS_OPTIONS = {*_TLS_FILES, "ssl_password", "ssl_cert_reqs", "ssl_check_hostname", "ssl_ciphers"}
_SENTINEL_OPTIONS = {"sentinel_username", "sentinel_password"}
_FIX = (
    "give redis://[user:password@]host:port/db, rediss://..., unix://[user:password@]/path?db=0, "
    "redis+sentinel://host:port,host:port/service/db or redis+cluster://host:port,host:port; in a password "
    "write @ : / ? # % as %40 %3A %2F %3F %23 %25"
)
_START, _LOGIN = "start that Redis, or correct redis", "correct the user and password of redis, or the user's rights"
_TRUST = "give its CA's certificate in redis (?ssl_ca_certs=FILE) and the host by the name the certificate is for"

_ANSWERS = (redis.AuthenticationError, redis.ResponseError)
# Answers that may become others: of a server that starts or changes its role, and rights, which others give.
_PASSING = (
    redis.BusyLoadingError, redis.ReadOnlyError, redis.exceptions.NoPermissionError, redis.exceptions.MasterDownError,
    redis.exceptions.ClusterDownError, redis.exceptions.TryAgainError,
)  # fmt: skip

_log = logging.getLogger(__name__)


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class RedisConnection(Protocol):
    """What is used of redis-py's connections."""

    _sock: socket.socket | None

    def connect(self) -> None: ...

    def disconnect(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Lost:
    """How a server was lost and what can be done, in words that hold no secret. refused: by what it answered to our
    settings, so that waiting does not help."""

    text: str
    fix: str = _START
    refused: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Target:
    """What a URL names. place: the URL as far as it may be shown. hosts: none for a unix socket. service: what
    sentinels are asked for, else empty. timeout_s: how long a call waits for a silent server.
    """

    place: str
    hosts: tuple[Address, ...]
    service: str
    cluster: bool
    timeout_s: float
    kind: Any
    settings: Mapping[str, Any]
    sentinel_login: Mapping[str, Any]

    def connection(self, address: Address | None = None) -> RedisConnection:
        """A connection that is not connected yet; to `address` where there is more than one server."""
        made: RedisConnection = self.kind(**self._at(address))
        return made

    def client(self, address: Address | None = None) -> Any:
        """redis-py's own client, for what is small."""
        return _client(redis.ConnectionPool(connection_class=self.kind, **self._at(address)))

    def client_of_master(self, sentinels: object) -> Any:
        """redis-py's own client of the service; each of its connections asks `sentinels.discover_master(service)`."""
        tls = issubclass(self.kind, SSLConnection)
        settings = {name: value for name, value in self.settings.items() if name not in Address._fields}
        pool: Any = SentinelConnectionPool
        return _client(pool(self.service, sentinels, ssl=tls, **settings))

    def guide(self, address: Address, timeout_s: float) -> Any:
        """A client that asks one sentinel or one node where the data is, and waits `timeout_s` at each step."""
        settings = self._at(address)
        if self.service:
            for name in ("username", "password", "db"):
                settings.pop(name, None)
            settings |= self.sentinel_login
        return _client(redis.ConnectionPool(connection_class=self.kind, **settings | _limits(timeout_s)))

    def said(self, error: BaseException) -> Lost:
        """An error of a connection in words."""
        if isinstance(error, (BlockingIOError, TimeoutError, redis.TimeoutError)):
            return Lost(f"no answer within {self.timeout_s} s")
        chain: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return Lost(f"its certificate is not accepted: {cause.verify_message}", _TRUST, refused=True)
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        login = any(isinstance(each, (redis.AuthenticationError, redis.exceptions.NoPermissionError)) for each in chain)
        answer = any(isinstance(each, _ANSWERS) or _own_key(each) for each in chain)
        passing = any(isinstance(each, _PASSING) for each in chain)
        text = f"{type(error).__name__}: {self.hide(str(error))}"
        return Lost(text, _LOGIN if login else _START, refused=answer and not passing)

    def hide(self, text: str) -> str:
        """`text` without our secrets. A server that does not know AUTH quotes what came with it, cut somewhere."""
        text = re.sub(r",? ?with args beginning with.*", "", text, flags=re.DOTALL)
        for secret in (
            self.settings.get("password"),
            self.settings.get("ssl_password"),
            self.sentinel_login.get("password"),
        ):
            if secret:
                text = text.replace(secret, "(secret)")
        return text

    def _at(self, address: Address | None) -> dict[str, Any]:
        return {**self.settings, **(address._asdict() if address else {})}


def parse_target(url: str, timeout_s: float, password_file: Path | None = None) -> Target:
    """Raises ConfigError, without secrets, for what cannot work; whether a server answers is not asked."""
    match = _URL.fullmatch(url)
    hosts = _hosts(match["hosts"], 26379 if match["scheme"].endswith("+sentinel") else 6379) if match else None
    if match is None or hosts is None:  # any part of it may be the password
        raise ConfigError(
            f"redis {url.partition('://')[0] + '://...' if '://' in url else '(no URL)'} will not do; {_FIX}"
        )
    scheme, path, query = match["scheme"], match["path"] or "", match["query"] or ""
    place = f"{scheme}://{match['hosts']}"
    base, _, mode = scheme.partition("+")
    count = 0 if base == "unix" else 1
    if not re.fullmatch(_PATHS.get(scheme, "(?!)"), path) or (len(hosts) < 1 if mode else len(hosts) != count):
        raise ConfigError(f"redis {place} will not do; {_FIX}")
    place += path
    options = _OPTIONS | (_TLS_OPTIONS if base == "rediss" else set())
    options |= _SENTINEL_OPTIONS if mode == "sentinel" else set()
    service, _, db = path[1:].partition("/") if mode == "sentinel" else ("", "", path[1:])
    login = f"{match['login']}@" if match["login"] else ""
    plain = f"{base}://{login}{path}?{query}" if base == "unix" else f"{base}://{login}host/{db}?{query}"
    # Looking for a master takes the other half of the time.
    settings = _settings(plain, options, timeout_s / 2 if mode == "sentinel" else timeout_s)
    if settings is None or (mode == "cluster" and settings.get("db")):
        raise ConfigError(f"redis {place} will not do; {_FIX}; after the ? it takes {', '.join(sorted(options))}")
    kind = settings.pop("connection_class", redis.Connection)
    if hosts:
        settings |= hosts[0]._asdict()
    if password_file is not None:
        if "password" in settings:
            raise ConfigError(f"redis {place} has a password, and redis_password_file is set too; keep one of them")
        settings["password"] = _read_password(password_file)
    sentinel_login = {name[9:]: settings.pop(name) for name in _SENTINEL_OPTIONS if name in settings}
    if issubclass(kind, SSLConnection):
        _prepare_tls(settings, place)
    return Target(place, hosts, service, mode == "cluster", timeout_s, kind, settings, sentinel_login)


def _own_key(error: BaseException) -> bool:
    """Whether it is our certificate or key that cannot be used. What ends a handshake has a reason, and may as well be
    seen as a connection that is closed: that depends on who is faster."""
    return type(error) is ssl.SSLError and error.reason is None


def _hosts(text: str, port: int) -> tuple[Address, ...] | None:
    """The addresses in "host:port,host"; None where there is one that is none."""
    found = []
    for part in text.split(",") if text else ():
        match = _HOST.fullmatch(part)
        if match is None or int(match["port"] or port) > 65535:
            return None
        try:
            (match["host"] or "").encode("idna")
        except UnicodeError:
            return None
        found.append(Address(match["six"] or match["host"], int(match["port"] or port)))
    return tuple(found)


def _settings(url: str, options: set[str], timeout_s: float) -> dict[str, Any] | None:
    """What redis-py makes of a URL of one server; None where it can make nothing of it."""
    if not set(parse_qs(url.partition("?")[2])) <= options:
        return None
    parse: Any = parse_url
    try:
        settings: dict[str, Any] = parse(url)
        settings.pop("host", None)
        settings |= _limits(timeout_s) | {
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,  # in RESP3 a server may push what nobody asked for between two replies
        }
        own = {name: value for name, value in settings.items() if name not in _SENTINEL_OPTIONS | {"connection_class"}}
        settings.get("connection_class", redis.Connection)(**own)
    except (ValueError, TypeError, redis.RedisError):
        return None
    return settings


def _prepare_tls(settings: dict[str, Any], place: str) -> None:
    """Verifies unless told not to, and says so where told; an unreadable file is the user's mistake."""
    settings.setdefault("ssl_cert_reqs", "required")
    settings.setdefault("ssl_check_hostname", True)
    settings.setdefault("ssl_password", "")  # without one, OpenSSL would ask the terminal
    for name in _TLS_FILES:
        path = settings.get(name)
        try:
            if path is not None:
                (any(Path(path).iterdir()) if name == "ssl_ca_path" else Path(path).open("rb").close())
        except OSError as error:
            raise ConfigError(
                f"redis {place}: {name} {path!r} cannot be read: {error.strerror}; correct redis"
            ) from None
    if settings["ssl_cert_reqs"] == "none":
        settings["ssl_check_hostname"] = False  # older redis-py leaves the contradiction to OpenSSL
        _log.warning("redis %s: anybody may pose as this server: ssl_cert_reqs=none", place)
    elif not settings["ssl_check_hostname"]:
        _log.warning("redis %s: any server with a valid certificate may pose as it: ssl_check_hostname=no", place)


def _read_password(path: Path) -> str:
    try:
        password = path.read_text().rstrip("\r\n")
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"redis_password_file {str(path)!r} cannot be read: {why}") from None
    if not password or "\n" in password:
        raise ConfigError(f"redis_password_file {str(path)!r} must hold the password alone, in one line")
    return password


def _limits(timeout_s: float) -> dict[str, Any]:
    return {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}


def _client(pool: redis.ConnectionPool) -> Any:
    from_pool: Any = redis.Redis.from_pool
    return from_pool(pool)
