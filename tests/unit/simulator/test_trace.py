# SPDX-License-Identifier: Apache-2.0
"""Traces: both formats are read, what is neither is refused with its line, and sessions keep their adapters."""

from __future__ import annotations

import contextlib
import gzip
import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loracache.errors import ConfigError
from loracache.simulator import trace
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


@pytest.mark.parametrize(("tokens", "block_bytes"), [(1600, 0), (1536, 0), (1, 0), (1600, 700)])
def test_sizes_of_blocks_are_those_of_each(tokens: int, block_bytes: int) -> None:
    request = Request(0.0, tokens, (1, 2, 3, 4, 5), block_bytes=block_bytes)
    for begin in range(6):
        for end in range(6):
            assert request.sizes(begin, end, 2) == [request.bytes_of(at, 2) for at in range(begin, end)]


def test_azures_format_shares_nothing(tmp_path: Path) -> None:
    first, second = read_trace(written(tmp_path, AZURE))
    assert (first.tokens, len(first.blocks), second.tokens, len(second.blocks)) == (1374, 3, 396, 1)
    assert not set(first.blocks) & set(second.blocks)
    assert second.time == pytest.approx(4.3145790, abs=1e-5)


def bailian(*requests: tuple[float, int, list[int]]) -> str:
    lines = []
    for number, (time, tokens, ids) in enumerate(requests):
        line = {"chat_id": number, "parent_chat_id": -1, "timestamp": time, "input_length": tokens, "output_length": 9}
        lines.append(json.dumps(line | {"type": "text", "turn": 1, "hash_ids": ids}))
    return "\n".join(lines) + "\n"


def test_bailians_format_has_blocks_of_16_tokens_and_seconds(tmp_path: Path) -> None:
    first, second = read_trace(written(tmp_path, bailian((61.5, 30, [7, 8]), (70.0, 33, [7, 8, 9]))))
    assert (first.time, second.time) == (0.0, 8.5)
    assert second.blocks == (7, 8, 9)
    assert [second.tokens_of(position) for position in range(3)] == [16, 16, 1]


BURST = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def test_burstgpts_sessions_grow_and_others_share_nothing(tmp_path: Path) -> None:
    rows = [
        "5,a,1.5,ChatGPT,40,100,140,Conversation log", "9,a,1,ChatGPT,200,10,210,Conversation log",
        "10,b,1,GPT-4,40,10,50,Conversation log", "11,a,1,ChatGPT,60,10,70,Conversation log",
        "12,,1,GPT-4,40,10,50,API log", "13,,1,GPT-4,40,10,50,API log", "14,a,1,ChatGPT,0,0,0,Conversation log",
    ]  # fmt: skip
    found = read_trace(written(tmp_path, BURST + "\n".join(rows) + "\n"))
    first, grown, other, shorter, *alone = found
    assert len(found) == 6  # what failed asked for nothing
    assert (len(first.blocks), len(grown.blocks)) == (3, 13)
    assert grown.blocks[:2] == first.blocks[:2]  # whole blocks of 40 tokens
    assert not set(grown.blocks[2:]) & set(first.blocks)
    rest = [set(each.blocks) for each in (grown, other, shorter, *alone)]
    assert sum(map(len, rest)) == len(set().union(*rest))
    assert grown.time == 4.0


def test_burstgpts_first_release_has_no_sessions(tmp_path: Path) -> None:
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,API log\n"
    (found,) = read_trace(written(tmp_path, text))
    assert (found.tokens, len(found.blocks)) == (472, 30)


def test_a_gzipped_trace_is_read_and_a_damaged_one_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    whole = gzip.compress(mooncake(*((number, 700, [1, 2]) for number in range(500))).encode())
    path.write_bytes(whole)
    assert len(read_trace(path)) == 500
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for content in (whole[: len(whole) // 2], bytes(damaged), whole[:10]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="gzip"):
            read_trace(path)


def test_requests_out_of_order_are_taken_in_the_order_of_their_times(tmp_path: Path) -> None:
    found = read_trace(written(tmp_path, mooncake((9000, 512, [1]), (-1000, 512, [2]), (4000, 512, [3]))))
    assert [(each.time, each.blocks) for each in found] == [(0.0, (2,)), (5.0, (3,)), (10.0, (1,))]


def test_a_line_that_never_ends_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_MOST_LINE", 1000)
    with pytest.raises(ConfigError, match="line 1: it is longer"):
        read_trace(written(tmp_path, "x" * 2000))


RECORDED = '{"loracache_trace": 1}\n{"space": 0, "adapter": "", "tenant": "", "model": "", "chunk_tokens": 16}\n'
ASKED = '{"time": 1, "request": 0, "chunks": "%s", "group": 1, "found": {}}\n'


@pytest.mark.parametrize(
    "line",
    [
        "3\n",
        "{}\n",
        '{"loracache_trace": 2}\n',
        ASKED % "zz",
        ASKED % ("g" * 16),
        ASKED.replace('"time": 1', '"time": NaN') % ("a" * 16),
        ASKED.replace('"time": 1', '"time": -1') % ("a" * 16),
        ASKED.replace("{}", '{"cpu": -1}') % ("a" * 16),
        ASKED.replace("{}", "3") % ("a" * 16),
        '{"time": 1, "store": "%s", "below": "", "bytes": 5, "space": 7}\n' % ("a" * 16),
        '{"time": 1, "store": "%s", "below": "", "bytes": -5, "space": 0}\n' % ("a" * 16),
        '{"time": 1, "adapter": "x", "bytes": 1e400}\n',
        "[" * 100_000 + "\n",
    ],
)
def test_a_recorded_line_that_no_daemon_writes_is_refused(tmp_path: Path, line: str) -> None:
    good = ASKED % ("a" * 16)
    assert len(read_trace(written(tmp_path, RECORDED + good))) == 1
    with pytest.raises(ConfigError, match="line 4: nothing that a daemon records"):
        read_trace(written(tmp_path, RECORDED + good + line + good))


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b"{")
@example(b'{"loracache_trace": 1}')
@example(b"\x1f\x8b")
@example(b"Timestamp,Request tokens\n1e999,5\n")
@example(b'TIMESTAMP,ContextTokens\n"')
def test_no_content_does_anything_but_be_read_or_refused(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with contextlib.suppress(ConfigError):
            read_trace(Path(file.name))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no requests"),
        ("\n\n", "no requests"),
        (mooncake((0, 0, [])), "no tokens"),
        (mooncake((0, -5, [1])), "line 1"),
        (mooncake((0, 5, [-1])), "line 1"),
        (mooncake((0, 5, [10**30])), "line 1"),
        (mooncake((0, 10**12, [1])), "line 1"),
        (mooncake((0, 5, [1])).replace("0,", "NaN,"), "line 1"),
        (mooncake((0, 5, [1])).replace("0,", "Infinity,"), "line 1"),
        (mooncake((0, 5, [1])).replace("[1]", "[1.5]"), "line 1"),
        (mooncake((0, 5, [1])).replace("[1]", "[true]"), "line 1"),
        (mooncake((0, 5, [1])).replace("5", '"5x"'), "line 1"),
        ("[" * 100_000, "line 1"),
        ("{" + "[" * 100_000, "line 1"),
        (bailian((0, 5, [1])) + "\n" + '{"chat_id": 1}\n', "line 3"),
        (BURST + "5,a,1,ChatGPT,-4,1,1,x\n", "line 2"),
        (BURST + "nan,a,1,ChatGPT,4,1,1,x\n", "line 2"),
        (BURST + "5,a,1,ChatGPT\n", "line 2"),
        (BURST, "no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-99-16 18:15:46,5,5\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,9999999999999,5\n", "line 2"),
        ("a,b,c\n1,2,3\n", "begins no format"),
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
