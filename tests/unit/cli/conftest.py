# SPDX-License-Identifier: Apache-2.0
"""`loracache` as its users run it: in this process for the many cases, as a process of its own where that matters."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loracache import CacheClient, Namespace, chunk_keys
from loracache.keys import salt_digest

CHUNK, SIZE = 4, 1500


@pytest.fixture(autouse=True)
def _no_settings_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("LORACACHE_") or name.lower().endswith("_proxy") or name == "VLLM_API_KEY":
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def running(module_daemon: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return module_daemon(memory="16MiB", page_size="4KiB", disk_path=tmp_path_factory.mktemp("disk"), disk="64MiB")


@pytest.fixture
def client(running: Any) -> Iterator[CacheClient]:
    with CacheClient(running.url) as made:
        yield made


@pytest.fixture
def cli(running: Any, loracache: Callable[..., Any]) -> Callable[..., Any]:
    """cli("evict", "--key", ..., stdin="") runs it on `running`, or on the daemon at `socket`, without a terminal."""
    return lambda *arguments, **more: loracache(*arguments, **{"socket": running.socket} | more)


@pytest.fixture
def refused(cli: Any) -> Callable[..., str]:
    """refused("pin", "--ttl", -1) is wrong usage: exit code 2, nothing printed; answers the message, in one line."""

    def run(*arguments: object, **more: Any) -> str:
        done = cli(*arguments, **more)
        assert (done.code, done.out) == (2, ""), done
        return " ".join(done.err.replace("│", " ").split())

    return run


@pytest.fixture
def prompt(client: CacheClient) -> Callable[..., tuple[list[int], list[bytes]]]:
    """prompt(chunks, model=, adapter=, salt=) stores a prompt's KV; answers its token ids and keys."""

    def store(
        chunks: int = 3,
        model: str = "model",
        adapter: str = "",
        salt: str | None = None,
        size: int = SIZE,
        of: CacheClient = client,
        content: Callable[[int], bytes] = bytes,
    ) -> tuple[list[int], list[bytes]]:
        tokens = [int.from_bytes(os.urandom(3), "little") for _ in range(chunks * CHUNK)]
        identity = (model.encode().hex() * 64)[:64]
        root = of.register(
            Namespace(identity, "bfloat16", "bytes", CHUNK, adapter=adapter, salt=salt_digest(salt)), [model]
        )
        keys = chunk_keys(root, tokens, CHUNK)
        with of.reserve(root, keys, [size] * chunks) as reservation:
            for position in range(chunks):
                reservation.write(position, content(size))
        assert reservation.causes == [""] * chunks
        return tokens, keys

    return store


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    """A PEFT folder that is like no other."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    name = "base_model.model.model.layers.0.q_proj.lora_{}.weight"
    numbers = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    shapes = {"A": (2, 16), "B": (16, 2)}
    save_file(
        {name.format(part): numbers.standard_normal(shape).astype(np.float32) for part, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def _hear_ctrl_c() -> None:
    """As in a shell: whoever runs the tests in the background has SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Process:
    """`loracache ...` as a process, on a terminal of its own where `terminal` is set."""

    def __init__(self, arguments: list[str], environment: dict[str, str], terminal: bool, done: Any) -> None:
        self._done = done
        command = [sys.executable, "-m", "loracache", *arguments]
        self.text = ""
        if terminal:
            self._master, end = pty.openpty()
            self.process = subprocess.Popen(
                command,
                stdin=end,
                stdout=end,
                stderr=end,
                env=environment,
                preexec_fn=_hear_ctrl_c,  # noqa: PLW1509 - one call, which takes no lock
            )
            os.close(end)
        else:
            self._master = -1
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
            )

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, wanted: str, seconds: float = 20.0) -> str:
        """All that the terminal showed, once `wanted` is in it."""
        deadline = time.monotonic() + seconds
        while wanted not in self.text:
            assert self._more(deadline - time.monotonic()), f"never said {wanted!r}: {self.text}"
        return self.text

    def forget(self) -> None:
        self.text = ""

    def end(self, seconds: float = 20.0) -> Any:
        if self._master < 0:
            out, err = self.process.communicate(timeout=seconds)
            return self._done(self.process.returncode, (out or b"").decode(), err.decode())
        deadline = time.monotonic() + seconds
        while self._more(deadline - time.monotonic()):
            pass
        return self._done(self.process.wait(seconds), self.text, "")

    def _more(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, seconds))[0]:
            return False
        try:
            read = os.read(self._master, 65536)
        except OSError:  # the last process on the terminal has ended
            return False
        self.text += read.decode(errors="replace")
        return bool(read)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        if self._master >= 0:
            os.close(self._master)


@pytest.fixture
def process(running: Any, done: Any) -> Iterator[Callable[..., Process]]:
    """process("top", terminal=True, socket=..., NAME=value) starts one; all end with the test."""
    started: list[Process] = []

    def start(*arguments: object, terminal: bool = False, socket: object = None, **more: str) -> Process:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LORACACHE_")}
        environment |= {
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path))),
            "LORACACHE_SOCKET": str(socket or running.socket), "COLUMNS": "160", "LINES": "50", "TERM": "xterm",
        }  # fmt: skip
        started.append(Process(list(map(str, arguments)), environment | more, terminal, done))
        return started[-1]

    yield start
    for each in started:
        each.close()
