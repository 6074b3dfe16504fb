# SPDX-License-Identifier: Apache-2.0
"""`loracache lookup --engine` beside `vllm serve`: what was served is found by its text."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BLOCK = 128
TEXT = "the quick brown fox jumps over the lazy dog and looks for what it has seen before " * 8


def answer_of(url: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read() or b"{}")


@pytest.fixture
def engine(tiny: Path, daemon: Any, eventually: Any, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """(address of an engine that serves "base" and the adapter "named", its daemon)"""
    cache = daemon(memory="64MiB")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    transfer = {
        "kv_connector": "LoRACacheConnector", "kv_connector_module_path": "loracache.connectors.vllm",
        "kv_role": "kv_both", "kv_connector_extra_config": {"server": cache.url, "chunk_tokens": BLOCK},
    }  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny / "model"),
        "--served-model-name", "base", "--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--dtype", "float32",
        "--max-model-len", "1024", "--block-size", str(BLOCK), "--enable-lora", "--lora-modules",
        f"named={tiny / 'adapters' / 'adapter-0'}", "--kv-transfer-config", json.dumps(transfer),
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return bool(answer_of(f"{url}/health") == {})
        except OSError:
            return False

    try:
        eventually(ready, "the server answers", 240)
        yield url, cache
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def test_a_served_prompt_is_found_by_its_text(engine: Any, tiny: Path, eventually: Any) -> None:
    url, cache = engine
    cache.client().add_adapter(str(tiny / "adapters" / "adapter-0"), "named")
    found: dict[str, Any] = {}

    def looked_up(model: str) -> int:
        command = [
            sys.executable,
            "-m",
            "loracache",
            "lookup",
            "--socket",
            str(cache.socket),
            "--json",
            "--engine",
            url,
        ]
        command += ["--prompt", TEXT, "--model", model]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode in (0, 3), done.stderr
        found.update(json.loads(done.stdout or "{}"))
        return done.returncode

    for model in ("base", "named"):
        assert looked_up(model) == 3
        answer = answer_of(f"{url}/v1/completions", {"model": model, "prompt": TEXT, "max_tokens": 8})
        eventually(lambda model=model: looked_up(model) == 0, f"{model}'s prompt is found")
        assert found["tokens"] == answer["usage"]["prompt_tokens"] // BLOCK * BLOCK
        assert found["hits"] == found["asked"]
