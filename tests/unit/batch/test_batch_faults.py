# SPDX-License-Identifier: Apache-2.0
"""`loracache batch run` with requests, answers and files that are not as they should be: none of them ends the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loracache.batch import driver
from tests.unit.batch.openai_fake import Fake, answers, request, run, write


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_PAUSES_S", (0.01, 0.05))


# -- while it is planned ----------


def test_a_server_that_hangs_up_while_prompts_are_tokenized_is_asked_again(server: Fake, tmp_path: Path) -> None:
    server.hang_ups = 1
    source, output = write(tmp_path / "in.jsonl", [request(number) for number in range(5)]), tmp_path / "out.jsonl"
    done = run(source, "-o", output, "--url", server.url)
    assert done.exit_code == 0, done.output
    assert len(answers(output)) == 5


def test_token_ids_that_are_none_are_told(server: Fake, tmp_path: Path) -> None:
    for tokens in ([10**12] * 40, [-1] * 40):
        server.tokens = tokens
        done = run(write(tmp_path / "in.jsonl", [request(0)]), "-o", tmp_path / "out.jsonl", "--url", server.url)
        assert (done.exit_code, "answered no list of token ids" in done.output) == (1, True)


@pytest.mark.parametrize("more", [{"max_tokens": 10**30}, {"max_tokens": 2**62}, {"n": 10**30}])
def test_counts_beyond_all_bounds_are_the_servers_to_refuse(server: Fake, tmp_path: Path, more: dict[str, int]) -> None:
    lines = [request(0), request(1, **more), request(2, **more), request(3, **more)]
    output = tmp_path / "out.jsonl"
    done = run(write(tmp_path / "in.jsonl", lines), "-o", output, "--url", server.url)
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
