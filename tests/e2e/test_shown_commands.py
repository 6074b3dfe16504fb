# SPDX-License-Identifier: Apache-2.0
"""What README.md and docs/*.md show that needs a vLLM does what they say. tests/unit/docs has the rest; what stands for
what is in `Shell.stands_for` of tests/documented.py.
"""

from __future__ import annotations

import json
import shlex
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHUNK = 1024  # tokens of the tiny model that take 1 MiB
START_S = 420.0
TEXT = "the quick brown fox jumps over the lazy dog and looks for what it has seen before " * 45 + "and so on"


def listens(said: str) -> bool:
    return "listening on" in said


class Engine:
    """An engine that a shell starts as it is shown."""

    def __init__(self, shell: Any, command: str) -> None:
        self._shell = shell
        self.process = shell.start(command, self._healthy, START_S)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What it answers."""
        data = json.dumps(body).encode() if body is not None else None
        url = self._shell.real(f"http://localhost:8000{path}")
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"{}")

    def complete(self, model: str, prompt: str) -> int:
        """How many tokens the prompt has."""
        answer = self.ask("/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 8})
        tokens: int = answer["usage"]["prompt_tokens"]
        return tokens

    def _healthy(self, said: str) -> bool:
        try:
            return bool(self.ask("/health") == {})
        except OSError:
            return False


def lookup(shell: Any, words: str) -> dict[str, Any]:
    """What `loracache lookup` finds; 3 is its exit code for nothing."""
    said = shell.run(f"LORACACHE_SOCKET=/run/loracache.sock loracache lookup --json {words} || [[ $? == 3 ]]")
    found: dict[str, Any] = json.loads(said or '{"hits": 0}')
    return found


def test_a_served_prompt_is_found_by_its_text(
    documented: Any, module_shell: Callable[..., Any], tiny: Path, eventually: Any
) -> None:
    """On the engine and the daemon of the first page."""
    adapter = str(tiny / "adapters" / "adapter-0")
    lora = ["--enable-lora", "--lora-modules", f"named={adapter}"]  # beyond what is shown
    shell = module_shell(model=shlex.join([str(tiny / "model"), *lora]))
    shell.start(documented.shown("README.md", "loracache serve --socket"), listens)
    shell.run(f"loracache adapters add --socket /run/loracache.sock named {shlex.quote(adapter)}")
    command = documented.shown("README.md", "vllm serve")
    assert command == documented.shown("vllm.md", "vllm serve")
    engine = Engine(shell, command)
    (shell.folder / "prompt.txt").write_text(TEXT)
    for model in ("llama", "named"):
        words = f'--engine http://localhost:8000 --prompt "$(cat prompt.txt)" --model {model}'
        assert lookup(shell, words)["hits"] == 0
        tokens = engine.complete(model, TEXT)
        assert tokens > CHUNK
        found = eventually(
            lambda words=words: (seen := lookup(shell, words))["hits"] and seen, f"{model}'s prompt is found", 60
        )
        assert found["tokens"] == tokens // CHUNK * CHUNK
        assert found["hits"] == found["asked"]
    shell.stop(engine.process)


@pytest.fixture
def with_pool(documented: Any, module_shell: Callable[..., Any], module_redis: Any, tiny: Path) -> Any:
    """A shell beside a daemon with all tiers, into which an adapter was taken; all as shown."""
    shell = module_shell(redis=module_redis().url, model=shlex.quote(str(tiny / "model")))
    shell.daemon = shell.start(documented.shown("README.md", "loracache serve --http"), listens)
    shutil.copytree(tiny / "adapters" / "adapter-0", shell.folder / "peft-folder")
    shell.run("".join(documented.shown("lora.md", "loracache adapters add").splitlines(keepends=True)[:2]))
    return shell


def test_what_is_shown_to_watch_and_steer_works_beside_an_engine_with_a_pool(
    documented: Any, with_pool: Any, eventually: Any
) -> None:
    """One engine for all of it: adapters by name, the verbs of the first page, those of the control API."""
    shell = with_pool
    engine = Engine(shell, documented.shown("lora.md", "vllm serve"))
    for name, text in (("prompt.txt", TEXT), ("system.txt", TEXT[4:])):
        (shell.folder / name).write_text(text)
        for model in ("llama", "team/assistant"):
            engine.complete(model, text)
            words = f'--engine http://localhost:8000 --prompt "$(cat {name})" --model {model}'
            eventually(lambda words=words: lookup(shell, words)["hits"], f"{name} is stored for {model}", 60)
    tokens = engine.ask("/tokenize", {"model": "llama", "prompt": TEXT})["tokens"]
    (shell.folder / "prompt.json").write_text(json.dumps(tokens))
    shell.run("loracache flush --socket /run/loracache.sock")
    said = shell.run(documented.shown("README.md", "loracache top"))
    assert "disk" in said
    engine.complete("llama", TEXT[8:])  # nobody looks this one up
    objects = "loracache objects --socket /run/loracache.sock --model llama --tier cpu --json"
    eventually(lambda: 0 in [each["hits"] for each in json.loads(shell.run(objects))], "it is stored", 60)
    said = shell.run(documented.shown("control-api.md", "loracache lookup"))
    assert "exit code" not in said
    shell.stop(engine.process)
    assert shell.stop(shell.daemon) == 0
    assert "faults left: 0" in shell.run(documented.shown("README.md", "loracache check"))
