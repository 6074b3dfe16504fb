# SPDX-License-Identifier: Apache-2.0
"""A group's prefix is pinned in a real daemon from its first answer to its last; what a batch started ends with it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, Namespace, chunk_keys
from loracache.batch.child import ChildEngine
from loracache.batch.engine import By, Engine
from loracache.batch.holding import Blocks
from loracache.batch.http import Server
from loracache.batch.job import Job
from loracache.batch.keeper import kept
from loracache.batch.lines import Line
from loracache.batch.pins import Pins
from loracache.batch.plan import make_plan
from loracache.errors import ConfigError
from tests.unit.batch.conftest import Asked, prompts_of
from tests.unit.batch.openai_fake import request, run, write

CHUNK = 4


@pytest.fixture
def server(daemon: Any) -> str:
    return str(daemon(memory="1MiB", page_size="4KiB").url)


@pytest.fixture
def client(server: str) -> Iterator[CacheClient]:
    with CacheClient(server) as made:
        yield made


def line(tokens: list[int], **body: Any) -> Line:
    return Line(1, "id", "/v1/completions", {"model": "base", "prompt": tokens} | body)


def test_a_prefix_is_pinned_from_the_first_answer_of_its_group_to_the_last(client: CacheClient, server: str) -> None:
    shared = [7] * 8
    batch = [Asked([*shared, number, 9, 9, 9]) for number in range(3)] + [Asked([1, 2, 3, 4, 5])]
    plan = make_plan(prompts_of(batch, CHUNK))
    root = client.register(Namespace("ab" * 32, "float32", "layout", CHUNK), ["base"])
    keys = chunk_keys(root, batch[0].tokens, CHUNK)
    with client.reserve(root, keys, [4096] * 3) as reservation:
        for position in range(3):
            reservation.write(position, bytes(4096))
    job = Job(plan, [1, 2, 3, 4], Blocks(plan.prompts, plan.tree))
    pins = Pins(server, [Engine(Server("http://localhost"))], "base", job)

    def answered(number: int) -> None:
        asyncio.run(pins.answered(number, line(batch[number].tokens)))

    answered(3)
    assert pins.objects == 0
    answered(0)
    assert (pins.objects, pins.failures) == (2, 0)
    answered(1)
    assert client.evict(keys).objects == 1  # what only the first request has
    assert client.lookup(keys).hits == 2
    answered(2)
    assert client.evict(keys[:2]).objects == 2


def test_of_each_request_only_that_is_stored_which_others_share(server: str) -> None:
    batch = [Asked([7] * 8 + [1] * 8 + [number]) for number in range(2)] + [Asked([7] * 12), Asked([1, 2, 3, 4, 5])]
    plan = make_plan(prompts_of(batch, CHUNK))
    job = Job(plan, [1, 2, 3, 4], Blocks(plan.prompts, plan.tree))
    engine = Engine(Server("http://localhost"))
    pins = Pins(server, [engine], "base", job)
    bodies = [pins.body(number, line(each.tokens)) for number, each in enumerate(batch)]
    assert [body["kv_transfer_params"] for body in bodies] == [{"store": each} for each in (16, 16, 8, False)]
    assert all(body["prompt"] == each.tokens for body, each in zip(bodies, batch, strict=True))
    own = line([1], kv_transfer_params={"pin": 5.0})
    assert pins.body(3, own) == own.body
    vector = Line(1, "id", "/v1/embeddings", {"input": "text"})
    assert pins.body(3, vector) == vector.body
    engine.by = By.TEXT  # whose lengths say nothing of tokens
    assert "kv_transfer_params" not in pins.body(0, line(batch[0].tokens))
    assert pins.body(3, line([1]))["kv_transfer_params"] == {"store": False}


def test_what_cannot_be_pinned_is_counted_and_no_more(tmp_path: Path) -> None:
    plan = make_plan(prompts_of([Asked([7] * 8), Asked([7] * 8)], CHUNK))
    job = Job(plan, [1, 2], Blocks(plan.prompts, plan.tree))
    pins = Pins(f"unix://{tmp_path}/none", [Engine(Server("http://localhost"))], "base", job)
    asyncio.run(pins.answered(0, line([7] * 8)))
    asyncio.run(pins.answered(1, line([7] * 8)))
    assert (pins.objects, pins.failures) == (0, 1)


def test_an_engine_schedules_by_priority_unless_it_is_told_how(tmp_path: Path) -> None:
    for options, prioritized in (
        ([], True),
        (["--max-model-len", "64"], True),
        (["--scheduling-policy", "fcfs"], False),
        (["--scheduling-policy=priority"], False),
    ):
        child = ChildEngine("none", options, tmp_path, "1MiB", tmp_path / "cache.sock")
        assert child.prioritized is prioritized
        assert (child._command.count("--scheduling-policy") - options.count("--scheduling-policy") == 1) is prioritized


def test_a_batch_that_shares_nothing_has_no_cache_behind_its_engine(
    daemon: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    made: list[tuple[str, Path | None]] = []

    def engine(model: str, options: object, folder: Path, memory: str, socket: Path | None) -> ChildEngine:
        made.append((memory, socket))
        raise ConfigError("far enough")

    monkeypatch.setattr("loracache.batch.child.ChildEngine", engine)
    socket = daemon(memory="1MiB").url.removeprefix("unix://")
    options = (("ab", ("--memory", "2MiB")), ("aa", ("--memory", "2MiB")), ("aa", ()), ("ab", ("--socket", socket)))
    for number, (prompts, more) in enumerate(options):
        lines = [request(at, prompt=prompt * 300) for at, prompt in enumerate(prompts)]
        run(write(tmp_path / "in", lines), "-o", tmp_path / f"out{number}", "--model", "m", *more)
    assert made == [("", None), ("2MiB", None), ("4GiB", None), ("", Path(socket))]
    alone = ChildEngine("none", [], tmp_path, "", None)
    assert (alone.socket, alone._daemon, "--kv-transfer-config" in alone._command) == (None, [], False)
    assert (alone.prioritized, "--scheduling-policy" in alone._command) == (False, False)


def test_a_folder_whose_sockets_would_have_too_long_names_is_refused_with_the_fix(tmp_path: Path) -> None:
    ChildEngine("none", [], Path("/" + 94 * "x"), "", None)
    with pytest.raises(ConfigError, match=r"xx/engine.sock is longer than .* 107 .*; set TMPDIR to a shorter"):
        ChildEngine("none", [], Path("/" + 95 * "x"), "", None)


def test_an_engine_that_does_not_start_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    child = ChildEngine("none", [], tmp_path, "1MiB", tmp_path / "cache.sock")
    child._command = [sys.executable, "-c", "import sys; sys.exit('no such option')"]

    async def enter() -> None:
        async with child:
            pass

    with pytest.raises(ConfigError, match="the engine ended with 1: no such option"):
        asyncio.run(enter())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--url", "http://127.0.0.1:9", "--memory", "1GiB"), 2, "--memory 1GiB: it is of the daemon that --model"),
        (("--model", "m", "--memory", "1GiB", "--socket", "s"), 2, "--memory 1GiB: it is of the daemon that --model"),
        (("--url", "http://127.0.0.1:9", "--socket", "nobody.sock"), 1, "nobody.sock"),
        (("--model", "./nowhere"), 2, "--model ./nowhere is not there"),
    ],
)
def test_what_no_run_can_do_is_told_before_anything_starts(
    tmp_path: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    done = run(write(tmp_path / "in.jsonl", [request(0)]), "-o", tmp_path / "out.jsonl", *words)
    assert (done.exit_code, said in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_an_engine_of_its_own_that_ends_in_the_middle_is_told_with_the_end_of_its_log(
    servers: Any, daemon: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = servers()
    engine.seconds = 30.0

    class Child(ChildEngine):
        async def __aenter__(self) -> ChildEngine:
            self.url = engine.url
            self._start([sys.executable, "-c", "import sys; sys.exit('out of memory')"], "engine")
            return self

    monkeypatch.setattr("loracache.batch.child.ChildEngine", Child)
    source, output = write(tmp_path / "in.jsonl", [request(0)]), tmp_path / "out.jsonl"
    began = time.monotonic()
    socket = daemon(memory="1MiB").url.removeprefix("unix://")
    done = run(source, "-o", output, "--model", "it", "--socket", socket)
    assert (done.exit_code, "the engine ended with 1: out of memory" in done.stderr) == (2, True)
    assert time.monotonic() - began < 20


def test_the_daemon_of_a_batch_is_not_alone_while_the_engine_starts(tmp_path: Path) -> None:
    """A private daemon that nobody talks to ends after two minutes; large models take longer to load."""
    child = ChildEngine("none", [], tmp_path, "16MiB", None)
    look = (
        "import os, sys, time; from loracache.client.client import CacheClient\n"
        f"while not os.path.exists('{tmp_path}/cache.sock'): time.sleep(0.01)\n"
        f"client = CacheClient('unix://{tmp_path}/cache.sock')\n"
        "while client.status()['connections'] < 2: time.sleep(0.01)\n"
        "sys.exit('not alone')"
    )
    child._command = [sys.executable, "-c", look]

    async def enter() -> None:
        async with child:
            pass

    with pytest.raises(ConfigError, match=r"the engine ended with 1: not alone$"):
        asyncio.run(enter())


@pytest.mark.parametrize("interrupts", ["SIG_DFL", "SIG_IGN"])
@pytest.mark.parametrize("loses", [0, 1])
def test_what_a_batch_started_ends_when_the_batch_is_killed(
    eventually: Any, tmp_path: Path, interrupts: str, loses: int
) -> None:
    """Also where it is a script's job in the background, which has SIGINT ignored; where it starts and loses an
    interrupt; and with what it has started itself."""
    started = tmp_path / "started"
    program = (
        "import os, signal, subprocess, sys, time\n"
        f"left = [None] * {loses}\n"
        "signal.signal(signal.SIGINT, lambda *_: left.pop() if left else sys.exit())\n"
        "other = subprocess.Popen(['sleep', '60'], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))\n"
        f"open({str(started)!r}, 'w').write(f'{{os.getpid()}} {{other.pid}}\\n')\n"
        "while True: time.sleep(0.1)\n"
    )
    starter = (
        "import signal, subprocess, sys, time\n"
        "from loracache.batch.keeper import kept\n"
        f"signal.signal(signal.SIGINT, signal.{interrupts})\n"
        f"print(subprocess.Popen(kept([sys.executable, '-c', {program!r}]), start_new_session=True).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            keeper = int(parent.stdout.readline())
            eventually(lambda: started.exists() and started.read_text().endswith("\n"), "the program runs")
        finally:
            parent.kill()
    for process in (keeper, *map(int, started.read_text().split())):
        eventually(lambda: not os.path.exists(f"/proc/{process}/stat") or _ended(process), "it has ended", 40)  # noqa: B023


@pytest.mark.parametrize("code", [0, 3, "-signal.SIGKILL"])
def test_a_command_that_is_kept_ends_as_it_ends(code: object) -> None:
    says = f"import os, signal, sys; code = {code}; os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)"
    done = subprocess.run(kept([sys.executable, "-c", says]), start_new_session=True, check=False)
    assert done.returncode == (137 if isinstance(code, str) else code)


def _ended(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_engines_that_share_a_daemon_are_told_what_to_store_and_it_what_to_pin(
    servers: Any, daemon: Any, tmp_path: Path
) -> None:
    both, socket = (servers(), servers()), daemon(memory="1MiB", page_size="4KiB").url.removeprefix("unix://")
    alone = request(40, prompt="nothing like the others")
    source = write(tmp_path / "in.jsonl", [*(request(number) for number in range(40)), alone])
    report = tmp_path / "report.json"
    urls = [word for each in both for word in ("--url", each.url)]
    done = run(source, "-o", tmp_path / "out.jsonl", *urls, "--socket", socket, "--report", report)
    assert done.exit_code == 0, done.output
    stored = [body["kv_transfer_params"]["store"] for each in both for body in each.asked]
    assert len(stored) == 41
    assert stored.count(False) == 1
    assert all(store >= 96 for store in stored if store is not False)
    told = json.loads(report.read_text())
    assert (told["pinned"], told["pin_failures"]) == (0, 0)  # of what these engines have not stored
