# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine in a process of its own, so that a program can start it, ask it and start it again.

    with EngineProcess({"model": "/path/to/model", "max_model_len": 4200}, log=Path("engine.log")) as engine:
        answer = engine.ask(tokens)
        print(answer.ttft, answer.cached, answer.tokens)

`make demo` and `make bench` use it. What vLLM prints goes to the log. Run as a script this file is the engine: it reads
commands as JSON lines from standard input and answers on standard output, one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Adapter", "Answer", "EngineError", "EngineProcess", "cores", "environment"]

_START_S = 600.0
_ASK_S = 600.0
_QUIT_S = 60.0


class EngineError(RuntimeError):
    """The engine ended, answered an error or did not answer; the message ends with the end of its log."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter as vLLM is asked for it: a name, a number of its own (1 or more) and a folder."""

    name: str
    id: int
    path: str


@dataclass(frozen=True, slots=True)
class Answer:
    """ttft: seconds from the request to its first token. cached: prompt tokens that were not computed."""

    tokens: list[int]
    cached: int
    ttft: float


def cores() -> list[int]:
    """The first two cores this process may use: left alone, vLLM computes on one core or on two, as it falls."""
    return sorted(os.sched_getaffinity(0))[:2]


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """What an engine's process gets: ours, and what keeps vLLM offline, small and on two cores."""
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores())),
        "VLLM_NO_USAGE_STATS": "1",
    }
    return defaults | dict(os.environ) | dict(extra)


class EngineProcess:
    """A running engine. `arguments` are vLLM's AsyncEngineArgs; `server` is the address of its private cache daemon, ""
    where it has none."""

    def __init__(
        self,
        arguments: Mapping[str, Any],
        *,
        log: Path,
        more: Mapping[str, str] | None = None,
        verbose: bool = False,
    ) -> None:
        self._log = log
        # A log that is watched goes to the terminal; else to a file, whose end is shown when something fails.
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if verbose else errors,
                env=environment(more or {}),
                text=True,
                start_new_session=True,  # one signal reaches all of the engine's processes
            )
        try:
            self.server: str = self._answer(_START_S)["server"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process, leader of a session with all of the engine's processes."""
        return self._process.pid

    def ask(self, tokens: Sequence[int], adapter: Adapter | None = None, *, max_tokens: int = 8) -> Answer:
        """Run one request, greedily, and wait for its end."""
        answer = self._call(
            "ask", tokens=list(tokens), adapter=asdict(adapter) if adapter else None, max_tokens=max_tokens
        )
        return Answer(answer["tokens"], answer["cached"], answer["ttft"])

    def reset_prefix_cache(self) -> None:
        """Wait for the stores, and have vLLM forget its own cached blocks, so that only LoRACache can answer."""
        if not self._call("reset")["done"]:
            raise EngineError("vLLM refuses to reset its prefix cache: its blocks stay in use")

    def close(self) -> None:
        """Shut the engine down; its private daemon writes to disk what is not there yet and ends by itself. Twice
        is once."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        if self._process.poll() is None:
            with contextlib.suppress(EngineError, subprocess.TimeoutExpired):
                self._send({"op": "quit"})
                self._process.wait(_QUIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_QUIT_S)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _call(self, operation: str, **fields: Any) -> dict[str, Any]:
        self._send({"op": operation} | fields)
        return self._answer(_ASK_S)

    def _send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineError(f"the engine ended\n{self._tail()}") from None

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while not select.select([self._process.stdout], [], [], 0.5)[0]:
            if self._process.poll() is not None:
                raise EngineError(f"the engine ended with {self._process.returncode}\n{self._tail()}")
            if time.monotonic() > deadline:
                raise EngineError(f"the engine did not answer within {seconds:.0f} s\n{self._tail()}")
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"the engine ended\n{self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"the engine answers: {answer['error']}\n{self._tail()}")
        return answer

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-60:]
        return "\n".join([f"--- end of {self._log} ---", *lines])


# -- the engine's side ----------


async def _ask(engine: Any, command: dict[str, Any], number: int) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    adapter = command["adapter"]
    lora = LoRARequest(adapter["name"], adapter["id"], adapter["path"]) if adapter else None
    params = SamplingParams(temperature=0, max_tokens=command["max_tokens"], ignore_eos=True)
    prompt = TokensPrompt(prompt_token_ids=command["tokens"])
    started = time.perf_counter()
    first, last = 0.0, None
    async for output in engine.generate(prompt, params, f"request-{number}", lora_request=lora):
        first = first or time.perf_counter() - started
        last = output
    if last is None:
        raise RuntimeError("vLLM ended the request without an answer")
    return {"tokens": list(last.outputs[0].token_ids), "cached": last.num_cached_tokens or 0, "ttft": first}


async def _serve(arguments: dict[str, Any], answers: Any) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    transfer = engine.vllm_config.kv_transfer_config
    server = ""
    if transfer is not None and "server" not in transfer.kv_connector_extra_config:
        from loracache.connectors.vllm.common.private import private_server

        server = private_server(transfer.engine_id, transfer.kv_connector_extra_config.get("disk_path", ""))
    answer({"server": server})
    loop = asyncio.get_running_loop()
    number = 0
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        number += 1
        if command["op"] == "quit":
            break
        try:
            if command["op"] == "ask":
                answer(await _ask(engine, command, number))
            else:
                await engine.pause_generation(mode="wait", clear_cache=False)  # until nothing is on its way any more
                await engine.resume_generation()
                answer({"done": bool(await engine.reset_prefix_cache())})
        except (RuntimeError, ValueError) as error:
            answer({"error": repr(error)})
    engine.shutdown()


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints belongs into the log, not between the answers
    asyncio.run(_serve(json.loads(sys.argv[1]), answers))


if __name__ == "__main__":
    _main()
