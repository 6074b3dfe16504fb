# SPDX-License-Identifier: Apache-2.0
"""Traces: both formats are read, what is neither is refused with its line, and sessions keep their adapters."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from loracache.errors import ConfigError
from loracache.simulator.trace import Request, read_trace, with_adapters

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,1374,44\n2023-11-16 18:15:50.9951690,396,9\n"
)


def mooncake(*requests: tuple[int, int, list[int]]) -> str:
    names = ("timestamp", "input_length", "hash_ids")
    return "".join(json.dumps(dict(zip(names, each, strict=True)) | {"output_length": 1}) + "\n" for each in requests)


def written(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def test_mooncakes_format(tmp_path: Path) -> None:
    found = read_trace(written(tmp_path, mooncake((3000, 700, [1, 2]), (1000, 512, [1]))))
    assert found == [Request(0.0, 512, (1,)), Request(2.0, 700, (1, 2))]
    assert [found[1].tokens_of(position) for position in (0, 1)] == [512, 188]


def test_azures_format_shares_nothing(tmp_path: Path) -> None:
    first, second = read_trace(written(tmp_path, AZURE))
    assert (first.tokens, len(first.blocks), second.tokens, len(second.blocks)) == (1374, 3, 396, 1)
    assert not set(first.blocks) & set(second.blocks)
    assert second.time == pytest.approx(4.3145790, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no requests"),
        ("nonsense\n", "line 1"),
        (mooncake((0, 1, [1])) + '{"timestamp": 1}\n', "line 2"),
        ("TIMESTAMP,Tokens\n2023-11-16 18:15:46,5\n", "ContextTokens"),
        ('{"timestamp": 0, "input_length": 1, "hash_ids": 3}\n', "line 1"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_trace(written(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        read_trace(tmp_path / "nowhere")


def test_a_session_keeps_its_adapter_and_a_system_prompt_has_none() -> None:
    turns = [
        Request(0.0, 1, (0, *range(100 * session, 100 * session + turn)))
        for turn in (1, 2, 3)
        for session in range(1, 60)
    ]
    assigned = with_adapters(turns, 20, 1.0)
    by_session: dict[int, set[int]] = {}
    for request in assigned:
        by_session.setdefault(request.blocks[1] // 100, set()).add(request.adapter)
    assert all(len(adapters) == 1 for adapters in by_session.values())
    assert len({adapter for adapters in by_session.values() for adapter in adapters}) > 5


def test_adapters_are_asked_for_by_zipfs_law() -> None:
    assigned = with_adapters([Request(0.0, 1, (number,)) for number in range(20_000)], 10, 1.0)
    counts = Counter(request.adapter for request in assigned)
    assert set(counts) == set(range(10))
    assert counts[0] / counts[4] == pytest.approx(5, rel=0.15)
    assert with_adapters([Request(0.0, 1, (1,))], 0, 1.0)[0].adapter == -1
