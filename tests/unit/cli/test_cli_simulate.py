# SPDX-License-Identifier: Apache-2.0
"""`loracache simulate`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loracache.cli.app import app


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    turns = [
        {"timestamp": 1000 * turn, "input_length": 512 * turn, "hash_ids": list(range(turn))} for turn in (1, 2, 3)
    ]
    path.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    return path


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["simulate", *map(str, words)])


def test_json_has_a_run_for_each_policy_and_the_bound(trace: Path) -> None:
    done = run(trace, "--policy", "lru,cost,static:20", "--memory", "1GiB", "--disk", "1GiB", "--adapters", 4, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert (answer["requests"], answer["tokens"]) == (3, 3072)
    assert [each["policy"] for each in answer["runs"]] == ["lru", "cost", "static:20"]
    first = answer["runs"][0]
    assert first["hit_rate"] == answer["belady"] == pytest.approx(0.5)
    assert first["invalid_kv"] == 0
    assert 0 < first["ttft_mean"] <= first["ttft_p99"]


def test_ways_to_prefetch_are_runs_of_their_own(trace: Path) -> None:
    words = ("--policy", "lru,sieve", "--memory", "1GiB", "--disk", "1GiB", "--prefetch", "none, hints:100")
    done = run(trace, *words, "--restart", 1.5, "--json")
    assert done.exit_code == 0, done.output
    runs = json.loads(done.stdout)["runs"]
    assert [(each["policy"], each["prefetch"]) for each in runs] == [
        ("lru", "none"), ("lru", "hints:100"), ("sieve", "none"), ("sieve", "hints:100"),
    ]  # fmt: skip
    assert {each["hit_rate"] for each in runs} == {0.5}
    assert [each["prefetched"] > 0 for each in runs] == [False, True] * 2
    assert runs[1]["hit_rate_cpu"] > runs[0]["hit_rate_cpu"]


def test_a_table_for_people(trace: Path) -> None:
    done = run(trace, "--policy", "sieve", "--memory", "1GiB")
    assert done.exit_code == 0, done.output
    assert "sieve   0.5000" in " ".join(done.stdout.split()).replace("sieve ", "sieve   ")
    assert done.stdout.rstrip().endswith("belady: 0.5000")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--policy", "best"], "give one of lru"),
        (["--policy", "static:100"], "static:P"),
        (["--memory", "much"], "is not a size"),
        (["--ranks", "8,x"], "--ranks"),
        (["--ranks", "0"], "1 or more"),
        (["--admission", "none"], "all, second_touch"),
        (["--disk-policy", "best"], "give one of lru"),
        (["--prefetch", "none,soon"], "none, timer, hints:P"),
    ],
)
def test_mistakes_name_value_and_fix(trace: Path, words: list[str], told: str) -> None:
    done = run(trace, *words)
    assert done.exit_code == 2
    assert told in done.output


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere.jsonl")
    assert done.exit_code == 2
    assert "nowhere.jsonl" in done.output
