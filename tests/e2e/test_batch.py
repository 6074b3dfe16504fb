# SPDX-License-Identifier: Apache-2.0
"""`loracache batch run` on a real vLLM: the answers of each request alone, and as few computed tokens as can be."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient
from loracache.batch.servers import chat_question
from loracache.client.control import Selection

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

GROUPS, MEMBERS, PREFIX, TAIL = 12, 6, 384, 20
TEMPLATE = (
    "{% for each in documents or [] %}{{ each.text }}{% endfor %}{{ reasoning_effort }} {{ enable_thinking }} "
    "{{ persona }}: {{ messages[0].content }}"
)
BLOCK, BLOCKS = 32, 80  # room for five prefixes or so


@pytest.fixture(scope="module")
def servers(openai_server: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Two, started together. The last test ends the second."""
    folder = tmp_path_factory.mktemp("batch")
    transfer = {
        "kv_connector": "LoRACacheConnector",
        "kv_connector_module_path": "loracache.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"memory": "64MiB"},
    }
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    more = (
        "--lora-modules", f"adapter={tiny / 'adapters' / 'adapter-0'}", "--block-size", str(BLOCK),
        "--num-gpu-blocks-override", str(BLOCKS), "--enable-prompt-tokens-details", "--chat-template", str(template),
    )  # fmt: skip
    running = []
    try:
        for name in ("first", "second"):
            running.append(openai_server(folder / f"{name}.log", tiny / "model", transfer, *more))
        for each in running:
            while not each.ready():
                time.sleep(0.5)
        yield running[0], running[1]
    finally:
        for each in running:
            each.close()


@pytest.fixture(scope="module")
def server(servers: tuple[Any, Any]) -> Any:
    return servers[0]


def bodies(seed: str = "batch") -> list[dict[str, Any]]:
    chance = random.Random(seed)
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
    """vLLM's own, summed over their labels; "computed": prompt tokens that it did not have."""
    _, text = server.call("/metrics", None)
    found: dict[str, float] = {}
    for name, labels, value in re.findall(r"^vllm:(\w+)(?:\{([^}]*)\})? ([\d.e+]+)$", text, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
        if name == "prompt_tokens_by_source_total" and 'source="local_compute"' in labels:
            found["computed"] = found.get("computed", 0.0) + float(value)
    return found


def check_alone(server: Any, asked: list[dict[str, Any]], output: Path, step: int = 1) -> None:
    """Each answer, in the input's order, is what the request alone gets; of every `step`th."""
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [str(number) for number in range(len(asked))]
    for body, answer in list(zip(asked, answers, strict=True))[::step]:
        status, alone = server.call("/v1/completions", body)
        assert status == 200
        for mine, other in zip(answer["response"]["body"]["choices"], alone["choices"], strict=True):
            assert mine["token_ids"] == other["token_ids"]
            assert mine["finish_reason"] == other["finish_reason"]


def command_of(asked: list[dict[str, Any]], folder: Path, *servers: Any) -> list[str]:
    """Of a run into out.jsonl and report.json."""
    source, output, report = (str(folder / name) for name in ("in.jsonl", "out.jsonl", "report.json"))
    lines = [{"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": b} for n, b in enumerate(asked)]
    Path(source).write_text("".join(json.dumps(line) + "\n" for line in lines))
    urls = [word for each in servers for word in ("--url", f"http://127.0.0.1:{each.port}/v1")]
    run = [sys.executable, "-m", "loracache", "batch", "run", source, "-o", output, "--report", report]
    return [*run, "--running", "8", *urls]


def test_answers_are_those_of_each_request_alone_and_nothing_shared_is_computed_twice(
    server: Any, tmp_path: Path
) -> None:
    asked = bodies()
    before = counters(server)
    done = subprocess.run(command_of(asked, tmp_path, server), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    after = counters(server)
    spent = {name: value - before.get(name, 0.0) for name, value in after.items()}
    report = json.loads((tmp_path / "report.json").read_text())
    plan = report["plan"]
    assert (plan["requests"], plan["kv_tokens"]) == (GROUPS * MEMBERS, BLOCK * (BLOCKS - 1))
    assert plan["planned"] == plan["bound"]
    assert plan["first_come"] > 1.5 * plan["bound"]
    assert spent["num_preemptions_total"] == 0
    computed = report["prompt_tokens"] - report["cached_tokens"]
    assert computed <= 1.02 * plan["bound"], (computed, plan, spent)
    check_alone(server, asked, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    "more",
    [
        {"documents": [{"text": "a document "}], "chat_template_kwargs": {"persona": "one"}},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_a_chats_tokens_are_those_that_the_engine_computes(server: Any, more: dict[str, Any]) -> None:
    chat = {"model": "base", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 1} | more
    _, asked = server.call("/tokenize", chat_question(chat))
    _, answer = server.call("/v1/chat/completions", chat | {"return_token_ids": True})
    assert asked["tokens"] == answer["prompt_token_ids"]


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


def test_a_batch_starts_an_engine_of_its_own_and_ends_it(tiny: Path, tmp_path: Path, short_tmp: Path) -> None:
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


def test_prefixes_of_groups_are_pinned_while_they_run_and_nothing_else_is_stored(
    tiny: Path, tmp_path: Path, daemon: Any
) -> None:
    url = daemon(memory="64MiB", page_size="4KiB").url
    source, output, report = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "report.json"
    asked = [body | {"model": "base"} for body in bodies("pinned")] + [{"model": "base", "prompt": [301] * 200}]
    lines = [{"custom_id": str(n), "url": "/v1/completions", "body": body} for n, body in enumerate(asked)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    transfer = {
        "kv_connector": "LoRACacheConnector",
        "kv_connector_module_path": "loracache.connectors.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"server": url, "chunk_tokens": BLOCK},
    }
    command = [
        sys.executable, "-m", "loracache", "batch", "run", str(source), "-o", str(output), "--report", str(report),
        "--model", str(tiny / "model"), "--socket", url.removeprefix("unix://"), "--running", "4", "--",
        "--served-model-name", "base", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
        "--block-size", str(BLOCK), "--num-gpu-blocks-override", str(BLOCKS),
        "--kv-transfer-config", json.dumps(transfer),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(report.read_text())
    shared = GROUPS * PREFIX // BLOCK
    assert (told["pinned"], told["pin_failures"]) == (shared, 0)
    with CacheClient(url) as client:
        assert client.unpin(Selection(model="*")) == 0
        assert client.evict(Selection(model="*")).objects == shared


def test_two_engines_share_a_batch_and_neither_computes_what_the_other_does(
    servers: tuple[Any, Any], tmp_path: Path
) -> None:
    asked = [body for body in bodies("pair") if "n" not in body]
    for each in servers:  # its first steps take an engine seconds, in which the other would take over its share
        for body in bodies("warm up")[:8]:
            each.call("/v1/completions", body)
    before = [counters(each) for each in servers]
    done = subprocess.run(
        command_of(asked, tmp_path, *servers), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert min(each["answered"] for each in report["engines"]) > 0  # how many depends on which is faster
    spent = [counters(each)["computed"] - then["computed"] for each, then in zip(servers, before, strict=True)]
    taken = sum(each["taken_over"] for each in report["engines"])  # of a slower one, which may tear a prefix
    assert sum(spent) <= 1.02 * report["plan"]["bound"] + taken * PREFIX, (spent, report)
    check_alone(servers[0], asked, tmp_path / "out.jsonl", step=3)


def test_an_engine_that_is_killed_in_the_middle_leaves_its_share_to_the_other(
    servers: tuple[Any, Any], tmp_path: Path
) -> None:
    asked = bodies("killed")
    partial = tmp_path / "out.jsonl.partial"
    command = [*command_of(asked, tmp_path, *servers), "--patience", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 12):
            time.sleep(0.01)
        assert process.poll() is None
        end(servers[1].process)
        _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    report = json.loads((tmp_path / "report.json").read_text())
    kept, lost = report["engines"]
    assert (kept["lost"], lost["lost"], report["errors"]) == (0, 1, 0)
    assert kept["answered"] + lost["answered"] == len(asked)
    assert kept["taken_over"] > 0
    check_alone(servers[0], asked, tmp_path / "out.jsonl", step=3)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill an engine with all its processes, and wait until none is left."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        for _ in range(600):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        raise AssertionError("processes of a killed engine are left")
