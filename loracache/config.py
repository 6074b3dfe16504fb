# SPDX-License-Identifier: Apache-2.0
"""One frozen configuration for the daemon, from a YAML file, LORACACHE_* variables and flags, the later the stronger.

Every key is documented where it is defined; `docs/configuration.md` is checked against this file by a test.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from loracache.errors import ConfigError
from loracache.keys import is_digest, salt_digest
from loracache.logs import LogFormat

__all__ = [
    "ENVIRONMENT", "Config", "PolicyName", "QuotaSetting", "holds_password", "http_address", "load_config",
    "on_loopback", "parse_size", "shown_config",
]  # fmt: skip

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}B": factor for unit, factor in list(_UNITS.items()) if unit not in ("", "B")}
_UNITS |= {f"{unit}IB": 1024**power for power, unit in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
ENVIRONMENT = "LORACACHE_"  # what the name of every setting's variable begins with
_SEEN = "command line"
_LOGIN = re.compile(r"://[^/?#]*:.*@|[?&][a-z_]*password=")
_HOST = re.compile(r"\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z](?:[0-9A-Za-z.-]*[0-9A-Za-z])?")
_HOST_OF_HEADER = re.compile(rf"(?:{_HOST.pattern})(?::[0-9]{{1,5}})?")
_SECRET = ("integrity_key", "redis")


def holds_password(value: object) -> bool:
    """Whether what somebody wrote, a URL or a structure with one in it, has a password in it."""
    return _LOGIN.search(str(value)) is not None


def parse_size(value: object) -> int:
    """Bytes in "4GiB", "512 MB", "65536" or a number. Raises ValueError naming the value."""
    if isinstance(value, int) and not isinstance(value, bool):
        number: float = value
        unit = ""
    else:
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"{value!r} is not a size; write it like 4GiB or 512MiB")
        number, unit = float(match[1]), match[2].upper()
    if number < 0:
        raise ValueError(f"{value!r} is negative")
    size = number * _UNITS[unit]
    if size >= 1 << 63:
        raise ValueError(f"{value!r} is too large for a size")
    return int(size)


def http_address(value: str) -> tuple[str, int]:
    """(host, port) of "127.0.0.1:9400", "[::1]:9400" or "name:9400"; port 0 takes a free one. Raises ValueError naming
    the value.
    """
    host, _, port = value.rpartition(":")
    if not _HOST.fullmatch(host) or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{value!r} is not a HOST:PORT; write it like 127.0.0.1:9400 or [::1]:9400")
    if host.lower() == "localhost":
        return "127.0.0.1", int(port)
    if host.startswith("["):
        return str(ipaddress.IPv6Address(host[1:-1])), int(port)
    return host.lower(), int(port)


def on_loopback(host: str) -> bool:
    """Whether `http_address` gave an address that this machine alone reaches. A name may lead anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


Size = Annotated[int, BeforeValidator(parse_size)]
PolicyName = Literal["lru", "s3fifo", "sieve", "gdsf", "cost", "adaptive"]


class QuotaSetting(BaseModel):
    """A quota from the start: of a tenant (the digest of its salt, or given by `salt`), an adapter (its digest) or a
    model (a name or an identity); "*": of all that have none of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    tier: Literal["cpu", "disk"]
    tenant: str | None = None
    adapter: str | None = None
    model: str | None = None
    soft: Size = 0
    hard: Size | None = None

    @model_validator(mode="before")
    @classmethod
    def _salt(cls, values: Any) -> Any:
        if isinstance(values, dict) and "salt" in values:
            if "tenant" in values or not isinstance(values["salt"], str) or not values["salt"]:
                raise ValueError("salt is a tenant's cache_salt, given in the place of tenant")
            values = {name: value for name, value in values.items() if name != "salt"} | {
                "tenant": salt_digest(values["salt"])
            }
        return values

    @model_validator(mode="after")
    def _one(self) -> QuotaSetting:
        self.subject  # noqa: B018 - raises
        return self

    @property
    def subject(self) -> tuple[str, str]:
        """(kind, name). Raises ValueError."""
        given = {"tenant": self.tenant, "adapter": self.adapter, "model": self.model}
        found = [(kind, name) for kind, name in given.items() if name]
        if len(found) != 1:
            raise ValueError("a quota is of one: give tenant (or salt), adapter or model")
        kind, name = found[0]
        if kind != "model" and name != "*" and not is_digest(name):
            raise ValueError(f"{kind}={name!r:.80} is not a digest of 64 hexadecimal digits; a name is no digest")
        return kind, name


class Config(BaseModel):
    """The daemon's settings. Sizes are bytes, or strings like "4GiB"; times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    socket: Path = Field(description="Unix socket the daemon listens on (mode 0600).")
    memory: Size = Field(4 << 30, ge=1 << 20, description="Size of the arena, tier cpu.")
    page_size: Size = Field(64 << 10, description="Page of the arena, a power of two from 4 KiB to 16 MiB.")
    hugepages: Literal["transparent", "reserved"] | None = Field(
        None, description="Huge pages for the arena: transparent, as far as the kernel has them, or reserved ones."
    )
    disk_path: Path | None = Field(None, description="Folder of tier disk; without it there is none.")
    disk: Size = Field(20 << 30, description="Most bytes tier disk may take.")
    disk_sync: bool = Field(False, description="Acknowledge a write to disk only after fdatasync.")
    redis: str | None = Field(
        None,
        repr=False,
        description="URL of tier redis: redis[s]://, redis[s]+sentinel://, redis[s]+cluster:// or unix://; "
        "without it none.",
    )
    redis_password_file: Path | None = Field(None, description="File with the password of Redis alone.")
    redis_prefix: str = Field("loracache", description="What every Redis key starts with.")
    redis_ttl: int | None = Field(
        None, ge=1, le=10**9, description="Seconds after which an object leaves Redis that nobody loaded."
    )
    redis_max_bytes: Size | None = Field(
        None, ge=1 << 20, description="Most bytes of Redis's memory that our keys may take, about."
    )
    redis_lookup_ms: float = Field(10.0, gt=0, le=1000, description="How long a lookup waits for Redis.")
    integrity_key: SecretStr | None = Field(None, description="Secret of a MAC over what disk and Redis hold.")
    http: str | None = Field(None, description="HOST:PORT of REST and metrics; without it there are none.")
    http_hosts: tuple[str, ...] = Field((), description="Names it is called by, besides loopback's: NAME or NAME:PORT.")
    http_rate: float | None = Field(None, ge=0, le=1e6, description="Most requests a second of one caller; 0: any.")
    http_upload: Size = Field(4 << 30, description="Most bytes of an uploaded adapter.")
    tls_cert: Path | None = Field(None, description="Certificate chain of REST (PEM); needed off loopback.")
    tls_key: Path | None = Field(None, description="Its key (PEM, without a passphrase), which nobody else may read.")
    traces: str | None = Field(
        None, pattern=r"^https?://\S+$", description="OTLP/HTTP collector of OpenTelemetry, http://host:4318."
    )
    audit_log: Path | None = Field(
        None, description="File of what operators changed, one JSON object a line; without it the daemon's own log."
    )
    policy: PolicyName = Field("adaptive", description="Who leaves a tier for others.")
    disk_policy: PolicyName | None = Field(None, description="The same of tier disk; without it as `policy`.")
    admission: Literal["all", "second_touch", "adaptive"] = Field(
        "all", description="What is written to disk and Redis: all, what was asked for twice, or is likely to be."
    )
    keep_share: float = Field(0.25, ge=0, le=1, description="Of memory, what requests of one tenant may have kept.")
    quotas: tuple[QuotaSetting, ...] = Field((), description="Quotas of tenants, adapters and models.")
    record: Path | None = Field(
        None, description="File of a trace of what is asked, for `loracache simulate`; without it nothing is recorded."
    )
    swapper: Size = Field(0, description="Most bytes a second raised ahead of need, while memory has room; 0: none.")
    drain: float = Field(5.0, ge=0, le=3600, description="Seconds a shutdown may take to write what is queued.")
    private: bool = Field(False, description="End when the last client disconnects (an engine's own daemon).")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level logged.")
    log_format: LogFormat = Field("text", description="How it logs: text, or json, one object a line.")

    @field_validator("page_size")
    @classmethod
    def _page_size(cls, value: int) -> int:
        if value & (value - 1) or not 4096 <= value <= 16 << 20:
            raise ValueError(f"{value} is not a power of two from 4 KiB to 16 MiB")
        return value

    @field_validator("http")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if value is not None:
            http_address(value)
        return value

    @field_validator("http_hosts", mode="before")
    @classmethod
    def _http_hosts(cls, value: object) -> object:
        names = [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value
        if isinstance(names, list | tuple):
            for name in names:
                if not isinstance(name, str) or not _HOST_OF_HEADER.fullmatch(name):
                    raise ValueError(f"{name!r} is not a name that a Host header has; write NAME or NAME:PORT")
        return names

    @field_validator("quotas", mode="before")
    @classmethod
    def _quotas(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(
                'is not JSON; write a list like [{"tenant": "*", "tier": "cpu", "soft": "1GiB"}]'
            ) from None

    @field_validator("traces")
    @classmethod
    def _traces(cls, value: str | None) -> str | None:
        if value is not None and "@" in value:  # it stands in the REST process's command line
            raise ValueError("has a login in it; give that as a header by OTEL_EXPORTER_OTLP_HEADERS")
        return value

    @field_validator("tls_cert", "tls_key", mode="before")
    @classmethod
    def _tls_path(cls, value: object) -> object:
        if "-----BEGIN" in str(value):
            raise ValueError("is the content of a file; give the file's path")
        return value

    @model_validator(mode="after")
    def _http_whole(self) -> Config:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; give both or none")
        host = http_address(self.http)[0] if self.http is not None else "127.0.0.1"
        if on_loopback(host):
            return self
        if self.tls_cert is None:
            raise ValueError(f"http={self.http} is not on loopback and needs TLS; give tls_cert and tls_key")
        if not self.http_hosts and host in ("0.0.0.0", "::"):
            raise ValueError(f"http={self.http} is every address; give http_hosts, the names that clients call it by")
        return self

    @model_validator(mode="after")
    def _whole(self) -> Config:
        if self.memory < 4 * self.page_size:
            raise ValueError(f"memory={self.memory} holds fewer than 4 pages of page_size={self.page_size}")
        if self.redis_password_file is not None and self.redis is None:
            raise ValueError("redis_password_file is set and redis is not; give the URL of that Redis as redis")
        return self


def load_config(flags: Mapping[str, Any], file: str | os.PathLike[str] | None = None) -> Config:
    """The configuration from `file`, then LORACACHE_* variables, then `flags` that are not None.

    Raises ConfigError naming key, value, origin and fix.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    sources = [(f"file {file}", _read_file(file)), ("environment", _environment()), (_SEEN, dict(flags))]
    for name, source in sources:
        for key, value in source.items():
            if value is None:
                continue
            if key not in Config.model_fields:
                raise ConfigError(f"unknown key {key!r} in the {name}{_suggestion(key)}; known: {', '.join(_known())}")
            if name == _SEEN and key == "redis" and holds_password(value):
                raise ConfigError(
                    f"redis on the command line has a password, and a command line can be read by every user; give "
                    f"redis by {ENVIRONMENT}REDIS or a config file, or the password by redis_password_file"
                )
            values[key], origin[key] = value, name
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item, values, origin) for item in error.errors())) from None


def shown_config(config: Config) -> dict[str, Any]:
    """The settings in plain values for an operator to see; of what may hold a secret only whether it is set."""
    shown = config.model_dump(mode="json")
    for key in _SECRET:
        shown[key] = "(set)" if shown[key] is not None else None
    return shown


def _explain(item: Any, values: dict[str, Any], origin: dict[str, str]) -> str:
    key = str(item["loc"][0]) if item["loc"] else ""
    message = str(item["msg"]).removeprefix("Value error, ")
    if not key:
        return message
    if item["type"] == "missing":
        return f"{key} is not set; give --{key.replace('_', '-')} or {ENVIRONMENT}{key.upper()}"
    given = values.get(key)
    secret = key in _SECRET or "-----BEGIN" in str(given) or ("://" in str(given) and "@" in str(given))
    shown = "(secret)" if secret else repr(given)
    if secret:
        message = message.replace(str(given), shown)
    return f"{key}={shown} ({origin.get(key, 'default')}): {message}"


def _read_file(file: str | os.PathLike[str] | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise ConfigError(f"config file {file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"config file {file} is not YAML{_place(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"config file {file} must map keys to values")
    return content


def _place(error: Exception) -> str:
    """What is wrong and in which line. The error's own text quotes the line, and the line may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f" ({type(error).__name__})"
    return f": {error.problem} in line {error.problem_mark.line + 1}"


def _environment() -> dict[str, Any]:
    found = {key[len(ENVIRONMENT) :].lower(): value for key, value in os.environ.items() if key.startswith(ENVIRONMENT)}
    return {key: value for key, value in found.items() if not key.startswith("connector_")}


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, _known(), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _known() -> list[str]:
    return list(Config.model_fields)
