# SPDX-License-Identifier: Apache-2.0
"""`loracache batch plan`, `run --dry-run`, and what of their options is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.batch.openai_fake import BLOCK, KV_BLOCKS, Fake, request, run, write


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
    table = run(source, "--url", server.url, verb="plan")
    assert "in the plan's order" in table.stdout


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
        (["-o", "x", "--url", "ftp://h"], "is no server's address"),
        (["-o", "x", "--url", "http://h:1", "--order", "any"], "--order 'any'"),
        (["-o", "x", "--url", "http://h:1", "--by", "words"], "--by 'words'"),
        (["-o", "x", "--url", "http://h:1", "--patience", "-1"], "--patience"),
        (["-o", "x", "--url", "http://h:1", "--running", "0"], "whole number from 1"),
    ],
)
def test_wrong_usage_is_refused(tmp_path: Path, words: list[str], told: str) -> None:
    done = run(write(tmp_path / "in.jsonl", [request(0)]), *words)
    assert (done.exit_code, told in " ".join(done.output.replace("│", " ").split())) == (2, True), done.output
