# SPDX-License-Identifier: Apache-2.0
"""`loracache batch run` on a real vLLM: the answers of each request alone, and as few computed tokens as can be."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

GROUPS, MEMBERS, PREFIX, TAIL = 12, 6, 384, 20
BLOCK, BLOCKS = 32, 80  # room for five prefixes or so


@pytest.fixture(scope="module")
def server(openai_server: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("batch")
    transfer = {
        "kv_connector": "LoRACacheConnector",
        "kv_connector_module_path": "loracache.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"memory": "64MiB"},
    }
    adapter = f"adapter={tiny / 'adapters' / 'adapter-0'}"
    running = openai_server(
        folder / "server.log",
        tiny / "model",
        transfer,
        "--lora-modules",
        adapter,
        "--block-size",
        str(BLOCK),
        "--num-gpu-blocks-override",
        str(BLOCKS),
        "--enable-prompt-tokens-details",
    )
    while not running.ready():
        time.sleep(0.5)
    yield running
    running.close()


def bodies() -> list[dict[str, Any]]:
    chance = random.Random("batch")
    found = []
    for group in range(GROUPS):
        prefix = [chance.randrange(300, 500) for _ in range(PREFIX)]
        for member in range(MEMBERS):
            body: dict[str, Any] = {
                "model": "adapter" if group % 3 == 0 else "base",
                "prompt": prefix + [chance.randrange(300, 500) for _ in range(TAIL)],
                "max_tokens": 8,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            if member == 1:
                body |= {"temperature": 0.9, "seed": group}
            if member == 2:
                body |= {"logprobs": 2}
            if member == 3:
                body |= {"n": 2, "temperature": 0.7, "seed": 7}
            if member == 4:
                body |= {"structured_outputs": {"choice": ["yes", "no"]}, "ignore_eos": False}
            found.append(body)
    chance.shuffle(found)
    return found


def counters(server: Any) -> dict[str, float]:
    """vLLM's own, summed over their labels."""
    _, text = server.call("/metrics", None)
    found: dict[str, float] = {}
    for name, value in re.findall(r"^vllm:(\w+)(?:\{[^}]*\})? ([\d.e+]+)$", text, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def test_answers_are_those_of_each_request_alone_and_nothing_shared_is_computed_twice(
    server: Any, tmp_path: Path
) -> None:
    asked = bodies()
    source, output, report = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "report.json"
    source.write_text(
        "".join(
            json.dumps({"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
            for n, body in enumerate(asked)
        )
    )
    before = counters(server)
    url = f"http://127.0.0.1:{server.port}/v1"
    command = [sys.executable, "-m", "loracache", "batch", "run", source, "-o", output, "--url", url]
    done = subprocess.run(
        [*map(str, command), "--report", str(report), "--running", "8"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = counters(server)
    spent = {name: value - before.get(name, 0.0) for name, value in after.items()}
    plan = json.loads(report.read_text())["plan"]
    assert (plan["requests"], plan["kv_tokens"]) == (GROUPS * MEMBERS, BLOCK * BLOCKS)
    assert plan["planned"] == plan["bound"]
    assert plan["first_come"] > 1.5 * plan["bound"]
    assert spent["num_preemptions_total"] == 0
    computed = json.loads(report.read_text())["prompt_tokens"] - json.loads(report.read_text())["cached_tokens"]
    assert computed <= 1.02 * plan["bound"], (computed, plan, spent)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    for number, answer in enumerate(answers):
        assert answer["custom_id"] == str(number)
        status, alone = server.call("/v1/completions", asked[number])
        assert status == 200
        for mine, other in zip(answer["response"]["body"]["choices"], alone["choices"], strict=True):
            assert mine["token_ids"] == other["token_ids"]
            assert mine["finish_reason"] == other["finish_reason"]


def test_what_the_engine_cannot_do_is_that_lines_error(server: Any, tmp_path: Path) -> None:
    lines = [
        {"custom_id": "vector", "url": "/v1/embeddings", "body": {"model": "base", "input": "text"}},
        {"custom_id": "long", "url": "/v1/completions", "body": {"model": "base", "prompt": [300] * 2000}},
        {"custom_id": "model", "url": "/v1/completions", "body": {"model": "none", "prompt": [300]}},
        {"custom_id": "right", "url": "/v1/completions", "body": {"model": "base", "prompt": [300], "max_tokens": 2}},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"method": "POST"} | line) + "\n" for line in lines))
    url = f"http://127.0.0.1:{server.port}/v1"
    command = [sys.executable, "-m", "loracache", "batch", "run", source, "-o", output, "--url", url]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 4, done.stderr
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [each["custom_id"] for each in found] == ["vector", "long", "model", "right"]
    assert [each["response"]["status_code"] for each in found] == [404, 400, 404, 200]
    assert [each["error"] is None for each in found] == [False, False, False, True]


def test_a_batch_starts_an_engine_of_its_own_pins_what_its_groups_share_and_ends_it(
    tiny: Path, tmp_path: Path, short_tmp: Path
) -> None:
    source, output, report = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "report.json"
    asked = [body | {"model": "base"} for body in bodies()]
    asked.append({"model": "base", "prompt": [301] * 40, "max_tokens": 4})
    lines = [{"custom_id": str(n), "url": "/v1/completions", "body": body} for n, body in enumerate(asked)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [
        sys.executable, "-m", "loracache", "batch", "run", str(source), "-o", str(output), "--report", str(report),
        "--model", str(tiny / "model"), "--memory", "64MiB", "--running", "8", "--", "--served-model-name", "base",
        "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager",
        "--block-size", str(BLOCK), "--num-gpu-blocks-override", str(BLOCKS),
    ]  # fmt: skip
    mine = os.environ | {"TMPDIR": str(short_tmp)}  # where its sockets are, by whose path its processes are known
    done = subprocess.run(command, env=mine, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [each["custom_id"] for each in found] == [str(number) for number in range(len(asked))]
    assert all(each["response"]["body"]["choices"][0]["token_ids"] for each in found[:-1])
    told = json.loads(report.read_text())
    assert told["plan"]["planned"] == told["plan"]["bound"]
    assert told["prompt_tokens"] - told["cached_tokens"] <= 1.02 * told["plan"]["bound"]
    assert told["pin_failures"] == 0
    left = subprocess.run(["pgrep", "-f", str(short_tmp)], capture_output=True, text=True, check=False).stdout
    assert not left
