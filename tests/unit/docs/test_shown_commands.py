# SPDX-License-Identifier: Apache-2.0
"""What README.md and docs/*.md show that needs no engine does what they say. What stands for what there is in
`Shell.stands_for` of tests/documented.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loracache import CacheClient, Namespace
from loracache.storage_backends.base import Standing
from loracache.storage_backends.redis.backend import RedisBackend
from tests.unit.batch.openai_fake import Fake

EXAMPLE = Path(__file__).parents[3] / "examples" / "client_ten_lines.py"


def listens(said: str) -> bool:
    return "listening on" in said


def make_adapter(folder: Path) -> None:
    """A PEFT folder."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    name = "base_model.model.model.layers.0.q_proj.lora_{}.weight"
    weights = {name.format("A"): np.ones((2, 16), np.float32), name.format("B"): np.ones((16, 2), np.float32)}
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def served(documented: Any, module_shell: Callable[..., Any], module_redis: Any) -> SimpleNamespace:
    """A shell beside the daemon of the first page, with all tiers and REST; url: its address."""
    shell = module_shell(redis=module_redis().url)
    command = documented.shown("README.md", "loracache serve --http")
    shell.start(command, lambda said: listens(said) and "REST on port" in said)
    shell.run("curl -s --retry 50 --retry-delay 1 --retry-all-errors localhost:9400/readyz")
    return SimpleNamespace(shell=shell, url=shell.real("unix:///run/loracache.sock"))


def test_a_daemon_starts_and_ends_as_shown(documented: Any, module_shell: Callable[..., Any]) -> None:
    command = documented.shown("index.md", "loracache serve")
    assert command == documented.shown("README.md", "loracache serve --socket")
    assert f"`{command.strip()}`" in (documented.ROOT / "docs" / "operations.md").read_text()
    shell = module_shell()
    assert shell.stop(shell.start(command, listens)) == 0
    assert "faults left: 0" in shell.run(documented.shown("README.md", "loracache check"))


def test_rest_for_other_machines_starts_as_shown(documented: Any, module_shell: Callable[..., Any]) -> None:
    shell = module_shell()
    shell.run(
        "mkdir -m 700 -p /etc/prometheus /etc/loracache\n"
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=cache.example.org "
        "-addext subjectAltName=DNS:cache.example.org -keyout /etc/loracache/tls.key -out /etc/loracache/tls.crt\n"
        "chmod 600 /etc/loracache/tls.key"
    )
    process = shell.start(documented.shown("operations.md", "loracache tokens add prometheus"), listens)
    metrics = shell.run(
        "curl -s --retry 50 --retry-delay 1 --retry-all-errors --cacert /etc/loracache/tls.crt "
        "--connect-to cache.example.org:9400:127.0.0.1:9400 https://cache.example.org:9400/metrics "
        '-H "Authorization: Bearer $(cat /etc/prometheus/loracache.token)"'
    )
    assert "loracache_tier_limit_bytes" in metrics
    assert shell.stop(process) == 0


def test_the_user_of_redis_that_is_shown_may_do_all_that_is_needed(documented: Any, module_redis: Any) -> None:
    server = module_redis()
    server.redis.execute_command(documented.shown("operations.md", "ACL SETUSER").strip())
    backend = RedisBackend(f"unix://cache:PASSWORD@{server.socket}")
    assert backend.check() == Standing()
    backend.close()


def test_adapters_are_added_listed_exported_and_removed_as_shown(documented: Any, served: Any) -> None:
    folder = served.shell.folder
    make_adapter(folder / "peft-folder")
    said = served.shell.run(documented.shown("lora.md", "loracache adapters add"))
    assert said.count("team/assistant") >= 3
    exported = {path.name for path in (folder / "a-new-folder").iterdir()}
    assert exported == {"adapter_config.json", "adapter_model.safetensors"}
    with CacheClient(served.url) as client:
        assert client.find_adapter("team/assistant") is None


def test_the_client_on_the_first_page_finds_what_it_stored(documented: Any, served: Any) -> None:
    (served.shell.folder / "client.py").write_text(served.shell.real(documented.shown("README.md", "from loracache")))
    assert served.shell.run("python client.py") == "2 1024\n"


def test_the_example_of_a_client_runs_on_a_daemon_and_alone(served: Any) -> None:
    for arguments in ([str(served.url.removeprefix("unix://"))], []):
        done = subprocess.run(
            [sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=30, check=False
        )
        assert done.stdout == "Lookup(tiers=('cpu', 'cpu'), beside=())\n[b'aaaaa', b'bbbbb']\n", done.stderr


def test_rest_is_called_as_shown(documented: Any, served: Any) -> None:
    make_adapter(served.shell.folder / "assistant")
    with CacheClient(served.url) as client:
        client.register(Namespace("ab" * 32, "float32", "layout", 16), ["llama"])
        client.add_adapter(str(served.shell.folder / "assistant"), "team/assistant")
    *calls, events = documented.shown("control-api.md", "curl -s localhost:9400/v1/stats").splitlines()
    assert events == "curl -sN localhost:9400/v1/events"  # which has no end
    said = served.shell.run("\n".join(calls))
    assert '"tiers"' in said
    assert '"digest"' in said
    served.shell.stop(served.shell.start(events, lambda said: said.startswith(":")))


def test_the_simulator_answers_as_shown(documented: Any, module_shell: Callable[..., Any]) -> None:
    shell = module_shell()
    lines = [
        {"timestamp": 1000 * n, "input_length": 2048, "output_length": 8, "hash_ids": [0, 1, n, 99]} for n in range(9)
    ]
    (shell.folder / "TRACE").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    told = json.loads(shell.run(documented.shown("policy.md", "loracache simulate")))
    assert [run["policy"] for run in told["runs"]] == ["lru", "adaptive", "static:20"]


def test_a_batch_is_planned_and_answered_as_shown(documented: Any, module_shell: Callable[..., Any]) -> None:
    shell = module_shell()
    line = json.loads(documented.shown("batch.md", '{"custom_id"'))
    lines = [line | {"custom_id": f"q{number}"} for number in range(3)]
    (shell.folder / "requests.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    server = Fake(shell.engine)
    try:
        said = shell.run(documented.shown("batch.md", "loracache batch plan"))
    finally:
        server.close()
    assert "3 requests" in said
    answers = [json.loads(each) for each in (shell.folder / "answers.jsonl").read_text().splitlines()]
    assert [(each["custom_id"], each["error"]) for each in answers] == [(f"q{number}", None) for number in range(3)]
    assert len(server.asked) == 3


def test_a_batch_is_answered_by_several_engines_as_shown(documented: Any, module_shell: Callable[..., Any]) -> None:
    shell, line = module_shell(), json.loads(documented.shown("batch.md", '{"custom_id"'))
    lines = [line | {"custom_id": f"q{number}"} for number in range(4)]
    (shell.folder / "requests.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    servers = [Fake(), Fake()]
    shell.stands_for |= {
        f"{name}:8000": f"127.0.0.1:{each.port}" for name, each in zip(("one", "two"), servers, strict=True)
    }
    try:
        shell.run(documented.shown("batch.md", "loracache batch run requests.jsonl -o answers.jsonl --url http://one"))
    finally:
        for each in servers:
            each.close()
    assert sum(len(each.asked) for each in servers) == 4
    assert len((shell.folder / "answers.jsonl").read_text().splitlines()) == 4
