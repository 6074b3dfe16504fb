# SPDX-License-Identifier: Apache-2.0
"""`loracache batch run` against OpenAI servers: every line is answered once, whatever ends in between."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracache.batch.journal import Journal
from loracache.batch.lines import BatchFile
from tests.unit.batch.openai_fake import BLOCK, KV_BLOCKS, Fake, answers, request, run, said_to, write

KILLS = int(os.environ.get("LORACACHE_BATCH_KILLS", "3"))  # each takes a second or more
ASKED = 50 * KILLS  # of a batch that is killed so often


# -- what is answered ----------


def test_each_line_is_answered_in_the_inputs_order_as_openai_writes_it(server: Fake, tmp_path: Path) -> None:
    lines = [request(number) for number in range(40)]
    chat = {"model": "base", "messages": [{"role": "user", "content": "größer"}]}
    lines.append({"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat})
    lines.append({"custom_id": "vector", "method": "POST", "url": "/v1/embeddings", "body": {"input": "text"}})
    source, output = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    done = run(source, "-o", output, "--url", server.url, "--report", tmp_path / "report.json")
    assert done.exit_code == 0, done.output
    found = answers(output)
    assert [each["custom_id"] for each in found] == [line["custom_id"] for line in lines]
    for line, each in zip(lines, found, strict=True):
        assert each.keys() == {"id", "custom_id", "response", "error"}
        assert each["response"]["status_code"] == 200
        assert each["response"]["body"]["text"] == said_to(line["url"], line["body"])
        assert each["error"] is None
    assert len({each["id"] for each in found}) == len(lines)
    assert all(count == 1 for count in server.answered.values())
    assert not list(tmp_path.glob("*.partial"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["requests"], report["answered"], report["errors"]) == (42, 42, 0)
    assert (report["completion_tokens"], report["cached_tokens"]) == (42 * 7, 42 * 3)
    assert report["plan"]["planned"] == report["plan"]["bound"] < report["plan"]["tokens"]


def test_bodies_reach_the_server_as_they_are(server: Fake, tmp_path: Path) -> None:
    more = {"seed": 7, "temperature": 0.5, "stop": ["\n"], "logprobs": 3, "n": 2, "response_format": {"type": "text"}}
    source = write(tmp_path / "in.jsonl", [request(0, **more)])
    assert run(source, "-o", tmp_path / "out.jsonl", "--url", server.url).exit_code == 0
    assert server.asked == [request(0, **more)["body"]]


def test_requests_that_share_are_sent_together(server: Fake, tmp_path: Path) -> None:
    lines = [request(number) for number in range(60)]
    source = write(tmp_path / "in.jsonl", lines)
    done = run(source, "-o", tmp_path / "out.jsonl", "--url", server.url, "--running", 1)
    assert done.exit_code == 0, done.output
    groups = [body["prompt"][0] for body in server.asked]
    assert sum(one != other for one, other in itertools.pairwise(groups)) == 9


@pytest.mark.parametrize("prioritized", [True, False])
def test_an_engine_of_its_own_is_told_the_plans_order(
    server: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prioritized: bool
) -> None:
    """Requests that are sent side by side arrive in any order."""

    class Child(contextlib.nullcontext[Any]):
        url, socket = server.url, None

        def __init__(self, *options: Any) -> None:
            super().__init__(self)
            self.prioritized = prioritized

        async def watch(self) -> None:
            await asyncio.sleep(60)

    monkeypatch.setattr("loracache.batch.child.ChildEngine", Child)
    lines = [request(number, priority=9) if number == 3 else request(number) for number in range(20)]
    source = write(tmp_path / "in.jsonl", lines)
    done = run(source, "-o", tmp_path / "out.jsonl", "--model", "it", "--running", 1)
    assert done.exit_code == 0, done.output
    sent = [body.pop("priority", None) for body in server.asked]
    assert sent == list(range(20)) if prioritized else set(sent) == {None, 9}


def test_no_more_is_sent_than_the_engines_kv_has_room_for(server: Fake, tmp_path: Path) -> None:
    server.seconds = 0.02
    lines = [request(number, prompt=f"{number:03} " + "x" * 120, max_tokens=16) for number in range(30)]
    source = write(tmp_path / "in.jsonl", lines)
    assert run(source, "-o", tmp_path / "out.jsonl", "--url", server.url).exit_code == 0
    each = -(-(len(json.dumps("000 " + "x" * 120)) + 16) // BLOCK)
    assert 1 < server.most_at_once <= KV_BLOCKS // each < 30


def test_gzip_standard_input_and_standard_output(server: Fake, tmp_path: Path) -> None:
    text = "".join(json.dumps(request(number)) + "\n" for number in range(5)).encode()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(text))
    for source, stdin in ((str(tmp_path / "in.jsonl.gz"), None), ("-", text), ("-", gzip.compress(text))):
        done = run(source, "-o", "-", "--url", server.url, stdin=stdin)
        assert done.exit_code == 0, done.output
        assert [json.loads(line)["custom_id"] for line in done.stdout.splitlines()] == [f"id-{n}" for n in range(5)]


def test_output_in_the_order_of_answers(server: Fake, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [request(number) for number in range(30)])
    output = tmp_path / "out.jsonl"
    assert run(source, "-o", output, "--url", server.url, "--order", "done", "--running", 1).exit_code == 0
    ids = [each["custom_id"] for each in answers(output)]
    prompts = {line["body"]["prompt"]: line["custom_id"] for line in (request(number) for number in range(30))}
    assert ids == [prompts[body["prompt"]] for body in server.asked]


# -- what goes wrong ----------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: it is no JSON"),
        ("[1]", "line 2: it is no JSON object"),
        ({"url": "/v1/completions", "body": {}}, "line 2: custom_id is missing"),
        ({"custom_id": 3, "url": "/v1/completions", "body": {}}, "line 2: custom_id is 3"),
        ({"custom_id": "a", "url": "/v1/images", "body": {}}, "line 2: url is '/v1/images'"),
        ({"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}, "line 2: method is 'GET'"),
        ({"custom_id": "a", "url": "/v1/completions"}, "line 2: body is missing"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"stream": True}}, "line 2: body.stream is set"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"model": 1}}, "line 2: body.model is 1"),
        (request(0), "line 2: custom_id 'id-0' is an earlier line's"),
    ],
)
def test_a_line_that_is_no_request_is_named_and_the_rest_runs(
    server: Fake, tmp_path: Path, line: Any, told: str
) -> None:
    source, output = write(tmp_path / "in.jsonl", [request(0), line, "", request(1)]), tmp_path / "out.jsonl"
    assert run(source, "-o", output, "--url", server.url).exit_code == 4
    first, wrong, last = answers(output)
    assert first["error"] is last["error"] is wrong["response"] is None
    assert wrong["error"]["code"] == "invalid_line"
    assert wrong["error"]["line"] == 2
    assert wrong["error"]["message"].startswith(told)
    assert len(server.asked) == 2


@pytest.mark.usefixtures("quick")
def test_what_the_server_refuses_is_an_error_of_its_line(server: Fake, tmp_path: Path) -> None:
    error = {"error": {"message": "max_tokens is too large", "type": "BadRequestError", "code": 400}}
    server.refuse = lambda body: (400, error) if body["prompt"].endswith(" 3") else None
    source, output = write(tmp_path / "in.jsonl", [request(number) for number in range(6)]), tmp_path / "out.jsonl"
    assert run(source, "-o", output, "--url", server.url).exit_code == 4
    found = answers(output)
    assert [each["response"]["status_code"] for each in found] == [200, 200, 200, 400, 200, 200]
    assert found[3]["error"] == error["error"]
    assert found[3]["response"]["body"] == error
    assert len(server.asked) == 6


@pytest.mark.usefixtures("quick")
def test_what_another_try_mends_is_tried_again(server: Fake, tmp_path: Path) -> None:
    tries: dict[str, int] = {}

    def refuse(body: dict[str, Any]) -> tuple[int, Any] | None:
        tries[body["prompt"]] = tries.get(body["prompt"], 0) + 1
        last = 99 if body["prompt"].endswith(" 0") else 2
        return (503, {"error": {"message": "busy"}}) if tries[body["prompt"]] <= last else None

    server.refuse = refuse
    source, output = write(tmp_path / "in.jsonl", [request(number) for number in range(3)]), tmp_path / "out.jsonl"
    assert run(source, "-o", output, "--url", server.url).exit_code == 4
    assert [each["response"]["status_code"] for each in answers(output)] == [503, 200, 200]
    assert sorted(tries.values()) == [3, 3, 5]


@pytest.mark.usefixtures("quick")
def test_an_engine_that_comes_back_is_waited_for(servers: Callable[..., Fake], tmp_path: Path) -> None:
    first = servers()
    first.seconds = 0.05
    source, output = write(tmp_path / "in.jsonl", [request(number) for number in range(20)]), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "loracache", "batch", "run", source, "-o", output, "--url", first.url]
    process = subprocess.Popen([*map(str, command), "--running", "2"])
    while len(first.asked) < 6:
        time.sleep(0.01)
    first.close()
    time.sleep(0.5)
    second = servers(first.port)
    assert process.wait(30) == 0
    assert [each["response"]["status_code"] for each in answers(output)] == [200] * 20
    assert len(second.asked) < 20


@pytest.mark.usefixtures("quick")
def test_an_engine_that_stays_away_ends_the_run_and_what_is_answered_stays(
    servers: Callable[..., Fake], tmp_path: Path
) -> None:
    first = servers()
    first.seconds = 0.05
    source, output = write(tmp_path / "in.jsonl", [request(number) for number in range(20)]), tmp_path / "out.jsonl"
    half = threading_stop(first, 10)
    done = run(source, "-o", output, "--url", first.url, "--running", 1, "--patience", 0.2)
    half.join()
    assert done.exit_code == 1
    assert "the same command goes on" in done.stderr
    assert not output.exists()
    second = servers(first.port)
    assert run(source, "-o", output, "--url", first.url).exit_code == 0
    assert len(answers(output)) == 20
    assert sum(count > 1 for count in (first.answered + second.answered).values()) <= 1  # that which was under way


def threading_stop(fake: Fake, after: int) -> Any:
    """Ends the server once it has been asked so often."""

    def stop() -> None:
        while len(fake.asked) < after:
            time.sleep(0.001)
        fake.close()

    thread = threading.Thread(target=stop)
    thread.start()
    return thread


@pytest.mark.timeout(60 + 10 * KILLS)
def test_a_run_that_is_killed_again_and_again_loses_no_line_and_answers_none_twice(
    server: Fake, tmp_path: Path
) -> None:
    server.seconds = 0.002
    source = write(tmp_path / "in.jsonl", [*(request(number) for number in range(ASKED)), "broken"])
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    command = [sys.executable, "-m", "loracache", "batch", "run", source, "-o", output, "--url", server.url]
    chance = random.Random(0)
    kills = 0
    while kills < KILLS:
        process = subprocess.Popen([*map(str, command), "--running", "4"], stderr=subprocess.DEVNULL)
        size = partial.stat().st_size if partial.exists() else 0
        grown = chance.randrange(200, 4000)
        while process.poll() is None and (not partial.exists() or partial.stat().st_size < size + grown):
            time.sleep(0.002)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    recorded = {json.loads(line)["line"] for line in partial.read_bytes().split(b"\n")[1:-1]}
    before = len(server.asked)
    assert kills == KILLS
    done = run(source, "-o", output, "--url", server.url)
    assert done.exit_code == 4, done.output
    assert len(server.asked) - before == len({*range(1, ASKED + 1)} - recorded)
    found = answers(output)
    assert [each["custom_id"] for each in found] == [*(f"id-{number}" for number in range(ASKED)), None]
    assert max(server.answered.values()) <= 1 + kills
    assert sum(server.answered.values()) <= ASKED + 4 * kills


def test_a_record_that_a_kill_cut_short_is_answered_again(server: Fake, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", [request(number) for number in range(6)]), tmp_path / "out.jsonl"
    assert run(source, "-o", output, "--url", server.url).exit_code == 0
    whole = output.read_text()
    output.unlink()
    with contextlib.closing(BatchFile(str(source))) as file:
        journal = Journal(output, file.digest)
    for number, line in enumerate(whole.splitlines()[:3], 1):
        journal.add(number, json.loads(line))
    journal.close()
    partial = output.with_name("out.jsonl.partial")
    partial.write_bytes(partial.read_bytes()[:-20])
    for number in (4, 5):  # two more runs, each killed behind an answer of its own
        with contextlib.closing(BatchFile(str(source))) as file:
            journal = Journal(output, file.digest)
        assert sorted(each.number for each in journal.recorded()) == [1, 2, *range(4, number)]
        journal.add(number, json.loads(whole.splitlines()[number - 1]))
        journal.close()
    server.asked.clear()
    assert run(source, "-o", output, "--url", server.url).exit_code == 0
    assert len(server.asked) == 2
    assert [each["custom_id"] for each in answers(output)] == [f"id-{number}" for number in range(6)]


def test_a_journal_of_another_input_and_an_output_that_is_there_are_refused(server: Fake, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", [request(0)]), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    answered = '{"line":1,"failed":false,"passing":false,"decode":1,"output":{}}\n'
    for text in (f'{{"batch":1,"input":"00"}}\n{answered}', f'{{"batch":2,"input":"00"}}\n{answered}', "mine\n", "\0"):
        partial.write_text(text)
        told = run(source, "-o", output, "--url", server.url)
        assert (told.exit_code, "is of another input" in told.stderr) == (2, True)
        assert partial.read_text() == text
    partial.unlink()
    output.touch()
    told = run(source, "-o", output, "--url", server.url)
    assert (told.exit_code, "is there already" in told.stderr) == (2, True)
    assert not server.asked


@pytest.mark.parametrize(
    "end",
    ["", "\n", "\n{", '\n{"line":1,"failed":true,"passing":false,"decode":0,"output":{}}\n'],
    ids=["no newline", "head", "torn", "error"],
)
def test_a_journal_that_holds_no_answer_does_not_keep_a_corrected_input_out(
    server: Fake, tmp_path: Path, end: str
) -> None:
    source, output = write(tmp_path / "in.jsonl", [request(0)]), tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").write_text(f'{{"batch":1,"input":"{"0" * 64}"}}{end}')
    assert run(source, "-o", output, "--url", server.url).exit_code == 0
    assert len(answers(output)) == 1


@pytest.mark.parametrize("head", ['{"batch": 1, "input": "%s"}\n', '{"input":"%s","batch":1}\r\n'])
def test_a_journal_that_an_editor_wrote_again_goes_on(server: Fake, tmp_path: Path, head: str) -> None:
    source, output = write(tmp_path / "in.jsonl", [request(0), request(1)]), tmp_path / "out.jsonl"
    with contextlib.closing(BatchFile(str(source))) as file:
        digest = file.digest
    record = {"line": 1, "failed": False, "passing": False, "decode": 1, "output": {"custom_id": "id-0"}}
    (tmp_path / "out.jsonl.partial").write_text(head % digest + json.dumps(record) + "\n")
    assert run(source, "-o", output, "--url", server.url).exit_code == 0
    assert len(server.asked) == 1


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial", "out.jsonl.tmp"])
@pytest.mark.parametrize("link", ["", "symlink", "link"])
def test_an_output_that_would_take_the_inputs_place_is_refused(
    server: Fake, tmp_path: Path, name: str, link: str
) -> None:
    source = write(tmp_path / (name if not link else "in.jsonl"), [request(0)])
    if link:
        getattr(os, link)(source, tmp_path / name)
    text = source.read_text()
    done = run(source, "-o", tmp_path / "out.jsonl", "--url", server.url)
    assert (done.exit_code, "would be the input" in done.stderr) == (2, True), done.output
    assert (source.read_text(), server.asked) == (text, [])


def test_what_is_there_is_not_written_over(server: Fake, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", [request(0)]), tmp_path / "out.jsonl"
    draft = tmp_path / "out.jsonl.tmp"
    draft.write_text("precious")
    done = run(source, "-o", output, "--url", server.url)
    assert (done.exit_code, "out.jsonl.tmp is there already" in done.stderr) == (2, True)
    assert draft.read_text() == "precious"
    draft.unlink()
    output.symlink_to(tmp_path / "nowhere")
    assert run(source, "-o", output, "--url", server.url).exit_code == 2
    output.unlink()
    os.link(source, tmp_path / "report")
    done = run(source, "-o", output, "--url", server.url, "--report", tmp_path / "report")
    assert (done.exit_code, "is the input" in done.stderr) == (2, True)


def test_a_key_is_sent_and_a_wrong_one_said(server: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "secret"
    source, output = write(tmp_path / "in.jsonl", [request(0)]), tmp_path / "out.jsonl"
    wrong = run(source, "-o", output, "--url", server.url)
    assert (wrong.exit_code, "set VLLM_API_KEY" in wrong.stderr) == (1, True)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert run(source, "-o", output, "--url", server.url).exit_code == 0
