# SPDX-License-Identifier: Apache-2.0
"""LoRACache without vLLM: put bytes into the cache, find them again. Run it as it is:

    python examples/client_ten_lines.py             starts a daemon of its own
    python examples/client_ten_lines.py /my.sock    uses one started by `loracache serve --socket /my.sock`

The ten lines are those of `main`; what follows only starts a daemon.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from loracache import CacheClient, Namespace, chunk_keys


def main(server: str) -> None:
    with CacheClient(server) as cache:
        # What makes bytes interchangeable: two models, dtypes or adapters are two namespaces, and never meet.
        namespace = cache.register(Namespace(model="my-model", kv_dtype="float16", layout="mine", chunk_tokens=4))
        # One key for each whole chunk of 4 tokens. A key stands for its chunk and all before it: a prefix.
        keys = chunk_keys(namespace, tokens=[1, 2, 3, 4, 5, 6, 7, 8, 9], chunk_tokens=4)
        # Reserve space, write straight into shared memory, and commit by leaving the block.
        with cache.reserve(namespace, keys, sizes=[1000, 1000]) as space:
            space.write(0, b"a" * 1000)
            space.write(1, b"b" * 1000)
        # Ask how much of a longer prompt is there: its first two chunks, and in which tier each is.
        print(cache.lookup([*keys, bytes(32)]))
        # Hold objects while reading them; a slot is None where its object is gone, which is a miss and no error.
        with cache.acquire(keys) as reading:
            print([slot.tobytes()[:5] if slot else None for slot in reading.slots])


@contextlib.contextmanager
def own_daemon() -> Iterator[str]:
    """A daemon for as long as the block lasts; answers its address."""
    with tempfile.TemporaryDirectory(prefix="loracache-") as folder:
        socket = Path(folder) / "daemon.sock"
        command = [sys.executable, "-m", "loracache", "serve", "--socket", str(socket), "--memory", "64MiB"]
        daemon = subprocess.Popen([*command, "--log-level", "warning"])
        try:
            while not socket.exists() and daemon.poll() is None:
                time.sleep(0.01)
            yield f"unix://{socket}"
        finally:
            daemon.terminate()
            daemon.wait()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(f"unix://{Path(sys.argv[1]).absolute()}")
    else:
        with own_daemon() as address:
            main(address)
