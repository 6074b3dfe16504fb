# SPDX-License-Identifier: Apache-2.0
"""The Redis tier behind a real sentinel: the master is found, lost, and found again elsewhere."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client

from loracache.errors import ConfigError, Unavailable
from loracache.storage_backends.base import Outcome
from loracache.storage_backends.redis.backend import RedisBackend
from loracache.storage_backends.redis.names import RedisNames

OK, MISS, UNAVAILABLE = Outcome.OK, Outcome.MISS, Outcome.UNAVAILABLE
SECRET, SENTINEL_SECRET = "s3cr3t", "s3ntin3l"
DOWN_MS = 1500  # what is asked of a master just killed is asked before the sentinel knows


def outcomes(results: list[Any]) -> list[Outcome]:
    return [result.outcome for result in results]


class Watched:
    """A master, its replica, and the sentinel that watches them; data and sentinel have passwords."""

    def __init__(self, folder: Path, start: Callable[..., Any], port: int, eventually: Callable[..., Any]) -> None:
        self._eventually = eventually
        self.master = start(password=SECRET)
        self.replica = start("--replicaof", f"127.0.0.1 {self.master.port}", password=SECRET)
        eventually(self.synced, "the replica has all")
        self.port = port
        file = folder / f"sentinel-{port}.conf"
        file.write_text(
            f"port {port}\nbind 127.0.0.1\nrequirepass {SENTINEL_SECRET}\n"
            f"sentinel monitor cache 127.0.0.1 {self.master.port} 1\nsentinel auth-pass cache {SECRET}\n"
            f"sentinel down-after-milliseconds cache {DOWN_MS}\nsentinel failover-timeout cache 3000\n"
        )
        command = ["redis-server", str(file), "--sentinel"]
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        self.sentinel = redis_client.Redis(port=port, password=SENTINEL_SECRET)
        self.url = self.url_of(f"127.0.0.1:{port}")

    def ready(self) -> Watched:
        self._eventually(self.knows_both, "the sentinel knows master and replica")
        return self

    def url_of(self, hosts: str) -> str:
        return f"redis+sentinel://:{SECRET}@{hosts}/cache?sentinel_password={SENTINEL_SECRET}"

    def synced(self) -> bool:
        return bool(self.replica.redis.info("replication")["master_link_status"] == "up")

    def knows_both(self) -> bool:
        assert self.process.poll() is None
        try:
            (found,) = self.sentinel.sentinel_slaves("cache")
        except (redis_client.ConnectionError, ValueError):
            return False
        return "ok" in str(found["master-link-status"]) and not found["is_disconnected"]

    def replicates(self) -> None:
        """Waits until the replica has what the master has."""
        self.master.redis.set("mark", "")
        assert self.master.redis.wait(1, 10_000) == 1

    def ends_failover(self) -> None:
        """Waits until the replica is the master, for the sentinel as well."""

        def done() -> bool:
            found: Any = self.sentinel.sentinel_get_master_addr_by_name("cache")
            return bool(found[1] == self.replica.port and self.replica.redis.info("replication")["role"] == "master")

        self._eventually(done, "the replica is the master", 30)

    def close(self) -> None:
        self.sentinel.close()
        self.process.kill()
        self.process.wait(30)


@pytest.fixture
def watched(
    short_tmp: Path, net_redis: Callable[..., Any], port: Callable[[], int], eventually: Callable[..., Any]
) -> Iterator[Watched]:
    made = Watched(short_tmp, net_redis, port(), eventually)
    try:
        yield made.ready()
    finally:
        made.close()


@pytest.fixture(scope="module")
def shared(
    net_folder: Path, net_redis: Callable[..., Any], port: Callable[[], int], eventually: Callable[..., Any]
) -> Iterator[Watched]:
    """One whose master stays."""
    made = Watched(net_folder, net_redis, port(), eventually)
    try:
        yield made.ready()
    finally:
        made.close()


@pytest.fixture
def tier(watched: Watched, redis_tier: Callable[..., RedisBackend]) -> RedisBackend:
    backend = redis_tier(watched.url, timeout_s=4.0)
    backend.check()
    return backend


@pytest.fixture
def names(watched: Watched) -> Iterator[RedisNames]:
    made = RedisNames(watched.url, timeout_s=4.0)
    yield made
    made.close()


def test_after_a_failover_the_next_calls_find_the_new_master(
    watched: Watched, tier: RedisBackend, names: RedisNames, objects: Any, eventually: Callable[..., Any]
) -> None:
    stored = [objects.new(600_000), objects.new(10)]
    objects.store(tier, stored)
    names.put("a", b"record")
    assert watched.master.redis.exists("loracache:adapters") == 1
    watched.replicates()
    watched.sentinel.execute_command("SENTINEL FAILOVER", "cache")

    watched.ends_failover()
    watched.master.redis.client_kill_filter(_type="normal")  # as the sentinel does, but some ten seconds later
    late = objects.new(300_000)
    objects.store(tier, [late])
    names.put("b", b"of b")
    assert watched.replica.redis.exists(f"loracache:{{{late.info.key.hex()}}}") == 1
    assert watched.replica.redis.hlen("loracache:adapters") == 2
    assert all(objects.holds(tier, item) for item in (*stored, late))


def test_a_killed_master_is_unavailable_until_there_is_another(
    watched: Watched, tier: RedisBackend, names: RedisNames, objects: Any, eventually: Callable[..., Any]
) -> None:
    stored = objects.new(600_000)
    objects.store(tier, [stored])
    names.put("a", b"record")
    watched.replicates()
    watched.master.kill()
    assert objects.found(tier, stored) is objects.load(tier, stored) is UNAVAILABLE
    assert outcomes(tier.store([stored])) == outcomes(tier.delete([stored.info.key])) == [UNAVAILABLE]
    with pytest.raises(Unavailable, match=r"redis redis\+sentinel://127"):
        names.get("a")
    eventually(lambda: objects.found(tier, stored) is OK, "the new master is found", 30)
    assert objects.holds(tier, stored)
    assert names.get("a") == b"record"


def test_one_connection_that_is_lost_has_all_of_them_ask_anew(
    watched: Watched, redis_tier: Callable[..., RedisBackend], objects: Any
) -> None:
    tier = redis_tier(watched.url, timeout_s=1.0)
    stored = objects.new(10)
    objects.store(tier, [stored])
    watched.replicates()
    connections = tier._servers
    assert connections.everywhere(lambda wire: connections.everywhere(lambda other: None)) is None  # there are two now
    watched.master.process.send_signal(signal.SIGSTOP)
    try:
        watched.ends_failover()
        assert objects.found(tier, stored) is UNAVAILABLE
        assert objects.found(tier, stored) is OK
    finally:
        watched.master.process.send_signal(signal.SIGCONT)


def test_a_master_that_became_a_replica_under_an_open_connection_is_left(
    watched: Watched, tier: RedisBackend, names: RedisNames, objects: Any
) -> None:
    stored = objects.new(600_000)
    objects.store(tier, [stored])
    names.put("a", b"record")
    watched.sentinel.execute_command("SENTINEL REMOVE", "cache")
    watched.replica.redis.replicaof("NO", "ONE")
    watched.master.redis.replicaof("127.0.0.1", watched.replica.port)
    watched.sentinel.execute_command("SENTINEL MONITOR", "cache", "127.0.0.1", watched.replica.port, 1)
    watched.sentinel.execute_command("SENTINEL SET", "cache", "auth-pass", SECRET)
    (result,) = tier.store([stored])
    assert (result.outcome, result.detail[:8]) == (UNAVAILABLE, "READONLY")
    objects.store(tier, [stored])
    with pytest.raises(Unavailable):
        names.put("b", b"record")
    names.put("b", b"record")


def test_a_silent_sentinel_is_passed_over_and_a_silent_master_given_up(
    watched: Watched, redis_tier: Callable[..., RedisBackend], objects: Any, port: Callable[[], int]
) -> None:
    backend = redis_tier(watched.url_of(f"127.0.0.1:{port()},127.0.0.1:{watched.port}"), timeout_s=2.0)
    objects.store(backend, [objects.new(10)])
    silent = redis_tier(watched.url, timeout_s=0.5)
    watched.process.send_signal(signal.SIGSTOP)
    try:
        assert outcomes(silent.contains([bytes(32)])) == [UNAVAILABLE]
        assert outcomes(backend.contains([bytes(32)])) == [MISS]  # who is connected needs no sentinel
    finally:
        watched.process.send_signal(signal.SIGCONT)


def test_a_sentinel_and_its_master_are_reached_by_tls(
    net_folder: Path,
    net_redis: Callable[..., Any],
    certificates: Any,
    port: Callable[[], int],
    redis_tier: Callable[..., RedisBackend],
    objects: Any,
    eventually: Callable[..., Any],
) -> None:
    certificate, key = certificates.signed("watched")
    master = net_redis("--tls-auth-clients", "no", tls=(certificate, key), ca=certificates.ca)
    file, at = net_folder / "sentinel-tls.conf", port()
    lines = (
        "port 0", f"tls-port {at}", "bind 127.0.0.1", "tls-replication yes", "tls-auth-clients no",
        f"tls-cert-file {certificate}", f"tls-key-file {key}", f"tls-ca-cert-file {certificates.ca}",
        f"sentinel monitor cache 127.0.0.1 {master.tls_port} 1", "",
    )  # fmt: skip
    file.write_text("\n".join(lines))
    process = subprocess.Popen(["redis-server", str(file), "--sentinel"], cwd=net_folder, stdout=subprocess.DEVNULL)
    try:
        url = f"rediss+sentinel://127.0.0.1:{at}/cache?ssl_ca_certs={certificates.ca}"
        backend = redis_tier(url)
        eventually(lambda: backend.contains([bytes(32)])[0].outcome is MISS, "the sentinel answers")
        backend.check()
        stored = objects.new(600_000, pieces=3)
        objects.store(backend, [stored])
        assert objects.holds(backend, stored)
        names = RedisNames(url)
        names.put("a", b"record")
        assert names.get("a") == b"record"
        names.close()
        with pytest.raises(ConfigError, match="its certificate is not accepted"):
            redis_tier(url.partition("?")[0]).check()
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("/cache", "/other"), "it watches no service of this name"),
        ((f":{SECRET}@", f":{SECRET}wrong@"), "correct the user and password"),
        ((f"sentinel_password={SENTINEL_SECRET}", f"sentinel_password={SENTINEL_SECRET}wrong"), "no master of 'cache'"),
        ((f"?sentinel_password={SENTINEL_SECRET}", ""), "no master of 'cache'"),
    ],
)
def test_what_is_wrong_with_the_url_is_said_at_the_start_without_secrets(
    shared: Watched, redis_tier: Callable[..., RedisBackend], change: tuple[str, str], said: str
) -> None:
    url = shared.url.replace(*change)
    with pytest.raises(ConfigError, match=r"redis redis\+sentinel://127") as caught:
        redis_tier(url).check()
    names = RedisNames(url)
    with pytest.raises(Unavailable) as unavailable:
        names.get("a")
    names.close()
    assert said in str(caught.value)
    for secret in (SECRET, SENTINEL_SECRET):
        assert secret not in f"{caught.value}{unavailable.value}"
