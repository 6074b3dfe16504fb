# SPDX-License-Identifier: Apache-2.0
"""`loracache batch plan`, `run --dry-run`, what a run shows, and what of their options is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loracache.batch.samples import Samples
from tests.unit.batch.openai_fake import BLOCK, KV_BLOCKS, Fake, request, run, write


def lines(count: int) -> list[dict[str, Any]]:
    return [request(number) for number in range(count)]


def test_a_dry_run_shows_what_the_plan_saves_and_sends_nothing(server: Fake, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [request(number) for number in range(200)])
    shown = run(source, "--dry-run", "--url", server.url, "--json", "--running", 4)
    assert shown.exit_code == 0, shown.output
    figures = json.loads(shown.stdout)
    assert figures["requests"] == 200
    assert figures["kv_tokens"] == KV_BLOCKS * BLOCK
    assert figures["groups"] >= 10
    assert figures["bound"] == figures["planned"] == figures["tokens"] - figures["shared"]
    assert figures["first_come"] > 1.2 * figures["bound"]
    assert not server.asked
    table = run(source, "--url", server.url, "--running", 4, verb="plan").stdout
    assert f"200 requests, {figures['tokens']:,} prompt tokens, of which {figures['shared']:,} are shared" in table
    rows = dict(re.findall(r"^(\S.*?) {2,}([\d,]+ +[\d,]+) +[\d.]+$", table, re.MULTILINE))
    for name, key in (("in the file's order", "first_come"), ("in the plan's order", "planned"), ("at least", "bound")):
        assert rows[name].split() == [f"{figures[key]:,}", f"{figures[key] - figures['bound']:,}"]


def test_a_dry_run_names_the_line_that_no_engine_has_room_for(server: Fake, tmp_path: Path) -> None:
    lines = [request(0), request(1, max_tokens=KV_BLOCKS * BLOCK), request(2)]
    shown = run(write(tmp_path / "in.jsonl", lines), "--dry-run", "--url", server.url)
    assert shown.exit_code == 2
    assert re.search(r"line 2: its prompt and answer, 1,\d+ tokens, do not fit a KV cache of 1,024", shown.output)


@pytest.mark.parametrize("how", ["by text", "no tokenizer"])
def test_text_stands_for_tokens_where_nobody_tokenizes(server: Fake, tmp_path: Path, how: str) -> None:
    source = write(tmp_path / "in.jsonl", [request(number) for number in range(100)])
    server.tokenizes = how == "by text"
    more = ["--by", "text"] if how == "by text" else []
    figures = json.loads(run(source, "--url", server.url, "--json", *more, verb="plan").stdout)
    assert figures["groups"] == 10
    assert figures["shared"] > figures["tokens"] / 3


def test_a_plan_needs_no_server(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*(request(number) for number in range(20)), "x"])
    shown = run(source, "--kv-tokens", 4096, "--json", verb="plan")
    assert json.loads(shown.stdout)["groups"] == 10
    assert json.loads(shown.stdout)["faults"][0].startswith("line 21: it is no JSON")
    wrong = run(source, verb="plan")
    assert (wrong.exit_code, "give --kv-tokens" in wrong.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--url", "http://h:1"], "no output is named"),
        (["-o", "x"], "give either --url"),
        (["-o", "x", "--url", "http://h:1", "--model", "m"], "give either --url"),
        (["-o", "x", "--url", "http://h:1", "--", "--dtype"], "options of vLLM go with --model"),
        (["-o", "x", "--url", "ftp://h"], "is not an address of a server"),
        (["-o", "x", "--url", "http://h:1", "--url", "http://h:1/v1/"], "http://h:1 is given twice"),
        (["-o", "x", "--url", "http://h:1", "--order", "any"], "--order 'any'"),
        (["-o", "x", "--url", "http://h:1", "--by", "words"], "--by 'words'"),
        (["-o", "x", "--url", "http://h:1", "--patience", "-1"], "--patience"),
        (["-o", "x", "--url", "http://h:1", "--running", "0"], "whole number from 1"),
    ],
)
def test_wrong_usage_is_refused(tmp_path: Path, words: list[str], told: str) -> None:
    done = run(write(tmp_path / "in.jsonl", [request(0)]), *words)
    assert (done.exit_code, told in " ".join(done.output.replace("│", " ").split())) == (2, True), done.output


# -- while a batch runs, and at its end ----------


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_plot_of_the_run_is_drawn(server: Fake, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / f"plot.{kind}"
    done = run(write(tmp_path / "in.jsonl", lines(20)), "-o", tmp_path / "o", "--url", server.url, "--plot", plot)
    assert done.exit_code == 0, done.output
    drawn = plot.read_bytes()
    assert drawn.startswith(b"<?xml" if kind == "svg" else b"\x89PNG")
    assert len(drawn) > 5000


def test_a_plot_that_cannot_be_drawn_is_told_before_anything_is_sent(
    server: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [write(tmp_path / "in.jsonl", lines(2)), "-o", tmp_path / "out.jsonl", "--url", server.url]
    for name, told in (("plot.pdf", ".png or .svg"), ("no/plot.svg", "there is no folder")):
        done = run(*words, "--plot", tmp_path / name)
        assert (done.exit_code, told in done.output) == (2, True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run(*words, "--plot", tmp_path / "plot.svg")
    assert (done.exit_code, "pip install 'loracache[plot]'" in " ".join(done.output.split())) == (2, True)
    assert not server.asked


def test_the_report_has_samples_over_time_and_the_table_what_came_of_it(server: Fake, tmp_path: Path) -> None:
    server.seconds = 0.05
    report = tmp_path / "report.json"
    source = write(tmp_path / "in.jsonl", lines(20))
    done = run(source, "-o", tmp_path / "o", "--url", server.url, "--running", 2, "--report", report)
    assert done.exit_code == 0, done.output
    told = json.loads(report.read_text())
    samples = told["samples"]
    assert samples["seconds"] == sorted(samples["seconds"])
    assert samples["answered"] == sorted(samples["answered"])
    assert (samples["answered"][0], samples["answered"][-1]) == (0, 20)
    assert samples["cached_tokens"][-1] == told["cached_tokens"] == 60
    assert samples["prompt_tokens"][-1] == told["prompt_tokens"]
    assert max(samples["running"]) == 2
    assert samples["running"][-1] == 0
    table = dict(re.findall(r"^ *(.*?)  +([\d,.]+)$", done.stdout, re.MULTILINE))
    assert (table["requests answered"], table["from the cache"]) == ("20", "60")
    assert table["computed"] == f"{told['prompt_tokens'] - 60:,}"
    assert table["computed, at least"] == f"{told['plan']['bound']:,}"


def test_samples_are_bounded_and_span_the_whole_run() -> None:
    samples = Samples()
    seconds = 0.0
    for number in range(5000):
        samples.add(seconds, number, 0, 0, 0)
        seconds += samples.interval
    assert len(samples.seconds) <= 512
    assert samples.seconds[0] == 0
    assert samples.seconds[-1] > 0.98 * (seconds - samples.interval)
    assert len({round(two - one, 3) for one, two in itertools.pairwise(samples.seconds)}) == 1


def test_the_bar_shows_tokens_saved_and_when_the_end_is_expected(server: Fake, tmp_path: Path) -> None:
    server.seconds = 0.1
    source, output = write(tmp_path / "in.jsonl", lines(60)), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "loracache", "batch", "run", source, "-o", output, "--url", server.url]
    leader, follower = pty.openpty()
    seen = b""
    words = [*map(str, command), "--running", "1"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=follower) as process:
        os.close(follower)
        with contextlib.suppress(OSError):  # EIO: it has ended
            while part := os.read(leader, 4096):
                seen += part
    os.close(leader)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    shown = re.findall(r"(\d+)/60 requests, [\d,]+ prompt tokens, (\d+) of them saved, 0:00:(\d\d) left", text)
    assert len(shown) > 10
    for answered, saved, left in [tuple(map(int, each)) for each in shown]:
        assert saved == 3 * answered
        if 20 <= answered < 60:
            assert abs(left - (60 - answered) * 0.11) <= 3
    assert shown[-1][:2] == ("60", "180")
