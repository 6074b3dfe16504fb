# SPDX-License-Identifier: Apache-2.0
"""What README.md and docs/*.md show, as tests run it: every fenced block, exactly as it stands there.

`shown` is a block's text. `Shell` runs it in a folder of its own; `Shell.stands_for` is all that differs there: places,
ports, sizes, the model. NOT_RUN says which blocks no test runs, and why; `tests/unit/docs` holds that all others are.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {
    ("README.md", "   vLLM EngineCore"): "a drawing, not a command",
    (
        "README.md",
        "make demo",
    ): "minutes each, and `make test` runs this test; tests/unit/test_docs.py finds the targets",
}
RUN_ELSEWHERE = {
    "python-api.md": "tests/unit/test_python_api.py runs all examples of the page, in their order",
}
_FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
_START_S, _RUN_S, _END_S = 60.0, 120.0, 60.0


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. number: which one of its page."""

    page: str
    number: int
    language: str
    text: str


def blocks() -> list[Block]:
    """All of them, but for what a site draws."""
    found = [
        Block(page.name, number, language, text)
        for page in PAGES
        for number, (language, text) in enumerate(_FENCE.findall(page.read_text()))
    ]
    return [block for block in found if block.language != "mermaid"]


def block(page: str, words: str) -> Block:
    """The one block of a page with a line that begins with `words`."""
    found = [each for each in blocks() if each.page == page and f"\n{words}" in f"\n{each.text}"]
    assert len(found) == 1, f"{page} has {len(found)} blocks with a line that begins with {words!r}, not one"
    return found[0]


def shown(page: str, words: str) -> str:
    """Its text. Called with two literals: so tests/unit/docs knows what is run."""
    return block(page, words).text


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Shell:
    """Runs what is shown.

    folder: a short path, since it holds sockets; redis: URL of a server; model: a folder, quoted, and more options of
    `vllm serve`.
    """

    def __init__(self, folder: Path, redis: str = "", model: str = "") -> None:
        self.folder = folder
        self.rest, self.engine = _free_port(), _free_port()
        self.stands_for = {
            "/run/": f"{folder}/",
            "/var/cache/": f"{folder}/cache/",
            "/etc/": f"{folder}/etc/",
            "/path/to/": f"{folder}/",
            ":9400": f":{self.rest}",
            ":8000": f":{self.engine}",
            "redis://127.0.0.1:6379": redis,
            "64GiB": "64MiB",
            "500GiB": "512MiB",
            "8GiB": "64MiB",
            "vllm serve MODEL": f"vllm serve {model} --served-model-name llama --host 127.0.0.1 --port {self.engine} "
            "--dtype float32 --max-num-seqs 8 --enforce-eager",
            "curl -s": "curl --fail-with-body -sS",  # else a refusal would pass for a success
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def real(self, text: str) -> str:
        """What is run where `text` is shown."""
        words = sorted(self.stands_for, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, words)), lambda found: self.stands_for[found[0]], text)

    def run(self, text: str) -> str:
        """What commands print. Each has to end with 0; none gets an answer from a terminal."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.real(text)],
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_RUN_S,
            check=False,
        )
        assert done.returncode == 0, f"{self.real(text)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, text: str, ready: Callable[[str], object], seconds: float = _START_S) -> subprocess.Popen[bytes]:
        """One command that goes on, as a process, once what it has printed so far is `ready`."""
        log = self.folder / f"started-{len(self._started)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", self.real(text)],  # which becomes the command, there is but one
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._started.append(process)
        deadline = time.monotonic() + seconds
        while True:
            said = log.read_text(errors="replace")
            if ready(said):
                return process
            assert process.poll() is None, f"{self.real(text)} ended with {process.returncode}: {said[-4000:]}"
            assert time.monotonic() < deadline, f"{self.real(text)} is not ready: {said[-4000:]}"
            time.sleep(0.05)

    def stop(self, process: subprocess.Popen[bytes]) -> int:
        """SIGTERM; its exit code, once nothing of it is left."""
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait(_END_S)

    def close(self) -> None:
        """End what still goes on."""
        for process in self._started:
            if process.poll() is None:
                self.stop(process)

    def _environment(self) -> dict[str, str]:
        """This environment's commands first, and no settings of whoever runs the tests."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LORACACHE_")}
        return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
