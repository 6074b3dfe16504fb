# SPDX-License-Identifier: Apache-2.0
"""Handles for the engines that the tests run (`host.py`), and for the process that they are forked from."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.engine_log import weights_are_known
from tests.waiting import eventually

FORK_SERVER = Path(__file__).with_name("fork_server.py")


@dataclass(frozen=True)
class Adapter:
    """A LoRA request's name, id and folder."""

    name: str
    id: int
    path: str
    inplace: bool = False


@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    tokens: list[int]
    cached: int
    ttft: float
    reason: str
    logprobs: int = 0
    error: str = ""
    aborted: bool = False
    why: str = ""


class ForkServer:
    """The process that engines are forked from (fork_server.py). environment: what Python reads when it starts."""

    def __init__(self, log: Path, environment: dict[str, str] | None = None) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = _environment(environment)
        with log.open("wb") as output, theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(FORK_SERVER), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )

    def fork(self, arguments: dict[str, Any], environment: dict[str, str], descriptors: list[int]) -> int:
        """A host's process id. descriptors: of its input, its answers and its log."""
        request = json.dumps({"arguments": arguments, "environment": environment})
        socket.send_fds(self._channel, [request.encode()], descriptors)
        return int(self._channel.recv(64))

    def close(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait(30)


def _environment(more: dict[str, str] | None) -> dict[str, str]:
    paths = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    return os.environ | {"PYTHONPATH": paths} | (more or {})


class Engine:
    """One vLLM engine in processes of its own (a session: signals reach all of them)."""

    def __init__(
        self, server: ForkServer, log: Path, arguments: dict[str, Any], environment: dict[str, str] | None = None
    ) -> None:
        self._log = log
        commands, mine = os.pipe()
        answers, theirs = os.pipe()  # not standard output: whatever vLLM prints there, it prints into our lines
        with log.open("wb") as output:
            self.pid = server.fork(arguments, _environment(environment), [commands, theirs, output.fileno()])
        self._handle = os.pidfd_open(self.pid)
        os.close(commands)
        os.close(theirs)
        self._commands, self._stream = os.fdopen(mine, "w"), os.fdopen(answers)
        self._calls = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._arrived = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_ready(self, seconds: float = 300) -> Engine:
        self._wait(0, seconds)
        eventually(lambda: weights_are_known(self.log()), "its weights are known", seconds)
        return self

    def start(
        self,
        tokens: list[int],
        *,
        lora: Adapter | None = None,
        salt: str = "",
        max_tokens: int = 8,
        prompt_logprobs: int | None = None,
        audio: int | None = None,
        uuid: str = "",
        image: int | None = None,
        hints: Sequence[tuple[str, dict[str, Any]]] = (),
        wishes: dict[str, Any] | None = None,
    ) -> int:
        """Send a request; `result` waits for its answer. audio: which tune its audio is, uuid: what it is called,
        image: which picture its image is.
        hints: types and payloads of its kv_hints (vLLM 0.32 on). wishes: its kv_transfer_params."""
        call = next(self._calls)
        self._send(
            {
                "op": "generate", "call": call, "id": f"r{call}", "tokens": tokens, "salt": salt,
                "max_tokens": max_tokens,
                "lora": vars(lora) if lora else None, "prompt_logprobs": prompt_logprobs, "audio": audio, "uuid": uuid,
                "image": image,
                "hints": hints, "wishes": wishes,
            }
        )  # fmt: skip
        return call

    def result(self, call: int, seconds: float = 180) -> Answer:
        answer = self._wait(call, seconds)
        return Answer(
            answer.get("tokens", []),
            answer.get("cached") or 0,
            answer.get("ttft") or 0.0,
            answer.get("reason", ""),
            answer.get("logprobs", 0),
            answer.get("error", ""),
            answer.get("aborted", False),
            answer.get("why", ""),
        )

    def ask(self, tokens: list[int], **options: Any) -> Answer:
        """Run one request; fails where the engine answers an error."""
        answer = self.result(self.start(tokens, **options))
        assert not answer.error, answer.error
        return answer

    def abort(self, call: int) -> None:
        self._send({"op": "abort", "target": call})

    def reset(self, *, connector: bool = False) -> bool:
        """Forget the engine's own prefix cache."""
        call = next(self._calls)
        self._send({"op": "reset", "call": call, "connector": connector})
        return bool(self._wait(call, 60).get("done"))

    def settle(self, daemon: Any) -> None:
        """Wait until all that was computed is stored (only then are its blocks free) and written to every tier. What
        the engine's own prefix cache holds is forgotten.
        """
        self.pause(mode="wait", clear=False)
        assert self.reset()
        with daemon.client() as client:
            client.flush()

    def pause(self, *, mode: str = "abort", clear: bool = True) -> None:
        """Pause and resume; with "wait" only once nothing is on its way any more."""
        call = next(self._calls)
        self._send({"op": "pause", "call": call, "mode": mode, "clear": clear})
        answer = self._wait(call, 60)
        assert "error" not in answer, answer["error"]

    def sleep(self, level: int = 1) -> None:
        """Sleep and wake up. On a CPU vLLM only pauses and clears its caches."""
        call = next(self._calls)
        self._send({"op": "sleep", "call": call, "level": level})
        answer = self._wait(call, 60)
        assert "error" not in answer, answer["error"]

    def add_lora(self, lora: Adapter) -> str:
        """Why vLLM would not take it, or ""."""
        call = next(self._calls)
        self._send({"op": "add_lora", "call": call, "lora": vars(lora)})
        return str(self._wait(call, 60).get("error", ""))

    def pin_lora(self, adapter: int) -> str:
        """Why vLLM would not pin it, or ""."""
        call = next(self._calls)
        self._send({"op": "pin_lora", "call": call, "id": adapter})
        return str(self._wait(call, 60).get("error", ""))

    def rpc(self, method: str, **arguments: Any) -> Any:
        """What a method of the (first) worker answers."""
        call = next(self._calls)
        self._send({"op": "rpc", "call": call, "method": method, "kwargs": arguments})
        answer = self._wait(call, 60)
        assert "error" not in answer, answer["error"]
        return answer["done"][0]

    def preemptions(self) -> int:
        """How many requests lost their blocks to others so far."""
        return self.counter("num_preemptions")

    def counter(self, name: str) -> int:
        """One of vLLM's counters, or of ours beside them, over all labels."""
        call = next(self._calls)
        self._send({"op": "counter", "call": call, "name": name})
        return int(self._wait(call, 60)["done"])

    def signal_all(self, number: int) -> None:
        """Signal every process of the engine."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """End every process of the engine at once."""
        self.signal_all(signal.SIGKILL)
        assert self._ended_within(30)

    def quit(self) -> None:
        """Have it end; nobody waits."""
        with contextlib.suppress(OSError, ValueError):
            self._send({"op": "quit"})

    def close(self) -> None:
        self.quit()
        self._ended_within(40)
        with contextlib.suppress(ProcessLookupError):
            self.signal_all(signal.SIGKILL)
        self._ended_within(30)
        with contextlib.suppress(OSError):
            self._commands.close()
        self._reader.join(30)
        self._stream.close()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _ended_within(self, seconds: float) -> bool:
        return self._handle < 0 or bool(select.select([self._handle], [], [], seconds)[0])

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def alive(self) -> bool:
        return not self._ended_within(0)

    def _send(self, command: dict[str, Any]) -> None:
        self._commands.write(json.dumps(command) + "\n")
        self._commands.flush()

    def _read(self) -> None:
        for line in self._stream:
            answer = json.loads(line)
            with self._arrived:
                self._answers[answer["call"]] = answer
                self._arrived.notify_all()
        with self._arrived:
            self._ended = True
            self._arrived.notify_all()

    def _wait(self, call: int, seconds: float) -> dict[str, Any]:
        with self._arrived:
            found = self._arrived.wait_for(lambda: call in self._answers or self._ended, seconds)
            if call in self._answers:
                return self._answers.pop(call)
        raise AssertionError(f"engine {'ended' if found else 'did not answer'}: {self.log()[-3000:]}")
