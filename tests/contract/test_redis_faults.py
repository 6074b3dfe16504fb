"""What the Redis tier does when Redis evicts, refuses, stalls, dies, or holds what we did not write."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loracache.errors import ConfigError
from loracache.storage_backends.base import Outcome, Transfer
from loracache.storage_backends.redis import RedisBackend

OK, MISS, CORRUPT, FULL, UNAVAILABLE = Outcome.OK, Outcome.MISS, Outcome.CORRUPT, Outcome.FULL, Outcome.UNAVAILABLE
SECRET = "s3cr3t@word"
QUOTED = "s3cr3t%40word"


@pytest.fixture
def server(redis_server: Callable[[], Any]) -> Any:
    return redis_server()


@pytest.fixture
def tier(server: Any, redis_tier: Callable[..., RedisBackend]) -> RedisBackend:
    return redis_tier(server.url)


def name(transfer: Transfer, segment: int | None = None) -> str:
    return f"loracache:{{{transfer.info.key.hex()}}}" + ("" if segment is None else f":{segment}")


def outcomes(results: list[Any]) -> list[Outcome]:
    return [result.outcome for result in results]


def gone(server: Any, transfer: Transfer) -> bool:
    return not [key for key in server.redis.keys("*") if transfer.info.key.hex().encode() in key]


def flipped(raw: bytes, offset: int) -> bytes:
    return raw[:offset] + bytes([raw[offset] ^ 1]) + raw[offset + 1 :]


def test_objects_lie_in_segments_under_a_small_header_in_one_slot(
    tier: RedisBackend, server: Any, objects: Any
) -> None:
    stored = objects.new(600_000)
    objects.store(tier, [stored])
    sizes = {key.decode(): server.redis.strlen(key) for key in server.redis.keys("*")}
    header_bytes = sizes.pop(name(stored))
    assert header_bytes <= 256
    assert sizes == {name(stored, 0): 262_144, name(stored, 1): 262_144, name(stored, 2): 75_712}
    tier.delete([stored.info.key])
    assert server.redis.dbsize() == 0


def test_another_segment_size_reads_and_deletes_what_is_there(
    server: Any, objects: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    writer, reader = redis_tier(server.url, segment_bytes=10_000), redis_tier(server.url)
    stored = objects.new(600_000, pieces=4)
    objects.store(writer, [stored])
    assert objects.holds(reader, stored)
    reader.delete([stored.info.key])
    assert server.redis.dbsize() == 0


def test_prefixes_keep_caches_apart(server: Any, objects: Any, redis_tier: Callable[..., RedisBackend]) -> None:
    one, two = redis_tier(server.url, prefix="one"), redis_tier(server.url, prefix="two")
    stored = objects.new(10)
    objects.store(one, [stored])
    assert objects.found(two, stored) is MISS


def damage(server: Any, stored: Transfer, how: str) -> None:
    first, middle, last = name(stored), name(stored, 1), name(stored, 2)
    changed = {
        "bit in payload": (middle, lambda raw: flipped(raw, 1000)),
        "short segment": (middle, lambda raw: raw[:-1]),
        "long segment": (last, lambda raw: raw + b"x"),
        "huge segment": (last, lambda raw: raw + bytes(5 << 20)),
        "empty segment": (middle, lambda raw: b""),
        "bit in header": (first, lambda raw: flipped(raw, 30)),
        "short header": (first, lambda raw: raw[:-1]),
        "huge header": (first, lambda raw: bytes(3 << 20)),
        "empty header": (first, lambda raw: b""),
    }
    key, change = changed[how]
    server.redis.set(key, change(server.redis.get(key)))


@pytest.mark.parametrize(
    "how",
    [
        "bit in payload",
        "short segment",
        "long segment",
        "huge segment",
        "empty segment",
        "bit in header",
        "short header",
        "huge header",
        "empty header",
    ],
)
def test_a_damaged_value_is_corrupt_and_deleted_and_its_neighbours_are_fine(
    tier: RedisBackend, server: Any, objects: Any, how: str
) -> None:
    before, stored, after = (objects.new(600_000) for _ in range(3))
    objects.store(tier, [before, stored, after])
    damage(server, stored, how)
    found = outcomes(tier.contains([item.info.key for item in (before, stored, after)]))
    assert found == [OK, MISS if "header" in how else OK, OK]
    targets = [objects.empty(item) for item in (before, stored, after)]
    assert outcomes(tier.load(targets)) == [OK, CORRUPT, OK]
    assert objects.payload(targets[2]) == objects.payload(after)
    assert gone(server, stored)
    objects.store(tier, [stored])
    assert objects.holds(tier, stored)


def test_headers_under_each_others_keys_are_corrupt(tier: RedisBackend, server: Any, objects: Any) -> None:
    one, two = objects.new(9000), objects.new(9000)
    objects.store(tier, [one, two])
    server.redis.copy(name(one), name(two), replace=True)
    assert outcomes(tier.contains([one.info.key, two.info.key])) == [OK, MISS]
    assert objects.load(tier, two) is CORRUPT
    assert gone(server, two)


def test_a_value_of_another_type_is_no_object(tier: RedisBackend, server: Any, objects: Any) -> None:
    one, two = objects.new(600_000), objects.new(9000)
    objects.store(tier, [one, two])
    for key in (name(one, 1), name(two)):
        server.redis.delete(key)
        server.redis.rpush(key, "x")
    assert outcomes(tier.load([objects.empty(one), objects.empty(two)])) == [CORRUPT, MISS]
    assert gone(server, one)
    objects.store(tier, [two])
    assert objects.holds(tier, two)


@pytest.mark.parametrize("segment", [0, 1, 2])
def test_an_evicted_segment_is_a_miss_and_the_rest_goes(
    tier: RedisBackend, server: Any, objects: Any, segment: int
) -> None:
    stored, after = objects.new(600_000), objects.new(600_000)
    objects.store(tier, [stored, after])
    server.redis.delete(name(stored, segment))
    assert outcomes(tier.load([objects.empty(stored), objects.empty(after)])) == [MISS, OK]
    assert gone(server, stored)


def test_an_evicted_header_is_a_miss(tier: RedisBackend, server: Any, objects: Any) -> None:
    stored = objects.new(600_000)
    objects.store(tier, [stored])
    server.redis.delete(name(stored))
    assert objects.found(tier, stored) is MISS
    assert objects.load(tier, stored) is MISS


def test_segments_without_a_header_are_not_found(tier: RedisBackend, server: Any, objects: Any) -> None:
    """What a writer leaves that dies before its last write."""
    stored = objects.new(600_000)
    objects.store(tier, [stored])
    raw = server.redis.getdel(name(stored))
    assert objects.load(tier, stored) is MISS
    server.redis.set(name(stored), raw)
    assert objects.holds(tier, stored)


def test_contains_is_one_round_trip(tier: RedisBackend, server: Any, objects: Any) -> None:
    stored = [objects.new(10) for _ in range(50)]
    objects.store(tier, stored)
    before = server.redis.info("stats")["total_commands_processed"]
    tier.contains([item.info.key for item in stored])
    assert server.redis.info("stats")["total_commands_processed"] - before == 2  # ours, and the first question


def test_many_headers_come_through_whole(tier: RedisBackend, objects: Any) -> None:
    stored = [objects.new(1) for _ in range(1500)]  # several times what is received at once
    objects.store(tier, stored)
    results = tier.contains([item.info.key for item in stored])
    assert [result.info for result in results] == [item.info for item in stored]


def test_out_of_memory_is_full_and_leaves_nothing_behind(tier: RedisBackend, server: Any, objects: Any) -> None:
    small, large, last = objects.new(300_000), objects.new(8 << 20), objects.new(1000)
    server.redis.config_set("maxmemory-policy", "noeviction")
    server.redis.config_set("maxmemory", server.redis.info("memory")["used_memory"] + (5 << 20))
    results = tier.store([small, large, last])
    assert outcomes(results)[:2] == [OK, FULL]
    assert "OOM" in results[1].detail
    assert gone(server, large)
    assert objects.holds(tier, small)
    objects.store(tier, [last])  # there is room again
    server.redis.config_set("maxmemory", "1mb")
    assert outcomes(tier.store([last])) == [FULL]


def test_a_stopped_server_is_unavailable_in_bounded_time(
    server: Any, objects: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    warm, cold = redis_tier(server.url, timeout_s=0.4), redis_tier(server.url, timeout_s=0.4)
    stored, other = objects.new(3 << 20), objects.new(3 << 20)
    objects.store(warm, [stored])
    server.send(signal.SIGSTOP)
    try:
        for backend in (warm, cold):
            for call in (
                lambda tier: tier.contains([stored.info.key] * 3),
                lambda tier: tier.load([objects.empty(stored)] * 3),
                lambda tier: tier.store([other] * 3),
                lambda tier: tier.delete([stored.info.key] * 3),
            ):
                began = time.monotonic()
                assert outcomes(call(backend)) == [UNAVAILABLE] * 3
                assert 0.3 < time.monotonic() - began < 0.8
    finally:
        server.send(signal.SIGCONT)
    for backend in (warm, cold):
        backend.delete([other.info.key])
        objects.store(backend, [stored])
        assert objects.holds(backend, stored)


def test_a_killed_server_is_unavailable_and_a_new_one_is_used(tier: RedisBackend, server: Any, objects: Any) -> None:
    stored = objects.new(600_000)
    objects.store(tier, [stored])
    server.kill()
    for _ in range(2):
        assert objects.found(tier, stored) is UNAVAILABLE
        assert objects.load(tier, stored) is UNAVAILABLE
        assert outcomes(tier.store([stored])) == [UNAVAILABLE]
        assert outcomes(tier.delete([stored.info.key])) == [UNAVAILABLE]
    server.start()
    assert objects.found(tier, stored) is MISS
    objects.store(tier, [stored])
    assert objects.holds(tier, stored)


def test_a_server_restarted_between_two_calls_is_not_noticed(tier: RedisBackend, server: Any, objects: Any) -> None:
    stored = objects.new(600_000)
    objects.store(tier, [stored])
    server.kill()
    server.start()
    objects.store(tier, [stored])
    assert objects.holds(tier, stored)


class Impostor:
    """A server that says what it was told to, one script for each connection, after the handshake."""

    def __init__(self, path: Path) -> None:
        self.url = f"unix://{path}"
        self.scripts: list[list[bytes]] = []
        self.connections = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            script = self.scripts[min(self.connections, len(self.scripts) - 1)]
            self.connections += 1
            with peer:
                self._play(peer, iter(script))

    def _play(self, peer: socket.socket, script: Iterator[bytes]) -> None:
        peer.settimeout(10)
        while request := peer.recv(1 << 20):
            try:
                peer.sendall(b"+OK\r\n" if b"SETINFO" in request else next(script))
            except (StopIteration, OSError):
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


@pytest.fixture
def impostor(short_tmp: Path) -> Iterator[Impostor]:
    server = Impostor(short_tmp / "impostor.sock")
    yield server
    server.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"*1\r\n$-1\r\n$-1\r\n",  # more than was asked
        b"*2\r\n$-1\r\n$-1\r\n",  # for another question
        b"*1\r\n$5\r\nabcdefg\r\n",
        b"*x\r\n",
        b"?\r\n",
        b"#" * 10_000,
        b"+OK\r\n",
        b"*1\r\n$100\r\nabc",
    ],
)
def test_a_connection_that_lost_its_place_is_never_used_again(
    impostor: Impostor, redis_tier: Callable[..., RedisBackend], reply: bytes
) -> None:
    impostor.scripts = [[reply] if reply else [], [b"*1\r\n$-1\r\n"] * 2]
    tier = redis_tier(impostor.url, timeout_s=0.4)
    assert outcomes(tier.contains([bytes(32)])) == [UNAVAILABLE]
    assert outcomes(tier.contains([bytes(32)])) == [MISS]
    assert outcomes(tier.contains([bytes(32)])) == [MISS]
    assert impostor.connections == 2


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("MOVED 3999 127.0.0.1:6381", UNAVAILABLE),
        ("LOADING Redis is loading the dataset in memory", UNAVAILABLE),
        ("READONLY You can't write against a read only replica.", UNAVAILABLE),
        ("OOM command not allowed when used memory > 'maxmemory'.", FULL),
        ("ERR something else", Outcome.FAILED),
    ],
)
def test_an_error_reply_fails_its_item_and_keeps_the_connection(
    impostor: Impostor, redis_tier: Callable[..., RedisBackend], reply: str, outcome: Outcome
) -> None:
    impostor.scripts = [[f"-{reply}\r\n".encode(), b"*1\r\n$-1\r\n"]]
    tier = redis_tier(impostor.url)
    (result,) = tier.contains([bytes(32)])
    assert (result.outcome, result.detail) == (outcome, reply)
    assert outcomes(tier.contains([bytes(32)])) == [MISS]
    assert impostor.connections == 1


def test_a_server_that_dies_in_the_middle_fails_only_what_it_did_not_answer(
    tier: RedisBackend, server: Any, objects: Any
) -> None:
    stored = [objects.new(2 << 20) for _ in range(12)]
    objects.store(tier, stored)
    results: list[Any] = []
    targets = [objects.empty(item) for item in stored] * 8
    killer = threading.Timer(0.02, server.process.kill)
    killer.start()
    results = tier.load(targets)
    killer.join()
    assert set(outcomes(results)) <= {OK, UNAVAILABLE}
    whole = outcomes(results).count(OK)
    assert outcomes(results) == [OK] * whole + [UNAVAILABLE] * (len(targets) - whole)
    assert whole == 0 or objects.payload(targets[whole - 1]) == objects.payload(stored[(whole - 1) % 12])


def test_check_passes_where_a_server_answers(tier: RedisBackend) -> None:
    tier.check()


def test_check_names_a_server_that_does_not_answer(short_tmp: Path, redis_tier: Callable[..., RedisBackend]) -> None:
    backend = redis_tier(f"unix://user:{QUOTED}@{short_tmp}/none.sock")
    with pytest.raises(ConfigError, match=r"redis_url .*none\.sock.*start that Redis, or correct redis_url") as caught:
        backend.check()
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("login", [f":{QUOTED}@", f"somebody:{QUOTED}@", ""])
def test_check_refuses_a_wrong_password_without_repeating_it(
    server: Any, redis_tier: Callable[..., RedisBackend], login: str
) -> None:
    server.redis.config_set("requirepass", "right")
    backend = redis_tier(f"unix://{login}{server.socket}")
    with pytest.raises(ConfigError, match="redis_url") as caught:
        backend.check()
    assert "s3cr3t" not in str(caught.value)
    assert "somebody" not in str(caught.value)


def test_the_right_password_of_an_acl_user_opens(
    server: Any, objects: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    server.redis.acl_setuser("cache", enabled=True, passwords=f"+{SECRET}", keys="loracache:*", commands=["+@all"])
    backend = redis_tier(f"unix://cache:{QUOTED}@{server.socket}?db=3")
    backend.check()
    stored = objects.new(300_000)
    objects.store(backend, [stored])
    assert objects.holds(backend, stored)
    assert server.redis.dbsize() == 0


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        f"http://user:{QUOTED}@host",
        f"redis://:{QUOTED}@host:port",
        "redis://:s3cr3t/word@host",
        "redis://:s3cr3t@host/zero",
        "redis://host/0?unknown=s3cr3t",
        "redis://host?socket_timeout=s3cr3t",
        f"redis://{'h' * 70}:6379?password=s3cr3t",
        "unix://",
    ],
)
def test_a_url_that_cannot_work_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"redis_url .* will not do; give redis://") as caught:
        RedisBackend(url)
    assert "s3cr3t" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize(
    ("setting", "value"), [("prefix", "a b"), ("prefix", "{x}"), ("prefix", ""), ("timeout_s", 0), ("segment_bytes", 0)]
)
def test_a_setting_that_cannot_work_is_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"redis_{setting}"):
        RedisBackend("redis://localhost", **{setting: value})


@pytest.mark.parametrize("planter", [None, b"other key of 32 bytes or so......"])
def test_an_object_planted_without_the_integrity_key_is_refused(
    server: Any, objects: Any, redis_tier: Callable[..., RedisBackend], planter: bytes | None
) -> None:
    donor = redis_tier(server.url, integrity_key=planter)
    backend = redis_tier(server.url, integrity_key=b"k" * 32)
    planted, own = objects.new(600_000), objects.new(600_000)
    objects.store(donor, [planted])
    objects.store(backend, [own])
    assert outcomes(backend.load([objects.empty(planted), objects.empty(own)])) == [CORRUPT, OK]
    assert gone(server, planted)


def test_bytes_travel_over_tls(
    server: Any, objects: Any, redis_tier: Callable[..., RedisBackend], short_tmp: Path
) -> None:
    key, certificate = short_tmp / "key.pem", short_tmp / "cert.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    try:
        subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {"tls-cert-file": certificate, "tls-key-file": key, "tls-ca-cert-file": certificate}
    server.redis.config_set("bind", "127.0.0.1")
    server.redis.execute_command(
        "CONFIG", "SET", *(str(part) for pair in settings.items() for part in pair), "tls-auth-clients", "no"
    )
    server.redis.config_set("tls-port", port)
    backend = redis_tier(f"rediss://localhost:{port}?ssl_ca_certs={certificate}", timeout_s=1.0)
    backend.check()
    stored = [objects.new(600_000, pieces=5), objects.new(2 << 20)]
    objects.store(backend, stored)
    assert all(objects.holds(backend, item) for item in stored)
    server.send(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert outcomes(backend.load([objects.empty(item) for item in stored])) == [UNAVAILABLE] * 2
        assert time.monotonic() - began < 1.8
    finally:
        server.send(signal.SIGCONT)


def test_closing_a_backend_closes_its_connections(server: Any, objects: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    backend = RedisBackend(server.url)
    objects.store(backend, [objects.new(10)])
    assert len(os.listdir("/proc/self/fd")) == before + 1
    backend.close()
    assert len(os.listdir("/proc/self/fd")) == before
