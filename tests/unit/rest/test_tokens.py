# SPDX-License-Identifier: Apache-2.0
"""The token store: nothing but hashes is kept, a file that others touched is not believed, changes need no restart."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import socket
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from loracache.errors import ConfigError
from loracache.rest.tokens import (
    Principal,
    TokenStore,
    add_token,
    own_token_path,
    read_tokens,
    remove_token,
    tokens_path,
)

TENANT = "ab" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of the tokens of a daemon at `lc.sock`."""
    return tokens_path(tmp_path / "lc.sock")


@pytest.fixture
def store(path: Path) -> TokenStore:
    return TokenStore(path.with_suffix(""))


def entry(**changed: Any) -> dict[str, Any]:
    return {"name": "a", "role": "read", "tenant": "", "sha256": "0" * 64, "created": 1} | changed


def test_what_is_kept_of_a_token_does_not_give_it_away(path: Path) -> None:
    old = os.umask(0)
    try:
        token = add_token(path, "grafana", "read", TENANT)
    finally:
        os.umask(old)
    assert re.fullmatch(r"[\w-]{43}", token)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (kept,) = json.loads(path.read_text())
    assert kept.pop("created") > 1_700_000_000
    sha256 = hashlib.sha256(token.encode()).hexdigest()
    assert kept == {"name": "grafana", "role": "read", "tenant": TENANT, "sha256": sha256}
    assert sorted(one.name for one in path.parent.iterdir()) == ["lc.sock.tokens", "lc.sock.tokens.lock"]


def test_the_daemons_own_token_is_an_admins_and_its_users_alone(path: Path) -> None:
    old = os.umask(0)
    try:
        store = TokenStore(path.with_suffix(""))
    finally:
        os.umask(old)
    own = own_token_path(path.with_suffix(""))
    assert own.name == "lc.sock.token"
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    token = own.read_text().strip()
    assert re.fullmatch(r"[\w-]{43}", token)
    assert store.find(token) == TokenStore(path.with_suffix("")).find(token) == Principal("daemon", "admin")


@pytest.mark.parametrize("empty", [True, False])
def test_without_its_file_the_daemons_own_token_is_made_anew(path: Path, store: TokenStore, empty: bool) -> None:
    own = own_token_path(path.with_suffix(""))
    old = own.read_text().strip()
    if empty:
        own.write_text("\n")
    else:
        own.unlink()
    store.refresh()
    assert store.find(old) is None
    assert store.find("") is None
    assert store.find(own.read_text().strip()) == Principal("daemon", "admin")


def test_the_daemons_own_token_is_worth_nothing_once_others_could_read_it(path: Path, store: TokenStore) -> None:
    own = own_token_path(path.with_suffix(""))
    token = own.read_text().strip()
    own.chmod(0o640)
    store.refresh()
    assert store.find(token) is None
    assert own.read_text().strip() == token


def test_tokens_come_and_go_with_a_refresh(path: Path, store: TokenStore) -> None:
    made = {role: add_token(path, role, role) for role in ("read", "operate", "admin")}
    assert store.find(made["read"]) is None
    store.refresh()
    assert [store.find(token) for token in made.values()] == [Principal(role, role) for role in made]  # type: ignore[arg-type]
    assert remove_token(path, "operate")
    assert not remove_token(path, "operate")
    store.refresh()
    assert [token and store.find(token) is not None for token in made.values()] == [True, False, True]
    path.unlink()
    store.refresh()
    assert [store.find(token) for token in made.values()] == [None] * 3


def test_only_the_token_itself_is_found(path: Path, store: TokenStore) -> None:
    token = add_token(path, "a", "read")
    store.refresh()
    digest = json.loads(path.read_text())[0]["sha256"]
    wrong = ["", " ", token[:-1], token + "x", token.swapcase(), token + "\0", digest, "a", "x" * 10**6, "\udcff", "ü"]
    assert [store.find(one) for one in wrong] == [None] * len(wrong)
    assert store.find(token) == Principal("a", "read")


def test_a_token_is_compared_with_all_whichever_it_is(
    path: Path, store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [add_token(path, f"t{number}", "read") for number in range(5)]
    store.refresh()
    compared: list[bytes] = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or a == b)
    for token in (*made, "unknown"):
        compared.clear()
        store.find(token)
        assert len(compared) == 6  # and the daemon's own


MALFORMED = [
    b"", b"{}", b"[", b"\xff", b"null", b"[1]", b'[{"name": "hunter2"}]', b"[" * 5000,
    *[json.dumps([entry(**wrong)]).encode() for wrong in (
        {"role": "root"}, {"role": "none"}, {"name": ""}, {"name": "a b"}, {"name": "@10.0.0.1"}, {"name": 7},
        {"tenant": "hunter2"}, {"tenant": "AB" * 32}, {"sha256": "hunter2"}, {"sha256": ""}, {"created": "1"},
        {"created": -1}, {"token": "hunter2"},
    )],
    json.dumps([entry(), entry(sha256="1" * 64)]).encode(), json.dumps([entry(), entry(name="b")]).encode(),
    json.dumps([entry()]).encode() + b" " * (1 << 20),
]  # fmt: skip


@pytest.mark.parametrize("content", MALFORMED)
def test_what_is_no_list_of_tokens_is_told_once_without_content_and_changes_nothing(
    path: Path, store: TokenStore, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    token = add_token(path, "kept", "read")
    store.refresh()
    path.write_bytes(content)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            store.refresh()
    assert store.find(token) == Principal("kept", "read")
    (said,) = caplog.messages
    assert str(path) in said
    with pytest.raises(ConfigError) as caught:
        read_tokens(path)
    assert "hunter2" not in said + str(caught.value)
    with pytest.raises(ConfigError):
        add_token(path, "another", "read")
    assert path.read_bytes() == content
    assert TokenStore(path.with_suffix("")).find(token) is None  # after a restart there is no last good list


def _others(path: Path) -> None:
    path.chmod(0o604)


def _group(path: Path) -> None:
    path.chmod(0o620)


def _stranger(path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs to be root")
    os.chown(path, 12345, -1)


def _link(path: Path) -> None:
    path.rename(f"{path}.real")
    path.symlink_to(f"{path}.real")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize("spoil", [_others, _group, _stranger, _link, _fifo, _folder, _socket])
def test_a_file_that_others_could_have_written_or_read_is_not_believed(
    path: Path, store: TokenStore, spoil: Callable[[Path], None]
) -> None:
    known = add_token(path, "known", "read")
    store.refresh()
    planted = add_token(path, "planted", "admin")
    spoil(path)
    store.refresh()
    assert (store.find(planted), store.find(known)) == (None, Principal("known", "read"))
    with pytest.raises((ConfigError, OSError)):
        read_tokens(path)


def test_nobody_elses_own_token_is_taken(path: Path) -> None:
    own = own_token_path(path.with_suffix(""))
    own.write_text("planted\n")
    own.chmod(0o644)
    store = TokenStore(path.with_suffix(""))
    assert store.find("planted") is None
    assert own.read_text() == "planted\n"


def test_tokens_made_at_once_are_all_there(path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda number: add_token(path, f"t{number}", "read"), range(40)))
    assert len(set(made)) == 40
    assert {token.name for token in read_tokens(path)} == {f"t{number}" for number in range(40)}


@pytest.mark.parametrize("name", ["", "a b", "@host", "-x", "x" * 65, "a/b", "ü", "a\nb", "daemon", "anonymous"])
def test_names_that_would_mislead_a_reader_of_logs_are_refused(path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        add_token(path, name, "read")
    assert not path.exists() or read_tokens(path) == []


# -- while a daemon runs, by the command line ----------


def status_of(running: Any, token: str) -> int:
    """Of a change that an operator may make and that changes nothing."""
    answer = httpx.post(f"{running.http}/v1/unpin", json={}, headers={"authorization": f"Bearer {token}"})
    assert answer.status_code in (401, 403, 422)
    return answer.status_code


def test_tokens_are_made_listed_and_removed_while_the_daemon_runs(
    running: Any, eventually: Any, loracache: Callable[..., Any]
) -> None:
    code, token, said = loracache("tokens", "add", "ci", "--role", "operate", socket=running.socket)
    assert (code, re.fullmatch(r"[\w-]{43}\n", token) is not None, token.strip() in said) == (0, True, False)
    eventually(lambda: status_of(running, token.strip()) == 422, "the token is known")
    code, listed, _ = loracache("tokens", "list", socket=running.socket)
    assert (code, "ci" in listed, "operate" in listed, token.strip() in listed) == (0, True, True, False)
    (shown,) = json.loads(loracache("tokens", "list", "--json", socket=running.socket)[1])
    assert (shown["name"], shown["role"], shown["tenant"], set(shown)) == (
        "ci",
        "operate",
        "",
        {"name", "role", "tenant", "created"},
    )
    assert loracache("tokens", "remove", "ci", socket=running.socket)[0] == 0
    eventually(lambda: status_of(running, token.strip()) == 401, "the token is forgotten")
    assert loracache("tokens", "remove", "ci", socket=running.socket)[0] == 3


def test_the_own_token_is_rotated_by_removing_its_file(running: Any, eventually: Any) -> None:
    own = Path(f"{running.socket}.token")
    old = own.read_text().strip()
    assert status_of(running, old) == 422
    own.unlink()
    eventually(lambda: own.exists() and status_of(running, own.read_text().strip()) == 422, "there is another")
    assert status_of(running, old) == 401


def test_a_tenants_salt_is_hashed_and_may_come_from_stdin(tmp_path: Path, loracache: Callable[..., Any]) -> None:
    from loracache.keys import salt_digest

    path = tmp_path / "lc.sock"
    for name, salt, given in (("a", "salty", None), ("b", "-", "salty\n"), ("c", "-", "salty")):
        code, _, _ = loracache("tokens", "add", name, "--role", "read", "--salt", salt, socket=path, stdin=given)
        assert code == 0
    assert [token.tenant for token in read_tokens(tokens_path(path))] == [salt_digest("salty")] * 3
    assert "salty" not in tokens_path(path).read_text()


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (["--role", "root"], None, "role='root' will not do: give read, operate or admin"),
        (["--role", "none"], None, "role='none' will not do"),
        (["--role", "read", "--salt", ""], None, "the salt is empty"),
        (["--role", "read", "--salt", "-"], "", "the salt is empty"),
        (["--role", "read", "--salt", "-"], "\n", "the salt is empty"),
        (["--role", "admin", "--salt", "x"], None, "an admin's routes are no tenant's"),
        ([], None, "role"),
    ],
)
def test_a_token_that_would_be_another_than_meant_is_not_made(
    tmp_path: Path, loracache: Callable[..., Any], arguments: list[str], stdin: str | None, said: str
) -> None:
    code, out, message = loracache("tokens", "add", "t", *arguments, socket=tmp_path / "lc.sock", stdin=stdin)
    assert (code, out) == (2, "")
    assert said in message
    assert "Traceback" not in message
    assert not tokens_path(tmp_path / "lc.sock").exists()


def test_the_command_line_says_what_is_wrong_with_the_file(tmp_path: Path, loracache: Callable[..., Any]) -> None:
    path = tokens_path(tmp_path / "lc.sock")
    add_token(path, "a", "read")
    assert loracache("tokens", "add", "a", "--role", "read", socket=tmp_path / "lc.sock")[0] == 2
    path.chmod(0o644)
    for command in (["list"], ["remove", "a"], ["add", "b", "--role", "read"]):
        code, _, said = loracache("tokens", *command, socket=tmp_path / "lc.sock")
        assert (code, "mode 0644" in said, "Traceback" in said) == (2, True, False)
    code, _, said = loracache("tokens", "add", "b", "--role", "read", socket=tmp_path / "nowhere" / "lc.sock")
    assert (code, "cannot be changed: No such file" in said) == (1, True)
    assert loracache("tokens", "list")[0] == 2
