# SPDX-License-Identifier: Apache-2.0
"""Off loopback: TLS and a token for everything, or no start. Certificates are real, and renewed while it runs."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import httpx
import pytest

from loracache.config import Config
from loracache.errors import ConfigError
from loracache.rest.certificate import Certificate, load_certificate
from loracache.rest.settings import rest_settings
from loracache.rest.tokens import add_token, tokens_path

Pair = tuple[Path, Path]


def make_pair(folder: Path, name: str = "localhost") -> Pair:
    """A certificate for `name` and 127.0.0.1, signed by itself, and its key."""
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
               "-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"]  # fmt: skip
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    key.chmod(0o600)
    return cert, key


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tls"))


def up(running: Any, cert: Path) -> bool:
    with caller(running, cert) as client:
        try:
            return client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False


def caller(running: Any, cert: Path, token: str = "", **options: Any) -> httpx.Client:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    url = running.http.replace("http:", "https:")
    return httpx.Client(base_url=url, headers=headers, verify=ssl.create_default_context(cafile=cert), **options)


@pytest.fixture(scope="module")
def far(module_daemon: Any, eventually: Any, pair: Pair) -> Iterator[Any]:
    """A daemon on all addresses, with `reader` and `operator` for tokens."""
    with tempfile.TemporaryDirectory(prefix="lc-") as folder:
        path = Path(folder) / "lc.sock"
        tokens = {name: add_token(tokens_path(path), name, name) for name in ("read", "operate")}
        running = module_daemon(
            socket=path,
            http="0.0.0.0:0",
            http_hosts="cache.example.org,cache.example.net:443",
            tls_cert=pair[0],
            tls_key=pair[1],
        )
        eventually(lambda: up(running, pair[0]), "REST answers")
        running.tokens = tokens
        yield running


def test_nothing_is_open_but_health(far: Any, pair: Pair) -> None:
    with caller(far, pair[0]) as anybody:
        for path in ("/healthz", "/readyz"):
            assert anybody.get(path).status_code == 200
        for path in ("/v1/stats", "/metrics", "/v1/adapters", "/docs", "/openapi.json"):
            answer = anybody.get(path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert anybody.post("/v1/lookup", json={}).status_code == 401


def test_tokens_open_what_they_should(far: Any, pair: Pair) -> None:
    with caller(far, pair[0], far.tokens["read"]) as reader, caller(far, pair[0], far.tokens["operate"]) as operator:
        assert reader.get("/v1/stats").status_code == reader.get("/docs").status_code == 200
        assert reader.post("/v1/unpin", json={}).status_code == 403
        assert operator.post("/v1/unpin", json={}).status_code == 422
        assert operator.post("/v1/clear", json={}).status_code == 403


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("cache.example.org:{}", True), ("CACHE.example.org:{}", True), ("localhost:{}", True),
        ("cache.example.net", True), ("cache.example.net:443", True), ("cache.example.net:{}", False),
        ("cache.example.org", False), ("example.org:{}", False),
        ("x.cache.example.org:{}", False), ("0.0.0.0:{}", False),
    ],
)  # fmt: skip
def test_it_answers_to_its_names_alone(far: Any, pair: Pair, host: str, answered: bool) -> None:
    port = far.http.rpartition(":")[2]
    with caller(far, pair[0], far.tokens["read"]) as client:
        named = host.format(port)
        assert (client.get("/v1/stats", headers={"host": named}).status_code == 200) == answered
        for origin, may in ((f"https://{named.lower()}", answered), (f"http://{named.lower()}", False)):
            answer = client.get("/v1/stats", headers={"host": named, "origin": origin})
            assert (answer.status_code == 200) == may


def test_plain_http_and_old_tls_get_no_answer(far: Any, pair: Pair) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{far.http}/healthz")
    old = ssl.create_default_context(cafile=pair[0])
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    port = int(far.http.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw, pytest.raises((ssl.SSLError, OSError)):
        old.wrap_socket(raw, server_hostname="localhost")
    assert load_certificate(str(pair[0]), str(pair[1])).minimum_version == ssl.TLSVersion.TLSv1_2


def test_the_rest_process_is_told_paths_and_no_secret(far: Any) -> None:
    (child,) = Path(f"/proc/{far.process.pid}/task/{far.process.pid}/children").read_text().split()
    secrets = [*far.tokens.values(), Path(f"{far.socket}.token").read_text().strip(), "PRIVATE KEY"]
    for pid in (child, far.process.pid):
        shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert str(far.socket) in shown.decode() or pid == far.process.pid
        assert not [secret for secret in secrets if secret.encode() in shown]


def test_tls_is_there_on_loopback_too_where_reading_needs_no_token(daemon: Any, eventually: Any, pair: Pair) -> None:
    running = daemon(http="127.0.0.1:0", tls_cert=pair[0], tls_key=pair[1])
    eventually(lambda: up(running, pair[0]), "REST answers")
    with caller(running, pair[0]) as anybody:
        assert anybody.get("/v1/stats").status_code == 200
        assert anybody.post("/v1/clear", json={}).status_code == 401
        assert anybody.get("/v1/stats", headers={"origin": running.http}).status_code == 403


# -- refusals at the start ----------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "http=0.0.0.0:0 is not on loopback and needs TLS; give tls_cert and tls_key"),
        ({"tls_cert": "c"}, "tls_cert and tls_key belong together"),
        ({"tls_key": "k"}, "tls_cert and tls_key belong together"),
        ({"tls_cert": "c", "tls_key": "k"}, "http=0.0.0.0:0 is every address; give http_hosts"),
        ({"http": "[::]:0", "tls_cert": "c", "tls_key": "k"}, "is every address; give http_hosts"),
        ({"http": "cache.example.org:0"}, "http=cache.example.org:0 is not on loopback and needs TLS"),
        ({"http": "10.0.0.1:0"}, "needs TLS"),
        ({"http": "127.0.0.1:0", "tls_cert": "c"}, "tls_cert and tls_key belong together"),
        ({"http_hosts": "a", "tls_cert": "c", "tls_key": "k"}, "loracache tokens add NAME --role operate --socket"),
        ({"http": "127.0.0.1:0", "http_hosts": "*"}, "'*' is not a name that a Host header has"),
        ({"http": "127.0.0.1:0", "http_hosts": "http://a"}, "is not a name that a Host header has"),
    ],
)
def test_off_loopback_it_does_not_start_with_less_than_all(
    serve_fails: Any, pair: Pair, options: dict[str, object], said: str
) -> None:
    files = {"c": pair[0], "k": pair[1]}
    code, message = serve_fails(**{"http": "0.0.0.0:0"} | {key: files.get(str(v), v) for key, v in options.items()})
    assert (code, "Traceback" in message) == (2, False)
    assert said in message


def test_a_list_without_a_token_is_none(serve_fails: Any, pair: Pair, short_tmp: Path) -> None:
    path = tokens_path(short_tmp / "lc.sock")
    path.write_text("[]")
    path.chmod(0o600)
    options = {"http": "0.0.0.0:0", "http_hosts": "a", "tls_cert": pair[0], "tls_key": pair[1]}
    code, message = serve_fails(**options)
    assert (code, f"{path} has none" in message) == (2, True)


@pytest.mark.parametrize(("suffix", "spoilt"), [("token", "open"), ("tokens", "open"), ("tokens", "nonsense")])
def test_it_does_not_start_on_token_files_that_it_cannot_believe(
    serve_fails: Any, short_tmp: Path, suffix: str, spoilt: str
) -> None:
    path = short_tmp / f"lc.sock.{suffix}"
    path.write_text("hunter2" if spoilt == "nonsense" else "[]")
    path.chmod(0o644 if spoilt == "open" else 0o600)
    code, message = serve_fails(http="127.0.0.1:0")
    assert (code, str(path) in message, "hunter2" in message, "Traceback" in message) == (2, True, False, False)


def _spoil(pair: Pair, how: str, folder: Path) -> Pair:
    cert, key = folder / "c.pem", folder / "k.pem"
    cert.write_bytes(pair[0].read_bytes())
    key.touch(0o600)
    key.write_bytes(pair[1].read_bytes())
    if how == "another's key":
        os.replace(make_pair(folder, "other")[1], key)
    elif how == "a key that others can read":
        key.chmod(0o604)
    elif how == "a key that a group can write":
        key.chmod(0o620)
    elif how == "no certificate":
        cert.write_text("hunter2")
    elif how == "no key":
        key.write_text("hunter2")
    elif how == "a key with a passphrase":
        command = ["openssl", "ec", "-in", str(pair[1]), "-aes128", "-passout", "pass:hunter2", "-out", str(key)]
        subprocess.run(command, check=True, capture_output=True)
    elif how == "a file that is gone":
        cert.unlink()
    return cert, key


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("another's key", "are not a certificate chain and its key"),
        ("a key that others can read", "has mode 0604, so that others can use it; chmod 600 it"),
        ("a key that a group can write", "has mode 0620"),
        ("no certificate", "are not a certificate chain and its key"),
        ("no key", "are not a certificate chain and its key"),
        ("a key with a passphrase", "without a passphrase"),
        ("a file that is gone", "cannot be read: No such file"),
    ],
)
def test_files_that_will_not_do_are_told_by_name(
    serve_fails: Any, pair: Pair, tmp_path: Path, how: str, said: str
) -> None:
    cert, key = _spoil(pair, how, tmp_path)
    code, message = serve_fails(http="127.0.0.1:0", tls_cert=cert, tls_key=key)
    assert (code, "Traceback" in message, "hunter2" in message) == (2, False, False)
    assert said in message
    assert str(tmp_path) in message


def test_a_group_may_read_the_key(pair: Pair, tmp_path: Path) -> None:
    cert, key = _spoil(pair, "", tmp_path)
    key.chmod(0o640)
    assert load_certificate(str(cert), str(key)) is not None


def test_the_key_itself_is_not_a_path_and_is_not_shown(serve_fails: Any, pair: Pair) -> None:
    content = pair[1].read_text()
    code, message = serve_fails(environment={"LORACACHE_TLS_KEY": content}, http="127.0.0.1:0")
    assert (code, "tls_key=(secret)" in message, content.splitlines()[1] in message) == (2, True, False)


# -- renewal ----------


def served(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=10)


def test_a_renewed_certificate_is_served_without_a_restart(
    daemon: Any, eventually: Callable[..., Any], pair: Pair, tmp_path: Path
) -> None:
    cert, key = _spoil(pair, "", tmp_path)
    running = daemon(http="127.0.0.1:0", tls_cert=cert, tls_key=key)
    eventually(lambda: up(running, cert), "REST answers")
    port = int(running.http.rpartition(":")[2])
    with caller(running, cert) as client:
        assert client.get("/healthz").status_code == 200
        first = served(port)
        new = make_pair(tmp_path, "renewed")
        wanted = new[0].read_text().strip()
        os.replace(new[0], cert)  # the pair does not fit until its key is there as well
        eventually(lambda: "the certificate stays as it was" in running.log(), "the half pair is refused")
        assert served(port) == first
        os.replace(new[1], key)
        eventually(lambda: served(port).strip() == wanted, "the new one is served")
        assert client.get("/healthz").status_code == 200  # on its old connection
    assert running.log().count("the certificate stays as it was") == 1


def test_a_certificate_that_is_gone_is_served_on(pair: Pair, tmp_path: Path) -> None:
    cert, key = _spoil(pair, "", tmp_path)
    followed = Certificate(str(cert), str(key))
    before = followed.context
    cert.unlink()
    for _ in range(2):
        followed.refresh()
    assert followed.context is before


# -- the settings of the process ----------


@pytest.mark.parametrize(
    ("options", "hosts", "open_reading", "rate"),
    [
        ({"http": "127.0.0.1:9"}, {"localhost:9", "127.0.0.1:9", "[::1]:9"}, True, 5000),
        ({"http": "localhost:80"},
         {"localhost:80", "127.0.0.1:80", "[::1]:80", "localhost", "127.0.0.1", "[::1]"}, True, 5000),
        ({"http": "127.0.0.2:9"}, {"localhost:9", "127.0.0.1:9", "[::1]:9", "127.0.0.2:9"}, True, 5000),
        ({"http": "[::1]:9", "http_rate": 5}, {"localhost:9", "127.0.0.1:9", "[::1]:9"}, True, 5),
        ({"http": "a.b:9"}, {"localhost:9", "127.0.0.1:9", "[::1]:9", "a.b:9"}, False, 100),
        ({"http": "0.0.0.0:9", "http_hosts": "A.b, [2001:db8::1]:1", "http_rate": 0},
         {"localhost:9", "127.0.0.1:9", "[::1]:9", "a.b:9", "[2001:db8::1]:1"}, False, 0),
    ],
)  # fmt: skip
def test_names_reading_and_rates_follow_the_address(
    options: dict[str, object], hosts: Set[str], open_reading: bool, rate: float
) -> None:
    tls = {} if open_reading else {"tls_cert": "/c", "tls_key": "/k"}
    config = Config(socket=Path("/run/lc.sock"), **tls, **options)  # type: ignore[arg-type]
    made = rest_settings(config, int(str(options["http"]).rpartition(":")[2]), 3, 4)
    assert (made.hosts, made.open_reading, made.rate) == (hosts, open_reading, rate)


def test_a_daemon_that_could_not_be_reached_safely_says_so_before_it_takes_a_port(tmp_path: Path) -> None:
    from loracache.daemon.rest_process import RestProcess

    config = Config(socket=tmp_path / "lc.sock", http="a.invalid:9", tls_cert=tmp_path / "c", tls_key=tmp_path / "k")
    with pytest.raises(ConfigError, match="cannot be read"):
        RestProcess(config)
