# SPDX-License-Identifier: Apache-2.0
"""An engine with many LoRA adapters in a process of its own: loads as JSON lines on standard input, times as JSON lines
on standard output. The demo and the LoRA benchmark use it:

    with LoRAEngine(arguments, folder, log) as engine:
        answer = engine.run(requests, clients=16)

A load is {"requests": [[adapter or null, prompt tokens, output tokens, at], ...], "clients": n}: `clients` of them run
at a time, in order; where clients is 0 each is sent at its own time `at` (seconds). Prompt tokens: how many, or which.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from engine_process import EngineError, environment

__all__ = ["LoRAEngine"]

_END_S = 120.0


class LoRAEngine:
    """A running engine. arguments: vLLM's AsyncEngineArgs. folder: of the adapters a0, a1, ... (lora_adapters.py)."""

    def __init__(
        self, arguments: Mapping[str, Any], folder: Path, log: Path, more: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        command = [sys.executable, str(Path(__file__).resolve()), json.dumps(arguments), str(folder)]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(more or {}),
                text=True,
            )
        try:
            self.server = str(self._answer()["server"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LoRAEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, requests: list[list[Any]], clients: int) -> dict[str, Any]:
        """{"seconds": of all, "times": [[to the first token, to the last, prompt tokens that were not computed], ...]},
        and what a worker extension says."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"requests": requests, "clients": clients}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Shut the engine down."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"the engine ended: {self._log.read_text(errors='replace')[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


# -- the engine's side ----------


async def main() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints belongs into the log
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**json.loads(sys.argv[1])))
    folder = sys.argv[2]
    print(json.dumps({"server": _private_server(engine)}), file=answers, flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await _run(engine, folder, json.loads(line))), file=answers, flush=True)
    engine.shutdown()


def _private_server(engine: Any) -> str:
    """The address of the engine's own daemon, "" where it has none."""
    transfer = engine.vllm_config.kv_transfer_config
    if transfer is None or "server" in transfer.kv_connector_extra_config:
        return ""
    from loracache.connectors.vllm.common.private import private_server

    return str(private_server(transfer.engine_id, transfer.kv_connector_extra_config.get("disk_path", "")))


async def _run(engine: Any, folder: str, load: dict[str, Any]) -> dict[str, Any]:
    requests, clients = load["requests"], load["clients"]
    measured = bool(engine.vllm_config.parallel_config.worker_extension_cls)
    if measured:
        await engine.collective_rpc("take_times")
    times: list[tuple[float, float, int] | None] = [None] * len(requests)
    started = time.perf_counter()
    waiting = iter(range(len(requests)))

    async def client() -> None:
        for number in waiting:
            times[number] = await _ask(engine, folder, requests[number])

    async def timed(number: int) -> None:
        await asyncio.sleep(requests[number][3])
        times[number] = await _ask(engine, folder, requests[number])

    if clients:
        await asyncio.gather(*(client() for _ in range(clients)))
    else:
        await asyncio.gather(*(timed(number) for number in range(len(requests))))
    spent = time.perf_counter() - started
    taken = (await engine.collective_rpc("take_times"))[0] if measured else {}
    return {"seconds": spent, "times": times} | taken


async def _ask(engine: Any, folder: str, request: list[Any]) -> tuple[float, float, int]:
    """(seconds to the first token, to the last, prompt tokens that were not computed)"""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    adapter, tokens, count, _ = request
    lora = LoRARequest(f"a{adapter}", adapter + 1, f"{folder}/a{adapter}") if adapter is not None else None
    if isinstance(tokens, int):
        tokens = [random.randrange(300, 1000) for _ in range(tokens)]
    prompt = TokensPrompt(prompt_token_ids=tokens)
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    started, first, cached = time.perf_counter(), 0.0, 0
    async for output in engine.generate(prompt, params, f"r{random.getrandbits(64):x}", lora_request=lora):
        first = first or time.perf_counter() - started
        cached = output.num_cached_tokens or 0
    return first, time.perf_counter() - started, cached


if __name__ == "__main__":
    asyncio.run(main())
