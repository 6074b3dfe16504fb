# SPDX-License-Identifier: Apache-2.0
"""`loracache batch run` with files that are not as they should be, or change: the input, the journal, the output."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loracache.batch.driver import Room
from loracache.batch.journal import Journal
from loracache.batch.lines import BatchFile
from tests.unit.batch.openai_fake import Fake, answers, request, run, write

pytestmark = pytest.mark.usefixtures("quick")


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
    source = write(tmp_path / "in.jsonl", [request(0)])
    mine = tmp_path / "out.jsonl.partial"  # without a newline at its end
    mine.write_text(json.dumps(request(0)))
    done = run(source, "-o", tmp_path / "out.jsonl", "--url", server.url)
    assert (done.exit_code, "is of another input" in done.stderr) == (2, True)
    assert json.loads(mine.read_text()) == request(0)


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
    server.refuse = lambda body: (tmp_path / "out.jsonl.tmp").mkdir()
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


@pytest.mark.parametrize(
    "text", ["", "{\n" * 40, "".join(f"{json.dumps(request(number))}\n" for number in range(1, 41))]
)
@pytest.mark.parametrize("bad", [[], ["no JSON"]])
def test_a_file_that_is_changed_while_it_is_planned_is_told_and_nothing_of_it_is_kept(
    server: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, bad: list[str]
) -> None:
    lines = [request(number) for number in range(40)]
    source, output = write(tmp_path / "in.jsonl", bad + lines), tmp_path / "out.jsonl"
    whole = source.read_text()

    async def edit(*arguments: object) -> Room:
        source.write_text(text)
        return Room(4096, 16)

    with monkeypatch.context() as patched:
        patched.setattr("loracache.batch.runner.room_of", edit)
        done = run(source, "-o", output, "--url", server.url)
    assert (done.exit_code, "was changed while its batch runs" in done.stderr) == (2, True), done.output
    assert not server.asked
    source.write_text(whole)
    assert run(source, "-o", output, "--url", server.url).exit_code == (4 if bad else 0)
    assert len(server.asked) == 40


def test_what_is_lost_with_standard_output_is_said_to_be(server: Fake, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [request(0), request(1)])

    def edit(body: object) -> None:
        source.write_text("")

    def end(body: object) -> None:
        server.healthy = False
        server.refuse = lambda body: (503, {})

    for happens, code in ((edit, 2), (end, 1)):
        server.refuse = happens
        source.write_text("".join(f"{json.dumps(request(number))}\n" for number in range(2)))
        done = run(source, "-o", "-", "--url", server.url, "--running", 1, "--patience", 0)
        assert (done.exit_code, "what is answered is lost; give -o a file" in done.stderr) == (code, True), done.output
        assert "is kept" not in done.stderr


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
