# SPDX-License-Identifier: Apache-2.0
"""What is secret shows nowhere: not in answers, logs, process lists or environments, whatever goes wrong."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from loracache.rest.tokens import add_token, own_token_path, tokens_path

INTEGRITY_KEY = "hunter2-" * 5


@pytest.fixture
def guarded(daemon: Any, eventually: Any, rest_is_up: Any, short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    config = short_tmp / "loracache.yaml"
    config.write_text(f"integrity_key: {INTEGRITY_KEY}\nlog_level: debug\n")
    path = short_tmp / "lc.sock"
    made = [add_token(tokens_path(path), role, role) for role in ("read", "operate", "admin")]
    running = daemon(socket=path, config=config, http="127.0.0.1:0")
    eventually(lambda: rest_is_up(running))
    running.secrets = [*made, own_token_path(path).read_text().strip(), INTEGRITY_KEY]
    return running


def test_no_answer_log_process_list_or_environment_shows_a_secret(guarded: Any, eventually: Any) -> None:
    answers = []
    calls = [
        ("GET", "/v1/stats"), ("GET", "/v1/config"), ("GET", "/v1/nowhere"), ("GET", "/v1/stats?token={}"),
        ("POST", "/v1/unpin"), ("POST", "/v1/clear"), ("PATCH", "/v1/evict"), ("GET", "/openapi.json"),
    ]  # fmt: skip
    headers = [("authorization", form) for form in ("Bearer {}", "Bearer {}x", "Basic {}", "{}")] + [("cookie", "{}")]
    with httpx.Client(base_url=guarded.http) as client:
        for secret, (name, form), (method, path) in itertools.product(guarded.secrets, headers, calls):
            given = {name: form.format(secret)}
            answers.append(client.request(method, path.format(secret), headers=given, content=b"{"))
        answers.append(client.get("/v1/stats", headers={"x-bad": "1", "connection": "upgrade", "upgrade": "h2c"}))
    shown = [answer.text + str(answer.headers) for answer in answers]

    # A list that turns bad is told of, and a restart logs what it finds.
    tokens_path(guarded.socket).write_text(f'["{guarded.secrets[0]}"]')
    eventually(lambda: "tokens stay as they were" in guarded.log())
    (child,) = Path(f"/proc/{guarded.process.pid}/task/{guarded.process.pid}/children").read_text().split()
    os.kill(int(child), 9)
    eventually(lambda: guarded.log().count("tokens stay as they were") == 2, "it is started again", 30)
    shown.append(guarded.log())
    (child,) = Path(f"/proc/{guarded.process.pid}/task/{guarded.process.pid}/children").read_text().split()
    for pid in (child, guarded.process.pid):
        for what in ("cmdline", "environ"):
            shown.append(Path(f"/proc/{pid}/{what}").read_bytes().decode())
    found = [(secret, text) for secret in guarded.secrets for text in shown if secret in text]
    assert not found
    assert "loracache.rest" in "".join(shown)


def test_requests_that_cannot_be_parsed_are_not_quoted(guarded: Any, eventually: Any) -> None:
    parts = urlsplit(guarded.http)
    for line in (
        "GET /?token={} HTTP/9.9",
        "GE T /?token={} HTTP/1.1",
        "GET /v1/stats HTTP/1.1\r\nauthori\x00zation: {}",
    ):
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10) as raw:
            raw.sendall(line.format(guarded.secrets[0]).encode() + b"\r\n\r\n")
            assert guarded.secrets[0].encode() not in raw.recv(1000)
    eventually(lambda: "Invalid HTTP request received" in guarded.log())
    assert guarded.secrets[0] not in guarded.log()
