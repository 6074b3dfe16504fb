# SPDX-License-Identifier: Apache-2.0
"""Names of adapters in a real Redis: what is kept there, and that whatever is wrong with it ends soon and in words."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracache.adapters.names import AdapterNames
from loracache.errors import Unavailable
from loracache.storage_backends.redis.names import RedisNames

SECRET, QUOTED = "s3cr3t@word", "s3cr3t%40word"
HASH = "loracache:adapters"
X, Y = "1" * 64, "2" * 64
CALLS: dict[str, Callable[[RedisNames], object]] = {
    "get": lambda names: names.get("a"),
    "all": lambda names: names.all(),
    "put": lambda names: names.put("a", b"record"),
    "put where new": lambda names: names.put("a", b"record", only_new=True),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture
def server(redis_server: Callable[[], Any]) -> Any:
    return redis_server()


@pytest.fixture
def names(server: Any, names_at: Callable[..., RedisNames]) -> RedisNames:
    return names_at(server.url)


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_put(names: RedisNames) -> None:
    records = {"a": b"", "org/model:v1@x+y": bytes(range(256)) * 5000, "x" * 200: b"\r\n$-1\r\n", "$5": b"1"}
    assert names.get("a") is None
    assert names.all() == []
    for name, record in records.items():
        names.put(name, record)
    assert {name: names.get(name) for name in records} == records
    assert sorted(names.all()) == sorted(records.values())
    names.put("a", b"another")
    assert names.get("a") == b"another"
    assert names.get("A") is None


def test_a_record_that_must_be_new_replaces_none(names: RedisNames) -> None:
    names.put("a", b"first", only_new=True)
    names.put("a", b"second", only_new=True)
    assert names.get("a") == b"first"
    names.put("a", b"third")
    assert names.get("a") == b"third"


def test_machines_share_one_hash_under_their_prefix(server: Any, names_at: Callable[..., RedisNames]) -> None:
    one, other, elsewhere = names_at(server.url), names_at(server.url), names_at(server.url, prefix="tenant")
    one.put("a", b"record")
    assert other.get("a") == b"record"
    assert elsewhere.get("a") is None
    elsewhere.put("a", b"another")
    assert server.redis.hgetall(HASH) == {b"a": b"record"}
    assert server.redis.hgetall("tenant:adapters") == {b"a": b"another"}
    assert server.redis.dbsize() == 2


def test_any_number_of_threads_get_the_answers_to_their_own_questions(names: RedisNames) -> None:
    answers: dict[int, bool] = {}

    def ask(number: int) -> None:
        for turn in range(50):
            names.put(f"name-{number}", b"%d-%d" % (number, turn))
            if names.get(f"name-{number}") != b"%d-%d" % (number, turn):
                return
        answers[number] = True

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == len(names.all()) == 8


def test_a_server_that_knows_no_hello_will_do(
    short_tmp: Path, names_at: Callable[..., RedisNames], eventually: Callable[..., Any]
) -> None:
    """As before Redis 6, and behind some proxies."""
    path = short_tmp / "old.sock"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--rename-command", "HELLO", ""]
    server = subprocess.Popen(["redis-server", *options], cwd=short_tmp, stdout=subprocess.DEVNULL)
    try:
        eventually(path.exists, "redis-server listens")
        names = names_at(f"unix://{path}")
        names.put("a", b"record")
        assert names.get("a") == b"record"
    finally:
        server.kill()
        server.wait(30)


def test_closing_leaves_no_connection_behind(server: Any, eventually: Callable[..., Any]) -> None:
    names = RedisNames(server.url)
    names.put("a", b"record")
    before = len(server.redis.client_list())
    names.close()
    eventually(lambda: len(server.redis.client_list()) == before - 1, "the connection has gone")


# -- what may be wrong with it -----------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("connected", [True, False])
def test_a_stopped_server_is_unavailable_in_bounded_time(
    server: Any, names_at: Callable[..., RedisNames], call: Callable[[RedisNames], object], connected: bool
) -> None:
    names = names_at(server.url, timeout_s=1.0)
    if connected:
        names.put("before", b"record")
    server.send(signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(Unavailable, match=f"redis unix://{server.socket}: no answer within"):
            call(names)
        assert 0.3 < time.monotonic() - began < 20
    finally:
        server.send(signal.SIGCONT)
    names.put("after", b"later")
    assert names.get("after") == b"later"


def test_an_answer_that_came_too_late_answers_no_other_question(
    server: Any, names_at: Callable[..., RedisNames]
) -> None:
    names = names_at(server.url, timeout_s=1.0)
    names.put("a", b"of a")
    names.put("b", b"of b")
    for _ in range(3):
        server.send(signal.SIGSTOP)
        with pytest.raises(Unavailable):
            names.get("a")
        server.send(signal.SIGCONT)
        assert names.get("b") == b"of b"


@every_call
def test_a_server_that_accepts_and_says_nothing_is_unavailable_in_bounded_time(
    short_tmp: Path, names_at: Callable[..., RedisNames], call: Callable[[RedisNames], object]
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_tmp / "silent.sock"))
        listener.listen()
        names = names_at(f"unix://{short_tmp}/silent.sock", timeout_s=0.3)
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"silent\.sock"):
            call(names)
        assert time.monotonic() - began < 20


@every_call
def test_a_server_that_is_not_there_is_unavailable_at_once(
    short_tmp: Path, names_at: Callable[..., RedisNames], call: Callable[[RedisNames], object]
) -> None:
    for url in (f"unix://{short_tmp}/none.sock", "redis://127.0.0.1:1/0"):
        began = time.monotonic()
        with pytest.raises(Unavailable, match=f"redis {url.removesuffix('/0')}"):
            call(names_at(url, timeout_s=60.0))
        assert time.monotonic() - began < 20


def test_a_killed_server_is_unavailable_and_the_next_one_is_used_at_once(names: RedisNames, server: Any) -> None:
    names.put("a", b"record")
    server.kill()
    for call in CALLS.values():
        with pytest.raises(Unavailable):
            call(names)
    server.start()
    assert names.get("a") is None
    server.kill()
    server.start()  # between two calls: not noticed
    names.put("a", b"again")
    assert names.get("a") == b"again"


@every_call
@pytest.mark.parametrize("login", [f":{QUOTED}@", f"somebody:{QUOTED}@", ""])
def test_a_wrong_password_is_unavailable_and_not_repeated(
    server: Any, names_at: Callable[..., RedisNames], login: str, call: Callable[[RedisNames], object]
) -> None:
    server.redis.config_set("requirepass", "right")
    with pytest.raises(Unavailable, match="redis unix://") as caught:
        call(names_at(f"unix://{login}{server.socket}"))
    shown = f"{caught.value!r} {caught.value.__cause__!r}"
    assert not any(word in shown for word in ("s3cr3t", SECRET, QUOTED, "somebody"))


def test_a_user_with_the_right_password_reaches_what_it_may_and_no_more(
    server: Any, names_at: Callable[..., RedisNames]
) -> None:
    rights = {"keys": ["loracache:*"], "commands": ["+@all"], "enabled": True}
    server.redis.acl_setuser("cache", passwords=f"+{SECRET}", **rights)
    url = f"unix://cache:{QUOTED}@{server.socket}?db=3"
    names = names_at(url)
    names.put("a", b"record")
    assert names.get("a") == b"record"
    assert server.redis.dbsize() == 0
    for call in CALLS.values():
        with pytest.raises(Unavailable, match="NoPermission") as caught:
            call(names_at(url, prefix="other"))
        assert "s3cr3t" not in str(caught.value)


def read_only(server: Any) -> None:
    server.redis.replicaof("127.0.0.1", 1)


def out_of_memory(server: Any) -> None:
    server.redis.config_set("maxmemory", 1)


@pytest.mark.parametrize(("fault", "said"), [(read_only, "ReadOnly"), (out_of_memory, "OutOfMemory")])
def test_a_server_that_takes_no_writes_still_answers(
    server: Any, names: RedisNames, fault: Callable[[Any], None], said: str
) -> None:
    names.put("a", b"record")
    fault(server)
    for only_new in (False, True):
        with pytest.raises(Unavailable, match=said):
            names.put("a", b"another", only_new=only_new)
    assert names.get("a") == b"record"
    assert names.all() == [b"record"]


@every_call
def test_a_key_that_somebody_uses_for_something_else_is_left_alone(
    server: Any, names: RedisNames, call: Callable[[RedisNames], object]
) -> None:
    server.redis.set(HASH, "mine")
    with pytest.raises(Unavailable, match="WRONGTYPE"):
        call(names)
    assert server.redis.get(HASH) == b"mine"


# -- with the names that a machine knows -------------------------------------------------------------------------------


def test_what_redis_lost_it_is_given_again(server: Any, names_at: Callable[..., RedisNames]) -> None:
    one, other = (AdapterNames(None, names_at(server.url), b"a secret") for _ in range(2))
    one.put("a", X, "config")
    one.put("b", X, "")
    one.remove("b")
    before = server.redis.hgetall(HASH)
    server.redis.flushall()
    assert other.find("a") is None
    one.find("a")
    one.find("b")
    assert server.redis.hgetall(HASH) == before
    found = other.find("a")
    assert found is not None
    assert (found.digest, found.config) == (X, "config")
    assert other.find("b") is None


def test_a_stopped_server_delays_one_question_and_not_all(server: Any, names_at: Callable[..., RedisNames]) -> None:
    names = AdapterNames(None, names_at(server.url, timeout_s=1.0))
    names.put("a", X, "")
    server.send(signal.SIGSTOP)
    try:
        began = time.monotonic()
        for _ in range(100):
            found = names.find("a")
            assert found is not None
            assert found.digest == X
        assert time.monotonic() - began < 20  # 100 if each waited
        with pytest.raises(Unavailable):
            names.put("a", Y, "")
        assert names.known()["a"].digest == X
    finally:
        server.send(signal.SIGCONT)
