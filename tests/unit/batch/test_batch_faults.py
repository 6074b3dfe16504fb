# SPDX-License-Identifier: Apache-2.0
"""`loracache batch run` with requests, answers and files that are not as they should be: none of them ends the run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from loracache.batch import lines
from loracache.batch.http import Answer, Server
from loracache.batch.job import Lengths, make_job
from loracache.batch.lines import BatchFile, Line
from loracache.errors import ProtocolError
from loracache.keys import TokenArray, token_array
from tests.unit.batch.openai_fake import Fake, answers, request, run, write

pytestmark = pytest.mark.usefixtures("quick")


# -- while it is planned ----------


@pytest.mark.parametrize("hang_ups", [1, 12])
def test_a_server_that_hangs_up_while_prompts_are_tokenized_is_waited_for(
    server: Fake, tmp_path: Path, hang_ups: int
) -> None:
    server.hang_ups = hang_ups
    source, output = write(tmp_path / "in.jsonl", [request(number) for number in range(5)]), tmp_path / "out.jsonl"
    done = run(source, "-o", output, "--url", server.url)
    assert done.exit_code == 0, done.output
    assert len(answers(output)) == 5


def test_a_server_that_tokenizes_nothing_within_the_patience_ends_the_run(server: Fake, tmp_path: Path) -> None:
    server.hang_ups = 1 << 30
    source = write(tmp_path / "in.jsonl", [request(0)])
    done = run(source, "-o", tmp_path / "out.jsonl", "--url", server.url, "--patience", 0.2)
    assert (done.exit_code, "closed the connection" in done.stderr) == (1, True)


@pytest.mark.parametrize("tokens", [[10**12] * 40, [-1] * 40, "<html>log in</html>", None])
def test_a_server_that_answers_no_token_ids_is_planned_by_text(server: Fake, tmp_path: Path, tokens: Any) -> None:
    server.tokens = tokens or 7
    output = tmp_path / "out.jsonl"
    done = run(write(tmp_path / "in.jsonl", [request(0), request(1)]), "-o", output, "--url", server.url)
    assert done.exit_code == 0, done.output
    assert len(answers(output)) == 2


def test_a_tokenize_that_does_not_speak_http_is_done_without(
    server: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    post = Server.post

    async def broken(self: Server, path: str, body: Any, timeout: float | None = None) -> Answer:
        if path == "/tokenize":
            raise ProtocolError("no HTTP")
        return await post(self, path, body, timeout)

    monkeypatch.setattr(Server, "post", broken)
    source = write(tmp_path / "in.jsonl", [request(0), request(1)])
    assert run(source, "-o", tmp_path / "out.jsonl", "--url", server.url).exit_code == 0
    assert len(answers(tmp_path / "out.jsonl")) == 2


@pytest.mark.parametrize("part", [1, 7, 1 << 20])
def test_a_line_that_is_too_long_is_named_and_the_rest_runs(
    server: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(lines, "_MOST_LINE", 1000)
    monkeypatch.setattr(lines, "_PART", part)
    source = tmp_path / "in.jsonl"
    wanted = [" " * 2000, request(0), request(1, prompt="x" * 1000), "", request(2)]
    source.write_bytes(write(source, wanted).read_bytes()[:-1])  # the last line has no newline
    output = tmp_path / "out.jsonl"
    assert run(source, "-o", output, "--url", server.url).exit_code == 4
    first, wrong, last = answers(output)
    assert (first["custom_id"], last["custom_id"]) == ("id-0", "id-2")
    assert (wrong["error"]["line"], "longer than" in wrong["error"]["message"]) == (3, True)


def test_a_line_as_long_as_memory_is_never_held(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    with source.open("wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    try:
        with contextlib.closing(BatchFile(str(source))) as batch:
            assert batch.requests == 1
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 << 20


@pytest.mark.parametrize("more", [{"max_tokens": 10**30}, {"max_tokens": 2**62}, {"n": 10**30}])
def test_counts_beyond_all_bounds_are_the_servers_to_refuse(server: Fake, tmp_path: Path, more: dict[str, int]) -> None:
    asked = [request(0), request(1, **more), request(2, **more), request(3, **more)]
    output = tmp_path / "out.jsonl"
    done = run(write(tmp_path / "in.jsonl", asked), "-o", output, "--url", server.url)
    assert done.exit_code == 0, done.output
    assert len(answers(output)) == 4
    assert len([body for body in server.asked if more.items() <= body.items()]) == 3


def test_usage_that_is_no_count_counts_nothing(server: Fake, tmp_path: Path) -> None:
    usage = {"prompt_tokens": -5, "completion_tokens": 10**30, "prompt_tokens_details": {"cached_tokens": "3"}}
    server.refuse = lambda body: (200, {"usage": usage})
    report = tmp_path / "report.json"
    source = write(tmp_path / "in.jsonl", [request(0)])
    assert run(source, "-o", tmp_path / "o", "--url", server.url, "--report", report).exit_code == 0
    told = json.loads(report.read_text())
    assert [told[name] for name in ("prompt_tokens", "completion_tokens", "cached_tokens")] == [0, 0, 0]


@pytest.mark.parametrize("body", ["<html>log in</html>", "", "[1]", "null", '{"id": NaN}', '{"id": -1e400}'])
def test_a_page_in_the_place_of_an_answer_is_an_error(server: Fake, tmp_path: Path, body: str) -> None:
    server.refuse = lambda asked: (200, body)
    output = tmp_path / "out.jsonl"
    assert run(write(tmp_path / "in.jsonl", [request(0)]), "-o", output, "--url", server.url).exit_code == 4
    (found,) = answers(output)
    assert found["error"]["code"] == "no_answer"


def test_an_answer_that_nests_too_deeply_to_be_kept_is_an_error(server: Fake, tmp_path: Path) -> None:
    """And no other line's. Python reads and writes JSON of about a thousand levels."""
    deep = [5, *range(900, 1000)]
    server.refuse = lambda asked: (200, '{"usage":{},"deep":' + "[" * asked["seed"] + "]" * asked["seed"] + "}")
    source = write(tmp_path / "in.jsonl", [request(number, seed=each) for number, each in enumerate(deep)])
    output = tmp_path / "out.jsonl"
    done = run(source, "-o", output, "--url", server.url)
    assert done.exit_code == 4, done.output
    found = answers(output)
    assert [each["custom_id"] for each in found] == [request(number)["custom_id"] for number in range(len(deep))]
    assert found[0]["error"] is None
    assert found[-1]["error"]["code"] == "no_answer"


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, {}, "the server answered 400 and said nothing"),
        (400, {"error": None}, "the server answered 400 and said nothing"),
        (404, {"detail": "Not Found"}, "Not Found"),
        (400, {"error": "no such model"}, "no such model"),
        (404, "", "the server answered 404 and said nothing"),
        (307, "elsewhere", "elsewhere"),
        (400, {"error": {"message": "too long", "code": 400}}, "too long"),
        (400, {"message": "too long"}, "too long"),
        (400, {"error": {"message": ["too long"]}}, '["too long"]'),
        (400, {"error": {"message": " "}}, "the server answered 400 and said nothing"),
        (422, {"detail": [{"msg": "too long"}]}, '[{"msg": "too long"}]'),
        (400, {"error": {"type": "odd"}}, '{"type": "odd"}'),
    ],
)
def test_a_refusal_is_an_error_with_a_message_whatever_form_it_has(
    server: Fake, tmp_path: Path, status: int, body: Any, said: str
) -> None:
    server.refuse = lambda asked: (status, body)
    output = tmp_path / "out.jsonl"
    assert run(write(tmp_path / "in.jsonl", [request(0)]), "-o", output, "--url", server.url).exit_code == 4
    (found,) = answers(output)
    assert found["error"]["message"] == said
    assert found["response"]["status_code"] == status


@pytest.mark.parametrize(
    ("tokens", "count", "limit", "blocks"),
    [(15, 1, 1, 1), (15, 8, 1, 8), (36, 8, 16, 2 + 8 * 2), (32, 3, 16, 2 + 3), (32, 2, 0, 2), (5, 1, None, 17)],
)
def test_each_of_several_answers_holds_blocks_of_its_own(
    tmp_path: Path, tokens: int, count: int, limit: int | None, blocks: int
) -> None:
    body = {"prompt": [1] * tokens, "n": count, "max_tokens": limit, "messages": [{}]}
    line = {"custom_id": "a", "url": "/v1/chat/completions" if limit is None else "/v1/completions", "body": body}

    async def tokens_of(line: Line) -> TokenArray:
        return token_array(line.body["prompt"])

    with contextlib.closing(BatchFile(str(write(tmp_path / "in.jsonl", [line])))) as file:
        job = asyncio.run(make_job(file, tokens_of, 16, Lengths(), lambda line: True, lambda fault: None))
    assert job.blocks.largest == sum(job.blocks.size[item] for item in job.blocks.path(0)) == blocks
