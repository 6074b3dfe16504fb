# SPDX-License-Identifier: Apache-2.0
"""`loracache batch run` with requests, answers and files that are not as they should be: none of them ends the run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from loracache.batch import driver, lines
from loracache.batch.job import Lengths, make_job
from loracache.batch.journal import Journal
from loracache.batch.lines import BatchFile, Line
from loracache.keys import TokenArray, token_array
from tests.unit.batch.openai_fake import Fake, answers, request, run, write


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_PAUSES_S", (0.01, 0.05))


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


# -- what is written ----------


@pytest.mark.parametrize(
    "body",
    ['{"seed": NaN}', '{"seed": 1e400}', '{"seed": -Infinity}'],
)
def test_a_number_that_json_does_not_have_is_its_lines_error(server: Fake, tmp_path: Path, body: str) -> None:
    wrong = f'{{"custom_id": "a", "url": "/v1/completions", "body": {body}}}'
    output = tmp_path / "out.jsonl"
    done = run(write(tmp_path / "in.jsonl", [wrong, request(1)]), "-o", output, "--url", server.url)
    assert done.exit_code == 4
    first, second = answers(output)
    assert (first["error"]["code"], second["error"]) == ("invalid_line", None)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_a_file_in_another_encoding_is_told_line_by_line(server: Fake, tmp_path: Path, encoding: str) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{json.dumps(request(number))}\n" for number in range(3)), encoding)
    assert run(source, "-o", output, "--url", server.url).exit_code == 4
    assert {each["error"]["code"] for each in answers(output)} == {"invalid_line"}
    assert not server.asked


def test_a_mark_at_the_beginning_of_the_file_is_none_of_its_first_line(server: Fake, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(request(0)), "utf-8-sig")
    assert run(source, "-o", output, "--url", server.url).exit_code == 0


def test_what_utf8_cannot_say_is_escaped_in_the_output(server: Fake, tmp_path: Path) -> None:
    asked = [request(0) | {"custom_id": "half \ud800"}, request(1, prompt="half \udc00"), request(2, prompt="größer")]
    output = tmp_path / "out.jsonl"
    assert run(write(tmp_path / "in.jsonl", asked), "-o", output, "--url", server.url).exit_code == 0
    assert [each["custom_id"] for each in answers(output)] == [line["custom_id"] for line in asked]  # read as UTF-8


@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 50, b"7", b"{}", b"[" * 5000, b'{"line": 1e400, "passing": false}',
        b'{"line": 2, "failed": false, "passing": false, "decode": "7", "output": {}}',
        b'{"line": 2, "failed": false, "passing": false, "decode": 7, "output": []}',
    ],
    ids=["zeros", "number", "object", "deep", "infinite", "text", "list"],
)  # fmt: skip
def test_a_record_that_the_disk_has_damaged_is_answered_again(server: Fake, tmp_path: Path, damage: bytes) -> None:
    source, output = write(tmp_path / "in.jsonl", [request(number) for number in range(5)]), tmp_path / "out.jsonl"
    with (
        contextlib.closing(BatchFile(str(source))) as file,
        contextlib.closing(Journal(output, file.digest)) as journal,
    ):
        for number in (1, 2, 3):
            journal.add(number, {"custom_id": f"id-{number - 1}"})
    partial = output.with_name("out.jsonl.partial")
    records = partial.read_bytes().split(b"\n")
    partial.write_bytes(b"\n".join([*records[:2], damage, *records[3:]]))
    done = run(source, "-o", output, "--url", server.url)
    assert done.exit_code == 0, done.output
    assert [each["custom_id"] for each in answers(output)] == [f"id-{number}" for number in range(5)]
    assert len(server.asked) == 3


def test_a_file_that_is_no_journal_is_not_cut(server: Fake, tmp_path: Path) -> None:
    source = tmp_path / "out.jsonl.partial"  # the input, without a newline at its end
    source.write_text(json.dumps(request(0)))
    done = run(source, "-o", tmp_path / "out.jsonl", "--url", server.url)
    assert (done.exit_code, "is of another input" in done.stderr) == (2, True)
    assert json.loads(source.read_text()) == request(0)


@pytest.mark.parametrize("name", ["", "x" * 300], ids=["empty", "long"])
def test_a_name_that_no_file_can_have_is_refused(server: Fake, tmp_path: Path, name: str) -> None:
    done = run(write(tmp_path / "in.jsonl", [request(0)]), "-o", name and tmp_path / name, "--url", server.url)
    assert (done.exit_code, done.stderr.startswith("loracache: ")) == (2, True)


def test_a_full_disk_is_told_and_what_is_answered_is_kept(server: Fake, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", [request(number) for number in range(30)]), tmp_path / "out.jsonl"
    words = [sys.executable, "-m", "loracache", "batch", "run", source, "-o", output, "--url", server.url]
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "sys.argv = sys.argv[1:]; runpy.run_module('loracache', run_name='__main__')"
    )
    command = [sys.executable, "-c", limited, *map(str, words[2:])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("loracache: ")
    assert "cannot be written: File too large; what is answered is kept" in done.stderr
    assert [each.name for each in sorted(tmp_path.iterdir())] == ["in.jsonl", "out.jsonl.partial"]
    recorded = output.with_name("out.jsonl.partial").read_bytes().count(b"\n") - 1
    assert recorded
    server.asked.clear()
    assert run(source, "-o", output, "--url", server.url).exit_code == 0
    assert len(server.asked) == 30 - recorded
    assert [each["custom_id"] for each in answers(output)] == [f"id-{number}" for number in range(30)]
    command[command.index(str(output))] = "-"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "what is answered is lost; give -o a file to keep it" in done.stderr) == (2, True)


def test_two_runs_do_not_write_one_output(server: Fake, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", [request(0)]), tmp_path / "out.jsonl"
    with contextlib.closing(BatchFile(str(source))) as file, contextlib.closing(Journal(output, file.digest)):
        done = run(source, "-o", output, "--url", server.url)
    assert (done.exit_code, "is another run's that is under way" in done.stderr) == (2, True)
    assert not server.asked


def test_an_output_that_cannot_be_written_leaves_the_journal(server: Fake, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", [request(0)]), tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.tmp").mkdir()
    done = run(source, "-o", output, "--url", server.url)
    assert (done.exit_code, "out.jsonl.tmp cannot be written: Is a directory" in done.stderr) == (2, True)
    (tmp_path / "out.jsonl.tmp").rmdir()
    assert run(source, "-o", output, "--url", server.url).exit_code == 0
    assert len(server.asked) == len(answers(output)) == 1


@pytest.mark.parametrize("text", ["{\n" * 40, "".join(f"{json.dumps(request(number))}\n" for number in range(1, 41))])
def test_a_file_that_is_changed_while_it_runs_is_told(server: Fake, tmp_path: Path, text: str) -> None:
    source = write(tmp_path / "in.jsonl", [request(number) for number in range(40)])

    def edit(body: object) -> None:
        source.write_text(text)

    server.refuse = edit
    done = run(source, "-o", tmp_path / "out.jsonl", "--url", server.url, "--running", 1)
    assert done.exit_code == 2
    assert "was changed while its batch runs" in done.output


def test_an_output_that_came_meanwhile_is_not_overwritten(server: Fake, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", [request(0)]), tmp_path / "out.jsonl"
    command = (source, "-o", output, "--url", server.url)

    def comes(body: dict[str, Any]) -> None:
        output.write_text("precious")

    server.refuse = comes
    for _ in range(2):  # as the run ends, and before the next begins
        told = run(*command)
        assert (told.exit_code, "not from this run; move it away: what is answered is kept" in told.stderr) == (2, True)
        assert output.read_text() == "precious"
    output.rename(tmp_path / "moved")
    assert run(*command).exit_code == 0
    assert len(answers(output)) == 1
    assert len(server.asked) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "moved", "out.jsonl"]


def test_a_run_that_was_killed_as_it_ended_goes_on(server: Fake, tmp_path: Path) -> None:
    """Its output has its name, and its journal is still there."""
    source, output = write(tmp_path / "in.jsonl", [request(0)]), tmp_path / "out.jsonl"
    file = BatchFile(str(source))
    journal = Journal(output, file.digest)
    file.close()
    journal.add(1, {"custom_id": "whole"})
    journal.close()
    (tmp_path / "out.jsonl.tmp").write_text('{"custom_id":"who')
    output.hardlink_to(tmp_path / "out.jsonl.tmp")
    assert run(source, "-o", output, "--url", server.url).exit_code == 0
    assert json.loads(output.read_text()) == {"custom_id": "whole"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("option", ["--report", "--plot"])
@pytest.mark.parametrize("name", ["in.svg", "out.svg", "out.svg.partial", "folder.svg", "nowhere/r.svg", "both.svg"])
def test_a_report_takes_no_other_files_place(server: Fake, tmp_path: Path, option: str, name: str) -> None:
    source, path = write(tmp_path / "in.svg", [request(0)]), tmp_path / name
    (tmp_path / "folder.svg").mkdir()
    before, other = source.read_text(), {"--report": "--plot", "--plot": "--report"}[option]
    more = (other, tmp_path / "both.svg") if name == "both.svg" else ()
    told = run(source, "-o", tmp_path / "out.svg", "--url", server.url, option, path, *more)
    assert told.exit_code == 2, told.output
    assert option in told.stderr or "--plot" in told.stderr
    assert source.read_text() == before
    assert not server.asked
