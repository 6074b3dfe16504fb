# SPDX-License-Identifier: Apache-2.0
"""Users and passwords: where they come from, what a user must be allowed, and that nobody else reads them."""

from __future__ import annotations

import contextlib
import logging
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracache.errors import ConfigError, Unavailable
from loracache.storage_backends.base import Outcome, Purge, Purpose, Standing
from loracache.storage_backends.redis.backend import RedisBackend
from loracache.storage_backends.redis.names import RedisNames

SECRET, QUOTED = "0p3n-s3cr3t@/word", "0p3n-s3cr3t%40%2Fword"
RIGHTS = [  # as docs/operations.md says
    "get",
    "mget",
    "getrange",
    "set",
    "exists",
    "unlink",
    "expire",
    "scan",
    "hget",
    "hgetall",
    "hset",
    "hsetnx",
    "hdel",
]


@pytest.fixture(scope="module")
def server(module_redis: Callable[[], Any]) -> Any:
    return module_redis()


@pytest.fixture
def user(server: Any) -> Callable[..., str]:
    """user(rights, keys) makes the user `cache`; answers the URL of the server without it."""

    def make(rights: list[str] = RIGHTS, keys: str = "loracache:*") -> str:
        commands = [f"+{right}" for right in rights]
        server.redis.execute_command("ACL SETUSER", "cache", "reset", "on", f">{SECRET}", f"~{keys}", *commands)
        return str(server.socket)

    return make


def test_the_rights_the_manual_names_are_all_that_is_needed(
    user: Callable[..., str], server: Any, objects: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    url = f"unix://cache:{QUOTED}@{user()}"
    backend, names = redis_tier(url, describe=lambda namespace: {namespace: b"what it is"}), RedisNames(url)
    assert backend.check() == Standing()
    stored = [objects.new(600_000, compressible=True), objects.new(10)]
    objects.store(backend, stored)
    objects.store(backend, [objects.keep(stored[0], 2)])
    assert all(objects.holds(backend, item) for item in stored)
    assert sum(server.redis.ttl(key) > 0 for key in server.redis.keys("*")) == 3  # the segments as they were before
    assert objects.load(backend, objects.unmatched(stored[0])) is Outcome.CORRUPT
    backend.delete([item.info.key for item in stored])
    objects.store(backend, stored)
    server.redis.delete(f"loracache:{{{stored[0].info.key.hex()}}}")
    (namespace,) = backend.descriptors()
    backend.purge(Purpose({namespace}), did := Purge(), lambda: True)
    assert (did.objects, did.loose, did.error) == (1, 1, "")
    backend.forget([namespace])
    assert backend.descriptors() == {}
    names.put("a", b"record", only_new=True)
    names.put("b", b"record")
    assert (names.get("a"), len(names.all())) == (b"record", 2)
    names.close()


def test_the_manual_names_these_rights() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    assert "~loracache:* " + " ".join(f"+{right}" for right in RIGHTS) in text


@pytest.mark.parametrize("missing", RIGHTS)
def test_a_missing_right_is_named_when_the_daemon_starts(
    user: Callable[..., str], redis_tier: Callable[..., RedisBackend], missing: str
) -> None:
    path = user([right for right in RIGHTS if right != missing])
    standing = redis_tier(f"unix://cache:{QUOTED}@{path}").check()
    assert re.search(rf"NOPERM.*'{missing}'.*give its user ~loracache:\* \+{missing} ", standing.reason)
    assert standing.reads == (missing not in ("get", "mget", "getrange"))
    assert standing.writes == (missing not in ("getrange", "set"))
    assert SECRET not in standing.reason
    assert QUOTED not in standing.reason


def test_a_time_to_live_needs_one_right_more(user: Callable[..., str], redis_tier: Callable[..., RedisBackend]) -> None:
    standing = redis_tier(f"unix://cache:{QUOTED}@{user()}", ttl_s=60).check()
    assert re.search(r"NOPERM.*'getex'.*give its user ~loracache:\* \+getex ", standing.reason)
    assert not standing.reads
    assert redis_tier(f"unix://cache:{QUOTED}@{user([*RIGHTS, 'getex'])}", ttl_s=60).check() == Standing()
    assert "`+getex` with `redis_ttl`" in (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def test_a_budget_needs_three_rights_more(
    user: Callable[..., str], objects: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    more = ["memory|usage", "object|idletime", "object|freq"]
    assert redis_tier(f"unix://cache:{QUOTED}@{user()}", max_bytes=1 << 20).check().reason
    tier = redis_tier(f"unix://cache:{QUOTED}@{user([*RIGHTS, *more])}", max_bytes=50_000)
    assert tier.check() == Standing()
    objects.store(tier, [objects.new(20_000) for _ in range(6)])
    did = tier.tend(lambda: True)
    assert (did.objects >= 4, did.error) == (True, "")
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    assert "`" + " ".join(f"+{right}" for right in more) + "` with `redis_max_bytes`" in text


def test_keys_that_a_user_may_not_touch_are_named_when_the_daemon_starts(
    user: Callable[..., str], redis_tier: Callable[..., RedisBackend]
) -> None:
    path = user(keys="other:*")
    standing = redis_tier(f"unix://cache:{QUOTED}@{path}").check()
    assert re.search(r"NOPERM.*give its user ~loracache:\* \+set \+get ", standing.reason)
    assert not standing.reads
    assert SECRET not in standing.reason
    assert redis_tier(f"unix://cache:{QUOTED}@{path}", prefix="other").check() == Standing()


def test_trying_the_rights_leaves_nothing_behind(
    user: Callable[..., str], server: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    server.redis.flushall()
    redis_tier(f"unix://cache:{QUOTED}@{user()}").check()
    assert server.redis.dbsize() == 0


def test_a_server_without_room_for_writes_is_no_mistake(server: Any, redis_tier: Callable[..., RedisBackend]) -> None:
    server.redis.config_set("maxmemory", 1)
    try:
        assert redis_tier(server.url).check() == Standing()
    finally:
        server.redis.config_set("maxmemory", 0)


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_password_may_stand_in_a_file(
    user: Callable[..., str], tmp_path: Path, objects: Any, redis_tier: Callable[..., RedisBackend], end: str
) -> None:
    file = tmp_path / "password"
    file.write_bytes((SECRET + end).encode())
    url = f"unix://cache@{user()}"
    with pytest.raises(ConfigError):
        redis_tier(url).check()
    backend = redis_tier(url, password_file=file)
    backend.check()
    objects.store(backend, [objects.new(10)])
    names = RedisNames(url, password_file=file)
    names.put("a", b"record")
    names.close()


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"", "alone"), (b"a\nb\n", "alone"), (b"\xff", "not UTF-8")]
)
def test_a_file_that_holds_no_password_is_refused_by_name(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"redis_password_file .*password.*{said}"):
        RedisBackend("redis://localhost", password_file=file)


def test_two_passwords_are_one_too_many(tmp_path: Path) -> None:
    (tmp_path / "password").write_text(SECRET)
    with pytest.raises(ConfigError, match=r"redis://localhost has a password.*keep one") as caught:
        RedisBackend(f"redis://:{QUOTED}@localhost", password_file=tmp_path / "password")
    assert "s3cr3t" not in str(caught.value)


def test_a_server_that_quotes_what_it_does_not_know_is_not_repeated(
    short_tmp: Path, eventually: Callable[..., Any], redis_tier: Callable[..., RedisBackend]
) -> None:
    """Redis answers an unknown command with its arguments: the password, where the command is AUTH."""
    path = short_tmp / "no-auth.sock"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--rename-command", "AUTH", ""]
    process = subprocess.Popen(["redis-server", *options], cwd=short_tmp, stdout=subprocess.DEVNULL)
    try:
        eventually(path.exists, "redis-server listens")
        for password in (QUOTED, "s3cr3t" * 40):
            url = f"unix://:{password}@{path}"
            with pytest.raises(ConfigError, match="unknown command") as caught:
                redis_tier(url).check()
            (found,) = redis_tier(url).contains([bytes(32)])
            names = RedisNames(url)
            with pytest.raises(Unavailable, match="unknown command") as unavailable:
                names.get("a")
            names.close()
            assert "s3cr3t" not in f"{caught.value}{found}{unavailable.value}"
    finally:
        process.kill()
        process.wait(30)


def test_nothing_that_is_logged_or_shown_has_the_password(
    user: Callable[..., str], objects: Any, redis_tier: Callable[..., RedisBackend], caplog: pytest.LogCaptureFixture
) -> None:
    url = f"unix://cache:{QUOTED}@{user()}"
    with caplog.at_level(logging.DEBUG):
        backend = redis_tier(url)
        objects.store(backend, [objects.new(10)])
        for name in ("cache", "nobody"):
            redis_tier(f"unix://{name}:{QUOTED}x@{user()}").contains([bytes(32)])
    shown = caplog.text + repr(backend) + repr(vars(backend)) + repr(vars(backend._servers))
    assert "s3cr3t" not in shown


def test_a_daemon_keeps_its_password_to_itself(
    user: Callable[..., str], daemon: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    file.write_text(SECRET)
    running = daemon(redis=f"unix://cache@{user()}", redis_password_file=file, http="127.0.0.1:0", log_level="debug")
    running.status()
    processes = ""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            processes += file.read_text(errors="replace")
    assert str(running.socket) in processes
    assert "0p3n-" not in processes + running.log() + repr(running.status())  # tests beside us have secrets too


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:s3cr3t?x@host", "redis://..."),
        ("redis://:s3cr3t#x@host", "redis://..."),
        ("redis://user:123?s3cr3t@host/0", "redis://..."),
        ("redis://host?password=s3cr3t@x", "redis://..."),
        ("redis://:s3cr3t", "redis://..."),
        ("redis://:s3cr3t@", "redis:// "),
        ("redis://:s3cr3t@host:99999", "redis://..."),
        ("redis://:s3cr3t@host,other", "redis://host,other "),
        ("redis://:s3cr3t@host?ssl_cert_reqs=none", "redis://host "),
        ("rediss://:s3cr3t@host?ssl_cert_reqs=nonsense", "rediss://host "),
        ("rediss://:s3cr3t@host?ssl_check=no", "rediss://host "),
        ("redis://:s3cr3t@host?credential_provider=x", "redis://host "),
        ("redis+sentinel://:s3cr3t@host", "redis+sentinel://host "),
        ("redis+sentinel://:s3cr3t@host/service/x", "redis+sentinel://host "),
        ("redis+sentinel://:s3cr3t@host/service?ssl_cert_reqs=none", "redis+sentinel://host/service "),
        ("redis+cluster://:s3cr3t@host:1/3", "redis+cluster://host:1 "),
        ("redis+cluster://:s3cr3t@host:1?db=3", "redis+cluster://host:1 "),
        ("redis+cluster://:s3cr3t@host:1,", "redis+cluster://..."),
        ("unix+cluster://:s3cr3t@/path", "unix+cluster://"),
        ("redis+other://:s3cr3t@host", "redis+other://host "),
    ],
)
def test_a_url_that_cannot_work_is_shown_as_far_as_it_holds_no_secret(url: str, shown: str) -> None:
    for kind in (RedisBackend, RedisNames):
        with pytest.raises(ConfigError, match="will not do; give redis://") as caught:
            kind(url)
        assert f"redis {shown}" in str(caught.value)
        assert "s3cr3t" not in str(caught.value)
        assert caught.value.__cause__ is caught.value.__context__ is None
