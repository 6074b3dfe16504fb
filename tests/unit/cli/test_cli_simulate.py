# SPDX-License-Identifier: Apache-2.0
"""`loracache simulate`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import sys
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
        (["--hints", "1.5"], "--hints 1.5"),
        (["--admission", "none"], "all, second_touch, adaptive"),
        (["--disk-policy", "best"], "give one of lru"),
        (["--policy", ""], "give one of lru"),
        (["--memory", "-1GiB"], "is not a size"),
        (["--memory", "1GiB,,2GiB"], "is not a size"),
        (["--memory", ",".join(["1GiB"] * 33)], "32 at most"),
        (["--disk", "-5"], "is not a size"),
        (["--disk", "1GiB,2GiB"], "--recommend"),
        (["--kv-bytes-per-token", "0"], "must be 1"),
        (["--kv-bytes-per-token", "1TiB"], "1GiB"),
        (["--zipf", "nan"], "0 to 10"),
        (["--zipf", "-1"], "0 to 10"),
        (["--ranks", "8,99999999999"], "at most"),
        (["--ranks", ""], "--ranks"),
        (["--adapters", "-1"], "whole number"),
        (["--adapters", "1000000"], "whole number"),
        (["--engines", "1.5"], "whole number"),
        (["--recommend", "--within", "nan"], "percentage"),
        (["--recommend", "--within", "100"], "percentage"),
        (["--recommend", "--prices", "30"], "MEMORY:DISK"),
        (["--recommend", "--prices", "inf:1"], "0 or more"),
        (["--recommend", "--prices", "a:b"], "MEMORY:DISK"),
    ],
)
def test_mistakes_name_value_and_fix(trace: Path, words: list[str], told: str) -> None:
    done = run(trace, *words)
    assert done.exit_code == 2
    assert told in done.output


def test_several_memories_make_a_run_and_a_bound_each(trace: Path) -> None:
    done = run(trace, "--memory", "64MiB,1GiB", "--policy", "lru,sieve", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert [(each["policy"], each["memory"]) for each in answer["runs"]] == [
        ("lru", 64 << 20),
        ("sieve", 64 << 20),
        ("lru", 1 << 30),
        ("sieve", 1 << 30),
    ]
    assert all(each["hit_rate"] <= each["belady"] for each in answer["runs"])
    assert "belady" not in answer
    done = run(trace, "--memory", "64MiB,1GiB")
    assert "belady: 64.0 MiB" in " ".join(done.stdout.split())


def test_a_recommendation_names_sizes_and_policy(trace: Path) -> None:
    done = run(trace, "--recommend", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    best = answer["recommended"]
    assert best in answer["points"]
    assert best["saved"] > 0
    assert {each["policy"] for each in answer["points"]} == {"lru", "adaptive"}
    assert answer["sample"] == 1.0
    done = run(trace, "--recommend", "--memory", "64MiB,1GiB", "--disk", "0")
    assert "recommended: memory 1.0 GiB, no disk, policy lru" in " ".join(done.stdout.split())


@pytest.mark.parametrize("kind", ["svg", "png"])
@pytest.mark.parametrize("words", [[], ["--memory", "64MiB,1GiB"], ["--recommend"]])
def test_a_plot_is_drawn(trace: Path, tmp_path: Path, kind: str, words: list[str]) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / f"plot.{kind}"
    done = run(trace, "--policy", "lru,sieve", "--plot", plot, *words)
    assert done.exit_code == 0, done.output
    drawn = plot.read_bytes()
    assert drawn.startswith(b"<?xml" if kind == "svg" else b"\x89PNG")
    assert len(drawn) > 5000


def test_a_plot_that_cannot_be_drawn_is_told_before_the_work(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, told in (("plot.pdf", ".png or .svg"), ("no/plot.svg", "there is no folder")):
        done = run(trace, "--plot", tmp_path / name)
        assert done.exit_code == 2
        assert told in done.output
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run(trace, "--plot", tmp_path / "plot.svg")
    assert done.exit_code == 2
    assert "pip install 'loracache[plot]'" in " ".join(done.output.split())


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere.jsonl")
    assert done.exit_code == 2
    assert "nowhere.jsonl" in done.output
