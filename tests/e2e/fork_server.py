# SPDX-License-Identifier: Apache-2.0
"""Imports vLLM once, and forks a host (host.py) from itself for each engine; the engine's own processes are forked too.

Importing vLLM in each of them is most of what starting an engine takes. vLLM forks by itself where there is a GPU; for
CPUs it asks for fresh processes, which openai_server.py starts. Engines are asked for on the socket that the argument
names: JSON, with descriptors of the host's input, its answers and its log; the answer is the host's process id.
"""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from typing import Any

import host  # type: ignore[import-not-found]


def import_vllm() -> None:
    """All that an engine's processes import."""
    for name in (
        "vllm.v1.engine.async_llm",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "loracache.connectors.vllm.connector",
        "loracache.connectors.vllm.plugin",
    ):
        importlib.import_module(name)


def fork_instead_of_spawning() -> None:
    real = multiprocessing.get_context

    def forking(method: str | None = None) -> Any:
        return real("fork" if method == "spawn" else method)

    multiprocessing.get_context = forking


def become(request: dict[str, Any], descriptors: list[int]) -> int:
    """A host's environment and streams; answers the descriptor of its answers."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    commands, answers, log = descriptors
    for descriptor, streams in ((commands, (0,)), (log, (1, 2))):
        for stream in streams:
            os.dup2(descriptor, stream)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    return answers


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    import_vllm()
    fork_instead_of_spawning()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # hosts that end are no zombies
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1 << 18, 3)
        if not message:
            return
        if os.fork() == 0:
            request = json.loads(message)
            answers = become(request, descriptors)
            channel.send(str(os.getpid()).encode())
            channel.close()
            host.run(request["arguments"], answers)
            return
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    main()
