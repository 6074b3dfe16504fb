# SPDX-License-Identifier: Apache-2.0
"""TLS to a real Redis: who is believed, who is not, and in what words."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from loracache.errors import ConfigError, Unavailable
from loracache.storage_backends.base import Outcome
from loracache.storage_backends.redis.backend import RedisBackend
from loracache.storage_backends.redis.names import RedisNames

OK, UNAVAILABLE = Outcome.OK, Outcome.UNAVAILABLE
SECRET = "s3cr3t"


def outcomes(results: list[Any]) -> list[Outcome]:
    return [result.outcome for result in results]


@pytest.fixture(scope="module")
def server_of(net_redis: Callable[..., Any], certificates: Any) -> Callable[..., Any]:
    """server_of(name, alternative names, days) starts one with such a certificate, once for the module."""
    known: dict[str, Any] = {}

    def of(name: str, *described: Any) -> Any:
        if name not in known:
            pair = certificates.signed(name, *described)
            known[name] = net_redis("--tls-auth-clients", "no", tls=pair, ca=certificates.ca)
        return known[name]

    return of


def refusal(url: str) -> str:
    """What the start says, which has no secret in it; what the names say is as harmless."""
    backend, names = RedisBackend(url, timeout_s=10), RedisNames(url, timeout_s=10)
    try:
        with pytest.raises(ConfigError) as caught:
            backend.check()
        with pytest.raises(Unavailable) as unavailable:
            names.get("a")
    finally:
        backend.close()
        names.close()
    assert SECRET not in str(caught.value) + str(unavailable.value)
    return str(caught.value)


def test_a_server_of_a_ca_that_nobody_named_is_refused(tls_redis: Any, certificates: Any) -> None:
    port = tls_redis.tls_port
    for query in ("", f"?ssl_ca_certs={certificates.stranger}", "?ssl_cert_reqs=optional", "?ssl_cert_reqs="):
        said = refusal(f"rediss://:{SECRET}@localhost:{port}{query}")
        assert f"redis rediss://localhost:{port}: its certificate is not accepted" in said
        assert "certificate" in said
        assert "ssl_ca_certs=FILE" in said


@pytest.mark.parametrize(
    ("described", "why"),
    [
        (("expired", "DNS:localhost,IP:127.0.0.1", -1), "expired"),
        (("elsewhere", "DNS:elsewhere.test"), "ostname mismatch"),
    ],
)
def test_a_certificate_that_does_not_fit_is_refused_with_the_reason(
    server_of: Callable[..., Any], certificates: Any, described: tuple[Any, ...], why: str
) -> None:
    port = server_of(*described).tls_port
    said = refusal(f"rediss://user:{SECRET}@localhost:{port}?ssl_ca_certs={certificates.ca}")
    assert why in said
    assert "the host by the name the certificate is for" in said


@pytest.mark.parametrize(
    ("option", "described"),
    [
        ("ssl_cert_reqs=none", ("expired", "DNS:localhost,IP:127.0.0.1", -1)),
        ("ssl_check_hostname=no", ("elsewhere", "DNS:elsewhere.test")),
    ],
)
def test_who_turns_verification_off_is_told_so(
    server_of: Callable[..., Any],
    certificates: Any,
    redis_tier: Callable[..., RedisBackend],
    caplog: pytest.LogCaptureFixture,
    option: str,
    described: tuple[Any, ...],
) -> None:
    url = f"rediss://localhost:{server_of(*described).tls_port}?ssl_ca_certs={certificates.ca}"
    with caplog.at_level(logging.WARNING):
        redis_tier(url)
        assert not caplog.text
        redis_tier(f"{url}&{option}").check()
    assert option in caplog.text


def test_a_server_that_wants_a_certificate_gets_the_clients(
    net_redis: Callable[..., Any], certificates: Any, objects: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    server = net_redis("--tls-auth-clients", "yes", tls=certificates.signed("strict"), ca=certificates.ca)
    url = f"rediss://localhost:{server.tls_port}?ssl_ca_certs={certificates.ca}"
    standing = redis_tier(url).check()
    assert "redis rediss://localhost" in standing.reason
    assert not standing.reads
    certificate, key = certificates.signed("client", "DNS:client")
    backend = redis_tier(f"{url}&ssl_certfile={certificate}&ssl_keyfile={key}")
    backend.check()
    stored = objects.new(600_000, pieces=3)
    objects.store(backend, [stored])
    assert objects.holds(backend, stored)


@pytest.mark.parametrize("name", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_ca_path"])
def test_a_file_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} '/nowhere/x' cannot be read: No such file") as caught:
        RedisBackend(f"rediss://:{SECRET}@localhost?{name}=/nowhere/x")
    assert SECRET not in str(caught.value)


AT_A_TERMINAL = """
import fcntl, pty, sys, termios
from loracache.errors import ConfigError
from loracache.storage_backends.redis.backend import RedisBackend
fcntl.ioctl(pty.openpty()[1], termios.TIOCSCTTY, 0)
try:
    RedisBackend(sys.argv[1]).check()
except ConfigError as error:
    print(error)
"""


def test_a_locked_key_without_its_password_asks_no_terminal(
    tls_redis: Any, certificates: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    certificate, key = certificates.signed("locked", "DNS:client")
    locked = certificates.locked(key, SECRET)
    url = f"{tls_redis.tls_url}&ssl_certfile={certificate}&ssl_keyfile={locked}"
    said = subprocess.run(
        [sys.executable, "-c", AT_A_TERMINAL, url],
        capture_output=True,
        text=True,
        timeout=30,
        start_new_session=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert "redis rediss://localhost" in said.stdout
    with pytest.raises(ConfigError, match="redis rediss://") as caught:
        redis_tier(f"{url}&ssl_password={SECRET}wrong").check()
    assert SECRET not in str(caught.value)
    redis_tier(f"{url}&ssl_password={SECRET}").check()


def test_tls_to_a_server_without_it_and_none_to_one_with_it_end_in_words(
    tls_redis: Any, certificates: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    for url in (
        f"rediss://localhost:{tls_redis.port}?ssl_ca_certs={certificates.ca}",
        f"redis://:{SECRET}@localhost:{tls_redis.tls_port}",
    ):
        standing = redis_tier(url, timeout_s=1.0).check()
        assert re.search(r"redis redis.*; start that Redis, or correct redis", standing.reason)
        assert SECRET not in standing.reason


def test_a_tls_server_stopped_in_the_middle_is_unavailable_and_back_again(
    tls_redis: Any, objects: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    backend = redis_tier(tls_redis.tls_url, prefix="stopped", timeout_s=1.5)
    stored = [objects.new(1 << 20) for _ in range(4)]
    objects.store(backend, stored)
    tls_redis.process.send_signal(signal.SIGSTOP)
    try:
        assert outcomes(backend.load([objects.empty(item) for item in stored])) == [UNAVAILABLE] * 4
        assert outcomes(backend.store(stored)) == [UNAVAILABLE] * 4
    finally:
        tls_redis.process.send_signal(signal.SIGCONT)
    assert all(objects.holds(backend, item) for item in stored)


def test_many_threads_over_tls_get_their_own_bytes(
    tls_redis: Any, objects: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    backend = redis_tier(tls_redis.tls_url, prefix="threads")
    stored = [objects.new(700_000 + number, pieces=4) for number in range(8)]
    objects.store(backend, stored)
    wrong: list[int] = []

    def read(number: int) -> None:
        for turn in range(6):
            item = stored[(number + turn) % 8]
            if not objects.holds(backend, item):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


def test_an_idle_connection_over_tls_that_the_server_closed_is_not_used(
    tls_redis: Any, objects: Any, redis_tier: Callable[..., RedisBackend]
) -> None:
    backend = redis_tier(tls_redis.tls_url, prefix="idle")
    stored = objects.new(10)
    objects.store(backend, [stored])
    tls_redis.redis.client_kill_filter(_type="normal", skipme=True)
    assert objects.holds(backend, stored)


def test_names_of_adapters_travel_over_tls(tls_redis: Any) -> None:
    names = RedisNames(tls_redis.tls_url, prefix="names", timeout_s=10)
    names.put("a", b"record")
    assert (names.get("a"), names.all()) == (b"record", [b"record"])
    names.close()
