# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI server in a process of its own, for the end-to-end tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.e2e.engine_log import weights_are_known


class Server:
    """vLLM's OpenAI server on a port of its own."""

    def __init__(self, log: Path, model: Path, transfer: dict[str, Any], *more: str) -> None:
        self._log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name",
            "base", "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "1024",
            "--max-num-seqs", "8", "--enable-lora", "--max-loras", "4", "--max-lora-rank", "64",
            "--kv-transfer-config", json.dumps(transfer), *more,
        ]  # fmt: skip
        env = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)

    def ready(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()[-3000:]
        try:
            return self.call("/health", None)[0] == 200 and weights_are_known(self._log.read_text(errors="replace"))
        except OSError:
            return False

    def call(self, path: str, body: Any) -> tuple[int, Any]:
        """(status, answer)"""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode() if body is not None else None,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
                is_json = "json" in (answer.headers.get("Content-Type") or "")
                return answer.status, json.loads(text) if text and is_json else text.decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, model: str, tokens: list[int], count: int = 8) -> tuple[int, Any]:
        """(status, token ids or the error)"""
        body = {
            "model": model, "prompt": tokens, "max_tokens": count, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        status, answer = self.call("/v1/completions", body)
        return status, answer["choices"][0]["token_ids"] if status == 200 else answer

    def stream(self, model: str, tokens: list[int], count: int) -> Iterator[list[int]]:
        """Token ids as they come."""
        body = {
            "model": model, "prompt": tokens, "max_tokens": count, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "stream": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:])["choices"]
                    if choices and choices[0]["token_ids"]:
                        yield choices[0]["token_ids"]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
