# SPDX-License-Identifier: Apache-2.0
"""Runs one vLLM engine for the tests, in a process of its own (fork_server.py): commands as JSON lines on standard
input, answers on a file descriptor. Commands run side by side, so requests can overlap and be aborted.
"""

import asyncio
import json
import os
import sys
import time
from typing import Any, TextIO


async def generate(engine: Any, command: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    prompt = TokensPrompt(prompt_token_ids=command["tokens"])
    if command.get("salt"):
        prompt["cache_salt"] = command["salt"]
    if command.get("audio") is not None:
        import numpy as np

        pitches = np.random.RandomState(command["audio"]).uniform(100, 4000, 32000 // 800).repeat(800)
        tune = np.sin(np.cumsum(pitches) * 2 * np.pi / 16000).astype("float32")
        prompt["multi_modal_data"] = {"audio": [(tune, 16000)]}
        if command.get("uuid"):
            prompt["multi_modal_uuids"] = {"audio": [command["uuid"]]}
    if command.get("image") is not None:
        import numpy as np
        from PIL import Image

        pixels = np.random.RandomState(command["image"]).randint(0, 256, (56, 56, 3), dtype="uint8")
        prompt["multi_modal_data"] = {"image": [Image.fromarray(pixels)]}
    params = SamplingParams(temperature=0, max_tokens=command.get("max_tokens", 8), ignore_eos=True)
    # Set afterwards, it escapes the rule of SamplingParams that such a request reads no cache: the connector must see.
    params.prompt_logprobs = command.get("prompt_logprobs")
    lora = command.get("lora")
    request = (
        LoRARequest(lora["name"], lora["id"], lora["path"], load_inplace=lora.get("inplace", False)) if lora else None
    )
    more: dict[str, Any] = {"lora_request": request}
    if command.get("hints"):
        from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

        actions = [KvHintAction(f"a{at}", kind, "1", payload) for at, (kind, payload) in enumerate(command["hints"])]
        more["kv_hints"] = KvHintsEnvelope("1", command["id"], actions)
    if command.get("wishes"):
        params.extra_args = {"kv_transfer_params": command["wishes"]}
    started = time.perf_counter()
    first = None
    output: Any = None
    try:
        async for output in engine.generate(prompt, params, command["id"], **more):  # noqa: B007
            first = first or time.perf_counter() - started
    except Exception as error:
        if type(error).__name__ not in ("GenerationError", "RetryableRequestError", "VLLMValidationError"):
            raise
        return {"reason": "error", "why": str(error)}
    return {
        "tokens": list(output.outputs[0].token_ids),
        "cached": output.num_cached_tokens,
        "logprobs": len(output.prompt_logprobs or ()),
        "ttft": first,
        "reason": output.outputs[0].finish_reason,
    }


def counter(name: str) -> float:
    """One of vLLM's, or of ours beside them, so far."""
    from prometheus_client import REGISTRY

    found = (each for metric in REGISTRY.collect() for each in metric.samples)
    return float(sum(each.value for each in found if each.name == f"vllm:{name}_total"))


async def serve(arguments: dict[str, Any], answers: TextIO) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    tasks: dict[int, asyncio.Task[None]] = {}

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    async def run(command: dict[str, Any]) -> None:
        answer = {"call": command["call"]}
        try:
            match command["op"]:
                case "generate":
                    answer |= await generate(engine, command)
                case "reset":
                    done = await engine.reset_prefix_cache(
                        command.get("running", False), command.get("connector", False)
                    )
                    answer["done"] = bool(done)
                case "rpc":
                    answer["done"] = await engine.collective_rpc(command["method"], kwargs=command.get("kwargs"))
                case "sleep":
                    await engine.sleep(command["level"])
                    await engine.wake_up()
                case "counter":
                    answer["done"] = counter(command["name"])
                case "pause":
                    await engine.pause_generation(mode=command["mode"], clear_cache=command["clear"])
                    await engine.resume_generation()
                case "pin_lora":
                    answer["done"] = await engine.pin_lora(command["id"])
                case "add_lora":
                    from vllm.lora.request import LoRARequest

                    lora = command["lora"]
                    answer["done"] = await engine.add_lora(
                        LoRARequest(lora["name"], lora["id"], lora["path"], load_inplace=lora.get("inplace", False))
                    )
        except asyncio.CancelledError:
            answer["aborted"] = True
        except Exception as error:  # noqa: BLE001 - the test decides
            answer["error"] = repr(error)
        say(answer)

    say({"call": 0})
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        if command["op"] == "abort":
            tasks[command["target"]].cancel()
            continue
        if command["op"] == "quit":
            break
        tasks[command["call"]] = asyncio.create_task(run(command))
    engine.shutdown()


def run(arguments: dict[str, Any], descriptor: int) -> None:
    """Run an engine until its input ends. Its answers go to `descriptor`, which its other processes have no part in."""
    os.set_inheritable(descriptor, False)
    os.register_at_fork(after_in_child=lambda: os.close(descriptor))
    with os.fdopen(descriptor, "w") as answers:
        asyncio.run(serve(arguments, answers))
