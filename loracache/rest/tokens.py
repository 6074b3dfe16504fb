# SPDX-License-Identifier: Apache-2.0
"""Who is known to REST: the daemon's own token (`SOCKET.token`) and those that an operator made (`SOCKET.tokens`).

Tokens are 256 random bits, so that a plain SHA-256 is all that has to be kept of them: there is nothing to guess and
nothing for a slow hash to slow down. Only the daemon's own stands in clear, for the command line, in a file that its
user alone can read. Standard library and pydantic only: the daemon and the command line import this too.

Threading: one store belongs to one thread. Files are changed under a lock and replaced whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from loracache.errors import ConfigError

__all__ = [
    "ANONYMOUS", "RANKS", "Principal", "Role", "Token", "TokenStore", "add_token", "own_token_path", "read_private",
    "read_tokens", "remove_token", "tokens_path",
]  # fmt: skip

Role = Literal["none", "read", "operate", "admin"]
RANKS: dict[Role, int] = {"none": 0, "read": 1, "operate": 2, "admin": 3}
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
ANONYMOUS = "anonymous"
_OWN = "daemon"
_MOST_BYTES = 1 << 20
_LONGEST = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Principal:
    """Whom a token stands for. name: what an audit log shows. tenant: hex digest of the only salt it may reach, or
    "" where it may reach all. address: where one who calls is, of whom the audit log shows that too.
    """

    name: str
    role: Role
    tenant: str = ""
    address: str = ""


class Token(BaseModel):
    """What is kept of a token. tenant: see `Principal`; sha256: hex, of the token; created: Unix seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(pattern=_NAME)
    role: Literal["read", "operate", "admin"]
    tenant: str = Field("", pattern=r"^(?:[0-9a-f]{64})?$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: int = Field(ge=0)


_TOKENS = TypeAdapter(list[Token])


def own_token_path(socket: str | os.PathLike[str]) -> Path:
    """Where a daemon's own token stands: beside its socket."""
    return Path(f"{os.fspath(socket)}.token")


def tokens_path(socket: str | os.PathLike[str]) -> Path:
    """Where the tokens stand that `loracache tokens add` makes."""
    return Path(f"{os.fspath(socket)}.tokens")


def read_private(path: Path) -> bytes:
    """What stands in a file that nobody but its owner, we or root, can read. Raises OSError, or ConfigError where
    others can: they would know the secret, or could have written it.
    """
    # Not blocking: a FIFO in the file's place would hold the event loop up.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path} is not a file; remove it")
        if found.st_uid not in (os.geteuid(), 0):
            raise ConfigError(f"{path} belongs to user {found.st_uid}, who may know what is in it; remove it")
        if found.st_mode & 0o077:
            raise ConfigError(
                f"{path} has mode {stat.S_IMODE(found.st_mode):04o}, so that others can use it; make its tokens anew, "
                "or chmod 600 it if nobody saw it"
            )
        if found.st_size > _MOST_BYTES:
            raise ConfigError(f"{path} has {found.st_size} bytes, more than {_MOST_BYTES}")
        return file.read(_MOST_BYTES)


def read_tokens(path: Path) -> list[Token]:
    """The tokens in a file; none where it is missing. Raises OSError, or ConfigError without the file's content."""
    try:
        found = _TOKENS.validate_json(read_private(path), strict=True)
    except FileNotFoundError:
        return []
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path} is not a list of tokens: {where}: {first['msg']}") from None
    for field in ("name", "sha256"):
        if len({getattr(token, field) for token in found}) < len(found):
            raise ConfigError(f"{path} has two tokens of one {field}; remove one")
    return found


def add_token(path: Path, name: str, role: Role, tenant: str = "") -> str:
    """Make a token and keep its hash; the token itself is answered, and nowhere else. Raises OSError, ConfigError."""
    if name in (_OWN, ANONYMOUS):
        raise ConfigError(f"the name {name!r} is the daemon's; give another")
    token = secrets.token_urlsafe(32)
    try:
        made = Token(name=name, role=role, tenant=tenant, sha256=_digest(token).hex(), created=int(time.time()))  # type: ignore[arg-type]
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        shown, fix = {
            "name": (name, "a name has letters, digits, dots, dashes and underscores, 64 at most"),
            "role": (role, "give read, operate or admin"),
        }.get(field, (tenant, "a tenant is 64 hexadecimal digits"))
        raise ConfigError(f"{field}={shown!r} will not do: {fix}") from None
    with _changing(path) as tokens:
        if any(known.name == name for known in tokens):
            raise ConfigError(f"there is a token {name!r} already; remove it first, or give another name")
        tokens.append(made)
    return token


def remove_token(path: Path, name: str) -> bool:
    """Forget a token; False where there is none of that name. Raises OSError, ConfigError."""
    with _changing(path) as tokens:
        left = [token for token in tokens if token.name != name]
        found = len(left) < len(tokens)
        tokens[:] = left
    return found


class TokenStore:
    """The tokens of one daemon, as they stand in its files at the last `refresh`.

    A list that is gone revokes every token in it. One that became unreadable, open to others, or no list of tokens is
    not taken: the last good one stays in force, because a slip of an editor should not lock everybody out, and because
    whoever opened the file up may have put tokens in. The daemon's own token is not kept so: a file that others can
    read has given it away.
    """

    def __init__(self, socket: str | os.PathLike[str]) -> None:
        self._own_path, self._path = own_token_path(socket), tokens_path(socket)
        self._seen: dict[Path, object] = {}
        self._own: list[tuple[bytes, Principal]] = []
        self._tokens: list[tuple[bytes, Principal]] = []
        self.refresh()

    def refresh(self) -> None:
        """Read the files again that changed. The daemon's own is made where it is missing."""
        if self._changed(self._own_path):
            self._own = []
            try:
                self._own = [(_digest(_make_token(self._own_path)), Principal(_OWN, "admin"))]
            except (OSError, ConfigError) as error:
                _log.error("the daemon's own token cannot be used: %s", error)
            self._changed(self._own_path)
        if self._changed(self._path):
            try:
                self._tokens = [
                    (bytes.fromhex(token.sha256), Principal(token.name, token.role, token.tenant))
                    for token in read_tokens(self._path)
                ]
            except (OSError, ConfigError) as error:
                _log.error("tokens stay as they were, %d of them: %s", len(self._tokens), error)

    def find(self, token: str) -> Principal | None:
        """Whom a token stands for. Takes as long whichever it is, and whether it is any."""
        if len(token) > _LONGEST:
            return None
        given, found = _digest(token), None
        for digest, principal in (*self._own, *self._tokens):
            if hmac.compare_digest(given, digest):
                found = principal
        return found

    def _changed(self, path: Path) -> bool:
        try:
            now = os.stat(path, follow_symlinks=False)
            # The mode and the owner show in the change time alone.
            seen: object = (now.st_ino, now.st_mtime_ns, now.st_ctime_ns, now.st_size)
        except OSError as error:
            seen = error.errno
        changed = self._seen.get(path, self) != seen
        self._seen[path] = seen
        return changed


def _make_token(path: Path) -> str:
    """The token in `path`, written there first where it is missing. Raises OSError, ConfigError."""
    with contextlib.suppress(FileNotFoundError):
        if token := read_private(path).decode("ascii", "replace").strip():
            return token
    token = secrets.token_urlsafe(32)
    _replace(path, token.encode() + b"\n")
    return token


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[list[Token]]:
    """The file's tokens, to be changed in place; written back on leaving without an error."""
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tokens = read_tokens(path)
        yield tokens
        _replace(path, _TOKENS.dump_json(tokens, indent=2) + b"\n")
    finally:
        os.close(lock)


def _replace(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 that is there whole or as it was."""
    draft = Path(f"{path}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
