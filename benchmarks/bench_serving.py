# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` alone, with LoRACache, and with LMCache where it is installed: requests that arrive beside others.

Three workloads, two requests at a time, on a 53 M model whose blocks hold less than half of what is asked for:

- prefixes: vLLM's own `vllm bench serve --dataset-name prefix_repetition`, 6 prefixes of 3,072 tokens, each four times.
- turns: 6 conversations of four turns over documents of 2,048 tokens; each turn repeats all before it.
- behind: a prompt of 3,072 tokens that is cached arrives 0.2 s after one that is not, which is computed meanwhile. Here
  stands a fourth server too, with a connector that never has the engine's loop wait for the answer to a lookup.

The servers stand side by side, and take turns: each round of each workload runs on one after another, the first
one another every round, with prompts that none of them has seen. LMCache runs as its documentation says for many
engines (a server of its own, LRU, as much memory as ours). It needs packages that vLLM and we do not: BENCH_LMCACHE
names the `bin` folder of a second virtual environment with vLLM and LMCache 0.5.6; without it that row is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from socket import create_server
from typing import Any, NamedTuple

from common import Row, daemon, ratio_row, row, work_folder
from engine_process import environment
from make_model import ModelSpec, make_model

MODEL = ModelSpec(
    hidden=768,
    layers=8,
    heads=12,
    kv_heads=4,
    head_dim=64,
    intermediate=2048,
    vocab=1024,
    max_positions=16384,
    dtype="bfloat16",
)
BLOCK, BLOCKS = 128, 66  # 8,448 tokens
PREFIXES, PREFIX, SUFFIX, OUTPUT = 6, 3072, 128, 32
CONVERSATIONS, TURNS, DOCUMENT, QUESTION = 6, 4, 2048, 128
AT_ONCE = 2
KNOWN, AFTER_S = 4, 0.2  # prompts, of which the blocks hold two
IMPATIENT = "LoRACache without waiting"
MEMORY_GIB = 4
THROUGHPUT, TTFT = 1.2, 0.75  # asked of us beside LMCache
_START_S = 300.0


class Load(NamedTuple):
    """What a workload got: requests a second, and the median time to the first token in milliseconds."""

    throughput: float
    ttft: float


def run(quick: bool) -> list[Row]:
    """See the module's docstring."""
    part, rounds = (3, 1) if quick else (1, 5)
    found: dict[tuple[str, str], list[Load]] = {}
    with work_folder() as folder, contextlib.ExitStack() as stack:
        model = Path(tempfile.gettempdir()) / f"loracache-serving-{os.getuid()}"
        if not (model / "tokenizer.json").exists():
            make_model(model, MODEL)
        servers = list(_servers(folder, model, stack))
        for server in servers:
            server.turns(-1, CONVERSATIONS)  # what the first requests of a process pay for
        for number in range(rounds):
            first = number % len(servers)
            for server in (*servers[first:], *servers[:first]):
                for workload in (server.behind, server.prefixes, server.turns)[: 1 if server.name == IMPATIENT else 3]:
                    load = workload(number, part)
                    found.setdefault((server.name, workload.__name__), []).append(load)
                    print(f"round {number + 1}, {workload.__name__}, {server.name}: {load}", flush=True)  # takes long
    return list(_rows(found))


def _rows(found: dict[tuple[str, str], list[Load]]) -> Iterator[Row]:
    for (name, workload), loads in found.items():
        if workload != "behind":
            yield row(f"{workload}, {name}: throughput", "requests/s", [load.throughput for load in loads])
        yield row(f"{workload}, {name}: median TTFT", "ms", [load.ttft for load in loads])
    for (name, workload), theirs in found.items():
        if name == "LoRACache":
            continue
        ours = found["LoRACache", workload]
        goals = ({"at_least": THROUGHPUT}, {"at_most": TTFT}) if name == "LMCache" else ({}, {})
        if workload != "behind":
            upper, lower = [load.throughput for load in ours], [load.throughput for load in theirs]
            yield ratio_row(f"{workload}: throughput, LoRACache / {name}", upper, lower, **goals[0])
        upper, lower = [load.ttft for load in ours], [load.ttft for load in theirs]
        yield ratio_row(f"{workload}: median TTFT, LoRACache / {name}", upper, lower, **goals[1])


# -- servers ----------


class Server:
    """`vllm serve` by the programs in the folder `programs`, listening already."""

    def __init__(self, name: str, programs: Path, folder: Path, model: Path, connector: dict[str, Any] | None) -> None:
        self.name = name
        self._programs = programs
        self._folder = folder
        self._model = model
        self._port = _free_port()
        arguments = [
            str(programs / "vllm"), "serve", str(model), "--served-model-name", "model", "--host", "127.0.0.1",
            "--port", str(self._port), "--dtype", "bfloat16", "--max-model-len", "8192", "--max-num-seqs", "8",
            "--block-size", str(BLOCK), "--num-gpu-blocks-override", str(BLOCKS), "--disable-uvicorn-access-log",
        ]  # fmt: skip
        if connector:
            arguments += ["--kv-transfer-config", json.dumps({"kv_role": "kv_both"} | connector)]
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                arguments, cwd=folder, env=_environment(), stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Shut it down, and all its processes."""
        _end(self._process)

    def prefixes(self, number: int, part: int) -> Load:
        """A round of `vllm bench serve` with prefixes of its own."""
        name = f"{self.name}-{number}.json"
        prefixes = PREFIXES // part
        arguments = [
            str(self._programs / "vllm"), "bench", "serve", "--host", "127.0.0.1", "--port", str(self._port),
            "--backend", "openai", "--model", "model", "--tokenizer", str(self._model), "--dataset-name",
            "prefix_repetition", "--prefix-repetition-num-prefixes", str(prefixes), "--prefix-repetition-prefix-len",
            str(PREFIX), "--prefix-repetition-suffix-len", str(SUFFIX), "--prefix-repetition-output-len", str(OUTPUT),
            "--num-prompts", str(4 * prefixes), "--max-concurrency", str(AT_ONCE), "--seed", str(1000 + number),
            "--ignore-eos", "--disable-tqdm", "--save-result", "--result-filename", name,
        ]  # fmt: skip
        done = subprocess.run(
            arguments, cwd=self._folder, env=_environment(), capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
        result = json.loads((self._folder / name).read_text())
        if result["completed"] != 4 * prefixes:
            raise RuntimeError(f"{result['completed']} of {4 * prefixes} requests were answered: {done.stdout[-2000:]}")
        return Load(result["request_throughput"], result["median_ttft_ms"])

    def turns(self, number: int, part: int) -> Load:
        """A round of conversations: each user speaks once before one speaks again."""
        rng = random.Random(f"turns {self.name} {number}")
        count = CONVERSATIONS // part
        histories = [_prompt(rng, DOCUMENT) for _ in range(count)]
        times: list[float] = []
        began = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in range(TURNS):
                for history in histories:
                    history += _prompt(rng, QUESTION)
                for history, (ttft, answer) in zip(histories, pool.map(self._complete, histories), strict=True):
                    history += answer
                    times.append(1e3 * ttft)
        return Load(count * TURNS / (time.perf_counter() - began), statistics.median(times))

    def behind(self, number: int, part: int) -> Load:
        """A round of cached prompts that arrive behind others."""
        rng = random.Random(f"behind {self.name} {number}")
        known = [_prompt(rng, PREFIX + 1) for _ in range(KNOWN)]
        times = []
        with ThreadPoolExecutor(1) as pool:
            for prompt in known:
                self._complete(prompt)
            for prompt in known[: KNOWN // part]:
                cold = pool.submit(self._complete, _prompt(rng, PREFIX))
                time.sleep(AFTER_S)
                times.append(1e3 * self._complete(prompt)[0])
                cold.result()
        return Load(0.0, statistics.median(times))

    def _complete(self, prompt: list[int]) -> tuple[float, list[int]]:
        """Seconds to the first token, and the answer."""
        body = {"model": "model", "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True,
                "stream": True, "return_token_ids": True}  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        began, first = time.perf_counter(), 0.0
        answer: list[int] = []
        with urllib.request.urlopen(request, timeout=300) as stream:
            for line in stream:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - began
                    answer += json.loads(line[6:])["choices"][0].get("token_ids") or []
        if len(answer) != OUTPUT:
            raise RuntimeError(f"{self.name} answered {len(answer)} of {OUTPUT} tokens")
        return first, answer

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health") as answer,
            ):
                if answer.status == 200:
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not answer: {self._log.read_text()[-3000:]}")
            time.sleep(0.5)


def _prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(300, 1000) for _ in range(length)]


def _servers(folder: Path, model: Path, stack: contextlib.ExitStack) -> Iterator[Server]:
    """All of them, started; `stack` ends them."""
    here = Path(sys.executable).parent
    cache = stack.enter_context(daemon(folder, memory=f"{MEMORY_GIB}GiB"))
    ours = {
        "kv_connector": "LoRACacheConnector",
        "kv_connector_module_path": "loracache.connectors.vllm",
        "kv_connector_extra_config": {"server": cache.url},
    }
    impatient = {"kv_connector": "ImpatientConnector", "kv_connector_module_path": "impatient_connector"}
    started = [
        partial(Server, "vLLM alone", here, folder, model, None),
        partial(Server, "LoRACache", here, folder, model, ours),
        partial(Server, IMPATIENT, here, folder, model, ours | impatient),
    ]
    if other := os.environ.get("BENCH_LMCACHE"):
        theirs = stack.enter_context(_lmcache(Path(other), folder))
        started.append(partial(Server, "LMCache", Path(other), folder, model, theirs))
    for start in started:
        server = start()
        stack.callback(server.close)
        yield server


@contextlib.contextmanager
def _lmcache(programs: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """A running LMCache server; how vLLM is to be told of it."""
    port = _free_port()
    arguments = [
        str(programs / "lmcache"), "server", "--host", "127.0.0.1", "--port", str(port), "--http-port",
        str(_free_port()), "--l1-size-gb", str(MEMORY_GIB), "--chunk-size", "256", "--supported-transfer-mode", "auto",
        "--shm-name", f"bench-{os.getpid()}", "--no-l1-use-lazy", "--eviction-policy", "LRU",
    ]  # fmt: skip
    with (folder / "lmcache.log").open("wb") as log:
        cache = subprocess.Popen(
            arguments, env=_environment(), cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        time.sleep(10)
        yield {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
        }
    finally:
        _end(cache)


def _environment() -> dict[str, str]:
    here = str(Path(__file__).parent)  # of the impatient connector
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    return environment({"LMCACHE_TRACK_USAGE": "false", "PYTHONPATH": path})


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)


def _free_port() -> int:
    with create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
