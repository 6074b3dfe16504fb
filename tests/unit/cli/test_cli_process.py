# SPDX-License-Identifier: Apache-2.0
"""The command as a process: terminals, pipes, signals, shells, and how much it imports."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loracache import CacheClient
from loracache.cli.app import app

HEAVY = ("torch", "vllm", "fastapi", "uvicorn", "redis", "safetensors", "urllib.request")


# -- starting ----------------------------------------------------------------------------------------------------------


def test_status_imports_nothing_heavy(running: Any) -> None:
    code = f"""
import sys
sys.argv = ["loracache", "status", "--json", "--socket", {str(running.socket)!r}]
from loracache.cli.app import main
try:
    main()
finally:
    print([name for name in {HEAVY!r} + ("rich", "yaml", "asyncio", "numpy") if name in sys.modules], file=sys.stderr)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert json.loads(done.stdout)["pid"] == running.process.pid
    assert done.stderr == "[]\n"


# -- pipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb",
    [["objects"], ["objects", "--json"], ["events", "--no-follow"], ["tree", "--depth", "300", "--limit", "1000"]],
)
def test_a_reader_that_goes_away_ends_it_quietly(process: Any, prompt: Any, verb: list[str]) -> None:
    for _ in range(8):
        prompt(200, size=8)
    started = process(*verb)
    assert started.process.stdout.read(1) != b""
    started.process.stdout.close()
    started.process.stdout = None
    assert (started.end().err, started.process.returncode) == ("", 141)


@pytest.mark.parametrize("verb", [["status"], ["status", "--json"], ["--version"], ["--help"], ["objects"]])
def test_output_that_cannot_be_written_is_told_in_one_line(running: Any, verb: list[str]) -> None:
    command = [sys.executable, "-m", "loracache", *verb]
    environment = os.environ | {"LORACACHE_SOCKET": str(running.socket)}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, env=environment, stdout=full, stderr=-1, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (1, b"loracache: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize("stream", ["1</dev/null", "2>/dev/full", "2</dev/null"])
def test_a_stream_that_cannot_be_written_hides_no_exit_code(stream: str) -> None:
    for words, code in (
        ("status --socket /nowhere.sock", 1),
        ("batch run x -o - --url http://127.0.0.1:1 --order up", 2),
    ):
        command = f'"{sys.executable}" -m loracache {words} {stream}'
        done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=30, check=False)
        assert (done.returncode, b"Traceback" in done.stderr) == (code, False)


def test_answers_are_not_computed_for_an_output_that_takes_none(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("")
    command = f'"{sys.executable}" -m loracache batch run in -o - --url http://127.0.0.1:1 1</dev/null'
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, timeout=30, check=False)
    assert (done.returncode, b"standard output cannot be written to" in done.stderr) == (2, True)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_nowhere(running: Any, closed: str) -> None:
    command = f'"{sys.executable}" -m loracache status --socket "{running.socket}" {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_through_a_pipe_there_are_no_boxes_and_no_short_keys(process: Any, prompt: Any) -> None:
    _, keys = prompt(2, model="piped")
    done = process("objects", "--model", "piped").end()
    assert (done.code, done.err, done.out.isascii()) == (0, "", True)
    assert all(key.hex() in done.out for key in keys)
    assert not re.search(r"[|+\x1b]| $", done.out, re.MULTILINE)


# -- terminals ---------------------------------------------------------------------------------------------------------


def test_on_a_terminal_keys_are_short(process: Any, prompt: Any) -> None:
    _, keys = prompt(2, model="drawn")
    done = process("objects", "--model", "drawn", terminal=True).end()
    assert done.code == 0
    assert keys[0].hex()[:12] in done.out
    assert keys[0].hex() not in done.out
    assert "│" in done.out


@pytest.mark.parametrize(("answer", "code", "left"), [("n\n", 1, 2), ("y\n", 0, 0)])
def test_on_a_terminal_a_whole_model_is_removed_after_a_question(
    process: Any, prompt: Any, client: CacheClient, answer: str, code: int, left: int
) -> None:
    _, keys = prompt(2, model="asked")
    started = process("evict", "--model", "asked", terminal=True)
    started.until("Remove everything of model asked from cpu, disk, redis? [y/N]")
    assert client.lookup(keys).hits == 2
    started.type(answer)
    assert started.end().code == code
    assert client.lookup(keys).hits == left
    client.evict(keys)


def test_on_a_terminal_clear_asks_unless_told_not_to(process: Any, prompt: Any, daemon: Any) -> None:
    own = daemon(memory="1MiB", page_size="4KiB")
    other = own.client()
    _, keys = prompt(2, of=other)
    started = process("clear", socket=own.socket, terminal=True)
    started.until("Remove everything from cpu, disk, redis? [y/N]")
    time.sleep(0.5)  # it says so just before it reads; a signal in between is seen after the next key
    started.process.send_signal(signal.SIGINT)
    assert started.end().code == 130
    assert other.lookup(keys).hits == 2
    assert process("clear", "--yes", socket=own.socket, terminal=True).end().code == 0
    assert other.lookup(keys).hits == 0


# -- long operations ---------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(daemon: Any, redis_server: Any, prompt: Any) -> Iterator[tuple[Any, list[str]]]:
    """A daemon whose Redis is silent, and the command that has it write there: it takes seconds."""
    server = redis_server()
    own = daemon(memory="16MiB", page_size="4KiB", redis=server.url)
    tokens, _ = prompt(4, of=own.client())
    own.client().flush()
    server.send(signal.SIGSTOP)
    yield own, ["admit", "--model", "model", "--tokens", ",".join(map(str, tokens)), "--tier", "redis"]
    server.send(signal.SIGCONT)


def test_ctrl_c_leaves_the_operation_running_and_says_its_id(process: Any, slow: Any, eventually: Any) -> None:
    own, command = slow
    started = process(*command, terminal=True, socket=own.socket)
    shown = started.until("0 of 4 (0 %) objects")
    started.process.send_signal(signal.SIGINT)
    done = started.end()
    (id_,) = set(re.findall(r"admit ([0-9a-f]{16}): ", shown))
    assert done.code == 130
    assert f"operation {id_} goes on; see: loracache operations show {id_}" in " ".join(done.out.split())
    with CacheClient(own.url) as client:
        assert client.operation(id_, wait=30.0).state == "done"  # and was not cancelled


def test_wait_ends_before_the_operation_does(cli: Any, slow: Any) -> None:
    own, command = slow
    done = cli(*command, "--wait", 0.3, "--json", socket=own.socket)
    assert (done.code, done.json["state"], done.err) == (4, "running", "")
    id_ = done.json["id"]
    assert cli("operations", "show", id_, "--wait", 0.2, socket=own.socket).code == 4
    cancelled = cli("operations", "cancel", id_, "--json", socket=own.socket)
    assert (cancelled.code, cancelled.json["state"]) == (0, "cancelled")


def test_a_daemon_that_dies_meanwhile_is_exit_code_1(process: Any, slow: Any) -> None:
    own, command = slow
    started = process(*command, terminal=True, socket=own.socket)
    started.until("objects")
    own.stop(signal.SIGKILL)
    done = started.end()
    assert done.code == 1
    assert "closed the connection" in done.out


def test_events_are_followed_until_ctrl_c(process: Any, prompt: Any, client: CacheClient) -> None:
    prompt(1)
    *_, before = client.events(1, wait=0.0, count=10_000)[2]
    started = process("events", "--since", before["id"], terminal=True)
    for _ in range(2):  # what was there when it began, and what comes later
        _, keys = prompt(1)
        started.until(keys[0].hex()[:12])
    started.process.send_signal(signal.SIGINT)
    assert started.end().code == 130


# -- shells ------------------------------------------------------------------------------------------------------------


def offered(words: str, socket: object) -> list[str]:
    """What is offered for the last of `words`."""
    given = words.split(" ")
    environment = {
        "_LORACACHE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(given) - 1),
        "LORACACHE_SOCKET": str(socket),
    }  # fmt: skip
    done = CliRunner().invoke(app, [], env=environment, prog_name="loracache")
    assert done.stderr == ""
    return done.stdout.split()


def test_a_tab_offers_what_the_daemon_knows(running: Any, prompt: Any, client: CacheClient, peft: Path) -> None:
    prompt(1, model="tabbed-model")
    client.add_adapter(str(peft), "tabbed/adapter")
    id_ = client.admit([bytes(32)]).id
    socket = running.socket
    assert offered("loracache dec", socket) == ["decompress"]
    assert offered("loracache evict --mod", socket) == ["--model"]
    assert offered("loracache evict --model tabb", socket) == ["tabbed-model"]
    assert offered("loracache lookup --adapter tabb", socket) == ["tabbed/adapter"]
    assert offered("loracache adapters show tabb", socket) == ["tabbed/adapter"]
    assert offered("loracache move ", socket) == ["cpu", "disk"]
    assert offered(f"loracache operations show {id_[:6]}", socket) == [id_]
    assert offered(f"loracache pin --socket {socket} --model tabb", "/nowhere/lc.sock") == ["tabbed-model"]


def test_a_tab_without_a_daemon_is_silent(
    daemon: Any, short_tmp: Path, monkeypatch: pytest.MonkeyPatch, quickest: Callable[..., float]
) -> None:
    for socket in (short_tmp / "lc.sock", ""):
        assert offered("loracache evict --model ", socket) == []
        assert offered("loracache evict --tier ", socket) == ["cpu", "disk", "redis"]
    silent = daemon(memory="1MiB")
    silent.send(signal.SIGSTOP)
    monkeypatch.setattr("loracache.cli.completion._PATIENCE_S", 0.05)

    def took() -> float:
        began = time.monotonic()
        assert offered("loracache evict --model ", silent.socket) == []
        return time.monotonic() - began

    assert quickest(took, 1.0) < 1.0  # a client would wait for two seconds
    silent.send(signal.SIGCONT)


def test_completion_is_installed_and_bash_uses_it(running: Any, tmp_path: Path, prompt: Any) -> None:
    prompt(1, model="bashful")
    command = tmp_path / "loracache"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m loracache "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {
        "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "LORACACHE_SOCKET": str(running.socket),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path))),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }  # fmt: skip
    installed = subprocess.run(
        [command, "--install-completion", "bash"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert installed.returncode == 0, installed.stderr
    script = tmp_path / ".bash_completions" / "loracache.sh"
    asking = f"""
source {script}
COMP_WORDS=(loracache evict --model bash); COMP_CWORD=3
_loracache_completion loracache
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", asking], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout, done.stderr) == ("bashful\n", "")


def test_a_daemon_lets_its_loop_go_on_beside_threads_that_compute(
    monkeypatch: pytest.MonkeyPatch, short_tmp: Path
) -> None:
    """By default each of them may keep it waiting for 5 ms."""
    found: list[float] = []

    class Noted:
        def __init__(self, settings: object, give_up: object) -> None:
            pass

        async def run(self) -> None:
            found.append(sys.getswitchinterval())

    monkeypatch.setattr("loracache.daemon.daemon.Daemon", Noted)
    before = sys.getswitchinterval()
    try:
        done = CliRunner().invoke(app, ["serve", "--socket", str(short_tmp / "s")])
    finally:
        sys.setswitchinterval(before)
    assert done.exit_code == 0, done.output
    assert found == [pytest.approx(0.001)]
