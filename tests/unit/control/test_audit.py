# SPDX-License-Identifier: Apache-2.0
"""The audit log: a line for every change, who made it, and nothing that is nobody's business."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from loracache import Namespace
from loracache.client.connection import Connection
from loracache.client.control import Selection
from loracache.control.audit import Audit
from loracache.errors import ConfigError, Rejected
from loracache.keys import salt_digest
from loracache.rest.tokens import add_token, tokens_path
from loracache.wire.control_messages import Clear

SPACE = Namespace("model", "float32", "layout", 16, salt=salt_digest("hunter2"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_is_for_its_owner_alone_and_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    before = os.umask(0)
    try:
        audit = Audit(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    audit.write("me", "evict", objects=0, tenant="", error=None, tiers=["cpu"])
    audit.close()
    again = Audit(path)
    again.write("you\n", "pin")
    again.close()
    first, second = lines(path)
    assert {name: first[name] for name in first if name != "time"} == {
        "by": "me",
        "verb": "evict",
        "objects": 0,
        "tiers": ["cpu"],
    }
    assert (second["by"], second["verb"]) == ("you\n", "pin")
    assert first["time"] <= second["time"]
    assert first["time"].endswith("Z")


@pytest.mark.parametrize("how", ["renamed", "removed", "replaced"])
def test_a_rotated_file_is_made_again(tmp_path: Path, how: str) -> None:
    path = tmp_path / "audit"
    audit = Audit(path)
    audit.write("me", "first")
    if how == "removed":
        path.unlink()
    else:
        path.rename(tmp_path / "audit.1")
    if how == "replaced":
        path.write_text("")
    audit.write("me", "second")
    audit.close()
    assert [line["verb"] for line in lines(path)] == ["second"]
    assert how == "removed" or [line["verb"] for line in lines(tmp_path / "audit.1")] == ["first"]


def test_what_cannot_be_written_goes_to_the_daemons_log_and_later_lines_to_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    audit = Audit(folder / "audit")
    (folder / "audit").unlink()
    folder.rmdir()
    audit.write("me", "lost")
    assert "cannot be written" in caplog.text
    assert '"lost"' in caplog.text
    folder.mkdir()
    audit.write("me", "found")
    audit.close()
    assert [line["verb"] for line in lines(folder / "audit")] == ["found"]


def test_without_a_file_lines_go_to_the_daemons_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="loracache.audit"):
        Audit(None).write("me", "evict")
    assert '"verb": "evict"' in caplog.text


@pytest.mark.parametrize("how", ["link", "folder", "missing"])
def test_a_file_that_cannot_be_written_is_refused_at_start(tmp_path: Path, how: str) -> None:
    path = tmp_path / "audit"
    if how == "link":
        (tmp_path / "elsewhere").write_text("")
        path.symlink_to(tmp_path / "elsewhere")
    elif how == "folder":
        path.mkdir()
    else:
        path = tmp_path / "nowhere" / "audit"
    with pytest.raises(ConfigError, match="audit_log="):
        Audit(path)


# -- of a daemon -------------------------------------------------------------------------------------------------------


@pytest.fixture
def running(daemon: Any, short_tmp: Path) -> Any:
    audit = short_tmp / "audit"
    return daemon(memory="4MiB", page_size="4KiB", disk_path=short_tmp / "disk", disk="8MiB", audit_log=audit)


def test_every_change_is_noted_with_who_made_it_and_without_tokens_or_salts(running: Any, short_tmp: Path) -> None:
    client = running.client(name="script")
    tokens = list(range(424200, 424248))
    root = client.register(SPACE, ["served"])
    keys = SPACE.object_keys(tokens)
    with client.reserve(root, keys, [100] * 3) as reservation:
        for position in range(3):
            reservation.write(position, bytes(100))
    prompt = Selection(model="served", tokens=tokens, salt="hunter2")
    assert client.pin(prompt) == 3
    assert client.unpin(keys) == 3
    assert client.admit(keys, tier="disk").state == "done"
    assert client.move(prompt, "cpu", "disk").objects == 3
    client.evict(Selection(salt="hunter2"))
    client.clear(tiers=["cpu"])
    client.cancel(client.operations()[0].id)
    with pytest.raises(Rejected):
        client.add_adapter("/nowhere", "name")
    assert client.remove_adapter("nobody") is None  # nor does this change anything
    client.locate(prompt)
    list(client.objects())
    audit = short_tmp / "audit"
    told = lines(audit)
    assert [line["verb"] for line in told] == ["pin", "unpin", "admit", "move", "evict", "clear", "cancel"]
    assert {(line["by"], line["says"]) for line in told} == {(f"pid {os.getpid()}, uid {os.getuid()}", "script")}
    pin, unpin, _, move, evict, *_ = told
    assert (pin["tokens"], pin["model"], pin["tier"], pin["objects"]) == (48, "served", "cpu", 3)
    assert (unpin["keys"], unpin["first_key"]) == (3, keys[0].hex())
    assert (move["source"], move["tier"], move["state"], move["bytes"]) == ("cpu", "disk", "done", 300)
    assert (evict["salt"], evict["tiers"]) == (salt_digest("hunter2"), ["cpu", "disk", "redis"])
    text = audit.read_text()
    assert "hunter2" not in text
    assert not any(str(token) in text for token in tokens)
    assert stat.S_IMODE(audit.stat().st_mode) == 0o600


def test_the_command_line_is_named_with_its_process(running: Any, short_tmp: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "loracache", "clear", "--socket", str(running.socket)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        assert process.wait(30) == 0
    (line,) = lines(short_tmp / "audit")
    assert (line["verb"], line["by"], line["says"]) == ("clear", f"pid {process.pid}, uid {os.getuid()}", "cli")


def test_who_claims_to_be_somebody_else_is_noted_as_what_the_kernel_says(running: Any, short_tmp: Path) -> None:
    pretended = "root (http, 192.0.2.1)"
    connection = Connection(running.url, name="daemon (pid 1, uid 0)")
    connection.connect()
    for by in (pretended, ""):
        connection.call(Clear(by, "", ["cpu"], 5.0), 10)
    connection.close()
    told = lines(short_tmp / "audit")
    assert {line["by"] for line in told} == {f"pid {os.getpid()}, uid {os.getuid()}"}
    assert [line["says"] for line in told] == [pretended, "daemon (pid 1, uid 0)"]


def test_over_rest_it_is_the_token_and_where_its_bearer_is(daemon: Any, short_tmp: Path, eventually: Any) -> None:
    config = short_tmp / "lc.yaml"
    config.write_text(f"audit_log: {short_tmp / 'audit'}\n")
    running = daemon(http="127.0.0.1:0", config=config)
    add_token(tokens_path(running.socket), "ops", "admin")
    token = add_token(tokens_path(running.socket), "script", "admin")

    def cleared() -> bool:
        with contextlib.suppress(httpx.TransportError):
            headers = {"Authorization": f"Bearer {token}"}
            return httpx.post(f"{running.http}/v1/clear", json={}, headers=headers).status_code == 200
        return False

    eventually(cleared, "REST knows the token", 30)
    (line,) = lines(short_tmp / "audit")
    assert (line["verb"], line["by"]) == ("clear", "script (http, 127.0.0.1)")
    assert "says" not in line


def test_an_operation_does_not_fail_for_its_line(running: Any, short_tmp: Path) -> None:
    audit = short_tmp / "audit"
    audit.unlink()
    audit.mkdir()
    client = running.client()
    assert client.clear().state == "done"
    assert "cannot be written" in running.log()
    audit.rmdir()
    assert client.clear().state == "done"
    assert len(lines(audit)) == 1
